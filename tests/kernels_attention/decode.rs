//! Paged decode attention against its twin.

use half::{bf16, f16};

use crate::args;
use crate::kernels_support::{Buffer, Expected, Library, Number, Random, Shape, shape};
use crate::{Cache, DIMS, ints, twin};

fn check<T: Number>(shape: Shape, lengths: &[usize], part_tokens: usize, seed: u64) {
    let Shape { heads, kv_heads, dim } = shape;
    let case = format!("{shape:?}, {lengths:?} keys in parts of {part_tokens}");
    let random = &mut Random::new(seed);
    let scattered = seed.is_multiple_of(2);
    let parts = lengths.iter().max().unwrap().div_ceil(part_tokens).max(1);
    let (sequences, all_rows) = (lengths.len(), lengths.len() + 2);
    let slots = all_rows * parts;
    let cache = Cache::<T>::new(random, shape, lengths);
    let (k, v, tables) = cache.buffers(random);
    let q = Buffer::of(&random.numbers::<T>(all_rows * heads * dim), random.side());
    let lengths = Buffer::of(&ints(lengths), random.side());
    let row_ids: Vec<i32> = random.order(all_rows)[..sequences].to_vec();
    let slot_ids: Vec<i32> =
        random.order(all_rows)[..sequences].iter().map(|slot| slot * parts as i32).collect();
    let row_ids = scattered.then(|| Buffer::of(&row_ids, random.side()));
    let slot_ids = scattered.then(|| Buffer::of(&slot_ids, random.side()));
    let out = Buffer::<f32>::poisoned(slots * heads * dim, random.side());
    let lse = Buffer::<f32>::poisoned(slots * heads, random.side());
    let head_tiles = (heads / kv_heads).div_ceil(16);
    Library::of("kernels/attention_decode.cu").launch(
        &format!("attention_decode_{}_d{dim}", T::NAME),
        [parts, sequences, kv_heads * head_tiles],
        random.seed(),
        args![
            &q,
            &k,
            &v,
            &tables,
            &lengths,
            row_ids.as_ref(),
            slot_ids.as_ref(),
            &out,
            &lse,
            heads as i32,
            kv_heads as i32,
            cache.table_stride as i32,
            part_tokens as i32,
            0.3f32,
        ],
    );
    let want = Expected::new(slots * heads, dim);
    twin().call(
        &format!("reference_attention_decode_{}", T::NAME),
        args![
            &q,
            &k,
            &v,
            &tables,
            &lengths,
            row_ids.as_ref(),
            slot_ids.as_ref(),
            &want.out,
            &want.noise,
            &want.lse,
            sequences as i32,
            heads as i32,
            kv_heads as i32,
            cache.table_stride as i32,
            part_tokens as i32,
            parts as i32,
            dim as i32,
            0.3f32,
        ],
    );
    want.check::<T, f32>(&out, &lse, &case);
}

#[test]
fn decode_attention_of_every_head_dimension() {
    for (seed, dim) in (0..).zip(DIMS) {
        for (heads, kv_heads) in [(2, 2), (8, 2), (8, 1)] {
            check::<bf16>(shape(heads, kv_heads, dim), &[1, 83], 256, seed);
            check::<bf16>(shape(heads, kv_heads, dim), &[150], 64, seed + 1);
        }
    }
    check::<f16>(shape(4, 2, 64), &[70, 3], 32, 9);
}

/// Lengths around blocks and around the four warps; more query heads than a product has rows; no key at all.
#[test]
fn decode_attention_at_the_edges_of_blocks_and_warps() {
    let lengths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81, 127, 128, 129, 0];
    for (seed, (heads, kv_heads)) in (20..).zip([(1, 1), (20, 1), (16, 1), (34, 2)]) {
        for part_tokens in [16, 48, 64, 1024] {
            check::<bf16>(shape(heads, kv_heads, 16), &lengths, part_tokens, seed);
        }
    }
}

#[test]
fn decode_attention_over_2047_keys() {
    for (seed, part_tokens) in (40..).zip([2048, 512, 256]) {
        check::<bf16>(shape(4, 1, 64), &[2047, 2048, 5], part_tokens, seed);
    }
}
