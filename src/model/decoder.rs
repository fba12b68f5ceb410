//! The decoder: token ids in, hidden states out, attention delegated.

use std::sync::{Arc, OnceLock};

use candle_core::{Result, Tensor};
use sha2::{Digest, Sha256};

use super::layer::{AttendBackward, Chosen, Layer, Trace};
use super::{Angles, Attend, ModelConfig};
use crate::gpu::is_gpu;
use crate::ops::{Linear, Matrix, RopeTable, rms_norm, rms_norm_backward, visit_bytes};

/// Positions whose rotary angles a GPU keeps: 64 MiB with heads of 128.
const KNOWN_ANGLES: usize = 1 << 17;

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
    /// On a GPU: of all positions, made with the first pass.
    pub(super) all_angles: Arc<OnceLock<Angles>>,
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
            (hidden, _) = self.layer(index, &hidden, &angles, None, attend)?;
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
    pub(crate) fn angles(&self, positions: &[u32]) -> Result<Angles> {
        let (device, known) = (self.device(), self.config.max_positions.min(KNOWN_ANGLES) as u32);
        let computed = |positions: &[u32]| {
            let (cos, sin) = self.rope.angles(positions, device)?;
            Ok::<_, candle_core::Error>(Angles { cos, sin })
        };
        if !is_gpu(device, self.dtype()) || positions.iter().any(|at| *at >= known) {
            return computed(positions);
        }
        // One thread of the host takes longer over the angles of a large batch than a GPU over a layer.
        let all = match self.all_angles.get() {
            Some(all) => all,
            None => {
                let all = computed(&(0..known).collect::<Vec<_>>())?;
                self.all_angles.get_or_init(|| all)
            }
        };
        let at = Tensor::new(positions, device)?;
        Ok(Angles { cos: all.cos.index_select(&at, 0)?, sin: all.sin.index_select(&at, 0)? })
    }

    /// One layer: hidden states `[tokens, hidden]` in and out, of the chosen tokens or of all.
    pub(crate) fn layer(
        &self,
        index: usize,
        hidden: &Tensor,
        angles: &Angles,
        chosen: Option<&Chosen>,
        attend: &mut dyn Attend,
    ) -> Result<(Tensor, Trace)> {
        self.layers[index].forward(&self.config, index, hidden, angles, chosen, attend)
    }

    /// The way back through [`Self::layer`]: from the gradient of its output to that of its input, unless
    /// `attend` says that nothing before it is learned.
    pub(crate) fn layer_backward(
        &self,
        index: usize,
        trace: Trace,
        angles: &Angles,
        chosen: Option<&Chosen>,
        grad: Tensor,
        attend: AttendBackward<'_>,
    ) -> Result<Option<Tensor>> {
        self.layers[index].backward(&self.config, trace, angles, chosen, grad, attend)
    }

    /// The final norm of hidden states: what [`Self::head`] takes.
    pub(crate) fn normed(&self, hidden: &Tensor) -> Result<Tensor> {
        rms_norm(hidden, &self.final_norm, self.config.rms_norm_eps)
    }

    /// The way back through [`Self::normed`].
    pub(crate) fn normed_backward(&self, hidden: &Tensor, grad: &Tensor) -> Result<Tensor> {
        rms_norm_backward(hidden, &self.final_norm, self.config.rms_norm_eps, grad, None)
    }

    /// From normed hidden states to logits.
    pub(crate) fn head(&self) -> &Linear {
        &self.head
    }

    /// Logits `[rows, vocab]` in f32 of hidden states `[rows, hidden]` from [`Self::forward`].
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward_f32(&self.normed(hidden)?)
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
