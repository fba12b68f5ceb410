//! The backward of packed attention, run on the CPU, against its naive twin and the crate's own gradient.

mod kernels_support;

use candle_core::{Device, Tensor};
use cartouche::ops::attention::{Heads, PackedAttention, PackedKv};
use half::{bf16, f16};
use kernels_support::{Buffer, Library, Number, Random, Shape, Side, check_one, shape};

const SCALE: f32 = 0.3;

struct Case {
    shape: Shape,
    prefix: usize,
    /// Of the sequences.
    lengths: Vec<usize>,
    /// Rows of a part of the prefix's gradient.
    part_rows: usize,
}

/// What kernels read: buffers of q, k, v, prefix keys and values, the output's gradient, and the forward's result.
struct Inputs<T> {
    tensors: [Buffer<T>; 5],
    d_out: Buffer<T>,
    cu_seqlens: Buffer<i32>,
    out: Buffer<T>,
    lse: Buffer<f32>,
    /// Elements from one KV head of the prefix to the next: more than there must be.
    prefix_stride: usize,
}

/// Of q, k, v, and of prefix keys and values; each contiguous.
#[derive(PartialEq)]
struct Gradients<T> {
    own: [Vec<T>; 3],
    prefix: [Vec<f32>; 2],
}

/// The twin's gradients of q, k, v, prefix keys and values, and the size of their terms.
struct Twin {
    gradients: [Vec<f64>; 5],
    noise: [Vec<f64>; 5],
}

impl Case {
    fn new(
        heads: (usize, usize, usize),
        prefix: usize,
        lengths: &[usize],
        part_rows: usize,
    ) -> Self {
        let (heads, kv_heads, dim) = heads;
        Self { shape: shape(heads, kv_heads, dim), prefix, lengths: lengths.to_vec(), part_rows }
    }

