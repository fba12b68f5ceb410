//! The cartridge itself: immutable keys and values per layer, and the digest that identifies them.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// SHA-256 of a cartridge's content: its identity, whatever it is called and wherever it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub [u8; 32]);

/// Keys and values of one layer.
#[derive(Debug, Clone)]
pub struct LayerKv {
    /// `[kv_heads, tokens, head_dim]`, after RoPE (and after QK norm where the model has one).
    pub keys: Tensor,
    /// `[kv_heads, tokens, head_dim]`.
    pub values: Tensor,
    /// `[kv_heads, tokens]` f32, added to the scaled attention score of each key.
    pub bias: Option<Tensor>,
}

/// What a model and a cartridge must agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// Facts about how a cartridge was made. Advisory: only the tensors decide what is computed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Model the cartridge was made for, as its maker named it.
    pub model: Option<String>,
    pub rope_theta: Option<f64>,
    /// RoPE scaling as in the model's `config.json`.
    pub rope_scaling: Option<serde_json::Value>,
    /// One line of free text: document, training run, tool.
    pub origin: Option<String>,
}

/// An immutable cartridge. Leading `frozen_tokens` were not trained (the attention sink).
#[derive(Debug, Clone)]
pub struct Cartridge {
    layers: Vec<LayerKv>,
    frozen_tokens: usize,
    provenance: Provenance,
    generation: Generation,
}
