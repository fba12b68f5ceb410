//! The decoder: token ids in, hidden states out, attention delegated.

use candle_core::{Result, Tensor};
use sha2::{Digest, Sha256};

use super::ModelConfig;
use crate::ops::{Linear, Matrix, RopeTable, apply_rope, rms_norm, swiglu, visit_bytes};

/// What the decoder's queries attend to.
pub trait Attend {
    /// Attention output `[tokens, heads, head_dim]` for `layer`, given this pass's queries
    /// `[tokens, heads, head_dim]` and keys and values `[tokens, kv_heads, head_dim]`, all after RoPE.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
}

/// A Llama-style decoder with frozen weights. Cheap to clone: the weights are shared.
#[derive(Debug, Clone)]
pub struct Decoder {
    pub(super) config: ModelConfig,
    /// `[vocab, hidden]`.
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Tensor,
    pub(super) head: Linear,
    pub(super) rope: RopeTable,
}

#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) input_norm: Tensor,
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) o: Linear,
    pub(super) q_norm: Option<Tensor>,
    pub(super) k_norm: Option<Tensor>,
    pub(super) post_norm: Tensor,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

impl Decoder {
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Device all weights live on.
    pub fn device(&self) -> &candle_core::Device {
        self.final_norm.device()
    }

    /// Type of hidden states, keys and values.
    pub fn dtype(&self) -> candle_core::DType {
        self.final_norm.dtype()
    }

    /// Hidden states `[tokens, hidden]` of packed tokens, before the final norm.
    ///
    /// `positions[i]` is the rotary position of `tokens[i]`. Which token sees which is `attend`'s affair.
    /// An id outside the vocabulary is an error.
    pub fn forward(
        &self,
        tokens: &[u32],
        positions: &[u32],
        attend: &mut dyn Attend,
    ) -> Result<Tensor> {
        let angles = self.angles(positions)?;
        let mut hidden = self.embed(tokens)?;
        for index in 0..self.layers.len() {
            hidden = self.layer(index, &hidden, &angles, attend)?;
        }
        Ok(hidden)
    }

    /// Hidden states `[tokens, hidden]` before the first layer.
    pub(crate) fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        if let Some(id) = tokens.iter().find(|id| **id as usize >= self.config.vocab_size) {
            candle_core::bail!("token id {id} is outside the vocabulary");
        }
        self.embedding.rows(&Tensor::new(tokens, self.device())?)
    }

    /// Rotary angles of `positions`, for [`Self::layer`].
    pub(crate) fn angles(&self, positions: &[u32]) -> Result<(Tensor, Tensor)> {
        self.rope.angles(positions, self.device())
    }

    /// One layer: hidden states `[tokens, hidden]` in and out.
    pub(crate) fn layer(
        &self,
        index: usize,
        hidden: &Tensor,
        (cos, sin): &(Tensor, Tensor),
        attend: &mut dyn Attend,
    ) -> Result<Tensor> {
        self.layers[index].forward(&self.config, index, hidden, (cos, sin), attend)
    }

    /// The final norm of hidden states: what [`Self::head`] takes.
    pub(crate) fn normed(&self, hidden: &Tensor) -> Result<Tensor> {
        rms_norm(hidden, &self.final_norm, self.config.rms_norm_eps)
    }

    /// From normed hidden states to logits.
    pub(crate) fn head(&self) -> &Linear {
        &self.head
    }

    /// Logits `[rows, vocab]` of hidden states `[rows, hidden]` from [`Self::forward`].
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.normed(hidden)?)
    }

    /// SHA-256 of all weights, in hex: whether they are still what they were.
    pub fn weights_digest(&self) -> Result<String> {
        let mut digest = Sha256::new();
        let mut update = |bytes: &[u8]| digest.update(bytes);
        self.embedding.visit_bytes(&mut update)?;
        for l in &self.layers {
            for linear in [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down] {
                linear.visit_bytes(&mut update)?;
            }
            let norms =
                [Some(&l.input_norm), Some(&l.post_norm), l.q_norm.as_ref(), l.k_norm.as_ref()];
            for norm in norms.into_iter().flatten() {
                visit_bytes(norm, &mut update)?;
            }
        }
        visit_bytes(&self.final_norm, &mut update)?;
        self.head.visit_bytes(&mut update)?;
        Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Bytes held by all weights; a head tied to the embedding is counted once.
    pub fn weight_bytes(&self) -> u64 {
        let embedding = match self.config.tie_word_embeddings {
            true => 0, // the head's
            false => self.embedding.bytes(),
        };
        let layers: u64 = self
            .layers
            .iter()
            .flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down])
            .map(Linear::bytes)
            .sum();
        embedding + layers + self.head.bytes()
    }
}

impl Layer {
    fn forward(
        &self,
        config: &ModelConfig,
        index: usize,
        hidden: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
        attend: &mut dyn Attend,
    ) -> Result<Tensor> {
        let eps = config.rms_norm_eps;
        let tokens = hidden.dim(0)?;
        let x = rms_norm(hidden, &self.input_norm, eps)?;
        let q = self.q.forward(&x)?.reshape((tokens, config.heads, config.head_dim))?;
        let k = self.k.forward(&x)?.reshape((tokens, config.kv_heads, config.head_dim))?;
        let v = self.v.forward(&x)?.reshape((tokens, config.kv_heads, config.head_dim))?;
        let q = apply_rope(&normed(q, self.q_norm.as_ref(), eps)?, cos, sin)?;
        let k = apply_rope(&normed(k, self.k_norm.as_ref(), eps)?, cos, sin)?;
        let attention = attend.attend(index, &q, &k, &v)?;
        let attention = attention.reshape((tokens, config.heads * config.head_dim))?;
        let hidden = (hidden + self.o.forward(&attention)?)?;
        let x = rms_norm(&hidden, &self.post_norm, eps)?;
        let x = swiglu(&self.gate.forward(&x)?, &self.up.forward(&x)?)?;
        hidden + self.down.forward(&x)?
    }
}

/// Qwen3 normalises queries and keys per head before RoPE.
fn normed(x: Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    match weight {
        Some(weight) => rms_norm(&x, weight, eps),
        None => Ok(x),
    }
}
