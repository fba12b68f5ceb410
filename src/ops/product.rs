//! The one inner loop of all products in f32: a few rows times vectors of sixteen columns.
//!
//! A product runs on the calling thread; callers split their work. Every number of the result is summed over
//! the depth in order, so its bits do not depend on how rows and columns are cut, nor on the company.

use std::marker::PhantomData;

use super::simd::{Lanes, dispatch};

/// Columns per tile: the lanes of a vector.
pub(crate) const LANES: usize = 16;
/// Rows multiplied at once: with two tiles, as many as keep their sums in registers.
pub(crate) const ROWS: usize = 8;

/// Rows of any strides: the number at `(row, k)` is `values[row * row_stride + k * step]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub values: &'a [f32],
    pub row_stride: usize,
    pub step: usize,
}

impl<'a> Left<'a> {
    /// Rows that lie one after the other, each `row_stride` after the one before.
    pub fn rows(values: &'a [f32], row_stride: usize) -> Self {
        Self { values, row_stride, step: 1 }
    }

    /// The columns of such rows.
    pub fn columns(values: &'a [f32], row_stride: usize) -> Self {
        Self { values, row_stride: 1, step: row_stride }
    }
}

/// Tiles of [`LANES`] columns: those of `tile` for `k` start at `values[tile * tile_stride + k * step]`.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub values: &'a [f32],
    pub tile_stride: usize,
    pub step: usize,
}

impl<'a> Right<'a> {
    /// Tiles one after the other, `depth` vectors each.
    pub fn tiles(values: &'a [[f32; LANES]], depth: usize) -> Self {
        Self { values: values.as_flattened(), tile_stride: depth * LANES, step: LANES }
    }

    /// Rows whose columns lie side by side.
    pub fn rows(values: &'a [f32], row_stride: usize) -> Self {
        Self { values, tile_stride: LANES, step: row_stride }
    }
}

/// Where products are written: rows `stride` apart, of `width` columns. Several threads may hold copies.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    start: *mut f32,
    len: usize,
    stride: usize,
    width: usize,
    holds: PhantomData<&'a mut [f32]>,
}

// SAFETY: whoever writes through a copy promises that no other thread touches these rows and columns.
unsafe impl Sync for Output<'_> {}
// SAFETY: as above.
unsafe impl Send for Output<'_> {}

impl<'a> Output<'a> {
    pub fn new(values: &'a mut [f32], stride: usize, width: usize) -> Self {
        assert!(width <= stride, "rows that overlap");
        Self { start: values.as_mut_ptr(), len: values.len(), stride, width, holds: PhantomData }
    }

    /// Replaces up to [`LANES`] columns of a row, as many as there are.
    ///
    /// # Safety
    /// The row must exist, and no other thread may touch these columns of it.
    #[inline(always)]
    pub unsafe fn write(&self, row: usize, column: usize, sums: &[f32; LANES]) {
        let len = LANES.min(self.width - column);
        // SAFETY: `column + len <= width`, the rest is the caller's promise.
        unsafe {
            let to = self.start.add(row * self.stride + column);
            match len {
                LANES => to.cast::<[f32; LANES]>().write_unaligned(*sums),
                _ => std::ptr::copy_nonoverlapping(sums.as_ptr(), to, len),
            }
        }
    }

    /// The columns of a row.
    ///
    /// # Safety
    /// The row must exist, and nobody else may touch it as long as the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, row: usize) -> &mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.width) }
    }

    /// What [`Self::write`] would replace; zeroes past the last column.
    ///
    /// # Safety
    /// As for [`Self::write`].
    #[inline(always)]
    unsafe fn read(&self, row: usize, column: usize) -> [f32; LANES] {
        let len = LANES.min(self.width - column);
        let mut values = [0f32; LANES];
        // SAFETY: `column + len <= width`, the rest is the caller's promise.
        unsafe {
            let from = self.start.add(row * self.stride + column);
            match len {
                LANES => values = from.cast::<[f32; LANES]>().read_unaligned(),
                _ => std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), len),
            }
        }
        values
    }
}

/// `left · right` into `output` from `first_row` and `first_column` on.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub left: Left<'a>,
    pub right: Right<'a>,
    pub rows: usize,
    pub depth: usize,
    pub tiles: usize,
    pub output: Output<'a>,
    pub first_row: usize,
    /// A tile may reach past the last column of the output; what it has there is dropped.
    pub first_column: usize,
    /// Whether sums go on from what is in the output.
    pub add: bool,
}

