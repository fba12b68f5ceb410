//! With the feature `flash-attn`: candle's FlashAttention-2 for steps that are plain prefill. It reads the
//! keys and values of the step itself, not the cache, so such a step is all or nothing: one sequence
//! with stored tokens or a cartridge, and our kernels compute all of it.

use candle_core::{Device, Result, Tensor};
use candle_flash_attn::flash_attn_varlen;

use super::BatchEntry;

/// A step whose rows see nothing but earlier rows of their own sequence in the same step.
pub struct PlainPrefill {
    /// Where each sequence begins, and the last one ends.
    cu_seqlens: Tensor,
    longest: usize,
}

impl PlainPrefill {
    /// The step of `batch`, if it is one and on a GPU.
    pub fn of(batch: &[BatchEntry<'_>], device: &Device) -> Result<Option<Self>> {
        let plain = |entry: &BatchEntry<'_>| entry.start == 0 && entry.cartridges.is_empty();
        if !device.is_cuda() || !batch.iter().all(plain) {
            return Ok(None);
        }
        let mut cu_seqlens = vec![0];
        let (mut end, mut longest) = (0, 0);
        for entry in batch.iter().filter(|entry| entry.rows > 0) {
            end += entry.rows as u32;
            longest = longest.max(entry.rows);
            cu_seqlens.push(end);
        }
        Ok(Some(Self { cu_seqlens: Tensor::new(cu_seqlens, device)?, longest }))
    }

    /// Attention `[rows, heads, head_dim]` of queries of that shape and keys and values
    /// `[rows, kv_heads, head_dim]`.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Tensor> {
        let Self { cu_seqlens: at, longest } = self;
        flash_attn_varlen(q, k, v, at, at, *longest, *longest, scale, true)
    }
}
