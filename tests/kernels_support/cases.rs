//! Random inputs, and how far a kernel may be from the f64 twin.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Buffer, Number, Side};

/// Heads and width of an attention.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
}

pub fn shape(heads: usize, kv_heads: usize, dim: usize) -> Shape {
    Shape { heads, kv_heads, dim }
}

/// Every case draws from its own seed, which also orders the threads and picks the sides of buffers.
pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub fn numbers<T: Number>(&mut self, len: usize) -> Vec<T> {
        (0..len).map(|_| T::of(self.0.random_range(-1.5f32..1.5))).collect()
    }

    pub fn side(&mut self) -> Side {
        if self.0.random_bool(0.5) { Side::Front } else { Side::Back }
    }

    /// An order of threads; often forwards or backwards, where one warp runs ahead as far as it can.
    pub fn seed(&mut self) -> u64 {
        match self.0.random_range(0..1000) {
            seed @ 0..600 => seed % 2,
            seed => seed,
        }
    }

    /// `0 .. of`, in random order.
    pub fn order(&mut self, of: usize) -> Vec<i32> {
        let mut order: Vec<i32> = (0..of as i32).collect();
        for i in (1..of).rev() {
            order.swap(i, self.0.random_range(0..=i));
        }
        order
    }
}

/// What a twin computed: the result, how much rounding the weights may change it, the log-sum-exp.
pub struct Expected {
    pub out: Buffer<f64>,
    pub noise: Buffer<f64>,
    pub lse: Buffer<f64>,
}

impl Expected {
    /// NaN wherever the twin writes nothing.
    pub fn new(rows: usize, dim: usize) -> Self {
        let nan = |len| Buffer::poisoned(len, Side::Back);
        Self { out: nan(rows * dim), noise: nan(rows * dim), lse: nan(rows) }
    }

    /// `T`: the type that weights are rounded to, `O` that of the result.
    #[track_caller]
    pub fn check<T: Number, O: Number>(&self, out: &Buffer<O>, lse: &Buffer<f32>, case: &str) {
        let (wanted, noise) = (self.out.read(), self.noise.read());
        let out = out.read();
        assert_eq!(out.len(), wanted.len());
        for (i, (got, (want, noise))) in out.iter().zip(wanted.iter().zip(&noise)).enumerate() {
            let most = 4.0 * T::EPSILON * noise + 2.0 * O::EPSILON * want.abs() + 2e-6;
            check_one(f64::from(got.to_f32()), *want, most, || format!("{case}: out[{i}]"));
        }
        let (lse, wanted) = (lse.read(), self.lse.read());
        assert_eq!(lse.len(), wanted.len());
        for (i, (got, want)) in lse.iter().zip(&wanted).enumerate() {
            let most = 1e-5 + 2e-6 * want.abs();
            check_one(f64::from(*got), *want, most, || format!("{case}: lse[{i}]"));
        }
    }
}

/// Equal, both NaN (nothing was to be written), or not further apart than `most`.
#[track_caller]
pub fn check_one(got: f64, want: f64, most: f64, what: impl Fn() -> String) {
    let fine = got == want || (got - want).abs() <= most || got.is_nan() && want.is_nan();
    assert!(fine, "{} is {got}, not {want} (within {most:e})", what());
}
