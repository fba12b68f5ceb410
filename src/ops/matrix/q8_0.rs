//! Q8_0 weights laid out for AVX-512 VNNI, and their product with a batch of tokens.
//!
//! Sixteen outputs make a tile, one per lane. Along the input a tile is cut into Q8_0's blocks of 32
//! weights with one scale; a block is eight vectors of 64 bytes, each with four weights of every lane,
//! which is what `vpdpbusd` multiplies with four broadcast activations. Sums within a block are exact
//! integers and blocks are added in order, so a token's result has the same bits in any batch.

use std::ops::Range;

use candle_core::{Result, bail};
use half::f16;
use rayon::prelude::*;

use super::activations::{BLOCK, CHUNK_TOKENS, Chunk, quantize};
use super::transposed::Tiles;
use super::{LANES, Output, for_tiles};
use crate::ops::memory::Pages;

/// Vectors of weights per block of a tile.
const VECTORS: usize = BLOCK / 4;
/// Bytes of a Q8_0 block in a file: a scale and its weights.
const FILE_BLOCK_BYTES: usize = 2 + BLOCK;
/// Weights that one thread multiplies with chunk after chunk of tokens; they stay in its L2 cache.
const GROUP_BYTES: usize = 512 << 10;

/// Four weights, plus 128, of each of sixteen outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Vector([[u8; 4]; LANES]);

/// One block's scales, as the bits of f16.
type Scales = [u16; LANES];

/// A matrix `[out, in]` in tiles.
#[derive(Debug)]
pub(super) struct PackedQ8 {
    out: usize,
    input: usize,
    /// `[tiles, in / 32, 8]`.
    weights: Pages<Vector>,
    /// `[tiles, in / 32]`.
    scales: Pages<Scales>,
}

impl PackedQ8 {
    /// Whether this processor has the instructions.
    pub fn is_supported() -> bool {
        #[cfg(target_arch = "x86_64")]
        return is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// From the bytes of a Q8_0 matrix as GGUF stores it, row by row.
    pub fn new(bytes: &[u8], (out, input): (usize, usize)) -> Result<Self> {
        let row_bytes = input / BLOCK * FILE_BLOCK_BYTES;
        if !input.is_multiple_of(BLOCK) || bytes.len() != out * row_bytes {
            bail!("{} bytes are no Q8_0 matrix of [{out}, {input}]", bytes.len());
        }
        let (tiles, blocks) = (out.div_ceil(LANES), input / BLOCK);
        // Outputs that do not exist have a scale of zero, so their weights do not matter.
        let mut weights = Pages::<Vector>::zeroed(tiles * blocks * VECTORS);
        let mut scales = Pages::<Scales>::zeroed(tiles * blocks);
        weights
            .par_chunks_exact_mut(blocks * VECTORS)
            .zip(scales.par_chunks_exact_mut(blocks))
            .zip(bytes.par_chunks(LANES * row_bytes))
            .for_each(|((weights, scales), rows)| {
                for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
                    for (b, block) in row.chunks_exact(FILE_BLOCK_BYTES).enumerate() {
                        let (scale, quants) = block.split_at(2);
                        scales[b][lane] = u16::from_le_bytes([scale[0], scale[1]]);
                        for (v, four) in quants.chunks_exact(4).enumerate() {
                            weights[b * VECTORS + v].0[lane] =
                                std::array::from_fn(|i| four[i] ^ 0x80);
                        }
                    }
                }
            });
        Ok(Self { out, input, weights, scales })
    }

    pub fn dims(&self) -> (usize, usize) {
        (self.out, self.input)
    }

    pub fn visit_bytes(&self, f: &mut impl FnMut(&[u8])) {
        f(bytemuck::cast_slice(&self.weights));
        f(bytemuck::cast_slice(&self.scales));
    }

    pub fn bytes(&self) -> u64 {
        (size_of_val(&self.weights[..]) + size_of_val(&self.scales[..])) as u64
    }

