//! Storage of the paged KV cache on the CPU, and attention over it.

use candle_core::{Result, Tensor};

use super::blocks::{BLOCK_TOKENS, BlockTable};
use crate::cartridge::{KvShape, Lease};
use crate::model::Attend;
use crate::ops::attention::{KvRun, SequenceQueries, segment_attention};
use crate::ops::{f32_slice, with_f32};

/// Keys and values of all blocks: per layer `[blocks, kv_heads, BLOCK_TOKENS, head_dim]`, f32.
///
/// The memory is reserved zeroed and becomes resident block by block as it is written.
pub struct KvCache {
    shape: KvShape,
    layers: Vec<LayerCache>,
}

struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    pub fn new(shape: KvShape, blocks: usize) -> Self {
        let len = blocks * Self::block_elements(shape);
        let layer = || LayerCache { keys: vec![0.0; len], values: vec![0.0; len] };
        Self { shape, layers: (0..shape.layers).map(|_| layer()).collect() }
    }

    /// Bytes one block takes over all layers, keys and values.
    pub fn block_bytes(shape: KvShape) -> u64 {
        (2 * shape.layers * Self::block_elements(shape) * size_of::<f32>()) as u64
    }

    fn block_elements(shape: KvShape) -> usize {
        shape.kv_heads * BLOCK_TOKENS * shape.head_dim
    }
}

impl LayerCache {
    /// Stores one token's keys and values `[kv_heads, head_dim]` at token index `at` of a sequence.
    fn write(&mut self, shape: KvShape, table: &BlockTable, at: usize, k: &[f32], v: &[f32]) {
        let (block, slot) = (table.blocks()[at / BLOCK_TOKENS] as usize, at % BLOCK_TOKENS);
        for head in 0..shape.kv_heads {
            let to = ((block * shape.kv_heads + head) * BLOCK_TOKENS + slot) * shape.head_dim;
            let from = head * shape.head_dim;
            let (to, from) = (to..to + shape.head_dim, from..from + shape.head_dim);
            self.keys[to.clone()].copy_from_slice(&k[from.clone()]);
            self.values[to].copy_from_slice(&v[from]);
        }
    }

    /// The first `tokens` tokens of a sequence, block by block.
    fn runs<'a>(&'a self, shape: KvShape, table: &BlockTable, tokens: usize) -> Vec<KvRun<'a>> {
        let elements = KvCache::block_elements(shape);
        let starts = (0..tokens).step_by(BLOCK_TOKENS);
        table
            .blocks()
            .iter()
            .zip(starts)
            .map(|(&block, start)| KvRun {
                keys: &self.keys[block as usize * elements..][..elements],
                values: &self.values[block as usize * elements..][..elements],
                head_stride: BLOCK_TOKENS * shape.head_dim,
                len: BLOCK_TOKENS.min(tokens - start),
                bias: None,
            })
            .collect()
    }
}

/// One sequence's part of a step: `rows` new tokens after `start` stored ones.
pub struct BatchEntry<'a> {
    pub table: &'a BlockTable,
    pub cartridges: &'a [Lease],
    pub start: usize,
    pub rows: usize,
}

/// What serving attends to: a sequence's cartridges, then its own blocks.
pub struct PagedAttention<'a> {
    pub cache: &'a mut KvCache,
    pub batch: &'a [BatchEntry<'a>],
}

impl Attend for PagedAttention<'_> {
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
        let mut shared = locked.iter().map(|(keys, values, bias, kv)| {
            let len = kv.keys.dim(1)?;
            let bias = bias.as_ref().map(|(storage, bias)| f32_slice(storage, bias));
            Ok(KvRun {
                keys: f32_slice(keys, &kv.keys)?,
                values: f32_slice(values, &kv.values)?,
                head_stride: len * head_dim,
                len,
                bias: bias.transpose()?,
            })
        });
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
            Ok(segment_attention(q, (heads, shape.kv_heads, head_dim), scale, &sequences))
        })?;
        Tensor::from_vec(out, q.shape(), q.device())
    }
}
