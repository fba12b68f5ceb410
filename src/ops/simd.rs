//! Sixteen f32 lanes in the processor's widest registers, for the loops that decide the speed of serving.
//!
//! A kernel is a generic function over [`Lanes`], marked `#[inline(always)]`; [`dispatch!`] calls it
//! compiled for the best instructions this processor has. Every implementation adds in the same order,
//! but only those with fused multiply-add round alike.

/// Sixteen f32 lanes.
///
/// Implementations for a processor's extension must only be used inside functions compiled for it.
pub trait Lanes: Copy {
    fn splat(value: f32) -> Self;
    /// From 16 values at `from`.
    ///
    /// # Safety
    /// `from` must be readable for 16 values; no alignment is needed.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// `to` must be writable for 16 values; no alignment is needed.
    unsafe fn store(self, to: *mut f32);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    /// `self * factor + addend`.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Rounded to the nearest integer, ties to even.
    fn round(self) -> Self;
    /// `self * 2^n` for integral `n` in −150 ..= 128.
    fn scale(self, n: Self) -> Self;
    fn to_array(self) -> [f32; 16];

    /// Lane `c` of row `r` in lane `r` of row `c`.
    #[inline(always)]
    fn transposed(rows: [Self; 16]) -> [Self; 16] {
        let rows = rows.map(Self::to_array);
        std::array::from_fn(|c| Self::from_array(std::array::from_fn(|r| rows[r][c])))
    }

    #[inline(always)]
    fn from_array(values: [f32; 16]) -> Self {
        // SAFETY: an array of 16.
        unsafe { Self::load(values.as_ptr()) }
    }

    /// Pairwise, so that every implementation adds in one order.
    #[inline(always)]
    fn sum(self) -> f32 {
        fold(self.to_array(), |a, b| a + b)
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        fold(self.to_array(), f32::max)
    }

    /// e to the power of each lane, to within 2 units in the last place; 0 below −103, infinity above 88.8, NaN for NaN.
    #[inline(always)]
    fn exp(self) -> Self {
        // Cephes' expf: e^x = 2^n · e^r with |r| <= ln 2 / 2, and a polynomial for e^r.
        // `max` returns its second operand for NaN on x86, so the limits come first.
        let x = Self::splat(-104.0).max(self);
        let x = Self::splat(0.0).sub(Self::splat(-89.0).max(Self::splat(0.0).sub(x)));
        let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
        let r = n.mul_add(Self::splat(-0.693_359_4), x);
        let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
        let mut p = Self::splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p.mul_add(r, Self::splat(c));
        }
        p.mul_add(r.mul(r), r).add(Self::splat(1.0)).scale(n)
    }
}

#[inline(always)]
fn fold(values: [f32; 16], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut v = values;
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            v[i] = f(v[i], v[i + half]);
        }
        half /= 2;
    }
    v[0]
}

