//! What must be moved and computed, from a model's dimensions alone, and how long that takes at least.
//!
//! Counted are weights, keys and values, and logits; activations between them are small beside these or stay
//! in caches. A multiply-add is two operations. Norms, rotations and exponentials are not counted.

use std::ops::Add;

use candle_core::DType;

use crate::model::ModelConfig;

/// Of one run: bytes read and written, and operations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    pub bytes: u64,
    pub flops: u64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, flops: self.flops + other.flops }
    }
}

/// What a device does at most, as measured on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofs {
    /// Of a copy: read and written.
    pub bytes_per_s: f64,
    /// Of a large matrix product.
    pub flops_per_s: f64,
}

impl Roofs {
    /// The shortest time `work` can take, in seconds, and which roof it is under: `bytes` or `flops`.
    pub fn shortest(&self, work: Work) -> (f64, &'static str) {
        let moved = work.bytes as f64 / self.bytes_per_s;
        let computed = work.flops as f64 / self.flops_per_s;
        if moved >= computed { (moved, "bytes") } else { (computed, "flops") }
    }
}

/// Sequences that decode one token each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoding {
    pub sequences: usize,
    /// Tokens of its own that each attends to, the new one included.
    pub own: usize,
    /// Tokens of the cartridge of each.
    pub cartridge: usize,
    /// How many cartridges there are to read: 1 where all share one.
    pub cartridges: usize,
}

/// Sequences of one length laid end to end, each of whose tokens sees a prefix and its own predecessors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    pub sequences: usize,
    pub length: usize,
    pub prefix: usize,
}

impl Packed {
    pub fn tokens(&self) -> usize {
        self.sequences * self.length
    }

    /// Pairs of a query and a key that it sees, over the last `queries` tokens of each sequence.
    pub fn pairs(&self, queries: usize) -> u64 {
        let (length, queries) = (self.length as u64, queries as u64);
        let own = queries * (2 * length - queries + 1) / 2;
        self.sequences as u64 * (queries * self.prefix as u64 + own)
    }
}

/// The dimensions of a model that work is counted from.
#[derive(Debug, Clone, Copy)]
pub struct Costs {
    layers: u64,
    hidden: u64,
    /// Numbers of a token's queries in a layer, and of its keys.
    queries: u64,
    keys: u64,
    intermediate: u64,
    vocab: u64,
    tied: bool,
    head_dim: u64,
    qk_norm: bool,
    /// Bytes of a number.
    size: u64,
}

impl Costs {
    pub fn new(config: &ModelConfig, dtype: DType) -> Self {
        Self {
            layers: config.layers as u64,
            hidden: config.hidden_size as u64,
            queries: (config.heads * config.head_dim) as u64,
            keys: (config.kv_heads * config.head_dim) as u64,
            intermediate: config.intermediate_size as u64,
            vocab: config.vocab_size as u64,
            tied: config.tie_word_embeddings,
            head_dim: config.head_dim as u64,
            qk_norm: config.qk_norm,
            size: dtype.size_in_bytes() as u64,
        }
    }

    /// Keys and values of one token over all layers.
    pub fn kv_token_bytes(&self) -> u64 {
        2 * self.layers * self.keys * self.size
    }

    /// Multiply-adds per token: of the matrices of a layer that make keys and values, and of the others.
    fn layer(&self) -> (u64, u64) {
        let others = 2 * self.hidden * self.queries + 3 * self.hidden * self.intermediate;
        (2 * self.hidden * self.keys, others)
    }

    fn head(&self) -> u64 {
        self.hidden * self.vocab
    }

    /// Numbers of the weights a step reads: all but the table of embeddings, of which it takes single rows.
    fn read_weights(&self) -> u64 {
        let (kv, others) = self.layer();
        let head_norms = if self.qk_norm { 2 * self.head_dim } else { 0 };
        let norms = 2 * self.hidden + head_norms;
        self.layers * (kv + others + norms) + self.hidden + self.head()
    }

    /// Bytes all weights take.
    pub fn weight_bytes(&self) -> u64 {
        let embedding = if self.tied { 0 } else { self.head() };
        (self.read_weights() + embedding) * self.size
    }

