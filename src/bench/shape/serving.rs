//! A batch of sequences as the engine runs it, in the middle of decoding: cartridges, and blocks full of keys
//! and values.

use std::collections::HashMap;

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::measure::{Unmeasured, check_memory};
use super::roofline::{Costs, Decoding};
use crate::cartridge::{Cartridge, LayerKv, Lease, Provenance};
use crate::engine::{
    BLOCK_TOKENS, BatchEntry, BlockPool, BlockTable, ContextKey, EngineOptions, KvCache, Root,
    SamplingParams, blocks_for,
};
use crate::gpu::sampling::{self, Wanted};
use crate::gpu::{SampleRow, machine};
use crate::model::{Angles, Decoder, ModelConfig, Placement, Unrotated, noise};
use crate::ops::{all_finite, argmax, on_host, with_f32};

/// Blocks that are filled at once.
const FILL_BLOCKS: usize = 256;

/// Sequences with one new token each.
pub struct Batch<'a> {
    decoder: &'a Decoder,
    cache: KvCache,
    /// Taken together, block by block, as sequences that grow side by side take them.
    tables: Vec<BlockTable>,
    /// Of each sequence.
    cartridges: Vec<Vec<Lease>>,
    own: usize,
}

impl<'a> Batch<'a> {
    /// Sequence `i` has the cartridges `cartridges[i]`; each has `own` tokens in blocks, the new one included.
    pub fn new(
        decoder: &'a Decoder,
        cartridges: Vec<Vec<Lease>>,
        own: usize,
    ) -> Result<Self, Unmeasured> {
        let config = decoder.config();
        let (device, dtype) = (decoder.device(), decoder.dtype());
        let each = blocks_for(own);
        let blocks = each * cartridges.len();
        let needed = blocks as u64 * KvCache::block_bytes(config.kv_shape(), dtype);
        check_memory(device, needed)?;
        let mut cache = KvCache::new(config.kv_shape(), blocks, device, dtype)?;
        let pool = BlockPool::new(blocks, false);
        fill(&mut cache, &pool, config, &placement(decoder))?;
        let tables = grown(&pool, cartridges.len(), each)?;
        let mut batch = Self { decoder, cache, tables, cartridges, own };
        let hidden = batch.hidden()?;
        match with_f32(&on_host(&hidden)?, |values| Ok(all_finite(values)))? {
            true => Ok(batch),
            false => Err(Unmeasured::NotFinite),
        }
    }

    /// A whole step: embedding, layers, head, and the likeliest token of each sequence.
    pub fn step(&mut self) -> Result<(), Unmeasured> {
        let hidden = self.hidden()?;
        let tokens = greedy(self.decoder, &self.decoder.logits(&hidden)?)?;
        std::hint::black_box(tokens);
        Ok(())
    }

    /// The attention of a step alone, all layers.
    pub fn attention(&mut self, inputs: &AttentionInputs) -> Result<(), Unmeasured> {
        let entries = entries(&self.tables, &self.cartridges, self.own);
        let group_min = EngineOptions::default().group_min_sequences;
        let mut attention = self.cache.attention(&entries, group_min);
        for layer in 0..self.decoder.config().layers {
            attention.attend(layer, &inputs.q, &inputs.k, &inputs.v)?;
        }
        Ok(())
    }

    fn hidden(&mut self) -> candle_core::Result<Tensor> {
        let vocab = self.decoder.config().vocab_size;
        let tokens: Vec<u32> = (0..self.tables.len()).map(|i| (i * 31 % vocab) as u32).collect();
        let position = |cartridges: &Vec<Lease>| {
            (cartridges.iter().map(|lease| lease.tokens()).sum::<usize>() + self.own - 1) as u32
        };
        let positions: Vec<u32> = self.cartridges.iter().map(position).collect();
        let entries = entries(&self.tables, &self.cartridges, self.own);
        let group_min = EngineOptions::default().group_min_sequences;
        let mut attention = self.cache.attention(&entries, group_min);
        self.decoder.forward(&tokens, &positions, &mut *attention)
    }
}

/// One new token of each sequence.
fn entries<'a>(
    tables: &'a [BlockTable],
    cartridges: &'a [Vec<Lease>],
    own: usize,
) -> Vec<BatchEntry<'a>> {
    let entry = |(table, cartridges)| BatchEntry { table, cartridges, start: own - 1, rows: 1 };
    tables.iter().zip(cartridges.iter().map(Vec::as_slice)).map(entry).collect()
}

