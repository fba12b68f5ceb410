//! Decoders of any shape with random weights: what speed is measured on where there are no files.

use std::ops::Range;

use candle_core::{DType, Result, Shape, Tensor};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::weights::{Placement, WeightReader, build};
use super::{Decoder, ModelConfig, ModelError};
use crate::ops::Matrix;

/// A decoder whose matrices are random, made where `placement` says, with the same numbers for the same
/// `seed` and device. Rows have unit length about, so that activations stay finite in any number of layers;
/// norms are ones.
///
/// # Errors
/// Memory that does not suffice on a GPU, or a configuration that asks for biases.
pub fn random(
    config: ModelConfig,
    placement: &Placement,
    seed: u64,
) -> std::result::Result<Decoder, ModelError> {
    if !placement.device.is_cpu() {
        placement.device.set_seed(seed)?;
    }
    build(config, &RandomWeights { placement, seed })
}

struct RandomWeights<'a> {
    placement: &'a Placement,
    seed: u64,
}

impl WeightReader for RandomWeights<'_> {
    fn vector(&self, name: &str, len: usize) -> std::result::Result<Option<Tensor>, ModelError> {
        let Placement { device, dtype } = self.placement;
        let is_norm = !name.ends_with(".bias");
        Ok(is_norm.then(|| Tensor::ones(len, *dtype, device)).transpose()?)
    }

    fn matrix(
        &self,
        name: &str,
        (rows, columns): (usize, usize),
    ) -> std::result::Result<Option<Matrix>, ModelError> {
        let deviation = 1.0 / (columns as f64).sqrt();
        let digest = Sha256::digest(name.as_bytes());
        let seed =
            self.seed ^ u64::from(u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]]));
        if self.placement.device.is_cpu() && self.placement.dtype == DType::F32 {
            let row = |rows: Range<usize>, to: &mut [f32]| {
                fill(seed, rows.start * columns, deviation, to);
            };
            return Ok(Some(Matrix::from_rows(rows, columns, row)));
        }
        let numbers = noise((rows, columns), deviation, self.placement, seed)?;
        Ok(Some(Matrix::dense(&numbers)?))
    }

    fn rope_divisors(&self) -> std::result::Result<Option<Vec<f32>>, ModelError> {
        Ok(None)
    }
}

/// Numbers evenly spread around 0 with this standard deviation. On a GPU they come from the device's own
/// generator, one call after the other; `seed` is the CPU's.
pub(crate) fn noise(
    shape: impl Into<Shape>,
    deviation: f64,
    placement: &Placement,
    seed: u64,
) -> Result<Tensor> {
    /// Numbers per parallel task.
    const GRAIN: usize = 1 << 18;
    let (shape, Placement { device, dtype }) = (shape.into(), placement);
    if !device.is_cpu() {
        let most = (deviation * 3f64.sqrt()) as f32;
        return Tensor::rand(-most, most, shape, device)?.to_dtype(*dtype);
    }
    let mut numbers = vec![0f32; shape.elem_count()];
    let parts = numbers.par_chunks_mut(GRAIN).enumerate();
    parts.for_each(|(part, to)| fill(seed, part * GRAIN, deviation, to));
    Tensor::from_vec(numbers, shape, device)?.to_dtype(*dtype)
}

/// Numbers `first ..` of the sequence that `seed` begins (SplitMix64, which gives any of them at once).
fn fill(seed: u64, first: usize, deviation: f64, to: &mut [f32]) {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    // A spread of 1 has a standard deviation of 1 / √12; 24 bits are all that f32 holds.
    let scale = (deviation * 12f64.sqrt() / f64::from(1 << 24)) as f32;
    let seed = seed.wrapping_mul(0xd134_2543_de82_ef95);
    for (number, index) in to.iter_mut().zip(first as u64 + 1..) {
        let mut z = seed.wrapping_add(index.wrapping_mul(STEP));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bits = ((z ^ (z >> 31)) >> 40) as i32 - (1 << 23);
        *number = bits as f32 * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_deviation_asked_for_and_depend_on_the_seed_alone() {
        let numbers = |shape: usize, seed| {
            let noise = noise(shape, 0.5, &Placement::default(), seed).unwrap();
            noise.to_vec1::<f32>().unwrap()
        };
        let all = numbers(600_000, 1);
        let mean = all.iter().map(|x| f64::from(*x)).sum::<f64>() / 6e5;
        let square = all.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 6e5;
        assert!(mean.abs() < 0.005 && (square.sqrt() - 0.5).abs() < 0.005, "{mean} {square}");
        assert_eq!(all[..1000], numbers(1000, 1), "the parts of a tensor follow on each other");
        assert_ne!(all[..1000], numbers(1000, 2));
    }

    #[test]
    fn rows_of_a_matrix_do_not_depend_on_how_they_are_asked_for() {
        let placement = Placement::default();
        let reader = RandomWeights { placement: &placement, seed: 7 };
        let matrix = |name: &str| {
            let matrix = reader.matrix(name, (50, 24)).unwrap().unwrap();
            matrix.to_dense(&placement.device).unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(matrix("a"), matrix("a"));
        let all = matrix("a").concat();
        assert!(all.windows(2).all(|pair| pair[0] != pair[1]), "rows follow on each other");
        assert_ne!(matrix("a"), matrix("b"));
    }
}
