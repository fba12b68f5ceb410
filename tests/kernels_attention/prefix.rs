//! Prefix attention against its twin.

use half::{bf16, f16};

use crate::args;
use crate::kernels_support::{Buffer, Expected, Library, Number, Random, Shape, shape};
use crate::{DIMS, twin};

struct Prefix {
    shape: Shape,
    rows: usize,
    tokens: usize,
    part_tokens: usize,
    bias: bool,
    /// The first keys have a bias of minus infinity.
    hidden: usize,
    /// Rows of the queries and slots are scattered.
    scattered: bool,
}

impl Prefix {
    fn check<T: Number>(&self, seed: u64) {
        let Self { shape: Shape { heads, kv_heads, dim }, rows, tokens, part_tokens, .. } = *self;
        let case = format!(
            "{heads}/{kv_heads} heads of {dim}, {rows} rows, {tokens} keys in parts of {part_tokens}, \
             bias {}, scattered {}",
            self.bias, self.scattered
        );
        let random = &mut Random::new(seed);
        let parts = tokens.div_ceil(part_tokens).max(1);
        // KV heads lie further apart than they must, and more rows and slots exist than are used.
        let (all_rows, head_stride) = (rows + 2, (tokens + 3) * dim);
        let slots = all_rows * parts;
        let q = random.numbers::<T>(all_rows * heads * dim);
        let mut k = random.numbers::<T>(kv_heads * head_stride);
        let mut v = random.numbers::<T>(kv_heads * head_stride);
        for head in 0..kv_heads {
            let behind = head * head_stride + tokens * dim..(head + 1) * head_stride;
            k[behind.clone()].fill(T::of(f32::NAN));
            v[behind].fill(T::of(f32::NAN));
        }
        // The last head ends where its last key does.
        let end = k.len() - 3 * dim;
        let mut bias = self.bias.then(|| random.numbers::<f32>(kv_heads * tokens));
        if let Some(bias) = &mut bias {
            for head in bias.chunks_exact_mut(tokens.max(1)) {
                head[..self.hidden].fill(f32::NEG_INFINITY);
            }
        }
        let row_ids: Vec<i32> = random.order(all_rows)[..rows].to_vec();
        let slot_ids: Vec<i32> =
            random.order(all_rows)[..rows].iter().map(|slot| slot * parts as i32).collect();
        let side = random.side();
        let (q, k, v) =
            (Buffer::of(&q, side), Buffer::of(&k[..end], side), Buffer::of(&v[..end], side));
        let bias = bias.map(|bias| Buffer::of(&bias, random.side()));
        let row_ids = self.scattered.then(|| Buffer::of(&row_ids, random.side()));
        let slot_ids = self.scattered.then(|| Buffer::of(&slot_ids, random.side()));
        let (out, lse) = (
            Buffer::<f32>::poisoned(slots * heads * dim, random.side()),
            Buffer::<f32>::poisoned(slots * heads, random.side()),
        );
        Library::of("kernels/attention_prefix.cu").launch(
            &format!("attention_prefix_{}_d{dim}", T::NAME),
            [parts, (rows * heads / kv_heads).div_ceil(64), kv_heads],
            random.seed(),
            args![
                &q,
                &k,
                &v,
                bias.as_ref(),
                row_ids.as_ref(),
                slot_ids.as_ref(),
                &out,
                &lse,
                rows as i32,
                heads as i32,
                kv_heads as i32,
                tokens as i32,
                head_stride as i64,
                part_tokens as i32,
                0.3f32,
            ],
        );
        let want = Expected::new(slots * heads, dim);
        twin().call(
            &format!("reference_attention_prefix_{}", T::NAME),
            args![
                &q,
                &k,
                &v,
                bias.as_ref(),
                row_ids.as_ref(),
                slot_ids.as_ref(),
                &want.out,
                &want.noise,
                &want.lse,
                rows as i32,
                heads as i32,
                kv_heads as i32,
                tokens as i32,
                head_stride as i64,
                part_tokens as i32,
                parts as i32,
                dim as i32,
                0.3f32,
            ],
        );
        want.check::<T, f32>(&out, &lse, &case);
    }
}

#[test]
fn prefix_attention_of_every_head_dimension() {
    for (seed, dim) in DIMS.into_iter().enumerate() {
        for (heads, kv_heads) in [(2, 2), (8, 2), (8, 1)] {
            let case = |rows, tokens, part_tokens, bias| Prefix {
                shape: shape(heads, kv_heads, dim),
                rows,
                tokens,
                part_tokens,
                bias,
                hidden: 0,
                scattered: bias,
            };
            case(1, 1, 1, false).check::<bf16>(seed as u64);
            case(9, 81, 64, true).check::<bf16>(seed as u64);
        }
    }
    let shape = shape(4, 2, 64);
    let (rows, tokens, part_tokens) = (3, 70, 32);
    Prefix { shape, rows, tokens, part_tokens, bias: true, hidden: 0, scattered: true }
        .check::<f16>(9);
}

/// Lengths around the 16 keys of a product and the 64 of a tile; rows around the 64 of a block.
#[test]
fn prefix_attention_at_the_edges_of_tiles() {
    let mut seed = 100;
    for tokens in [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129] {
        for (rows, heads, kv_heads) in [(1, 1, 1), (16, 4, 1), (17, 4, 1), (5, 20, 1), (130, 2, 2)]
        {
            seed += 1;
            let (bias, scattered) = (seed % 2 == 0, seed % 3 == 0);
            let part_tokens = [tokens, 16, 64][seed as usize % 3];
            let shape = shape(heads, kv_heads, 16);
            Prefix { shape, rows, tokens, part_tokens, bias, hidden: 0, scattered }
                .check::<bf16>(seed);
        }
    }
}

#[test]
fn prefix_attention_over_no_keys_and_over_2047() {
    for (tokens, part_tokens) in [(0, 64), (2047, 2047), (2047, 512)] {
        let shape = shape(4, 1, 64);
        Prefix { shape, rows: 3, tokens, part_tokens, bias: true, hidden: 0, scattered: true }
            .check::<bf16>(7);
    }
}

/// Whole tiles, whole parts and whole cartridges without a visible key.
#[test]
fn prefix_attention_does_not_see_keys_with_a_bias_of_minus_infinity() {
    for (seed, (tokens, hidden, part_tokens)) in
        (300..).zip([(80, 1, 80), (130, 64, 130), (200, 150, 70), (70, 70, 64)])
    {
        let shape = shape(4, 2, 32);
        Prefix { shape, rows: 3, tokens, part_tokens, bias: true, hidden, scattered: false }
            .check::<bf16>(seed);
    }
}
