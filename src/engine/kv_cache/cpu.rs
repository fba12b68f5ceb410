//! The KV cache on the CPU, in f32.

use candle_core::{Result, Storage, Tensor};

use super::{BatchEntry, block_elements};
use crate::cartridge::{KvShape, LayerKv};
use crate::engine::blocks::{BLOCK_TOKENS, BlockTable};
use crate::model::Attend;
use crate::ops::attention::{Heads, KvRun, SequenceQueries, segment_attention};
use crate::ops::{f32_slice, with_f32};

/// Keys and values of all blocks in f32: per layer keys `[blocks, kv_heads, head_dim, BLOCK_TOKENS]`, so that
/// the keys of a block lie side by side as attention reads them, and values
/// `[blocks, kv_heads, BLOCK_TOKENS, head_dim]`.
///
/// The memory is reserved zeroed and becomes resident block by block as it is written.
pub struct CpuKvCache {
    shape: KvShape,
    layers: Vec<LayerCache>,
}

struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl CpuKvCache {
    pub fn new(shape: KvShape, blocks: usize) -> Self {
        let len = blocks * block_elements(shape);
        let layer = || LayerCache { keys: vec![0.0; len], values: vec![0.0; len] };
        Self { shape, layers: (0..shape.layers).map(|_| layer()).collect() }
    }
}

impl LayerCache {
    /// Stores one token's keys and values `[kv_heads, head_dim]` at token index `at` of a sequence.
    fn write(&mut self, shape: KvShape, table: &BlockTable, at: usize, k: &[f32], v: &[f32]) {
        let (block, slot) = (table.blocks()[at / BLOCK_TOKENS] as usize, at % BLOCK_TOKENS);
        for head in 0..shape.kv_heads {
            let start = (block * shape.kv_heads + head) * BLOCK_TOKENS * shape.head_dim;
            let from = head * shape.head_dim..(head + 1) * shape.head_dim;
            let keys = self.keys[start + slot..].iter_mut().step_by(BLOCK_TOKENS);
            keys.zip(&k[from.clone()]).for_each(|(to, from)| *to = *from);
            let to = start + slot * shape.head_dim;
            self.values[to..to + shape.head_dim].copy_from_slice(&v[from]);
        }
    }

    /// The first `tokens` tokens of a sequence, block by block.
    fn runs<'a>(&'a self, shape: KvShape, table: &BlockTable, tokens: usize) -> Vec<KvRun<'a>> {
        let elements = block_elements(shape);
        let starts = (0..tokens).step_by(BLOCK_TOKENS);
        table
            .blocks()
            .iter()
            .zip(starts)
            .map(|(&block, start)| KvRun {
                keys: &self.keys[block as usize * elements..][..elements],
                key_head_stride: BLOCK_TOKENS * shape.head_dim,
                key_stride: BLOCK_TOKENS,
                values: &self.values[block as usize * elements..][..elements],
                value_head_stride: BLOCK_TOKENS * shape.head_dim,
                len: BLOCK_TOKENS.min(tokens - start),
                bias: None,
            })
            .collect()
    }
}

/// A cartridge's layer as attention reads it. Its keys must be laid out by [`crate::cartridge::Cartridge::for_attention`].
fn cartridge_run<'a>(
    keys: &'a Storage,
    values: &'a Storage,
    bias: Option<&'a (impl std::ops::Deref<Target = Storage>, &Tensor)>,
    kv: &LayerKv,
) -> Result<KvRun<'a>> {
    let (_, len, head_dim) = kv.keys.dims3()?;
    let keys_of_head = kv.keys.transpose(1, 2)?;
    let bias = bias.map(|(storage, bias)| f32_slice(storage, bias)).transpose()?;
    Ok(KvRun {
        keys: f32_slice(keys, &keys_of_head)?,
        key_head_stride: head_dim * len,
        key_stride: len,
        values: f32_slice(values, &kv.values)?,
        value_head_stride: len * head_dim,
        len,
        bias,
    })
}

/// Attention of a step over this cache.
pub struct CpuAttention<'a> {
    pub cache: &'a mut CpuKvCache,
    pub batch: &'a [BatchEntry<'a>],
    pub group_min: usize,
}

impl Attend for CpuAttention<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let shape = self.cache.shape;
        let (_, heads, head_dim) = q.dims3()?;
        let store = &mut self.cache.layers[layer];
        with_f32(k, |k| {
            with_f32(v, |v| {
                let width = shape.kv_heads * shape.head_dim;
                let mut tokens = k.chunks_exact(width).zip(v.chunks_exact(width));
                for entry in self.batch {
                    for (at, (k, v)) in (entry.start..entry.start + entry.rows).zip(tokens.by_ref())
                    {
                        store.write(shape, entry.table, at, k, v);
                    }
                }
                Ok(())
            })
        })?;

        // Read locks on the cartridge tensors are held until attention is done.
        let cartridges = self.batch.iter().flat_map(|entry| entry.cartridges.iter());
        let locked: Vec<_> = cartridges
            .map(|cartridge| {
                let kv = &cartridge.layers()[layer];
                let bias = kv.bias.as_ref().map(|bias| (bias.storage_and_layout().0, bias));
                (kv.keys.storage_and_layout().0, kv.values.storage_and_layout().0, bias, kv)
            })
            .collect();
        let mut shared = locked
            .iter()
            .map(|(keys, values, bias, kv)| cartridge_run(keys, values, bias.as_ref(), kv));
        let store = &*store;
        let mut sequences = Vec::with_capacity(self.batch.len());
        let mut first_row = 0;
        for entry in self.batch {
            sequences.push(SequenceQueries {
                first_row,
                rows: entry.rows,
                shared: shared.by_ref().take(entry.cartridges.len()).collect::<Result<_>>()?,
                own: store.runs(shape, entry.table, entry.start + entry.rows),
                own_before: entry.start,
            });
            first_row += entry.rows;
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        let out = with_f32(q, |q| {
            let heads = Heads { heads, kv_heads: shape.kv_heads, head_dim };
            Ok(segment_attention(q, heads, scale, &sequences, self.group_min))
        })?;
        Tensor::from_vec(out, q.shape(), q.device())
    }
}