    /// Rows `ids` in f32, one after the other. Each must exist.
    pub fn rows(&self, ids: &[u32]) -> Vec<f32> {
        let blocks = self.input / BLOCK;
        let mut rows = vec![0f32; ids.len() * self.input];
        rows.par_chunks_mut(self.input).zip(ids).for_each(|(row, id)| {
            let (tile, lane) = (*id as usize / LANES, *id as usize % LANES);
            for (b, values) in row.chunks_exact_mut(BLOCK).enumerate() {
                let block = tile * blocks + b;
                let scale = f16::from_bits(self.scales[block][lane]).to_f32();
                let vectors = &self.weights[block * VECTORS..][..VECTORS];
                for (values, vector) in values.chunks_exact_mut(4).zip(vectors) {
                    for (value, quant) in values.iter_mut().zip(vector.0[lane]) {
                        *value = f32::from((quant ^ 0x80) as i8) * scale;
                    }
                }
            }
        });
        rows
    }

    /// `x · weightᵀ` for `x` `[tokens, in]`: `[tokens, out]`. Needs [`Self::is_supported`].
    pub fn product(&self, x: &[f32]) -> Vec<f32> {
        let chunks = quantize(x, self.input);
        let tokens = x.len() / self.input;
        let blocks = self.input / BLOCK;
        let tiles = self.out.div_ceil(LANES);
        let mut result = vec![0f32; tokens * self.out];
        let output = Output::new(&mut result, self.out, self.out);
        let in_cache = GROUP_BYTES / (self.input * LANES);
        for_tiles(tiles, in_cache, tokens * self.out * self.input, |range| {
            for (c, chunk) in chunks.iter().enumerate() {
                for tile in range.clone() {
                    let weights = &self.weights[tile * blocks * VECTORS..][..blocks * VECTORS];
                    let scales = &self.scales[tile * blocks..][..blocks];
                    let sums = tile_product(weights, scales, chunk);
                    for (t, sums) in sums[..chunk.tokens].iter().enumerate() {
                        // SAFETY: every (token, tile) is written once, by one task, within `result`.
                        unsafe { output.write(c * CHUNK_TOKENS + t, tile * LANES, sums) };
                    }
                }
            }
        });
        result
    }
}

impl Tiles for PackedQ8 {
    fn dims(&self) -> (usize, usize) {
        (self.out, self.input)
    }

    fn turn(&self, rows: Range<usize>, columns: Range<usize>, to: &mut [[f32; LANES]]) {
        let blocks = self.input / BLOCK;
        // A block is two tiles of columns.
        for (b, to) in (columns.start / BLOCK..).zip(to.chunks_mut(BLOCK / LANES * rows.len())) {
            for (r, row) in rows.clone().enumerate() {
                let (block, lane) = (row / LANES * blocks + b, row % LANES);
                let scale = f16::from_bits(self.scales[block][lane]).to_f32();
                let vectors = &self.weights[block * VECTORS..][..VECTORS];
                let value = |column: usize| {
                    f32::from((vectors[column / 4].0[lane][column % 4] ^ 0x80) as i8) * scale
                };
                to[r] = std::array::from_fn(value);
                to[rows.len() + r] = std::array::from_fn(|column| value(LANES + column));
            }
        }
    }
}

