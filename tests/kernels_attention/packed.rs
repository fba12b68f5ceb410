//! Packed attention against its twin, and against the CPU backend's.

use candle_core::{Device, Result, Tensor};
use cartouche::ops::attention::{Heads, PackedAttention, PackedKv};
use half::{bf16, f16};

use crate::kernels_support::{Buffer, Expected, Library, Number, Random, Shape, check_one, shape};
use crate::{DIMS, args, cumulative, twin};

struct Packed<T> {
    shape: Shape,
    prefix: usize,
    lengths: Vec<usize>,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    prefix_k: Vec<T>,
    prefix_v: Vec<T>,
}

const SCALE: f32 = 0.3;

impl<T: Number> Packed<T> {
    fn new(shape: Shape, prefix: usize, lengths: &[usize], random: &mut Random) -> Self {
        let Shape { heads, kv_heads, dim } = shape;
        let tokens: usize = lengths.iter().sum();
        let (own, of_prefix) = (tokens * kv_heads * dim, prefix * kv_heads * dim);
        Self {
            shape,
            prefix,
            lengths: lengths.to_vec(),
            q: random.numbers(tokens * heads * dim),
            k: random.numbers(own),
            v: random.numbers(own),
            prefix_k: random.numbers(of_prefix),
            prefix_v: random.numbers(of_prefix),
        }
    }

    /// The kernel's result and log-sum-exps, once they agree with the twin's.
    fn run(&self, random: &mut Random) -> (Vec<T>, Vec<f32>) {
        let Shape { heads, kv_heads, dim } = self.shape;
        let case = format!("{:?}, prefix {}, {:?}", self.shape, self.prefix, self.lengths);
        let tokens: usize = self.lengths.iter().sum();
        let mut buffer = |values: &[T]| Buffer::of(values, random.side());
        let (q, k, v) = (buffer(&self.q), buffer(&self.k), buffer(&self.v));
        let (prefix_k, prefix_v) = (buffer(&self.prefix_k), buffer(&self.prefix_v));
        let cu_seqlens = Buffer::of(&cumulative(&self.lengths), random.side());
        let out = Buffer::<T>::poisoned(tokens * heads * dim, random.side());
        let lse = Buffer::<f32>::poisoned(tokens * heads, random.side());
        let longest = self.lengths.iter().max().unwrap();
        let (stride, sequences) = ((self.prefix * dim) as i64, self.lengths.len());
        Library::of("kernels/attention_packed.cu").launch(
            &format!("attention_packed_{}_d{dim}", T::NAME),
            [(longest * heads / kv_heads).div_ceil(64), kv_heads, sequences],
            random.seed(),
            args![
                &q,
                &k,
                &v,
                &prefix_k,
                &prefix_v,
                &cu_seqlens,
                &out,
                &lse,
                heads as i32,
                kv_heads as i32,
                self.prefix as i32,
                stride,
                SCALE,
            ],
        );
        let want = Expected::new(tokens * heads, dim);
        twin().call(
            &format!("reference_attention_packed_{}", T::NAME),
            args![
                &q,
                &k,
                &v,
                &prefix_k,
                &prefix_v,
                &cu_seqlens,
                &want.out,
                &want.noise,
                &want.lse,
                sequences as i32,
                heads as i32,
                kv_heads as i32,
                self.prefix as i32,
                stride,
                dim as i32,
                SCALE,
            ],
        );
        want.check::<T, T>(&out, &lse, &case);
        (out.read(), lse.read())
    }

    /// What the CPU backend computes of the same numbers.
    fn on_the_cpu(&self) -> Result<Vec<f32>> {
        let Shape { heads, kv_heads, dim } = self.shape;
        let tokens: usize = self.lengths.iter().sum();
        let tensor = |values: &[T], shape: (usize, usize, usize)| {
            let wide: Vec<f32> = values.iter().map(|x| x.to_f32()).collect();
            Tensor::from_vec(wide, shape, &Device::Cpu)
        };
        let cu_seqlens: Vec<u32> = cumulative(&self.lengths).iter().map(|at| *at as u32).collect();
        let (q, k) =
            (tensor(&self.q, (tokens, heads, dim))?, tensor(&self.k, (tokens, kv_heads, dim))?);
        let v = tensor(&self.v, (tokens, kv_heads, dim))?;
        let keys = tensor(&self.prefix_k, (kv_heads, self.prefix, dim))?;
        let values = tensor(&self.prefix_v, (kv_heads, self.prefix, dim))?;
        let all: Vec<u32> = (0..tokens as u32).collect();
        let heads = Heads { heads, kv_heads, head_dim: dim };
        let attention = PackedAttention::new(&cu_seqlens, &all, heads, SCALE, &Device::Cpu)?;
        let kv = PackedKv { k: &k, v: &v, prefix: Some((&keys, &values)) };
        attention.forward(&q, kv)?.0.flatten_all()?.to_vec1()
    }
}

fn check<T: Number>(shape: Shape, prefix: usize, lengths: &[usize], seed: u64) {
    let random = &mut Random::new(seed);
    Packed::<T>::new(shape, prefix, lengths, random).run(random);
}

#[test]
fn packed_attention_of_every_head_dimension() {
    for (seed, dim) in (0..).zip(DIMS) {
        for (heads, kv_heads) in [(2, 2), (8, 2), (8, 1)] {
            check::<bf16>(shape(heads, kv_heads, dim), 35, &[1, 21], seed);
        }
        check::<bf16>(shape(1, 1, dim), 0, &[70], seed);
    }
    check::<f16>(shape(4, 2, 64), 17, &[30, 5], 9);
}

/// Lengths around products and tiles, for the rows and for the keys; sequences without a token between others.
#[test]
fn packed_attention_at_the_edges_of_tiles() {
    let prefixes = [0, 1, 15, 16, 17, 63, 64, 65];
    let batches: [&[usize]; 4] = [&[1], &[15, 16, 0, 17], &[63, 64, 65, 1], &[127, 0, 0, 130]];
    let mut seed = 100;
    for prefix in prefixes {
        for lengths in batches {
            seed += 1;
            let (heads, kv_heads) = [(1, 1), (4, 2), (3, 1)][seed as usize % 3];
            check::<bf16>(shape(heads, kv_heads, 16), prefix, lengths, seed);
        }
    }
}

#[test]
fn packed_attention_of_2047_keys() {
    check::<bf16>(shape(1, 1, 16), 2047, &[33, 1], 7);
    check::<bf16>(shape(1, 1, 64), 5, &[2047], 8);
}

#[test]
fn packed_attention_agrees_with_the_cpu_backend() -> Result<()> {
    for (seed, (heads, kv_heads, dim)) in (50..).zip([(4, 2, 64), (8, 1, 32), (2, 2, 128)]) {
        let random = &mut Random::new(seed);
        let lengths = [40, 1, 0, 77];
        let packed = Packed::<bf16>::new(shape(heads, kv_heads, dim), 81, &lengths, random);
        let (out, _) = packed.run(random);
        for (i, (got, want)) in out.iter().zip(packed.on_the_cpu()?).enumerate() {
            // Against f64 the kernel is held tighter; this is about meaning the same thing.
            let most = 4e-3 + 4e-3 * f64::from(want.abs());
            check_one(f64::from(got.to_f32()), f64::from(want), most, || format!("out[{i}]"));
        }
    }
    Ok(())
}
