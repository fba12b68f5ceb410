//! What the decoder attends to in training: a cartridge, then each sequence its own tokens.

use candle_core::{Result, Tensor};

use crate::model::Attend;
use crate::ops::attention::{packed_attention, prefix_attention};

/// Keys and values of one layer's prefix, each `[kv_heads, p, head_dim]`.
pub(super) type Prefix = (Tensor, Tensor);

/// Serves one layer.
pub(super) struct PrefixAttention<'a> {
    /// `None` for a model without a cartridge.
    pub prefix: Option<&'a Prefix>,
    pub cu_seqlens: &'a [u32],
}

impl Attend for PrefixAttention<'_> {
    fn attend(&mut self, _layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let scale = 1.0 / (q.dim(2)? as f32).sqrt();
        match self.prefix {
            Some((keys, values)) => prefix_attention(q, k, v, keys, values, self.cu_seqlens, scale),
            None => packed_attention(q, k, v, self.cu_seqlens, scale),
        }
    }
}
