//! Activations rounded to 8 bits, in the order the kernels read them.

use rayon::prelude::*;

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
    let (tokens, blocks) = (rows.len() / input, input / BLOCK);
    let mut words = Vec::with_capacity(tokens * blocks);
    let mut scales = Vec::with_capacity(tokens * blocks);
    let mut offsets = Vec::with_capacity(tokens * blocks);
    for block in 0..blocks {
        for row in rows.chunks_exact(input) {
            let values = &row[block * BLOCK..][..BLOCK];
            let largest = values.iter().fold(0f32, |max, v| max.max(v.abs()));
            // A block that is not finite has to spoil its row: the engine looks for that in the logits.
            let finite = values.iter().all(|v| v.is_finite());
            let scale = if finite { largest / 127.0 } else { f32::NAN };
            let inverse = if largest > 0.0 && finite { 127.0 / largest } else { 0.0 };
            let mut word = [0i32; BLOCK / 4];
            let mut sum = 0;
            for (word, four) in word.iter_mut().zip(values.chunks_exact(4)) {
                let mut bytes = [0u8; 4];
                for (byte, value) in bytes.iter_mut().zip(four) {
                    let rounded = (value * inverse).round_ties_even() as i8;
                    sum += i32::from(rounded);
                    *byte = rounded as u8;
                }
                *word = i32::from_le_bytes(bytes);
            }
            words.push(word);
            scales.push(scale);
            offsets.push(-128 * sum);
        }
    }
    Chunk { tokens, words, scales, offsets }
}
