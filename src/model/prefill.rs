//! The keys and values the decoder itself computes for a text: an exact cartridge.

use candle_core::{Result, Tensor};

use super::{Attend, Decoder};
use crate::cartridge::LayerKv;
use crate::gpu::is_gpu;
use crate::ops::attention::{
    Heads, KEY_LANES, KvRun, PackedAttention, PackedKv, SequenceQueries, segment_attention,
};
use crate::ops::{f32_slice, with_f32};

/// Tokens computed at once: activations are held for so many, not for the whole document. A multiple of the
/// lanes of attention.
const CHUNK: usize = 32 * KEY_LANES;

/// Per-layer keys (after RoPE) and values of `tokens` at positions 0, 1, …, in the decoder's type on its device.
///
/// A prompt that continues after such a cartridge sees exactly what it would see after the tokens.
pub fn prefill(decoder: &Decoder, tokens: &[u32]) -> Result<Vec<LayerKv>> {
    prefill_chunked(decoder, tokens, CHUNK)
}

fn prefill_chunked(decoder: &Decoder, tokens: &[u32], chunk: usize) -> Result<Vec<LayerKv>> {
    match is_gpu(decoder.device(), decoder.dtype()) {
        true => prefill_on_gpu(decoder, tokens, chunk),
        false => prefill_on_cpu(decoder, tokens, chunk),
    }
}

/// Calls `forward` with each chunk and the number of tokens before it.
fn chunks(
    tokens: &[u32],
    chunk: usize,
    mut forward: impl FnMut(&[u32], usize) -> Result<()>,
) -> Result<()> {
    let starts = (0..).step_by(chunk);
    tokens.chunks(chunk).zip(starts).try_for_each(|(tokens, start)| forward(tokens, start))
}

fn positions(tokens: &[u32], start: usize) -> Vec<u32> {
    (start as u32..).take(tokens.len()).collect()
}

fn prefill_on_cpu(decoder: &Decoder, tokens: &[u32], chunk: usize) -> Result<Vec<LayerKv>> {
    let layers = decoder.config().layers;
    let mut recording = Recording { layers: (0..layers).map(|_| Vec::new()).collect() };
    chunks(tokens, chunk, |tokens, start| {
        decoder.forward(tokens, &positions(tokens, start), &mut recording).map(|_| ())
    })?;
    recording.layers.into_iter().map(joined).collect()
}

/// Keys and values of a layer, each `[kv_heads, tokens, head_dim]`, from those of its chunks.
fn joined(chunks: Vec<(Tensor, Tensor)>) -> Result<LayerKv> {
    let (keys, values): (Vec<_>, Vec<_>) = chunks.into_iter().unzip();
    let keys = Tensor::cat(&keys, 2)?.transpose(1, 2)?.contiguous()?;
    Ok(LayerKv { keys, values: Tensor::cat(&values, 1)?, bias: None })
}

/// Causal attention of one sequence over itself, chunk by chunk, that keeps what it is given.
struct Recording {
    /// Per layer, the keys `[kv_heads, head_dim, tokens]` and values `[kv_heads, tokens, head_dim]` of each
    /// chunk so far.
    layers: Vec<Vec<(Tensor, Tensor)>>,
}

impl Attend for Recording {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (rows, heads, head_dim) = q.dims3()?;
        let chunks = &mut self.layers[layer];
        chunks.push((k.permute((1, 2, 0))?.contiguous()?, v.transpose(0, 1)?.contiguous()?));
        let stored: Vec<_> = chunks
            .iter()
            .map(|(keys, values)| (keys.storage_and_layout().0, values.storage_and_layout().0))
            .collect();
        let own = chunks
            .iter()
            .zip(&stored)
            .map(|((keys, values), (stored_keys, stored_values))| {
                let len = values.dim(1)?;
                Ok(KvRun {
                    keys: f32_slice(stored_keys, keys)?,
                    key_head_stride: head_dim * len,
                    key_stride: len,
                    values: f32_slice(stored_values, values)?,
                    value_head_stride: len * head_dim,
                    len,
                    bias: None,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let own_before = own.iter().map(|run| run.len).sum::<usize>() - rows;
        let sequence = SequenceQueries { first_row: 0, rows, shared: Vec::new(), own, own_before };
        let heads = Heads { heads, kv_heads: k.dim(1)?, head_dim };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let out = with_f32(q, |q| Ok(segment_attention(q, heads, scale, &[sequence], 1)))?;
        Tensor::from_vec(out, q.shape(), q.device())
    }
}

fn prefill_on_gpu(decoder: &Decoder, tokens: &[u32], chunk: usize) -> Result<Vec<LayerKv>> {
    let (config, device) = (decoder.config(), decoder.device());
    let heads = Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
    let shape = (config.kv_heads, tokens.len(), config.head_dim);
    let zeros = || Tensor::zeros(shape, decoder.dtype(), device);
    let mut layers = Vec::with_capacity(config.layers);
    for _ in 0..config.layers {
        layers.push(LayerKv { keys: zeros()?, values: zeros()?, bias: None });
    }
    let scale = 1.0 / (config.head_dim as f32).sqrt();
    chunks(tokens, chunk, |tokens, start| {
        let len = tokens.len() as u32;
        let all: Vec<u32> = (0..len).collect();
        let attention = PackedAttention::new(&[0, len], &all, heads, scale, device)?;
        let mut stored = Stored { layers: &layers, start, attention };
        decoder.forward(tokens, &positions(tokens, start), &mut stored).map(|_| ())
    })?;
    Ok(layers)
}

/// The same on a GPU: what is stored already is the prefix of a chunk.
struct Stored<'a> {
    /// With room for all tokens.
    layers: &'a [LayerKv],
    /// Tokens stored.
    start: usize,
    /// Of the chunk.
    attention: PackedAttention,
}

impl Attend for Stored<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let LayerKv { keys, values, .. } = &self.layers[layer];
        let (stored_keys, stored_values) =
            (keys.narrow(1, 0, self.start)?, values.narrow(1, 0, self.start)?);
        let prefix = (self.start > 0).then_some((&stored_keys, &stored_values));
        let (out, _) = self.attention.forward(q, PackedKv { k, v, prefix })?;
        for (to, from) in [(keys, k), (values, v)] {
            to.slice_set(&from.transpose(0, 1)?.contiguous()?, 1, self.start)?;
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LoadOptions, ModelSource, load_decoder};
    use crate::ops::tests::assert_close;

    #[test]
    fn chunks_give_the_keys_and_values_of_one_pass() {
        let decoder = load_decoder(&ModelSource::Demo, &LoadOptions::default()).unwrap();
        let tokens: Vec<u32> = (0..45).map(|i| i * 7 % 90).collect();
        let whole = prefill_chunked(&decoder, &tokens, tokens.len()).unwrap();
        assert_eq!(whole.len(), decoder.config().layers);
        for chunk in [16, 32] {
            let parts = prefill_chunked(&decoder, &tokens, chunk).unwrap();
            assert_eq!(parts.len(), whole.len());
            for (part, whole) in parts.iter().zip(&whole) {
                assert_eq!(whole.keys.dim(1).unwrap(), tokens.len());
                for (part, whole) in [(&part.keys, &whole.keys), (&part.values, &whole.values)] {
                    // Matrix products of other heights round otherwise, in proportion to the values.
                    let largest = whole.abs().unwrap().max_all().unwrap();
                    let largest = largest.to_scalar::<f32>().unwrap();
                    assert_close(part, whole, 1e-5 * largest.max(1.0));
                }
            }
        }
    }
}
