//! A step of the engine as a GPU computes it: which kernels are launched, over which blocks and with which
//! arguments, run on the emulation and held to the attention of the CPU.

#[path = "kernels_support/mod.rs"]
mod kernels_support;

use candle_core::DType;
use cartouche::gpu::{CartridgeLayer, LayerAddresses, QuerySequence, StepAttention, StepHeads};
use cartouche::ops::attention::{Heads, KvRun, SequenceQueries, segment_attention};
use half::bf16;
use kernels_support::{Buffer, Emulation, Random, Shape, shape};

const BLOCK: usize = 16;

/// Keys and values `[tokens, kv_heads, dim]` of a cartridge or of a sequence.
struct Kv {
    keys: Vec<bf16>,
    values: Vec<bf16>,
    tokens: usize,
    /// `[kv_heads, tokens]`
    bias: Option<Vec<f32>>,
}

impl Kv {
    fn new(random: &mut Random, shape: Shape, tokens: usize, bias: bool) -> Self {
        let len = tokens * shape.kv_heads * shape.dim;
        Self {
            keys: random.numbers(len),
            values: random.numbers(len),
            tokens,
            bias: bias.then(|| random.numbers(tokens * shape.kv_heads)),
        }
    }

    /// `[kv_heads, tokens, dim]`
    fn by_head(&self, values: &[bf16], shape: Shape) -> Vec<bf16> {
        let at = |h, t, d| (t * shape.kv_heads + h) * shape.dim + d;
        let heads = (0..shape.kv_heads).flat_map(|h| (0..self.tokens).map(move |t| (h, t)));
        heads.flat_map(|(h, t)| (0..shape.dim).map(move |d| values[at(h, t, d)])).collect()
    }

    /// As the CPU reads it: keys `[kv_heads, dim, tokens]`, values `[kv_heads, tokens, dim]`.
    fn on_cpu(&self, shape: Shape) -> (Vec<f32>, Vec<f32>) {
        let at = |h, t, d| (t * shape.kv_heads + h) * shape.dim + d;
        let heads = (0..shape.kv_heads).flat_map(|h| (0..shape.dim).map(move |d| (h, d)));
        let keys =
            heads.flat_map(|(h, d)| (0..self.tokens).map(move |t| self.keys[at(h, t, d)].to_f32()));
        let values = self.by_head(&self.values, shape);
        (keys.collect(), values.iter().map(|v| v.to_f32()).collect())
    }

    fn run<'a>(&'a self, (keys, values): &'a (Vec<f32>, Vec<f32>), dim: usize) -> KvRun<'a> {
        KvRun {
            keys,
            key_head_stride: self.tokens * dim,
            key_stride: self.tokens,
            values,
            value_head_stride: self.tokens * dim,
            len: self.tokens,
            bias: self.bias.as_deref(),
        }
    }
}

struct Sequence {
    start: usize,
    rows: usize,
    cartridges: Vec<usize>,
}

fn sequence(start: usize, rows: usize, cartridges: &[usize]) -> Sequence {
    Sequence { start, rows, cartridges: cartridges.to_vec() }
}

