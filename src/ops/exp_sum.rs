//! The normaliser of a softmax over a vocabulary.

use super::simd::{Lanes, dispatch};

/// Sum of `exp((value - base) · scale)`.
pub fn exp_sum(values: &[f32], base: f32, scale: f32) -> f64 {
    dispatch!(exp_sum_with(values: &[f32], base: f32, scale: f32) -> f64)
}

#[inline(always)]
fn exp_sum_with<L: Lanes>(values: &[f32], base: f32, scale: f32) -> f64 {
    /// Values added up in f32 before the sum is carried on in f64.
    const PART: usize = 4096;
    let (base, factor) = (L::splat(base), L::splat(scale));
    let mut total = 0f64;
    for part in values.chunks(PART) {
        let mut sum = L::splat(0.0);
        let mut vectors = part.chunks_exact(16);
        for vector in vectors.by_ref() {
            // SAFETY: chunks of 16.
            let values = unsafe { L::load(vector.as_ptr()) };
            sum = sum.add(values.sub(base).mul(factor).exp());
        }
        let mut rest = [f32::NEG_INFINITY; 16];
        rest[..vectors.remainder().len()].copy_from_slice(vectors.remainder());
        sum = sum.add(L::from_array(rest).sub(base).mul(factor).exp());
        total += f64::from(sum.sum());
    }
    total
}

#[cfg(test)]
mod tests {
    #[test]
    fn equals_the_sum_in_f64() {
        for len in [0, 1, 15, 16, 4096, 5003] {
            let values: Vec<f32> = (0..len).map(|i| (i * 37 % 101) as f32 * 0.3 - 20.0).collect();
            let naive: f64 = values.iter().map(|v| ((f64::from(*v) - 9.0) * 0.5).exp()).sum();
            let got = super::exp_sum(&values, 9.0, 0.5);
            assert!((got - naive).abs() <= 1e-6 * naive, "{got} for {naive}");
        }
    }
}