/// `count` tables of so many blocks each.
fn grown(pool: &BlockPool, count: usize, blocks: usize) -> candle_core::Result<Vec<BlockTable>> {
    let root = Root { context: ContextKey::new([]), request: None };
    let mut tables: Vec<BlockTable> = (0..count).map(|_| pool.table(root)).collect();
    for blocks in 1..=blocks {
        if !tables.iter_mut().all(|table| table.grow_to(blocks)) {
            candle_core::bail!("{count} times {blocks} blocks are more than the pool has");
        }
    }
    Ok(tables)
}

/// What [`Batch::attention`] takes: the queries, keys and values of one token of each sequence.
pub struct AttentionInputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl AttentionInputs {
    pub fn new(
        config: &ModelConfig,
        placement: &Placement,
        tokens: usize,
    ) -> candle_core::Result<Self> {
        let numbers = |heads, seed| noise((tokens, heads, config.head_dim), 1.0, placement, seed);
        Ok(Self {
            q: numbers(config.heads, 1)?,
            k: numbers(config.kv_heads, 2)?,
            v: numbers(config.kv_heads, 3)?,
        })
    }

    /// That turn nothing.
    fn angles(&self) -> candle_core::Result<Angles> {
        let (tokens, _, head_dim) = self.q.dims3()?;
        let sin = Tensor::zeros((tokens, head_dim / 2), DType::F32, self.q.device())?;
        Ok(Angles { cos: sin.ones_like()?, sin })
    }

    fn unrotated<'a>(&'a self, angles: &'a Angles) -> Unrotated<'a> {
        let Self { q, k, v } = self;
        let (q_angles, k_angles) = (angles, angles);
        Unrotated { q, k, v, q_norm: None, k_norm: None, eps: 0.0, q_angles, k_angles }
    }
}

/// Writes keys and values into every block: memory that was never written is not read like other memory.
/// Each block is a sequence of its own, so that its attention costs next to nothing.
fn fill(
    cache: &mut KvCache,
    pool: &BlockPool,
    config: &ModelConfig,
    placement: &Placement,
) -> candle_core::Result<()> {
    let tables = grown(pool, pool.counts().total, 1)?;
    let whole = |table| BatchEntry { table, cartridges: &[], start: 0, rows: BLOCK_TOKENS };
    for tables in tables.chunks(FILL_BLOCKS) {
        let inputs = AttentionInputs::new(config, placement, tables.len() * BLOCK_TOKENS)?;
        let entries: Vec<BatchEntry<'_>> = tables.iter().map(whole).collect();
        let mut attention = cache.attention(&entries, usize::MAX);
        let angles = inputs.angles()?;
        for layer in 0..config.layers {
            // One of the two stores them.
            let (q, k) = attention.rotate(layer, &inputs.unrotated(&angles))?;
            attention.attend(layer, &q, &k, &inputs.v)?;
        }
    }
    Ok(())
}

/// The likeliest token of each row of logits, as the engine finds it.
fn greedy(decoder: &Decoder, logits: &Tensor) -> candle_core::Result<Vec<u32>> {
    let Some(gpu) = machine(decoder.device(), decoder.dtype())? else {
        let vocab = logits.dim(D::Minus1)?;
        return with_f32(logits, |logits| {
            Ok(logits.par_chunks_exact(vocab).map(|row| argmax(row) as u32).collect())
        });
    };
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let adjustments = HashMap::new();
    let row =
        SampleRow { params: &params, uniform: 0.0, adjustments: &adjustments, forbidden: &[] };
    let rows = vec![(row, Wanted { temperature: 0.0, top: 0 }); logits.dim(0)?];
    let tokens = sampling::draw(&*gpu, logits, &rows)?.into_iter().flatten();
    Ok(tokens.map(|token| token.id).collect())
}

/// Where a decoder computes.
pub fn placement(decoder: &Decoder) -> Placement {
    Placement { device: decoder.device().clone(), dtype: decoder.dtype() }
}

/// A cartridge of random numbers, the same in all layers, and copies of it.
pub struct Copies {
    cartridge: Cartridge,
    /// Of a layer, laid out for attention.
    layer: LayerKv,
    layers: usize,
}

