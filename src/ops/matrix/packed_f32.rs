//! f32 weights in tiles of sixteen outputs, and their product with a batch of tokens.
//!
//! Within a tile the weights of sixteen outputs for one input lie side by side, so a product is one
//! multiply-add per vector with a broadcast activation, and each output is summed over the inputs in
//! order. A general matrix product would lay the weights out like this in every call; they are frozen, so
//! once is enough.

use std::ops::Range;

use rayon::prelude::*;

use super::transposed::Tiles;
use super::{LANES, Output, for_tiles};
use crate::ops::memory::Pages;
use crate::ops::product::{Left, Product, Right, turn};

/// Inputs multiplied at once where there are many tokens: a pair of tiles of so many stays in the nearest
/// cache. Sums go on from what is stored, so the block does not show in their bits.
pub(super) const BLOCK_INPUTS: usize = 256;
/// Tokens that pass by a block of the weights: so many of their inputs stay in the second cache.
pub(super) const BLOCK_TOKENS: usize = 512;

#[derive(Debug)]
pub(super) struct PackedF32 {
    out: usize,
    input: usize,
    /// `[tiles, in, 16]`, zeroes for outputs that do not exist.
    weights: Pages<[f32; LANES]>,
}

impl PackedF32 {
    pub fn new(out: usize, input: usize, fill: impl Fn(Range<usize>, &mut [f32]) + Sync) -> Self {
        let mut weights = Pages::<[f32; LANES]>::zeroed(out.div_ceil(LANES) * input);
        weights.par_chunks_mut(input.max(1)).enumerate().for_each_init(
            || vec![0f32; LANES * input],
            |rows, (tile, weights)| {
                let range = tile * LANES..((tile + 1) * LANES).min(out);
                let rows = &mut rows[..range.len() * input];
                fill(range, rows);
                for (lane, row) in rows.chunks_exact(input).enumerate() {
                    for (weights, value) in weights.iter_mut().zip(row) {
                        weights[lane] = *value;
                    }
                }
            },
        );
        Self { out, input, weights }
    }

    pub fn dims(&self) -> (usize, usize) {
        (self.out, self.input)
    }

    pub fn visit_bytes(&self, f: &mut impl FnMut(&[u8])) {
        f(bytemuck::cast_slice(&self.weights));
    }

    pub fn bytes(&self) -> u64 {
        size_of_val(&self.weights[..]) as u64
    }

    /// Rows `ids`, one after the other. Each must exist.
    pub fn rows(&self, ids: &[u32]) -> Vec<f32> {
        let mut rows = vec![0f32; ids.len() * self.input];
        rows.par_chunks_mut(self.input).zip(ids).for_each(|(row, id)| {
            let (tile, lane) = (*id as usize / LANES, *id as usize % LANES);
            let weights = &self.weights[tile * self.input..][..self.input];
            row.iter_mut().zip(weights).for_each(|(value, weights)| *value = weights[lane]);
        });
        rows
    }

    /// `x · weightᵀ` for `x` `[tokens, in]`: `[tokens, out]`.
    pub fn product(&self, x: &[f32]) -> Vec<f32> {
        let (out, input) = (self.out, self.input);
        let tokens = x.len() / input;
        let mut result = vec![0f32; tokens * out];
        let output = Output::new(&mut result, out, out);
        // Few tokens read every weight once, so they gain nothing from its staying in the cache.
        let block = if tokens < 32 { input } else { BLOCK_INPUTS };
        let work = tokens * self.weights.len() * LANES;
        for_tiles(out.div_ceil(LANES), usize::MAX, work, |tiles| {
            for first_row in (0..tokens).step_by(BLOCK_TOKENS) {
                for first in (0..input).step_by(block) {
                    let product = Product {
                        left: Left::rows(&x[first_row * input + first..], input),
                        right: Right::tiles(&self.weights[tiles.start * input + first..], input),
                        rows: BLOCK_TOKENS.min(tokens - first_row),
                        depth: block.min(input - first),
                        tiles: tiles.len(),
                        output,
                        first_row,
                        first_column: tiles.start * LANES,
                        add: first > 0,
                    };
                    // SAFETY: each task has columns of its own.
                    unsafe { product.compute() };
                }
            }
        });
        result
    }
}

impl Tiles for PackedF32 {
    fn dims(&self) -> (usize, usize) {
        (self.out, self.input)
    }

    fn turn(&self, rows: Range<usize>, columns: Range<usize>, to: &mut [[f32; LANES]]) {
        // A tile's vectors are the rows to turn: those of one column of tiles after the other.
        for (tile, first) in (rows.start / LANES..).zip((0..rows.len()).step_by(LANES)) {
            let from = self.weights[tile * self.input..][columns.clone()].as_flattened();
            let width = LANES.min(rows.len() - first);
            for (at, to) in (0..columns.len()).step_by(LANES).zip(to.chunks_exact_mut(rows.len())) {
                let columns = LANES.min(columns.len() - at);
                turn(&from[at * LANES..], columns, width, LANES, &mut to[first..first + width]);
            }
        }
    }
}
