//! Products with a packed matrix from the other side: what takes a gradient back through a layer.
//!
//! A block of the weights is turned into tiles of columns, in a scratch that stays in the cache, and goes
//! through the kernel of the forward product.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::packed_f32::{BLOCK_INPUTS, BLOCK_TOKENS};
use super::{LANES, Output};
use crate::ops::product::{Left, Product, Right};
use crate::ops::{Numbers, change_f32};

/// Columns of the matrix per task; with [`BLOCK_INPUTS`] a scratch of 64 KiB. Each task turns the weights
/// on its own, and [`BLOCK_TOKENS`] multiplications pay for it.
const COLUMNS: usize = 64;

/// A matrix in tiles of [`LANES`] rows.
pub(super) trait Tiles: Sync {
    /// `(out, in)`.
    fn dims(&self) -> (usize, usize);

    /// Writes the rows and columns as tiles of [`LANES`] columns: element `(r, c)` of the part in lane
    /// `c % LANES` of `to[c / LANES * rows.len() + r]`. Rows start at a multiple of [`LANES`], columns at
    /// one of [`COLUMNS`]. What is in lanes past the last column does not matter.
    fn turn(&self, rows: Range<usize>, columns: Range<usize>, to: &mut [[f32; LANES]]);
}

/// `y · weight` for `y` `[tokens, out]`, `[tokens, in]`; added to `to`, if it is given, in its place. The
/// shapes must fit. Same bits whatever the number of threads.
pub(super) fn transposed_product(
    matrix: &impl Tiles,
    y: &Tensor,
    to: Option<Tensor>,
) -> Result<Tensor> {
    let add = to.is_some();
    let input = matrix.dims().1;
    let to = to.map_or_else(|| Tensor::zeros((y.dim(0)?, input), y.dtype(), y.device()), Ok)?;
    let y = Numbers::of(y)?;
    change_f32(&to, |to| {
        multiply(matrix, &y, to, add);
        Ok(())
    })?;
    Ok(to)
}

fn multiply(matrix: &impl Tiles, y: &[f32], to: &mut [f32], add: bool) {
    let (out, input) = matrix.dims();
    let tokens = y.len() / out;
    let column_blocks = input.div_ceil(COLUMNS);
    let tasks = tokens.div_ceil(BLOCK_TOKENS) * column_blocks;
    let output = Output::new(to, input, input);
    (0..tasks).into_par_iter().for_each_init(
        || vec![[0f32; LANES]; COLUMNS / LANES * BLOCK_INPUTS],
        |scratch, task| {
            let first_row = task / column_blocks * BLOCK_TOKENS;
            let start = task % column_blocks * COLUMNS;
            let columns = start..input.min(start + COLUMNS);
            let tiles = columns.len().div_ceil(LANES);
            for first in (0..out).step_by(BLOCK_INPUTS) {
                let rows = first..out.min(first + BLOCK_INPUTS);
                let weights = &mut scratch[..tiles * rows.len()];
                matrix.turn(rows.clone(), columns.clone(), weights);
                let product = Product {
                    left: Left::rows(&y[first_row * out + first..], out),
                    right: Right::tiles(weights, rows.len()),
                    rows: BLOCK_TOKENS.min(tokens - first_row),
                    depth: rows.len(),
                    tiles,
                    output,
                    first_row,
                    first_column: columns.start,
                    add: add || first > 0,
                };
                // SAFETY: each task has rows and columns of its own.
                unsafe { product.compute() };
            }
        },
    );
}
