//! The inner loops: a few queries against a tile of keys and values.

// Index loops over arrays of registers: a closure would not be compiled for the processor's extensions.
#![allow(clippy::needless_range_loop)]

use crate::ops::simd::Lanes;

/// Keys side by side in memory and in a register.
pub const KEY_LANES: usize = 16;
/// Keys per tile. Tiles start at fixed tokens of a segment, so that their sums are the same in any batch.
pub(super) const TILE_KEYS: usize = 64;
/// Vectors of keys per tile.
pub(super) const TILE_VECTORS: usize = TILE_KEYS / KEY_LANES;
/// Queries that share what is loaded of a tile.
pub(super) const QUERIES: usize = 8;

/// Up to [`TILE_KEYS`] keys and values of one KV head, in groups of [`KEY_LANES`].
///
/// Key `t` of a group, dimension `d`: `keys[group] + d * key_stride + t`; its value starts at
/// `values[group] + t * value_stride`. Groups are readable as a whole; values are wide enough for whole
/// vectors.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub keys: [*const f32; TILE_VECTORS],
    pub key_stride: usize,
    pub values: [*const f32; TILE_VECTORS],
    pub value_stride: usize,
    pub len: usize,
    /// One per key, or null.
    pub bias: *const f32,
}

/// One query's running softmax.
#[derive(Clone, Copy)]
pub(super) struct Running {
    /// Unnormalised output, in whole vectors.
    pub out: *mut f32,
    /// Largest score so far, and the sum of the weights relative to it.
    pub max: *mut f32,
    pub sum: *mut f32,
    /// Leading keys of this tile the query may see.
    pub visible: usize,
}

/// Adds a tile to the running softmax of `N` queries. `q` is `[head_dim, N]`, scaled; outputs are `width`
/// wide.
///
/// # Safety
/// All pointers must be valid as [`Tile`] and [`Running`] say, and those of a query be nobody else's.
#[inline(always)]
pub(super) unsafe fn add_tile<L: Lanes, const N: usize>(
    tile: &Tile,
    q: &[f32],
    width: usize,
    queries: &[Running; N],
) {
    // SAFETY, for the whole body: the caller's promise.
    unsafe {
        let mut weights = [[0f32; TILE_KEYS]; N];
        let visible = queries.iter().map(|query| query.visible).max().unwrap_or(0).min(tile.len);
        let vectors = visible.div_ceil(KEY_LANES);
        let mut vector = 0;
        // Enough independent sums to hide the latency of the multiply-add.
        while vector + 2 <= vectors {
            if N <= 2 && vector + 4 <= vectors {
                scores::<L, N, 4>(tile, q, vector, &mut weights);
                vector += 4;
            } else {
                scores::<L, N, 2>(tile, q, vector, &mut weights);
                vector += 2;
            }
        }
        if vector < vectors {
            scores::<L, N, 1>(tile, q, vector, &mut weights);
        }
        let mut rescale = [0f32; KEY_LANES];
        for (n, (query, weights)) in queries.iter().zip(&mut weights).enumerate() {
            rescale[n] = to_weights::<L>(weights, vectors, tile.bias, query);
        }
        let rescale = L::from_array(rescale).exp().to_array();
        for (n, (query, weights)) in queries.iter().zip(&weights).enumerate() {
            let mut sum = L::splat(0.0);
            for vector in 0..vectors {
                sum = sum.add(L::load(weights.as_ptr().add(vector * KEY_LANES)));
            }
            *query.sum = *query.sum * rescale[n] + sum.sum();
        }
        let mut at = 0;
        while at < width {
            if N <= 4 && at + 4 * KEY_LANES <= width {
                add_values::<L, N, 4>(tile, &weights, visible, &rescale, at, queries);
                at += 4 * KEY_LANES;
            } else if at + 2 * KEY_LANES <= width {
                add_values::<L, N, 2>(tile, &weights, visible, &rescale, at, queries);
                at += 2 * KEY_LANES;
            } else {
                add_values::<L, N, 1>(tile, &weights, visible, &rescale, at, queries);
                at += KEY_LANES;
            }
        }
    }
}

