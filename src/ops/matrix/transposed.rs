//! Products with a packed matrix from the other side: what takes a gradient back through a layer.
//!
//! A block of the weights is turned into tiles of columns, in a scratch that stays in the cache, and goes
//! through the kernel of the forward product.

use std::ops::Range;

use rayon::prelude::*;

use super::packed_f32::{CHUNK_TOKENS, Part, interleaved, multiply};
use super::{LANES, Output};

/// Tokens per task, a multiple of those of a chunk. Each task turns the weights on its own, so this many
/// multiplications pay for it.
const TOKENS: usize = 512;
/// Columns of the matrix per task.
const COLUMNS: usize = 128;
/// Rows turned at once; with [`COLUMNS`] a scratch of 256 KiB.
const ROWS: usize = 512;

/// A matrix in tiles of [`LANES`] rows.
pub(super) trait Tiles: Sync {
    /// `(out, in)`.
    fn dims(&self) -> (usize, usize);

    /// Writes the rows and columns as tiles of [`LANES`] columns: element `(r, c)` of the part in lane
    /// `c % LANES` of `to[c / LANES * rows.len() + r]`. Rows start at a multiple of [`LANES`], columns at
    /// one of [`COLUMNS`]. What is in lanes past the last column does not matter.
    fn turn(&self, rows: Range<usize>, columns: Range<usize>, to: &mut [[f32; LANES]]);
}

/// `y · weight` for `y` `[tokens, out]`: `[tokens, in]`. Same bits whatever the number of threads.
pub(super) fn transposed_product(matrix: &impl Tiles, y: &[f32]) -> Vec<f32> {
    let (out, input) = matrix.dims();
    let tokens = y.len() / out;
    let chunks = interleaved(y, out);
    let column_blocks = input.div_ceil(COLUMNS);
    let tasks = tokens.div_ceil(TOKENS) * column_blocks;
    let columns = |task: usize| {
        let start = task % column_blocks * COLUMNS;
        start..input.min(start + COLUMNS)
    };
    let parts: Vec<Vec<f32>> = (0..tasks)
        .into_par_iter()
        .map_init(
            || vec![[0f32; LANES]; COLUMNS / LANES * ROWS],
            |scratch, task| {
                let first = task / column_blocks * (TOKENS / CHUNK_TOKENS);
                let chunks = &chunks[first..chunks.len().min(first + TOKENS / CHUNK_TOKENS)];
                part(matrix, chunks, columns(task), scratch)
            },
        )
        .collect();
    let mut result = vec![0f32; tokens * input];
    for (task, part) in parts.iter().enumerate() {
        let columns = columns(task);
        let first = task / column_blocks * TOKENS;
        let width = columns.len().next_multiple_of(LANES);
        let rows = result[first * input..].chunks_exact_mut(input);
        for (to, from) in rows.zip(part.chunks_exact(width)) {
            to[columns.clone()].copy_from_slice(&from[..columns.len()]);
        }
    }
    result
}

/// The given columns of the product, in rows of whole tiles.
fn part(
    matrix: &impl Tiles,
    chunks: &[Vec<f32>],
    columns: Range<usize>,
    scratch: &mut [[f32; LANES]],
) -> Vec<f32> {
    let out = matrix.dims().0;
    let width = columns.len().next_multiple_of(LANES);
    let tokens: usize = chunks.iter().map(|chunk| chunk.len() / out).sum();
    let mut sums = vec![0f32; tokens * width];
    let output = Output::new(&mut sums, width);
    for first in (0..out).step_by(ROWS) {
        let rows = first..out.min(first + ROWS);
        let weights = &mut scratch[..width / LANES * rows.len()];
        matrix.turn(rows.clone(), columns.clone(), weights);
        for (c, chunk) in chunks.iter().enumerate() {
            let tokens = chunk.len() / out;
            multiply(&Part {
                weights,
                input: rows.len(),
                inputs: 0..rows.len(),
                x: &chunk[rows.start * tokens..rows.end * tokens],
                tokens,
                output,
                first_token: c * CHUNK_TOKENS,
                first_out: 0,
                go_on: first > 0,
            });
        }
    }
    sums
}
