//! What the decoder attends to in training: a cartridge, then each sequence its own tokens.

use candle_core::{Result, Tensor};

use crate::model::{Attend, Trace};
use crate::ops::attention::{LogSums, PackedAttention, PackedGradients, PackedKv};

/// Keys and values of one layer's prefix, each `[kv_heads, p, head_dim]`.
pub(super) type Prefix = (Tensor, Tensor);

/// Serves one layer.
pub(super) struct PrefixAttention<'a> {
    pub packed: &'a PackedAttention,
    /// `None` for a model without a cartridge.
    pub prefix: Option<&'a Prefix>,
    /// Left by the forward pass for the backward.
    pub log_sums: Option<LogSums>,
}

impl PrefixAttention<'_> {
    fn kv<'b>(&'b self, k: &'b Tensor, v: &'b Tensor) -> PackedKv<'b> {
        PackedKv { k, v, prefix: self.prefix.map(|(keys, values)| (keys, values)) }
    }

    /// Gradients of the prefix, and of queries, keys and values if `own` says so, given that of the output.
    pub fn backward(&self, trace: &Trace, grad: &Tensor, own: bool) -> Result<PackedGradients> {
        let Some(log_sums) = &self.log_sums else {
            candle_core::bail!("prefix attention: a gradient without a forward pass");
        };
        let kv = self.kv(&trace.k, &trace.v);
        self.packed.backward(&trace.q, kv, (&trace.attention, log_sums), grad, own)
    }
}

impl Attend for PrefixAttention<'_> {
    fn attend(&mut self, _layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (out, log_sums) = self.packed.forward(q, self.kv(k, v))?;
        self.log_sums = Some(log_sums);
        Ok(out)
    }
}