/// One tile with one chunk of tokens: per token the sixteen outputs.
fn tile_product(
    weights: &[Vector],
    scales: &[Scales],
    chunk: &Chunk,
) -> [[f32; LANES]; CHUNK_TOKENS] {
    #[cfg(target_arch = "x86_64")]
    {
        debug_assert!(PackedQ8::is_supported());
        let mut sums = [[0f32; LANES]; CHUNK_TOKENS];
        macro_rules! with_tokens {
            ($($n:literal)*) => {
                match chunk.tokens {
                    // SAFETY: matrices are packed only where the processor was asked for the features.
                    $($n => unsafe { avx512::tile_product::<$n>(weights, scales, chunk, &mut sums) },)*
                    tokens => unreachable!("a chunk of {tokens} tokens"),
                }
            };
        }
        with_tokens!(1 2 3 4 5 6 7 8);
        sums
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (weights, scales, chunk);
        unreachable!("matrices are packed only where there is a kernel")
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{CHUNK_TOKENS, Chunk, LANES, Scales, VECTORS, Vector};

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn tile_product<const TOKENS: usize>(
        weights: &[Vector],
        scales: &[Scales],
        chunk: &Chunk,
        out: &mut [[f32; LANES]; CHUNK_TOKENS],
    ) {
        let mut sums = [_mm512_setzero_ps(); TOKENS];
        let blocks = weights.chunks_exact(VECTORS).zip(scales);
        let words = chunk.words.chunks_exact(TOKENS);
        let numbers = chunk.scales.chunks_exact(TOKENS).zip(chunk.offsets.chunks_exact(TOKENS));
        for (((weights, scale), words), (x_scales, offsets)) in blocks.zip(words).zip(numbers) {
            let mut dots = [_mm512_setzero_si512(); TOKENS];
            for t in 0..TOKENS {
                dots[t] = _mm512_set1_epi32(offsets[t]);
            }
            for (v, weights) in weights.iter().enumerate() {
                // SAFETY: 64 aligned bytes.
                let weights = unsafe { _mm512_load_si512((&raw const *weights).cast()) };
                for t in 0..TOKENS {
                    dots[t] = _mm512_dpbusd_epi32(dots[t], weights, _mm512_set1_epi32(words[t][v]));
                }
            }
            // SAFETY: 16 halves are 32 bytes.
            let scale = _mm512_cvtph_ps(unsafe { _mm256_loadu_si256((&raw const *scale).cast()) });
            for t in 0..TOKENS {
                let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[t]));
                sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), scale, sums[t]);
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            // SAFETY: 16 floats are 64 bytes.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    fn matrix(out: usize, input: usize) -> Result<(PackedQ8, Vec<Vec<f32>>)> {
        let dense = Tensor::randn(0f32, 1f32, (out, input), &Device::Cpu)?;
        let tensor = QTensor::quantize(&dense, GgmlDType::Q8_0)?;
        let packed = PackedQ8::new(&tensor.data()?, (out, input))?;
        Ok((packed, tensor.dequantize(&Device::Cpu)?.to_vec2()?))
    }

    #[test]
    fn packing_keeps_every_weight() -> Result<()> {
        for (out, input) in [(1, 32), (16, 64), (37, 96)] {
            let (packed, dense) = matrix(out, input)?;
            let ids: Vec<u32> = (0..out as u32).rev().collect();
            let rows = packed.rows(&ids);
            for (row, id) in rows.chunks_exact(input).zip(ids) {
                assert_eq!(row, dense[id as usize]);
            }
        }
        assert!(PackedQ8::new(&[0; 34], (1, 48)).is_err());
        Ok(())
    }

    /// Against the sum in f64 over the rounded activations: only the order of additions may differ.
    #[test]
    fn equals_the_naive_sum_and_does_not_depend_on_the_batch() -> Result<()> {
        if !PackedQ8::is_supported() {
            return Ok(()); // such a processor never packs
        }
        for (out, input) in [(16, 32), (33, 256), (130, 2048)] {
            let (packed, dense) = matrix(out, input)?;
            let x = Tensor::randn(0f32, 3f32, (19, input), &Device::Cpu)?;
            let x = x.flatten_all()?.to_vec1::<f32>()?;
            let all = packed.product(&x);
            for (t, row) in x.chunks_exact(input).enumerate() {
                let rounded: Vec<f64> = row
                    .chunks_exact(BLOCK)
                    .flat_map(|block| {
                        let scale = block.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
                        let round = move |v: &f32| f64::from((v / scale).round() * scale);
                        block.iter().map(round).collect::<Vec<_>>()
                    })
                    .collect();
                for (o, weights) in dense.iter().enumerate() {
                    let terms = || weights.iter().zip(&rounded).map(|(w, x)| f64::from(*w) * x);
                    let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    let got = f64::from(all[t * out + o]);
                    // Half a step of rounding may fall either way for a few activations.
                    assert!((got - want).abs() <= 1e-3 * size, "{got} for {want} of {size}");
                }
                assert_eq!(packed.product(row), all[t * out..][..out], "token {t} alone");
            }
        }
        Ok(())
    }

    #[test]
    fn a_value_that_is_not_finite_spoils_its_own_token_only() -> Result<()> {
        if !PackedQ8::is_supported() {
            return Ok(());
        }
        let (packed, _) = matrix(16, 64)?;
        let mut x = vec![1f32; 2 * 64];
        x[3] = f32::INFINITY;
        let y = packed.product(&x);
        assert!(y[..16].iter().all(|v| v.is_nan()) && y[16..].iter().all(|v| v.is_finite()));
        Ok(())
    }
}
