//! Reductions over a row of logits, which may be a vocabulary long.

use super::simd::{Lanes, dispatch};

/// The largest value; negative infinity for none. NaN must not be among them.
pub fn max(values: &[f32]) -> f32 {
    dispatch!(max_with(values: &[f32]) -> f32)
}

#[inline(always)]
fn max_with<L: Lanes>(values: &[f32]) -> f32 {
    let mut best = [L::splat(f32::NEG_INFINITY); 4];
    let mut chunks = values.chunks_exact(4 * 16);
    for chunk in chunks.by_ref() {
        for (i, best) in best.iter_mut().enumerate() {
            // SAFETY: chunks of four vectors.
            *best = best.max(unsafe { L::load(chunk.as_ptr().add(16 * i)) });
        }
    }
    let vectors = best.into_iter().fold(f32::NEG_INFINITY, |max, best| max.max(best.largest()));
    chunks.remainder().iter().copied().fold(vectors, f32::max)
}

/// Where the largest value stands; the first of several. 0 for none.
pub fn argmax(values: &[f32]) -> usize {
    let max = max(values);
    values.iter().position(|value| *value == max).unwrap_or(0)
}

/// Whether there is neither an infinity nor a NaN.
pub fn all_finite(values: &[f32]) -> bool {
    // Without a way out in the middle this becomes vector instructions.
    values.chunks(1024).all(|part| part.iter().fold(true, |all, value| all & value.is_finite()))
}

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

/// Replaces every value by `exp((value - base) · scale)` and returns the sum of what it became.
pub fn exp_in_place(values: &mut [f32], base: f32, scale: f32) -> f64 {
    dispatch!(exp_in_place_with(values: &mut [f32], base: f32, scale: f32) -> f64)
}

#[inline(always)]
fn exp_in_place_with<L: Lanes>(values: &mut [f32], base: f32, scale: f32) -> f64 {
    const PART: usize = 4096;
    let (base, factor) = (L::splat(base), L::splat(scale));
    let mut total = 0f64;
    for part in values.chunks_mut(PART) {
        let mut sum = L::splat(0.0);
        let mut vectors = part.chunks_exact_mut(16);
        for vector in vectors.by_ref() {
            // SAFETY: chunks of 16.
            let exp = unsafe { L::load(vector.as_ptr()) }.sub(base).mul(factor).exp();
            // SAFETY: as above.
            unsafe { exp.store(vector.as_mut_ptr()) };
            sum = sum.add(exp);
        }
        let rest = vectors.into_remainder();
        let mut lanes = [f32::NEG_INFINITY; 16];
        lanes[..rest.len()].copy_from_slice(rest);
        let exp = L::from_array(lanes).sub(base).mul(factor).exp();
        rest.copy_from_slice(&exp.to_array()[..rest.len()]);
        total += f64::from(sum.add(exp).sum());
    }
    total
}

#[cfg(test)]
mod tests {
    #[test]
    fn largest_and_finite_are_those_of_the_naive_forms() {
        for len in [1usize, 15, 63, 64, 65, 200, 1500] {
            let mut values: Vec<f32> = (0..len).map(|i| (i * 37 % 101) as f32 - 200.0).collect();
            for at in [0, len / 2, len - 1] {
                let before = std::mem::replace(&mut values[at], 1.0);
                assert_eq!((super::max(&values), super::argmax(&values)), (1.0, at));
                assert!(super::all_finite(&values));
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    values[at] = bad;
                    assert!(!super::all_finite(&values), "{bad} at {at} of {len}");
                }
                values[at] = before;
            }
        }
        assert_eq!(
            (super::max(&[]), super::argmax(&[]), super::argmax(&[2.0; 70])),
            (f32::NEG_INFINITY, 0, 0)
        );
    }

    #[test]
    fn equals_the_sum_in_f64() {
        for len in [0, 1, 15, 16, 4096, 5003] {
            let values: Vec<f32> = (0..len).map(|i| (i * 37 % 101) as f32 * 0.3 - 20.0).collect();
            let naive: f64 = values.iter().map(|v| ((f64::from(*v) - 9.0) * 0.5).exp()).sum();
            let got = super::exp_sum(&values, 9.0, 0.5);
            assert!((got - naive).abs() <= 1e-6 * naive, "{got} for {naive}");
            let mut replaced = values.clone();
            assert_eq!(super::exp_in_place(&mut replaced, 9.0, 0.5), got);
            for (value, exp) in values.iter().zip(replaced) {
                let want = ((f64::from(*value) - 9.0) * 0.5).exp();
                assert!((f64::from(exp) - want).abs() <= 1e-6 * want, "{exp} for {want}");
            }
        }
    }
}
