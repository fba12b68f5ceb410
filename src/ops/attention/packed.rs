//! Attention of packed sequences over a shared prefix and their own earlier tokens, with a backward: what
//! training needs.
//!
//! Keys and values of prefix and sequences lie in one tensor each, because candle's operations take three
//! arguments. Nothing of the size of tokens by tokens exists: the forward keeps one number per row and
//! head, and the backward computes the scores again, tile by tile (FlashAttention's scheme).

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::Heads;
use super::packed_cpu::{self, Inputs};
use super::packed_plan::Plan;
use crate::ops::{contiguous_f32, with_f32};

/// `softmax(scale · q kᵀ) v` per row and head, over the whole prefix and the row's own sequence up to and
/// including itself. On the CPU in f32.
///
/// `q` `[tokens, heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]`; the prefix's keys and values
/// are `[kv_heads, prefix, head_dim]`. Sequence `i` is the rows `cu_seqlens[i] .. cu_seqlens[i + 1]`. Query
/// head `h` uses KV head `h / (heads / kv_heads)`. The gradient reaches all five tensors and has the same
/// bits whatever the number of threads.
pub fn prefix_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    prefix_keys: &Tensor,
    prefix_values: &Tensor,
    cu_seqlens: &[u32],
    scale: f32,
) -> Result<Tensor> {
    let join = |prefix: &Tensor, own: &Tensor| Tensor::cat(&[prefix, &own.transpose(0, 1)?], 1);
    attend(q, &join(prefix_keys, k)?, &join(prefix_values, v)?, cu_seqlens, scale)
}

/// [`prefix_attention`] without a prefix.
pub fn packed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[u32],
    scale: f32,
) -> Result<Tensor> {
    attend(q, &k.transpose(0, 1)?, &v.transpose(0, 1)?, cu_seqlens, scale)
}

/// `k` and `v` are `[kv_heads, prefix + tokens, head_dim]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[u32], scale: f32) -> Result<Tensor> {
    let (tokens, heads, head_dim) = q.dims3()?;
    let (kv_heads, all, key_dim) = k.dims3()?;
    if k.dims() != v.dims() || key_dim != head_dim || all < tokens {
        candle_core::bail!(
            "prefix attention: keys {:?} and values {:?} for queries {:?}",
            k.dims(),
            v.dims(),
            q.dims()
        );
    }
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        candle_core::bail!("prefix attention: {heads} heads over {kv_heads} KV heads");
    }
    let heads = Heads { heads, kv_heads, head_dim };
    let plan = Plan::new(cu_seqlens, tokens, all - tokens, heads)?;
    let op = PackedAttention { plan, heads, scale, log_sums: OnceLock::new() };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

struct PackedAttention {
    plan: Plan,
    heads: Heads,
    scale: f32,
    /// Of the forward, for the backward: per task the logarithm of each row's softmax denominator.
    log_sums: OnceLock<Vec<Vec<f32>>>,
}

impl PackedAttention {
    fn inputs<'a>(&'a self, q: &'a [f32], k: &'a [f32], v: &'a [f32]) -> Inputs<'a> {
        Inputs { plan: &self.plan, heads: self.heads, scale: self.scale, q, k, v }
    }
}

impl CustomOp3 for PackedAttention {
    fn name(&self) -> &'static str {
        "prefix_attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let q = contiguous_f32(self.name(), s1, l1)?;
        let k = contiguous_f32(self.name(), s2, l2)?;
        let v = contiguous_f32(self.name(), s3, l3)?;
        let (out, log_sums) = packed_cpu::forward(&self.inputs(q, k, v));
        // The op is made for one call; a second would store the same numbers.
        let _ = self.log_sums.set(log_sums);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(log_sums) = self.log_sums.get() else {
            candle_core::bail!("prefix attention: a gradient without a forward pass");
        };
        let (dq, dk, dv) = with_f32(q, |q| {
            with_f32(k, |k| {
                with_f32(v, |v| {
                    with_f32(out, |out| {
                        with_f32(grad, |grad| {
                            Ok(packed_cpu::backward(&self.inputs(q, k, v), log_sums, out, grad))
                        })
                    })
                })
            })
        })?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