impl Copies {
    pub fn new(decoder: &Decoder, tokens: usize) -> Result<Self, Unmeasured> {
        let (config, placement) = (decoder.config(), placement(decoder));
        let costs = Costs::new(config, placement.dtype);
        check_memory(&placement.device, tokens as u64 * costs.kv_token_bytes())?;
        let numbers =
            |seed| noise((config.kv_heads, tokens, config.head_dim), 1.0, &placement, seed);
        let layer = LayerKv { keys: numbers(4)?, values: numbers(5)?, bias: None };
        let layers = vec![layer; config.layers];
        let cartridge = Cartridge::new(layers, 0, Provenance::default())?;
        let laid_out = cartridge.for_attention()?;
        let layer = laid_out.layers().first().cloned();
        let layer = layer.ok_or_else(|| candle_core::Error::msg("a model without layers"))?;
        Ok(Self { cartridge, layer, layers: config.layers })
    }

    /// Of [`Self::one_layer`].
    pub fn layer_bytes(&self) -> u64 {
        self.cartridge.bytes() / self.layers as u64
    }

    /// Of [`Self::whole`].
    pub fn bytes(&self) -> u64 {
        self.cartridge.bytes()
    }

    /// A copy with memory of its own for each layer.
    pub fn whole(&self) -> Result<Lease, Unmeasured> {
        let layers = (0..self.layers).map(|_| self.copied()).collect::<Result<_, _>>()?;
        Ok(Lease::detached("bench", &self.cartridge.in_tensors(layers))?)
    }

    /// A copy all of whose layers lie in the same memory. Many of these are together larger than any cache,
    /// so that a layer is read from memory again each time.
    pub fn one_layer(&self) -> Result<Lease, Unmeasured> {
        let layers = vec![self.copied()?; self.layers];
        Ok(Lease::detached("bench", &self.cartridge.in_tensors(layers))?)
    }

    fn copied(&self) -> Result<LayerKv, Unmeasured> {
        let LayerKv { keys, values, .. } = &self.layer;
        Ok(LayerKv { keys: keys.copy()?, values: values.copy()?, bias: None })
    }
}

/// `count` sequences without a cartridge.
pub fn plain(count: usize) -> Vec<Vec<Lease>> {
    vec![Vec::new(); count]
}

/// What a batch without cartridges reads.
pub fn plain_work(sequences: usize, own: usize) -> Decoding {
    Decoding { sequences, own, cartridge: 0, cartridges: 0 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::gpu::address;
    use crate::model::{LoadOptions, ModelSource, load_decoder};

    fn addresses(leases: &[Lease]) -> BTreeSet<u64> {
        let layers = leases.iter().flat_map(|lease| lease.layers());
        layers.map(|layer| address(&layer.keys.transpose(1, 2).unwrap()).unwrap()).collect()
    }

    #[test]
    fn copies_lie_in_memory_of_their_own() {
        let decoder = load_decoder(&ModelSource::Demo, &LoadOptions::default()).unwrap();
        let copies = Copies::new(&decoder, 5).unwrap();
        let whole: Vec<Lease> = (0..3).map(|_| copies.whole().unwrap()).collect();
        assert_eq!(addresses(&whole).len(), 3 * decoder.config().layers);
        let single: Vec<Lease> = (0..3).map(|_| copies.one_layer().unwrap()).collect();
        assert_eq!(addresses(&single).len(), 3);
        assert_eq!(copies.layer_bytes() * decoder.config().layers as u64, copies.bytes());
        for lease in whole.iter().chain(&single) {
            assert_eq!(lease.generation(), copies.cartridge.generation());
            for layer in lease.layers() {
                let same = layer.values.eq(&copies.layer.values).unwrap();
                assert_eq!(same.min_all().unwrap().to_scalar::<u8>().unwrap(), 1);
            }
        }
    }

    #[test]
    fn every_block_is_written() {
        let decoder = load_decoder(&ModelSource::Demo, &LoadOptions::default()).unwrap();
        let config = decoder.config();
        let own = 64;
        let mut batch = Batch::new(&decoder, plain(20), own).unwrap();
        let inputs = AttentionInputs::new(config, &placement(&decoder), 20).unwrap();
        let entries = entries(&batch.tables, &batch.cartridges, own);
        let blocks: BTreeSet<u32> =
            batch.tables.iter().flat_map(|table| table.blocks()).copied().collect();
        assert_eq!(blocks.len(), 20 * 4, "no two sequences share one");
        let mut attention = batch.cache.attention(&entries, 2);
        let q = inputs.q.zeros_like().unwrap();
        for layer in 0..config.layers {
            // The mean of 64 values: their deviation is an eighth of that of one.
            let mean = attention.attend(layer, &q, &inputs.k, &inputs.v).unwrap();
            let square = mean.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
            assert!((square.sqrt() * 8.0 - 1.0).abs() < 0.1, "layer {layer}: {}", square.sqrt());
        }
    }
}
