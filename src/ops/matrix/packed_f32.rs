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
use crate::ops::simd::{Lanes, dispatch};

/// Tokens multiplied at once: as many as keep their sums in registers.
pub(super) const CHUNK_TOKENS: usize = 8;
/// Weights that one thread multiplies with chunk after chunk of tokens; they stay in its L2 cache.
const GROUP_BYTES: usize = 512 << 10;
/// Inputs multiplied at once where there are many tokens: longer rows would not leave room for a group of
/// tiles in the cache. Sums go on from what is stored, so the block does not show in their bits.
const BLOCK_INPUTS: usize = 512;

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
        let tokens = x.len() / self.input;
        let chunks = interleaved(x, self.input);
        let mut result = vec![0f32; tokens * self.out];
        let output = Output::new(&mut result, self.out);
        let tiles = self.out.div_ceil(LANES);
        // Few tokens read every weight once, so they gain nothing from its staying in the cache.
        let block = if chunks.len() < 4 { self.input } else { self.input.min(BLOCK_INPUTS) };
        let in_cache = GROUP_BYTES / (block * size_of::<[f32; LANES]>());
        for_tiles(
            tiles,
            in_cache.next_multiple_of(4),
            tokens * self.weights.len() * LANES,
            |range| {
                for first in (0..self.input).step_by(block) {
                    let inputs = first..self.input.min(first + block);
                    for (c, chunk) in chunks.iter().enumerate() {
                        let tokens = chunk.len() / self.input;
                        multiply(&Part {
                            weights: &self.weights
                                [range.start * self.input..range.end * self.input],
                            input: self.input,
                            inputs: inputs.clone(),
                            x: &chunk[inputs.start * tokens..inputs.end * tokens],
                            tokens,
                            output,
                            first_token: c * CHUNK_TOKENS,
                            first_out: range.start * LANES,
                            go_on: first > 0,
                        });
                    }
                }
            },
        );
        result
    }
}

impl Tiles for PackedF32 {
    fn dims(&self) -> (usize, usize) {
        (self.out, self.input)
    }

    fn turn(&self, rows: Range<usize>, columns: Range<usize>, to: &mut [[f32; LANES]]) {
        for (columns, to) in columns_of_tiles(columns).zip(to.chunks_exact_mut(rows.len())) {
            for (tile, to) in (rows.start / LANES..).zip(to.chunks_mut(LANES)) {
                let from = &self.weights[tile * self.input..][columns.clone()];
                // A whole square in registers, where there is one.
                match <&[[f32; LANES]; LANES]>::try_from(from) {
                    Ok(from) => turn_square(from, to),
                    Err(_) => {
                        for (c, from) in from.iter().enumerate() {
                            to.iter_mut().zip(from).for_each(|(to, value)| to[c] = *value);
                        }
                    }
                }
            }
        }
    }
}

/// Ranges of up to [`LANES`] columns.
fn columns_of_tiles(columns: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = columns.end;
    columns.step_by(LANES).map(move |start| start..end.min(start + LANES))
}

fn turn_square(from: &[[f32; LANES]; LANES], to: &mut [[f32; LANES]]) {
    for (row, to) in to.iter_mut().enumerate() {
        *to = std::array::from_fn(|c| from[c][row]);
    }
}

/// Chunks of tokens, each as the kernels read it.
pub(super) fn interleaved(x: &[f32], input: usize) -> Vec<Vec<f32>> {
    let chunks = x.par_chunks(CHUNK_TOKENS * input).with_min_len(8);
    chunks.map(|chunk| interleave(chunk, input)).collect()
}

/// `[tokens, in]` to `[in, tokens]`.
fn interleave(x: &[f32], input: usize) -> Vec<f32> {
    let tokens = x.len() / input;
    let mut to = vec![0f32; x.len()];
    for (t, row) in x.chunks_exact(input).enumerate() {
        to[t..].iter_mut().step_by(tokens).zip(row).for_each(|(to, from)| *to = *from);
    }
    to
}

/// Some tiles with one chunk of tokens.
pub(super) struct Part<'a> {
    /// `[tiles, input]`.
    pub weights: &'a [[f32; LANES]],
    pub input: usize,
    /// Which of the inputs to multiply.
    pub inputs: Range<usize>,
    /// `[inputs, tokens]`.
    pub x: &'a [f32],
    pub tokens: usize,
    pub output: Output,
    pub first_token: usize,
    pub first_out: usize,
    /// Whether the sums go on from what is in the output.
    pub go_on: bool,
}

pub(super) fn multiply(part: &Part<'_>) {
    dispatch!(multiply_with(part: &Part<'_>))
}

#[inline(always)]
fn multiply_with<L: Lanes>(part: &Part<'_>) {
    // As many tiles at once as give enough independent sums, and keep them in registers.
    match part.tokens {
        1 => tiles_with::<L, 1, 4>(part),
        2 => tiles_with::<L, 2, 4>(part),
        3 => tiles_with::<L, 3, 4>(part),
        4 => tiles_with::<L, 4, 4>(part),
        5 => tiles_with::<L, 5, 2>(part),
        6 => tiles_with::<L, 6, 2>(part),
        7 => tiles_with::<L, 7, 2>(part),
        _ => tiles_with::<L, CHUNK_TOKENS, 2>(part),
    }
}

#[inline(always)]
fn tiles_with<L: Lanes, const TOKENS: usize, const TILES: usize>(part: &Part<'_>) {
    let tile_len = part.input;
    let mut tiles = part.weights.chunks_exact(TILES * tile_len);
    let mut column = part.first_out;
    for weights in tiles.by_ref() {
        sums::<L, TOKENS, TILES>(part, weights, column);
        column += TILES * LANES;
    }
    for weights in tiles.remainder().chunks_exact(tile_len) {
        sums::<L, TOKENS, 1>(part, weights, column);
        column += LANES;
    }
}

#[inline(always)]
fn sums<L: Lanes, const TOKENS: usize, const TILES: usize>(
    part: &Part<'_>,
    weights: &[[f32; LANES]],
    column: usize,
) {
    let mut sums = [[L::splat(0.0); TILES]; TOKENS];
    if part.go_on {
        for (t, sums) in sums.iter_mut().enumerate() {
            for (tile, sums) in sums.iter_mut().enumerate() {
                let column = column + tile * LANES;
                // SAFETY: only this task writes to these columns.
                *sums = L::from_array(unsafe { part.output.read(part.first_token + t, column) });
            }
        }
    }
    let inputs = part.inputs.clone();
    let weights = &weights[inputs.start..][..(TILES - 1) * part.input + inputs.len()];
    for (i, x) in part.x.chunks_exact(TOKENS).take(inputs.len()).enumerate() {
        let mut lanes = [L::splat(0.0); TILES];
        for (tile, lanes) in lanes.iter_mut().enumerate() {
            // SAFETY: `i < inputs.len()`, and `TILES` tiles are `input` vectors apart.
            *lanes = unsafe { L::load(weights.as_ptr().add(tile * part.input + i).cast()) };
        }
        for t in 0..TOKENS {
            let x = L::splat(x[t]);
            for tile in 0..TILES {
                sums[t][tile] = x.mul_add(lanes[tile], sums[t][tile]);
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        for (tile, sums) in sums.iter().enumerate() {
            let column = column + tile * LANES;
            // SAFETY: every (token, tile) is written by one task, within the result.
            unsafe { part.output.write(part.first_token + t, column, &sums.to_array()) };
        }
    }
}
