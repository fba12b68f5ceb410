//! The keys and values the decoder itself computes for a text: an exact cartridge.

use candle_core::{Result, Tensor};

use super::{Attend, Decoder};
use crate::cartridge::LayerKv;
use crate::ops::attention::{KvRun, SequenceQueries, segment_attention};
use crate::ops::{f32_slice, with_f32};

/// Per-layer keys (after RoPE) and values of `tokens` at positions 0, 1, …
///
/// A prompt that continues after such a cartridge sees exactly what it would see after the tokens.
pub fn prefill(decoder: &Decoder, tokens: &[u32]) -> Result<Vec<LayerKv>> {
    let positions: Vec<u32> = (0..tokens.len() as u32).collect();
    let mut recording = Recording { layers: Vec::new() };
    decoder.forward(tokens, &positions, &mut recording)?;
    Ok(recording.layers)
}

/// Causal attention of one sequence over itself that keeps what it is given.
struct Recording {
    layers: Vec<LayerKv>,
}

impl Attend for Recording {
    fn attend(&mut self, _layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (tokens, heads, head_dim) = q.dims3()?;
        let keys = k.transpose(0, 1)?.contiguous()?;
        let values = v.transpose(0, 1)?.contiguous()?;
        let out = {
            let (stored_keys, _) = keys.storage_and_layout();
            let (stored_values, _) = values.storage_and_layout();
            let run = KvRun {
                keys: f32_slice(&stored_keys, &keys)?,
                values: f32_slice(&stored_values, &values)?,
                head_stride: tokens * head_dim,
                len: tokens,
                bias: None,
            };
            let sequence = SequenceQueries {
                first_row: 0,
                rows: tokens,
                shared: Vec::new(),
                own: vec![run],
                own_before: 0,
            };
            let shape = (heads, k.dim(1)?, head_dim);
            let scale = 1.0 / (head_dim as f32).sqrt();
            with_f32(q, |q| Ok(segment_attention(q, shape, scale, &[sequence])))?
        };
        self.layers.push(LayerKv { keys, values, bias: None });
        Tensor::from_vec(out, q.shape(), q.device())
    }
}