/// Lanes in an array: any processor, and the reference for the others.
#[derive(Clone, Copy)]
pub struct Portable([f32; 16]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 16])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { from.cast::<[f32; 16]>().read() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 16]>().write(self.0) }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        self.mul(factor).add(addend)
    }
    #[inline(always)]
    fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        self.zip(n, |x, n| {
            // In two steps, so that results below the smallest normal number are reached.
            let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
            let (n, half) = (n as i32, n as i32 / 2);
            x * power(half) * power(n - half)
        })
    }
    #[inline(always)]
    fn to_array(self) -> [f32; 16] {
        self.0
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use std::arch::x86_64::*;

    /// One register of AVX-512.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    /// Two registers of AVX2, with FMA.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    // SAFETY, for all of both: `Lanes` asks that these types be used only where their instructions exist.
    impl Lanes for Avx512 {
        #[inline(always)]
        fn splat(value: f32) -> Self {
            Self(unsafe { _mm512_set1_ps(value) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            Self(unsafe { _mm512_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            Self(unsafe { _mm512_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn div(self, other: Self) -> Self {
            Self(unsafe { _mm512_div_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            Self(unsafe { _mm512_max_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, addend: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
        }
        #[inline(always)]
        fn round(self) -> Self {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            Self(unsafe { _mm512_roundscale_ps::<NEAREST>(self.0) })
        }
        #[inline(always)]
        fn scale(self, n: Self) -> Self {
            Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
        }
        #[inline(always)]
        fn transposed(rows: [Self; 16]) -> [Self; 16] {
            unsafe {
                // Within quarters of registers: pairs of rows, then squares of four.
                let mut pairs = [rows[0].0; 16];
                for r in (0..16).step_by(2) {
                    pairs[r] = _mm512_unpacklo_ps(rows[r].0, rows[r + 1].0);
                    pairs[r + 1] = _mm512_unpackhi_ps(rows[r].0, rows[r + 1].0);
                }
                let mut squares = pairs;
                for r in (0..16).step_by(4) {
                    for half in 0..2 {
                        let (a, b) = (pairs[r + half], pairs[r + half + 2]);
                        let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
                        squares[r + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                        squares[r + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                    }
                }
                // `squares[4 * i + j]` has in quarter `q` column `4 * q + j` of rows `4 * i ..`.
                let mut turned = rows;
                for j in 0..4 {
                    let (a, b, c, d) =
                        (squares[j], squares[4 + j], squares[8 + j], squares[12 + j]);
                    let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                    let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
                    let even_below = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
                    let odd_below = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
                    turned[j].0 = _mm512_shuffle_f32x4::<0b10_00_10_00>(even, even_below);
                    turned[4 + j].0 = _mm512_shuffle_f32x4::<0b10_00_10_00>(odd, odd_below);
                    turned[8 + j].0 = _mm512_shuffle_f32x4::<0b11_01_11_01>(even, even_below);
                    turned[12 + j].0 = _mm512_shuffle_f32x4::<0b11_01_11_01>(odd, odd_below);
                }
                turned
            }
        }
        #[inline(always)]
        fn to_array(self) -> [f32; 16] {
            let mut values = [0.0; 16];
            unsafe { self.store(values.as_mut_ptr()) };
            values
        }
    }

    /// The same operation on both halves. A macro, since a closure would not be compiled for AVX2.
    macro_rules! halves {
        ($operation:ident, $a:expr, $b:expr) => {
            unsafe { Avx2($operation($a.0, $b.0), $operation($a.1, $b.1)) }
        };
    }

    /// In two steps, so that results below the smallest normal number are reached.
    #[inline(always)]
    unsafe fn scale_half(x: __m256, n: __m256) -> __m256 {
        unsafe {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let rest = _mm256_sub_epi32(n, half);
            let bias = _mm256_set1_epi32(127);
            let half = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let rest = _mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias));
            let x = _mm256_mul_ps(x, _mm256_castsi256_ps(half));
            _mm256_mul_ps(x, _mm256_castsi256_ps(rest))
        }
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        fn splat(value: f32) -> Self {
            let half = unsafe { _mm256_set1_ps(value) };
            Self(half, half)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            halves!(_mm256_add_ps, self, other)
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            halves!(_mm256_sub_ps, self, other)
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            halves!(_mm256_mul_ps, self, other)
        }
        #[inline(always)]
        fn div(self, other: Self) -> Self {
            halves!(_mm256_div_ps, self, other)
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            halves!(_mm256_max_ps, self, other)
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, addend: Self) -> Self {
            unsafe {
                Self(
                    _mm256_fmadd_ps(self.0, factor.0, addend.0),
                    _mm256_fmadd_ps(self.1, factor.1, addend.1),
                )
            }
        }
        #[inline(always)]
        fn round(self) -> Self {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            unsafe { Self(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)) }
        }
        #[inline(always)]
        fn scale(self, n: Self) -> Self {
            unsafe { Self(scale_half(self.0, n.0), scale_half(self.1, n.1)) }
        }
        #[inline(always)]
        fn to_array(self) -> [f32; 16] {
            let mut values = [0.0; 16];
            unsafe { self.store(values.as_mut_ptr()) };
            values
        }
    }
}

/// `dispatch!(kernel(arguments: types) -> result)` calls `kernel::<L>(arguments)` with the widest
/// [`Lanes`] this processor has, in a function compiled for them.
macro_rules! dispatch {
    ($kernel:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            fn with_avx512($($argument: $type),*) $(-> $result)? {
                $kernel::<$crate::ops::simd::Avx512>($($argument),*)
            }
            #[target_feature(enable = "avx2,fma")]
            fn with_avx2($($argument: $type),*) $(-> $result)? {
                $kernel::<$crate::ops::simd::Avx2>($($argument),*)
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
            {
                // SAFETY: the processor was asked.
                return unsafe { with_avx512($($argument),*) };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: the processor was asked.
                return unsafe { with_avx2($($argument),*) };
            }
        }
        $kernel::<$crate::ops::simd::Portable>($($argument),*)
    }};
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    fn exps<L: Lanes>(x: [f32; 16]) -> [f32; 16] {
        L::from_array(x).exp().to_array()
    }

    fn dispatched(x: [f32; 16]) -> [f32; 16] {
        dispatch!(exps(x: [f32; 16]) -> [f32; 16])
    }

    #[test]
    fn exp_is_that_of_f64_to_two_units_in_the_last_place() {
        for exp in [exps::<Portable>, dispatched] {
            for step in -87_000..88_000 {
                let x = step as f32 * 1e-3;
                let (got, want) = (f64::from(exp([x; 16])[7]), f64::from(x).exp());
                assert!((got - want).abs() <= 2.4e-7 * want, "e^{x} = {want}, not {got}");
            }
            let specials = [f32::NEG_INFINITY, -1e30, -200.0, 0.0, 89.5, 1e30, f32::INFINITY];
            for x in specials {
                assert_eq!(exp([x; 16])[0], x.exp(), "e^{x}");
            }
            assert!(exp([f32::NAN; 16])[3].is_nan());
        }
    }

    #[test]
    fn sums_and_maxima_cover_all_lanes() {
        let values: [f32; 16] = std::array::from_fn(|i| (i as f32 - 7.0) * 3.0);
        assert_eq!(Portable(values).sum(), values.iter().sum::<f32>());
        assert_eq!(Portable(values).largest(), 24.0);
    }
}
