//! Activations rounded to 8 bits, in the order the kernels read them.

use rayon::prelude::*;

use crate::ops::simd::{Lanes, dispatch};

/// Values that share one scale, as in Q8_0.
pub(super) const BLOCK: usize = 32;
/// Tokens that a kernel multiplies at once: as many as keep their sums in registers.
pub(super) const CHUNK_TOKENS: usize = 8;

/// Tokens of one chunk, block by block: for block `b` and token `t` of `tokens`, index `b * tokens + t`.
#[derive(Debug)]
pub(super) struct Chunk {
    pub tokens: usize,
    /// The block's signed bytes, four to a word.
    pub words: Vec<[i32; BLOCK / 4]>,
    /// What a byte counts.
    pub scales: Vec<f32>,
    /// −128 times the sum of the block's bytes: what storing weights as `w + 128` adds is taken off.
    pub offsets: Vec<i32>,
}

/// Rounds `x` `[tokens, input]`, chunk by chunk. `input` is a multiple of [`BLOCK`].
pub(super) fn quantize(x: &[f32], input: usize) -> Vec<Chunk> {
    x.par_chunks(CHUNK_TOKENS * input).map(|rows| chunk(rows, input)).collect()
}

fn chunk(rows: &[f32], input: usize) -> Chunk {
    dispatch!(chunk_with(rows: &[f32], input: usize) -> Chunk)
}

#[inline(always)]
fn chunk_with<L: Lanes>(rows: &[f32], input: usize) -> Chunk {
    let (tokens, blocks) = (rows.len() / input, input / BLOCK);
    let mut words = vec![[0; BLOCK / 4]; tokens * blocks];
    let mut scales = vec![0f32; tokens * blocks];
    let mut offsets = vec![0; tokens * blocks];
    for (t, row) in rows.chunks_exact(input).enumerate() {
        for (b, values) in row.chunks_exact(BLOCK).enumerate() {
            // SAFETY: a block is two vectors.
            let (low, high) =
                unsafe { (L::load(values.as_ptr()), L::load(values.as_ptr().add(BLOCK / 2))) };
            let zero = L::splat(0.0);
            let (low_size, high_size) = (low.max(zero.sub(low)), high.max(zero.sub(high)));
            // A block that is not finite has to spoil its row: the engine looks for that in the logits.
            // Nothing times zero is zero, except what is not finite.
            let spoilt = low.mul(zero).add(high.mul(zero)).sum();
            let largest = low_size.max(high_size).largest();
            let usable = largest > 0.0 && spoilt == 0.0;
            let inverse = L::splat(if usable { 127.0 / largest } else { 0.0 });
            let low = low.mul(inverse).round().to_array();
            let high = high.mul(inverse).round().to_array();
            let mut bytes = [0i8; BLOCK];
            for i in 0..BLOCK / 2 {
                bytes[i] = low[i] as i8;
                bytes[i + BLOCK / 2] = high[i] as i8;
            }
            let at = b * tokens + t;
            words[at] = bytemuck::cast(bytes);
            scales[at] = if spoilt == 0.0 { largest / 127.0 } else { f32::NAN };
            offsets[at] = -128 * bytes.iter().map(|byte| i32::from(*byte)).sum::<i32>();
        }
    }
    Chunk { tokens, words, scales, offsets }
}
