//! Paged prefill attention against its twin.

use half::{bf16, f16};

use crate::kernels_support::{Buffer, Expected, Library, Number, Random, Shape, shape};
use crate::{Cache, DIMS, args, cumulative, ints, twin};

/// `chunks`: of each sequence, tokens before the new rows, and new rows.
fn check<T: Number>(shape: Shape, chunks: &[(usize, usize)], seed: u64) {
    let Shape { heads, kv_heads, dim } = shape;
    let case = format!("{shape:?}, tokens before and rows {chunks:?}");
    let random = &mut Random::new(seed);
    let (before, lengths): (Vec<_>, Vec<_>) = chunks.iter().copied().unzip();
    let all: Vec<_> = chunks.iter().map(|(before, rows)| before + rows).collect();
    let rows: usize = lengths.iter().sum();
    let cache = Cache::<T>::new(random, shape, &all);
    let (k, v, tables) = cache.buffers(random);
    let q = Buffer::of(&random.numbers::<T>(rows * heads * dim), random.side());
    let cu_seqlens = Buffer::of(&cumulative(&lengths), random.side());
    let before = Buffer::of(&ints(&before), random.side());
    let slots =
        seed.is_multiple_of(2).then(|| Buffer::of(&random.order(rows + 3)[..rows], random.side()));
    let elements = (rows + 3) * heads;
    let out = Buffer::<f32>::poisoned(elements * dim, random.side());
    let lse = Buffer::<f32>::poisoned(elements, random.side());
    let longest = lengths.iter().max().unwrap();
    Library::of("kernels/attention_prefill.cu").launch(
        &format!("attention_prefill_{}_d{dim}", T::NAME),
        [(longest * heads / kv_heads).div_ceil(64), kv_heads, chunks.len()],
        random.seed(),
        args![
            &q,
            &k,
            &v,
            &tables,
            &cu_seqlens,
            &before,
            slots.as_ref(),
            &out,
            &lse,
            heads as i32,
            kv_heads as i32,
            cache.table_stride as i32,
            0.3f32,
        ],
    );
    let want = Expected::new(elements, dim);
    twin().call(
        &format!("reference_attention_prefill_{}", T::NAME),
        args![
            &q,
            &k,
            &v,
            &tables,
            &cu_seqlens,
            &before,
            slots.as_ref(),
            &want.out,
            &want.noise,
            &want.lse,
            chunks.len() as i32,
            heads as i32,
            kv_heads as i32,
            cache.table_stride as i32,
            dim as i32,
            0.3f32,
        ],
    );
    want.check::<T, f32>(&out, &lse, &case);
}

#[test]
fn prefill_attention_of_every_head_dimension() {
    for (seed, dim) in (0..).zip(DIMS) {
        for (heads, kv_heads) in [(2, 2), (8, 2), (8, 1)] {
            check::<bf16>(shape(heads, kv_heads, dim), &[(0, 1), (37, 20)], seed);
        }
    }
    check::<f16>(shape(4, 2, 64), &[(17, 30), (0, 5)], 9);
}

#[test]
fn prefill_attention_at_the_edges_of_blocks_and_tiles() {
    let counts = [0, 1, 15, 16, 17, 63, 64, 65];
    for (seed, before) in (100..).zip(counts) {
        let chunks: Vec<_> = counts.iter().map(|rows| (before, *rows)).collect();
        check::<bf16>(shape(1, 1, 16), &chunks, seed);
        check::<bf16>(shape(6, 2, 16), &chunks[..6], seed + 50);
    }
    check::<bf16>(shape(4, 1, 64), &[(2047, 3)], 200);
}
