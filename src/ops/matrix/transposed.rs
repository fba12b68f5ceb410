//! Products with a packed matrix from the other side: what takes a gradient back through a layer.
//!
//! A block of the weights is unpacked into a scratch that stays in the cache, and multiplied there.

use std::ops::Range;

use rayon::prelude::*;

use super::LANES;
use crate::ops::gemm::{Into, View, gemm};

/// Tokens per task. Each task unpacks on its own, so this many multiplications pay for one unpacking.
const TOKENS: usize = 512;
/// Columns of the matrix per task.
const COLUMNS: usize = 256;
/// Tiles unpacked at once; with [`COLUMNS`] a scratch of 256 KiB.
const TILES: usize = 16;

/// A matrix in tiles of [`LANES`] rows.
pub(super) trait Tiles: Sync {
    /// `(out, in)`.
    fn dims(&self) -> (usize, usize);

    /// Writes `[columns, tiles * LANES]`: row by row one column of the matrix, row `c` from
    /// `to[c * TILES * LANES]` on. `columns` starts at a multiple of [`COLUMNS`].
    fn unpack(&self, tiles: Range<usize>, columns: Range<usize>, to: &mut [[f32; LANES]]);
}

/// Vectors from one column to the next in what [`Tiles::unpack`] writes.
pub(super) const COLUMN_VECTORS: usize = TILES;

/// `y · weight` for `y` `[tokens, out]`: `[tokens, in]`. Same bits whatever the number of threads.
pub(super) fn transposed_product(matrix: &impl Tiles, y: &[f32]) -> Vec<f32> {
    let (out, input) = matrix.dims();
    let tokens = y.len() / out;
    let column_blocks = input.div_ceil(COLUMNS);
    let tasks = tokens.div_ceil(TOKENS) * column_blocks;
    let block = |task: usize| {
        let (token, column) = (task / column_blocks * TOKENS, task % column_blocks * COLUMNS);
        (token..tokens.min(token + TOKENS), column..input.min(column + COLUMNS))
    };
    let parts: Vec<Vec<f32>> = (0..tasks)
        .into_par_iter()
        .map_init(
            || vec![[0f32; LANES]; COLUMNS * TILES],
            |scratch, task| {
                let (tokens, columns) = block(task);
                part(matrix, &y[tokens.start * out..tokens.end * out], columns, scratch)
            },
        )
        .collect();
    let mut result = vec![0f32; tokens * input];
    for (task, part) in parts.iter().enumerate() {
        let (tokens, columns) = block(task);
        for (token, row) in tokens.zip(part.chunks_exact(columns.len())) {
            result[token * input..][columns.clone()].copy_from_slice(row);
        }
    }
    result
}

/// The given columns of the product.
fn part(
    matrix: &impl Tiles,
    y: &[f32],
    columns: Range<usize>,
    scratch: &mut [[f32; LANES]],
) -> Vec<f32> {
    let (out, width) = (matrix.dims().0, columns.len());
    let tokens = y.len() / out;
    let mut sums = vec![0f32; tokens * width];
    for first in (0..out.div_ceil(LANES)).step_by(TILES) {
        let tiles = first..out.div_ceil(LANES).min(first + TILES);
        let rows = first * LANES..out.min(tiles.end * LANES);
        matrix.unpack(tiles, columns.clone(), scratch);
        let weights = View::rows(scratch.as_flattened(), width, rows.len(), TILES * LANES).t();
        let left = View::rows(&y[rows.start..], tokens, rows.len(), out);
        gemm(&mut sums, width, Into::Add, left, weights, 1.0);
    }
    sums
}