/// `q · kᵀ` of `K` vectors of keys, the first of which is `vector`.
#[inline(always)]
unsafe fn scores<L: Lanes, const N: usize, const K: usize>(
    tile: &Tile,
    q: &[f32],
    vector: usize,
    scores: &mut [[f32; TILE_KEYS]; N],
) {
    // SAFETY: groups of keys are readable as a whole.
    unsafe {
        let mut sums = [[L::splat(0.0); K]; N];
        let keys: [*const f32; K] = std::array::from_fn(|k| tile.keys[vector + k]);
        for (d, q) in q.chunks_exact(N).enumerate() {
            let mut lanes = [L::splat(0.0); K];
            for k in 0..K {
                lanes[k] = L::load(keys[k].add(d * tile.key_stride));
            }
            for n in 0..N {
                let q = L::splat(q[n]);
                for k in 0..K {
                    sums[n][k] = q.mul_add(lanes[k], sums[n][k]);
                }
            }
        }
        for (scores, sums) in scores.iter_mut().zip(sums) {
            for (k, sum) in sums.into_iter().enumerate() {
                sum.store(scores.as_mut_ptr().add((vector + k) * KEY_LANES));
            }
        }
    }
}

/// Turns scores into weights relative to the new maximum, 0 for keys the query may not see. Returns the
/// exponent by which what was summed before has to be rescaled.
#[inline(always)]
unsafe fn to_weights<L: Lanes>(
    weights: &mut [f32; TILE_KEYS],
    vectors: usize,
    bias: *const f32,
    query: &Running,
) -> f32 {
    // SAFETY: `weights` has whole vectors; the pointers are the caller's promise.
    unsafe {
        let visible = query.visible.min(vectors * KEY_LANES);
        if !bias.is_null() {
            for (t, weight) in weights[..visible].iter_mut().enumerate() {
                *weight += *bias.add(t);
            }
        }
        weights[visible..vectors * KEY_LANES].fill(f32::NEG_INFINITY);
        let at = weights.as_mut_ptr();
        let mut largest = L::splat(f32::NEG_INFINITY);
        for vector in 0..vectors {
            largest = largest.max(L::load(at.add(vector * KEY_LANES)));
        }
        let old = *query.max;
        let new = old.max(largest.largest());
        *query.max = new;
        // Nothing visible yet: any finite base gives weights of 0.
        let base = if new == f32::NEG_INFINITY { 0.0 } else { new };
        for vector in 0..vectors {
            let at = at.add(vector * KEY_LANES);
            L::load(at).sub(L::splat(base)).exp().store(at);
        }
        old - base
    }
}

/// Adds `weights · values` to `D` vectors of the outputs, from dimension `at` on.
#[inline(always)]
unsafe fn add_values<L: Lanes, const N: usize, const D: usize>(
    tile: &Tile,
    weights: &[[f32; TILE_KEYS]; N],
    visible: usize,
    rescale: &[f32; KEY_LANES],
    at: usize,
    queries: &[Running; N],
) {
    // SAFETY: values and outputs are wide enough for whole vectors.
    unsafe {
        let mut sums = [[L::splat(0.0); D]; N];
        for n in 0..N {
            for d in 0..D {
                let out = L::load(queries[n].out.add(at + d * KEY_LANES));
                sums[n][d] = out.mul(L::splat(rescale[n]));
            }
        }
        for start in (0..visible).step_by(KEY_LANES) {
            let values = tile.values[start / KEY_LANES].add(at);
            for t in 0..KEY_LANES.min(visible - start) {
                let mut value = [L::splat(0.0); D];
                for d in 0..D {
                    value[d] = L::load(values.add(t * tile.value_stride + d * KEY_LANES));
                }
                for n in 0..N {
                    let weight = L::splat(weights[n][start + t]);
                    for d in 0..D {
                        sums[n][d] = weight.mul_add(value[d], sums[n][d]);
                    }
                }
            }
        }
        for n in 0..N {
            for d in 0..D {
                sums[n][d].store(queries[n].out.add(at + d * KEY_LANES));
            }
        }
    }
}
