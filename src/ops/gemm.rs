//! Matrix products of f32 slices with any strides, on the calling thread.
//!
//! Callers split their work into tasks of their own, so that what a task adds up, and in which order, does
//! not depend on the number of threads.

use gemm::Parallelism;

/// A matrix inside a slice: element `(r, c)` is at `r * row_stride + c * column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// Rows one after the other, each starting `row_stride` after the one before.
    pub fn rows(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { values, rows, columns, row_stride, column_stride: 1 }
    }

    /// Transposed.
    pub fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn is_within(&self) -> bool {
        match (self.rows.checked_sub(1), self.columns.checked_sub(1)) {
            (Some(r), Some(c)) => r * self.row_stride + c * self.column_stride < self.values.len(),
            _ => true,
        }
    }
}

/// What happens to the numbers already in the place of the result.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Into {
    Add,
    Replace,
}

/// `factor · left · right` into the rows `to`, which start `row_stride` apart.
///
/// # Panics
/// If the shapes do not fit one another or a slice is too short: a mistake of the caller.
pub(crate) fn gemm(
    to: &mut [f32],
    row_stride: usize,
    into: Into,
    left: View<'_>,
    right: View<'_>,
    factor: f32,
) {
    let (m, n, k) = (left.rows, right.columns, left.columns);
    assert_eq!(k, right.rows, "matrices that cannot be multiplied");
    assert!(left.is_within() && right.is_within(), "a matrix larger than its slice");
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= row_stride && (m - 1) * row_stride + n <= to.len(), "no room for the product");
    // SAFETY: every element of the three matrices lies within its slice, as asserted, and the rows of the
    // result do not overlap.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            to.as_mut_ptr(),
            1,
            row_stride as isize,
            into == Into::Add,
            left.values.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.values.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_and_sums_are_those_of_the_naive_product() {
        let a: Vec<f32> = (0..60).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
        let b: Vec<f32> = (0..60).map(|i| (i * 5 % 13) as f32 - 6.0).collect();
        // [3, 4] within rows of 7, and the transpose of [5, 4] within rows of 6.
        let (left, right) = (View::rows(&a, 3, 4, 7), View::rows(&b, 5, 4, 6).t());
        for into in [Into::Replace, Into::Add] {
            let mut to = vec![2f32; 3 * 9];
            gemm(&mut to, 9, into, left, right, 0.5);
            for (i, got) in to.iter().enumerate() {
                let (r, c) = (i / 9, i % 9);
                let sum: f32 = (0..4).map(|k| a[r * 7 + k] * b[c.min(4) * 6 + k]).sum();
                let want = match (c < 5, into) {
                    (false, _) => 2.0,
                    (true, Into::Replace) => 0.5 * sum,
                    (true, Into::Add) => 2.0 + 0.5 * sum,
                };
                assert_eq!(*got, want, "row {r}, column {c}");
            }
        }
    }
}