    /// Of the attention of a step, all layers: keys and values read once for each cartridge and sequence, the
    /// new ones written.
    pub fn step_attention(&self, batch: Decoding) -> Work {
        let Decoding { sequences, own, cartridge, cartridges } = batch;
        let tokens = sequences * (own + 1) + cartridge * cartridges;
        let pairs = (sequences * (own + cartridge)) as u64;
        Work {
            bytes: tokens as u64 * self.kv_token_bytes(),
            flops: 4 * self.layers * self.queries * pairs,
        }
    }

    /// Of a whole step: the weights once, and the logits, which are f32, written and read.
    pub fn step(&self, batch: Decoding) -> Work {
        let (sequences, (kv, others)) = (batch.sequences as u64, self.layer());
        let products = Work {
            bytes: self.read_weights() * self.size + 2 * sequences * self.vocab * 4,
            flops: 2 * sequences * (self.layers * (kv + others) + self.head()),
        };
        products + self.step_attention(batch)
    }

    /// Of the forward of one layer's attention in training: all tensors once, 2 products.
    pub fn packed_forward(&self, pack: Packed) -> Work {
        let (tokens, prefix) = (pack.tokens() as u64, pack.prefix as u64);
        Work {
            bytes: 2 * (tokens * (self.queries + self.keys) + prefix * self.keys) * self.size,
            flops: 4 * self.queries * pack.pairs(pack.length),
        }
    }

    /// Of its backward: all tensors and gradients once (those of the prefix in f32), 5 products.
    pub fn packed_backward(&self, pack: Packed) -> Work {
        let (tokens, prefix) = (pack.tokens() as u64, pack.prefix as u64);
        Work {
            bytes: 4 * tokens * (self.queries + self.keys) * self.size
                + 2 * prefix * self.keys * (self.size + 4),
            flops: 10 * self.queries * pack.pairs(pack.length),
        }
    }

    /// Of a training step with targets on the last `targets` rows of each sequence, as [`crate::train`]
    /// computes it: of the last layer only these rows beyond keys and values, before the first layer's keys
    /// and values nothing on the way back, no gradient of weights; then Adam on f32 copies.
    pub fn train_step(&self, pack: Packed, targets: usize) -> Work {
        let (tokens, prefix) = (pack.tokens() as u64, pack.prefix as u64);
        let target_rows = (pack.sequences * targets) as u64;
        let (kv, others) = self.layer();
        let project = self.hidden * self.queries;
        let layer = |index: u64| {
            let (rows, pairs) = match index + 1 == self.layers {
                true => (target_rows, pack.pairs(targets)),
                false => (tokens, pack.pairs(pack.length)),
            };
            let forward = 2 * (kv * tokens + others * rows) + 4 * self.queries * pairs;
            let backward = match index {
                // Only to what comes out of the attention, and on to the prefix: 4 products.
                0 => 2 * (others - project) * rows + 8 * self.queries * rows * prefix,
                _ => 2 * (kv * tokens + others * rows) + 10 * self.queries * pairs,
            };
            forward + backward
        };
        let learned = 2 * self.layers * self.keys * prefix;
        Work {
            // Weights forward and backward; of a learned number two readings, its gradient, and what Adam
            // reads (number, gradient, two means) and writes (number, two means).
            bytes: 2 * self.read_weights() * self.size + learned * (2 * self.size + 4 + 7 * 4),
            flops: (0..self.layers).map(layer).sum::<u64>() + 4 * self.head() * target_rows,
        }
    }

    /// What a training step holds at most of its layers, about: activations kept for the way back. With
    /// `recompute` those of one layer, and every layer's input.
    pub fn trace_bytes(&self, tokens: usize, recompute: bool) -> u64 {
        let unnormed = if self.qk_norm { self.queries + self.keys } else { 0 };
        let layer = 2 * (self.hidden + self.queries + self.keys + self.intermediate) + unnormed;
        let kept = match recompute {
            true => layer + self.layers * self.hidden,
            false => self.layers * layer,
        };
        kept * tokens as u64 * self.size
    }
}