    fn name(&self) -> String {
        format!(
            "{:?}, prefix {}, lengths {:?}, {} rows in a part",
            self.shape, self.prefix, self.lengths, self.part_rows
        )
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn shared_by(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn cu_seqlens(&self) -> Vec<i32> {
        let mut ends = vec![0];
        for length in &self.lengths {
            ends.push(ends.last().unwrap() + *length as i32);
        }
        ends
    }

    fn inputs<T: Number>(&self, random: &mut Random) -> Inputs<T> {
        let Shape { heads, kv_heads, dim } = self.shape;
        let (q_len, kv_len) = (self.tokens() * heads * dim, self.tokens() * kv_heads * dim);
        let prefix_stride = (self.prefix + 3) * dim;
        let mut tensor = |len| Buffer::of(&random.numbers::<T>(len), random.side());
        let (q, k, v, d_out) = (tensor(q_len), tensor(kv_len), tensor(kv_len), tensor(q_len));
        let mut prefix = || {
            let mut numbers = random.numbers::<T>(kv_heads * prefix_stride);
            for head in numbers.chunks_exact_mut(prefix_stride) {
                head[self.prefix * dim..].fill(T::of(f32::NAN));
            }
            // The last head ends where its last key does.
            Buffer::of(&numbers[..numbers.len() - 3 * dim], random.side())
        };
        Inputs {
            tensors: [q, k, v, prefix(), prefix()],
            d_out,
            cu_seqlens: Buffer::of(&self.cu_seqlens(), random.side()),
            out: Buffer::poisoned(q_len, random.side()),
            lse: Buffer::poisoned(self.tokens() * heads, random.side()),
            prefix_stride,
        }
    }

    /// Of q, k, v, prefix keys and values.
    fn shapes(&self) -> [(usize, usize, usize); 5] {
        let Shape { heads, kv_heads, dim } = self.shape;
        let (own, prefix) = ((self.tokens(), kv_heads, dim), (kv_heads, self.prefix, dim));
        [(self.tokens(), heads, dim), own, own, prefix, prefix]
    }

    /// Fills in the forward's result.
    fn twin<T: Number>(&self, inputs: &Inputs<T>) -> Twin {
        let Shape { heads, kv_heads, dim } = self.shape;
        let lengths = self.shapes().map(|(a, b, c)| a * b * c);
        let all: usize = lengths.iter().sum();
        let gradients = Buffer::<f64>::poisoned(all, Side::Back);
        let noise = Buffer::<f64>::poisoned(all, Side::Back);
        let [q, k, v, prefix_k, prefix_v] = &inputs.tensors;
        Library::of("kernels/reference/attention_backward.cpp").call(
            &format!("reference_attention_backward_{}", T::NAME),
            args![
                q,
                k,
                v,
                prefix_k,
                prefix_v,
                &inputs.cu_seqlens,
                &inputs.d_out,
                &inputs.out,
                &inputs.lse,
                &gradients,
                &noise,
                self.lengths.len() as i32,
                heads as i32,
                kv_heads as i32,
                self.prefix as i32,
                inputs.prefix_stride as i64,
                dim as i32,
                SCALE,
            ],
        );
        let split = |numbers: Vec<f64>| {
            let mut rest = &numbers[..];
            lengths.map(|len| rest.split_off(..len).unwrap().to_vec())
        };
        Twin { gradients: split(gradients.read()), noise: split(noise.read()) }
    }

    /// The forward's result, from its kernel.
    fn forward<T: Number>(&self, inputs: &Inputs<T>, order: u64) {
        let Shape { heads, kv_heads, dim } = self.shape;
        let longest = self.lengths.iter().max().unwrap();
        let [q, k, v, prefix_k, prefix_v] = &inputs.tensors;
        Library::of("kernels/attention_packed.cu").launch(
            &format!("attention_packed_{}_d{dim}", T::NAME),
            [(longest * self.shared_by()).div_ceil(64), kv_heads, self.lengths.len()],
            order,
            args![
                q,
                k,
                v,
                prefix_k,
                prefix_v,
                &inputs.cu_seqlens,
                &inputs.out,
                &inputs.lse,
                heads as i32,
                kv_heads as i32,
                self.prefix as i32,
                inputs.prefix_stride as i64,
                SCALE,
            ],
        );
    }

    /// `order` is that of blocks and threads.
    fn run<T: Number>(&self, inputs: &Inputs<T>, order: u64) -> Gradients<T> {
        let Shape { heads, kv_heads, dim } = self.shape;
        let Inputs { tensors: [q, k, v, prefix_k, prefix_v], d_out, cu_seqlens, out, lse, .. } =
            inputs;
        let random = &mut Random::new(order);
        let (tokens, split) = (self.tokens(), if dim > 128 { 2 } else { 1 });
        let longest = *self.lengths.iter().max().unwrap();
        let (sequences, name) = (self.lengths.len(), T::NAME);
        let mut like =
            |tensor: &Buffer<T>| Buffer::<T>::poisoned(tensor.read().len(), random.side());
        let (dq, dk, dv) = (like(q), like(k), like(v));
        let rows = tokens * heads;
        let delta = Buffer::<f32>::poisoned(rows, random.side());
        Library::of("kernels/attention_backward_sums.cu").launch(
            &format!("attention_backward_delta_{name}"),
            [rows.div_ceil(64), 1, 1],
            order,
            args![out, d_out, &delta, rows as i64, dim as i32],
        );
        let (heads_arg, kv_heads_arg, prefix) = (heads as i32, kv_heads as i32, self.prefix as i32);
        let prefix_stride = inputs.prefix_stride as i64;
        Library::of("kernels/attention_backward_queries.cu").launch(
            &format!("attention_backward_queries_{name}_d{dim}"),
            [(longest * self.shared_by()).div_ceil(64), kv_heads, sequences],
            order,
            args![
                q,
                k,
                v,
                prefix_k,
                prefix_v,
                cu_seqlens,
                d_out,
                lse,
                &delta,
                &dq,
                heads_arg,
                kv_heads_arg,
                prefix,
                prefix_stride,
                SCALE,
            ],
        );
        let keys = Library::of("kernels/attention_backward_keys.cu");
        keys.launch(
            &format!("attention_backward_own_{name}_d{dim}"),
            [longest.div_ceil(64) * split, kv_heads, sequences],
            order,
            args![
                q,
                k,
                v,
                cu_seqlens,
                d_out,
                lse,
                &delta,
                &dk,
                &dv,
                heads_arg,
                kv_heads_arg,
                SCALE,
            ],
        );
        let own = [dq.read(), dk.read(), dv.read()];
        let count = kv_heads * self.prefix * dim;
        if self.prefix == 0 {
            return Gradients { own, prefix: [vec![], vec![]] };
        }
        let parts = (tokens * self.shared_by()).div_ceil(self.part_rows);
        let mut buffer = |len| Buffer::<f32>::poisoned(len, random.side());
        let (dk_parts, dv_parts) = (buffer(parts * count), buffer(parts * count));
        keys.launch(
            &format!("attention_backward_prefix_{name}_d{dim}"),
            [self.prefix.div_ceil(64) * split, kv_heads, parts],
            order,
            args![
                q,
                prefix_k,
                prefix_v,
                d_out,
                lse,
                &delta,
                &dk_parts,
                &dv_parts,
                tokens as i32,
                heads_arg,
                kv_heads_arg,
                prefix,
                prefix_stride,
                self.part_rows as i32,
                SCALE,
            ],
        );
        let (dk, dv) = (buffer(count), buffer(count));
        Library::of("kernels/attention_backward_sums.cu").launch(
            "attention_backward_sum",
            [count.div_ceil(1024), 2, 1],
            order,
            args![&dk_parts, &dv_parts, &dk, &dv, parts as i32, count as i64],
        );
        Gradients { own, prefix: [dk.read(), dv.read()] }
    }

    fn check<T: Number>(&self, seed: u64) {
        let random = &mut Random::new(seed);
        let inputs = self.inputs::<T>(random);
        let twin = self.twin(&inputs);
        let Gradients { own, prefix } = self.run(&inputs, random.seed());
        for (i, name) in NAMES.into_iter().enumerate() {
            let (wanted, noise) = (&twin.gradients[i], &twin.noise[i]);
            // Weights and slopes are rounded to T, and gradients to what they are stored as.
            let (got, rounding) = match i {
                0..3 => (wide(&own[i]), T::EPSILON),
                _ => (prefix[i - 3].clone(), f32::EPSILON.into()),
            };
            assert_eq!(got.len(), wanted.len());
            for (at, (got, (want, noise))) in got.iter().zip(wanted.iter().zip(noise)).enumerate() {
                let most = 4.0 * T::EPSILON * noise + 2.0 * rounding * want.abs() + 2e-6;
                check_one(f64::from(*got), *want, most, || {
                    format!("{}: {name}[{at}]", self.name())
                });
            }
        }
    }
}

const NAMES: [&str; 5] = ["dq", "dk", "dv", "prefix dk", "prefix dv"];

fn wide<T: Number>(numbers: &[T]) -> Vec<f32> {
    numbers.iter().map(|x| x.to_f32()).collect()
}

#[test]
fn gradients_of_every_head_dimension() {
    for (seed, dim) in [16, 32, 64, 96, 128, 256].into_iter().enumerate() {
        for (heads, kv_heads) in [(2, 2), (4, 1), (8, 1)] {
            let part_rows = if kv_heads == 2 { 64 } else { 1000 };
            Case::new((heads, kv_heads, dim), 70, &[3, 18], part_rows).check::<bf16>(seed as u64);
        }
        Case::new((1, 1, dim), 1, &[1], 1).check::<bf16>(seed as u64);
    }
    Case::new((4, 2, 64), 17, &[70, 3], 64).check::<f16>(9);
}

/// Lengths around the 16 rows of a product and the 64 (or 32) of a tile.
#[test]
fn gradients_at_the_edges_of_tiles() {
    let mut seed = 100;
    for prefix in [0, 1, 15, 16, 17, 63, 64, 65, 129] {
        for (heads, kv_heads, lengths) in [
            (1, 1, &[1][..]),
            (2, 2, &[1, 63, 64, 65]),
            (4, 1, &[15, 16, 17]),
            (6, 2, &[129, 1, 0, 22]),
            (8, 1, &[1; 20]),
        ] {
            seed += 1;
            let part_rows = [1000, 37, 64][seed as usize % 3];
            Case::new((heads, kv_heads, 16), prefix, lengths, part_rows).check::<bf16>(seed);
        }
    }
}

#[test]
fn gradients_of_a_long_prefix() {
    Case::new((4, 1, 64), 2047, &[1, 2], 4).check::<bf16>(7);
    Case::new((2, 2, 128), 2047, &[33], 32).check::<bf16>(8);
}

#[test]
fn the_bits_do_not_depend_on_the_order_of_blocks_and_threads() {
    for case in
        [Case::new((8, 2, 64), 130, &[70, 1, 65], 100), Case::new((2, 1, 256), 65, &[66], 64)]
    {
        let inputs = case.inputs::<bf16>(&mut Random::new(3));
        case.twin(&inputs);
        let first = case.run(&inputs, 0);
        for order in [1, 2, 3] {
            assert!(case.run(&inputs, order) == first, "{}: order {order}", case.name());
        }
    }
}

/// The crate computes in f32 with the same inputs. The kernels' output, weights and slopes are rounded to 16
/// bits on the way, each by at most EPSILON; over a whole tensor these average out to less than three of it.
#[test]
fn forward_and_backward_give_the_gradients_of_the_crate() -> candle_core::Result<()> {
    gradients_as_in_the_crate::<bf16>()?;
    gradients_as_in_the_crate::<f16>()
}

fn gradients_as_in_the_crate<T: Number>() -> candle_core::Result<()> {
    let case = Case::new((8, 2, 64), 75, &[66, 1, 20], 100);
    let inputs = case.inputs::<T>(&mut Random::new(5));
    case.forward(&inputs, 7);
    let got = case.run(&inputs, 6);
    let mut tensors = Vec::new();
    for (tensor, shape) in inputs.tensors.iter().zip(case.shapes()) {
        let mut numbers = tensor.read();
        if shape.1 == case.prefix {
            let heads = numbers.chunks(inputs.prefix_stride);
            numbers = heads.flat_map(|head| head[..shape.1 * shape.2].to_vec()).collect();
        }
        tensors.push(Tensor::from_vec(wide(&numbers), shape, &Device::Cpu)?);
    }
    let cu_seqlens: Vec<u32> = case.cu_seqlens().iter().map(|end| *end as u32).collect();
    let [q, k, v, keys, values] = &tensors[..] else { unreachable!() };
    let Shape { heads, kv_heads, dim } = case.shape;
    let queries: Vec<u32> = (0..q.dim(0)? as u32).collect();
    let heads = Heads { heads, kv_heads, head_dim: dim };
    let attention = PackedAttention::new(&cu_seqlens, &queries, heads, SCALE, &Device::Cpu)?;
    let kv = PackedKv { k, v, prefix: Some((keys, values)) };
    let (out, sums) = attention.forward(q, kv)?;
    let d_out = Tensor::from_vec(wide(&inputs.d_out.read()), q.shape(), &Device::Cpu)?;
    let want = attention.backward(q, kv, (&out, &sums), &d_out, true)?;
    let (keys, values) = want.prefix.unwrap();
    let want = want.own.unwrap().into_iter().chain([keys, values]);
    let got = got.own.iter().map(|own| wide(own)).chain(got.prefix);
    for ((want, got), name) in want.zip(got).zip(NAMES) {
        let want: Vec<f32> = want.flatten_all()?.to_vec1()?;
        assert_eq!(got.len(), want.len());
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = want.iter().zip(&got).map(|(want, got)| square(want - got)).sum();
        let size: f64 = want.iter().map(|want| square(*want)).sum();
        let relative = (error / size).sqrt();
        assert!(relative < 3.0 * T::EPSILON, "{name} of {}: {relative:e}", T::NAME);
    }
    Ok(())
}