impl Product<'_> {
    /// Computes it.
    ///
    /// # Safety
    /// No other thread may touch the rows and columns that are written.
    ///
    /// # Panics
    /// If a slice is too short for the shapes: a mistake of the caller.
    pub unsafe fn compute(&self) {
        if self.rows == 0 || self.tiles == 0 {
            return;
        }
        let (left, right, output) = (self.left, self.right, self.output);
        if self.depth > 0 {
            let last = (self.rows - 1) * left.row_stride + (self.depth - 1) * left.step;
            assert!(last < left.values.len(), "rows longer than their slice");
            let last = (self.tiles - 1) * right.tile_stride + (self.depth - 1) * right.step;
            assert!(last + LANES <= right.values.len(), "tiles longer than their slice");
        }
        assert!(self.first_column + (self.tiles - 1) * LANES < output.width, "too many columns");
        let last_row = self.first_row + self.rows - 1;
        assert!(last_row * output.stride + output.width <= output.len, "too many rows");
        compute(self);
    }
}

fn compute(product: &Product<'_>) {
    dispatch!(compute_with(product: &Product<'_>))
}

#[inline(always)]
fn compute_with<L: Lanes>(product: &Product<'_>) {
    // A pair of tiles stays in the nearest cache while the rows pass by. The last few rows need more tiles
    // at once for enough independent sums.
    let few = product.rows % ROWS <= 4;
    let mut tile = 0;
    while tile < product.tiles {
        match product.tiles - tile {
            1 => {
                whole_rows::<L, 1>(product, tile);
                last_rows::<L, 1>(product, tile);
                tile += 1;
            }
            4.. if few => {
                whole_rows::<L, 2>(product, tile);
                whole_rows::<L, 2>(product, tile + 2);
                last_rows::<L, 4>(product, tile);
                tile += 4;
            }
            _ => {
                whole_rows::<L, 2>(product, tile);
                last_rows::<L, 2>(product, tile);
                tile += 2;
            }
        }
    }
}

#[inline(always)]
fn whole_rows<L: Lanes, const TILES: usize>(product: &Product<'_>, tile: usize) {
    for row in (0..product.rows / ROWS * ROWS).step_by(ROWS) {
        sums::<L, ROWS, TILES>(product, row, tile);
    }
}

/// What [`whole_rows`] leaves; at most four with four tiles.
#[inline(always)]
fn last_rows<L: Lanes, const TILES: usize>(product: &Product<'_>, tile: usize) {
    let rows = product.rows % ROWS;
    let row = product.rows - rows;
    match rows {
        1 => sums::<L, 1, TILES>(product, row, tile),
        2 => sums::<L, 2, TILES>(product, row, tile),
        3 => sums::<L, 3, TILES>(product, row, tile),
        4 => sums::<L, 4, TILES>(product, row, tile),
        5 if TILES <= 2 => sums::<L, 5, TILES>(product, row, tile),
        6 if TILES <= 2 => sums::<L, 6, TILES>(product, row, tile),
        7 if TILES <= 2 => sums::<L, 7, TILES>(product, row, tile),
        _ => {}
    }
}

#[inline(always)]
fn sums<L: Lanes, const ROWS: usize, const TILES: usize>(
    product: &Product<'_>,
    row: usize,
    tile: usize,
) {
    let Product { left, right, output, .. } = *product;
    let (to_row, to_column) = (product.first_row + row, product.first_column + tile * LANES);
    let mut sums = [[L::splat(0.0); TILES]; ROWS];
    if product.add {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (t, sums) in sums.iter_mut().enumerate() {
                // SAFETY: rows and columns were checked, and are this thread's.
                *sums = L::from_array(unsafe { output.read(to_row + r, to_column + t * LANES) });
            }
        }
    }
    // SAFETY: `Product::compute` checked that every row, tile and step lies within its slice.
    unsafe {
        let rows = left.values.as_ptr().wrapping_add(row * left.row_stride);
        let tiles = right.values.as_ptr().wrapping_add(tile * right.tile_stride);
        for k in 0..product.depth {
            let tiles = tiles.add(k * right.step);
            let mut lanes = [L::splat(0.0); TILES];
            for (t, lanes) in lanes.iter_mut().enumerate() {
                *lanes = L::load(tiles.add(t * right.tile_stride));
            }
            let rows = rows.add(k * left.step);
            for (r, sums) in sums.iter_mut().enumerate() {
                let factor = L::splat(*rows.add(r * left.row_stride));
                for t in 0..TILES {
                    sums[t] = factor.mul_add(lanes[t], sums[t]);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (t, sums) in sums.iter().enumerate() {
                output.write(to_row + r, to_column + t * LANES, &sums.to_array());
            }
        }
    }
}

/// Turns rows into tiles of them: element `(r, c)` of `from`, whose rows start `row_stride` apart, goes to
/// lane `r % LANES` of `to[r / LANES * columns + c]`. Lanes past the last row become 0.
pub(crate) fn turn(
    from: &[f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    to: &mut [[f32; LANES]],
) {
    dispatch!(turn_with(
        from: &[f32],
        rows: usize,
        columns: usize,
        row_stride: usize,
        to: &mut [[f32; LANES]],
    ))
}

#[inline(always)]
fn turn_with<L: Lanes>(
    from: &[f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    to: &mut [[f32; LANES]],
) {
    for (tile, to) in to.chunks_exact_mut(columns.max(1)).take(rows.div_ceil(LANES)).enumerate() {
        let first = tile * LANES;
        let rows = LANES.min(rows - first);
        for (at, to) in (0..columns).step_by(LANES).zip(to.chunks_mut(LANES)) {
            let mut square = [L::splat(0.0); LANES];
            for (r, lanes) in square.iter_mut().enumerate().take(rows) {
                let row = &from[(first + r) * row_stride + at..][..to.len()];
                let mut values = [0f32; LANES];
                match <&[f32; LANES]>::try_from(row) {
                    Ok(row) => values = *row,
                    Err(_) => values[..row.len()].copy_from_slice(row),
                }
                *lanes = L::from_array(values);
            }
            for (to, lanes) in to.iter_mut().zip(L::transposed(square)) {
                *to = lanes.to_array();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, by: usize, modulus: usize) -> Vec<f32> {
        (0..len).map(|i| (i * by % modulus) as f32 - 5.0).collect()
    }

    /// Small integers, so that every order of additions gives the same.
    #[test]
    fn strides_tiles_and_sums_are_those_of_the_naive_product() {
        let depth = 7;
        for rows in (1..=9).chain([17, 24]) {
            for columns in [1usize, 16, 20, 33, 64, 70] {
                let width = columns.next_multiple_of(LANES);
                // Rows within longer ones, and the columns of others.
                let (a, b) = (values(rows * depth * 3, 7, 11), values(depth * width, 5, 13));
                let lefts = [Left::rows(&a, depth + 2), Left::columns(&a, rows + 1)];
                for (left, add) in lefts.into_iter().flat_map(|l| [(l, false), (l, true)]) {
                    let mut to = vec![2f32; (rows + 1) * (columns + 3)];
                    let product = Product {
                        left,
                        right: Right::rows(&b, width),
                        rows,
                        depth,
                        tiles: width / LANES,
                        output: Output::new(&mut to, columns + 3, columns),
                        first_row: 1,
                        first_column: 0,
                        add,
                    };
                    // SAFETY: one thread.
                    unsafe { product.compute() };
                    for (i, got) in to.iter().enumerate() {
                        let (r, c) = (i / (columns + 3), i % (columns + 3));
                        let of = |r: usize, k| left.values[r * left.row_stride + k * left.step];
                        let want = match r > 0 && c < columns {
                            false => 2.0,
                            true => {
                                let start = if add { 2.0 } else { 0.0 };
                                let terms = (0..depth).map(|k| of(r - 1, k) * b[k * width + c]);
                                start + terms.sum::<f32>()
                            }
                        };
                        assert_eq!(*got, want, "{rows} rows, {columns} columns: {r}, {c}");
                    }
                }
            }
        }
    }

    #[test]
    fn turned_rows_are_where_tiles_have_them() {
        for (rows, columns, stride) in [(1, 1, 1), (16, 16, 16), (23, 64, 70), (40, 10, 11)] {
            let from = values(rows * stride, 3, 101);
            let mut to = vec![[9f32; LANES]; rows.div_ceil(LANES) * columns];
            turn(&from, rows, columns, stride, &mut to);
            for (i, got) in to.as_flattened().iter().enumerate() {
                let (tile, c, lane) = (i / LANES / columns, i / LANES % columns, i % LANES);
                let r = tile * LANES + lane;
                assert_eq!(*got, if r < rows { from[r * stride + c] } else { 0.0 });
            }
        }
    }
}