/// Runs one layer of a step on the emulation and on the CPU. `cartridges` are tokens and whether there is a bias.
#[track_caller]
fn check(seed: u64, shape: Shape, cartridges: &[(usize, bool)], sequences: &[Sequence]) {
    let mut random = Random::new(seed);
    let Shape { heads, kv_heads, dim } = shape;
    let cartridges: Vec<Kv> = cartridges
        .iter()
        .map(|(tokens, bias)| Kv::new(&mut random, shape, *tokens, *bias))
        .collect();
    let own: Vec<Kv> =
        sequences.iter().map(|s| Kv::new(&mut random, shape, s.start + s.rows, false)).collect();
    let rows: usize = sequences.iter().map(|s| s.rows).sum();
    let q: Vec<bf16> = random.numbers(rows * heads * dim);

    // Blocks in random order; what no sequence owns is NaN.
    let needed = |kv: &Kv| kv.tokens.div_ceil(BLOCK);
    let count = own.iter().map(needed).sum::<usize>() + 1;
    let mut free = random.order(count).into_iter().map(|block| block as u32);
    let tables: Vec<Vec<u32>> =
        own.iter().map(|kv| free.by_ref().take(needed(kv)).collect()).collect();
    let nan = vec![bf16::NAN; count * kv_heads * BLOCK * dim];
    let (mut keys, mut values) = (nan.clone(), nan);
    for (kv, table) in own.iter().zip(&tables) {
        for (t, head) in (0..kv.tokens).flat_map(|t| (0..kv_heads).map(move |head| (t, head))) {
            let from = (t * kv_heads + head) * dim;
            let block = table[t / BLOCK] as usize;
            let to = ((block * kv_heads + head) * BLOCK + t % BLOCK) * dim;
            keys[to..to + dim].copy_from_slice(&kv.keys[from..from + dim]);
            values[to..to + dim].copy_from_slice(&kv.values[from..from + dim]);
        }
    }
    let (keys, values) = (Buffer::of(&keys, random.side()), Buffer::of(&values, random.side()));
    let machine = Emulation { seed };

    let named: Vec<Vec<(usize, usize)>> = sequences
        .iter()
        .map(|s| s.cartridges.iter().map(|c| (*c, cartridges[*c].tokens)).collect())
        .collect();
    let queries: Vec<QuerySequence<'_>> = sequences
        .iter()
        .zip(&tables)
        .zip(&named)
        .map(|((s, blocks), cartridges)| QuerySequence {
            blocks,
            start: s.start,
            rows: s.rows,
            cartridges,
        })
        .collect();
    let step = StepAttention::new(StepHeads { heads, kv_heads, head_dim: dim }, &queries);
    let mut buffer = |values: &[bf16]| Buffer::of(values, random.side());
    let laid_out: Vec<_> = cartridges
        .iter()
        .map(|kv| (buffer(&kv.by_head(&kv.keys, shape)), buffer(&kv.by_head(&kv.values, shape))))
        .collect();
    let q_buffer = buffer(&q);
    let biases: Vec<_> = cartridges
        .iter()
        .map(|kv| kv.bias.as_ref().map(|bias| Buffer::of(bias, random.side())))
        .collect();
    let layers: Vec<CartridgeLayer> = laid_out
        .iter()
        .zip(&biases)
        .map(|((keys, values), bias)| CartridgeLayer {
            keys: keys.address() as u64,
            values: values.address() as u64,
            bias: bias.as_ref().map_or(0, |bias| bias.address() as u64),
        })
        .collect();
    let indices = Buffer::of(step.indices(), random.side());
    let parts = Buffer::<f32>::poisoned(step.slots() * heads * dim, random.side());
    let lse = Buffer::<f32>::poisoned(step.slots() * heads, random.side());
    let out = Buffer::<bf16>::poisoned(rows * heads * dim, random.side());
    let at = LayerAddresses {
        indices: indices.address() as u64,
        q: q_buffer.address() as u64,
        keys: keys.address() as u64,
        values: values.address() as u64,
        cartridges: &layers,
        parts: parts.address() as u64,
        lse: lse.address() as u64,
        out: out.address() as u64,
    };
    let scale = 1.0 / (dim as f32).sqrt();
    // SAFETY: the buffers above have the shapes that `LayerAddresses` names.
    unsafe { step.launch(&machine, DType::BF16, &at, scale).unwrap() };
    let got = out.read();

    let shared: Vec<(Vec<f32>, Vec<f32>)> = cartridges.iter().map(|kv| kv.on_cpu(shape)).collect();
    let of_own: Vec<(Vec<f32>, Vec<f32>)> = own.iter().map(|kv| kv.on_cpu(shape)).collect();
    let mut first_row = 0;
    let mut cpu = Vec::new();
    for ((s, kv), on_cpu) in sequences.iter().zip(&own).zip(&of_own) {
        cpu.push(SequenceQueries {
            first_row,
            rows: s.rows,
            shared: s.cartridges.iter().map(|c| cartridges[*c].run(&shared[*c], dim)).collect(),
            own: vec![kv.run(on_cpu, dim)],
            own_before: s.start,
        });
        first_row += s.rows;
    }
    let q: Vec<f32> = q.iter().map(|x| x.to_f32()).collect();
    let want = segment_attention(&q, Heads { heads, kv_heads, head_dim: dim }, scale, &cpu, 2);
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        // Weights and result are rounded to 8 bits of mantissa.
        let (got, most) = (got.to_f32(), 0.002 + want.abs() / 128.0);
        assert!((got - want).abs() <= most, "seed {seed}, element {i}: {got} instead of {want}");
    }
}

#[test]
fn one_token_after_nothing() {
    check(1, shape(4, 2, 64), &[], &[sequence(0, 1, &[])]);
}

#[test]
fn sequences_share_cartridges_and_decode_beside_prompts() {
    let cartridges = [(17, false), (300, true), (1, false)];
    let sequences = [
        sequence(30, 1, &[1]),
        sequence(0, 1, &[1, 0]),
        sequence(16, 1, &[]),
        sequence(0, 40, &[1]),
        sequence(5, 3, &[2, 1, 0]),
        sequence(15, 1, &[1]), // after prompts: rows of decoding need not lie side by side
        sequence(1, 2, &[]),
    ];
    check(2, shape(8, 2, 64), &cartridges, &sequences);
}

#[test]
fn long_texts_are_cut_into_parts() {
    let sequences = [sequence(600, 1, &[0]), sequence(255, 1, &[0]), sequence(256, 1, &[])];
    check(3, shape(4, 4, 32), &[(513, false)], &sequences);
}

#[test]
fn a_cartridge_named_twice_counts_twice() {
    check(4, shape(2, 1, 64), &[(20, false)], &[sequence(3, 1, &[0, 0]), sequence(0, 5, &[0])]);
}

#[test]
fn many_heads_and_rows() {
    check(5, shape(64, 4, 16), &[(300, false)], &[sequence(0, 130, &[0]), sequence(9, 1, &[0])]);
}

#[test]
fn heads_of_every_size() {
    for (seed, dim) in [16, 32, 64, 96, 128, 256].into_iter().enumerate() {
        let sequences = [sequence(20, 1, &[0]), sequence(0, 18, &[0])];
        check(10 + seed as u64, shape(4, 1, dim), &[(31, true)], &sequences);
    }
}
