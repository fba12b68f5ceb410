//! What happens to the rows of scores between the products of packed attention.

use crate::ops::simd::{Lanes, dispatch};

/// Which scores of a tile count. A row has those of the prefix, then those of the own tokens, each padded
/// to whole vectors.
pub(super) struct Mask {
    pub prefix: usize,
    pub own: usize,
    /// Of each row, the leading own tokens it sees; more than `own` if they are left out.
    pub visible: Vec<usize>,
}

impl Mask {
    pub fn rows(&self) -> usize {
        self.visible.len()
    }

    /// Where the own tokens' scores start.
    pub fn own_start(&self) -> usize {
        self.prefix.next_multiple_of(16)
    }

    pub fn width(&self) -> usize {
        self.own_start() + self.own.next_multiple_of(16)
    }

    /// Nothing weighs what a row does not see.
    #[inline(always)]
    fn apply(&self, row: usize, scores: &mut [f32]) {
        let own = self.own_start();
        scores[self.prefix..own].fill(f32::NEG_INFINITY);
        scores[own + self.visible[row].min(self.own)..].fill(f32::NEG_INFINITY);
    }
}

/// Turns scores into `exp(score − the row's largest)`; gives the log-sum-exp of each row, and what makes
/// its weights sum to 1.
pub(super) fn softmax(scores: &mut [f32], mask: &Mask, log_sums: &mut [f32], shares: &mut [f32]) {
    dispatch!(softmax_with(
        scores: &mut [f32],
        mask: &Mask,
        log_sums: &mut [f32],
        shares: &mut [f32],
    ))
}

#[inline(always)]
fn softmax_with<L: Lanes>(
    scores: &mut [f32],
    mask: &Mask,
    log_sums: &mut [f32],
    shares: &mut [f32],
) {
    let results = log_sums.iter_mut().zip(shares);
    for (r, (row, (log_sum, share))) in
        scores.chunks_exact_mut(mask.width()).zip(results).enumerate()
    {
        mask.apply(r, row);
        let mut largest = L::splat(f32::NEG_INFINITY);
        for vector in row.chunks_exact(16) {
            // SAFETY: 16 values, here and below.
            largest = largest.max(unsafe { L::load(vector.as_ptr()) });
        }
        let largest = largest.largest();
        let (base, mut sum) = (L::splat(largest), L::splat(0.0));
        for vector in row.chunks_exact_mut(16) {
            let weight = unsafe { L::load(vector.as_ptr()) }.sub(base).exp();
            sum = sum.add(weight);
            unsafe { weight.store(vector.as_mut_ptr()) };
        }
        let sum = sum.sum();
        *log_sum = largest + sum.ln();
        *share = 1.0 / sum;
    }
}

/// Turns scores into the weights of the softmax whose log-sum-exp is known.
pub(super) fn weights(scores: &mut [f32], mask: &Mask, log_sums: &[f32]) {
    dispatch!(weights_with(scores: &mut [f32], mask: &Mask, log_sums: &[f32]))
}

#[inline(always)]
fn weights_with<L: Lanes>(scores: &mut [f32], mask: &Mask, log_sums: &[f32]) {
    if scores.is_empty() {
        return;
    }
    for (r, (row, log_sum)) in scores.chunks_exact_mut(mask.width()).zip(log_sums).enumerate() {
        mask.apply(r, row);
        for vector in row.chunks_exact_mut(16) {
            // SAFETY: 16 values.
            unsafe {
                let weight = L::load(vector.as_ptr()).sub(L::splat(*log_sum)).exp();
                weight.store(vector.as_mut_ptr());
            }
        }
    }
}

/// Turns `grad · value` into the slopes of the scores: `weight · (grad · value − grad · out)`. `out` and
/// `grad` are `rows` long, in whole vectors, like the scores.
pub(super) fn slopes(values: &mut [f32], weights: &[f32], out: &[f32], grad: &[f32], rows: usize) {
    dispatch!(slopes_with(
        values: &mut [f32],
        weights: &[f32],
        out: &[f32],
        grad: &[f32],
        rows: usize,
    ))
}

#[inline(always)]
fn slopes_with<L: Lanes>(
    values: &mut [f32],
    weights: &[f32],
    out: &[f32],
    grad: &[f32],
    rows: usize,
) {
    let (width, dim) = (values.len() / rows.max(1), out.len() / rows.max(1));
    if width == 0 {
        return;
    }
    let each = values.chunks_exact_mut(width).zip(weights.chunks_exact(width));
    let states = out.chunks_exact(dim).zip(grad.chunks_exact(dim));
    for ((values, weights), (out, grad)) in each.zip(states) {
        let mut mean = L::splat(0.0);
        for (out, grad) in out.chunks_exact(16).zip(grad.chunks_exact(16)) {
            // SAFETY: 16 values, here and below.
            let (out, grad) = unsafe { (L::load(out.as_ptr()), L::load(grad.as_ptr())) };
            mean = out.mul_add(grad, mean);
        }
        let mean = L::splat(mean.sum());
        for (value, weight) in values.chunks_exact_mut(16).zip(weights.chunks_exact(16)) {
            unsafe {
                let slope = L::load(value.as_ptr()).sub(mean).mul(L::load(weight.as_ptr()));
                slope.store(value.as_mut_ptr());
            }
        }
    }
}
