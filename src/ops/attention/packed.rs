//! Attention of packed sequences over a shared prefix and their own earlier tokens, and its gradient: what
//! training needs.
//!
//! Nothing of the size of tokens by tokens exists: the forward keeps one number per row and head, and the
//! backward computes the scores again, tile by tile (FlashAttention's scheme).

use candle_core::{Device, Result, Tensor};

use super::Heads;
use super::packed_cpu::{self, Inputs};
use super::packed_plan::Plan;
use crate::ops::Numbers;

/// `softmax(scale · q kᵀ) v` per row and head, over a whole prefix and the row's own sequence up to and
/// including itself. On the CPU in f32.
///
/// `q` is `[queries, heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]`; the prefix's keys and values
/// are `[kv_heads, prefix, head_dim]`. Query head `h` uses KV head `h / (heads / kv_heads)`.
#[derive(Debug)]
pub struct PackedAttention {
    plan: Plan,
    heads: Heads,
    scale: f32,
}

/// What attention is computed from, apart from the queries.
#[derive(Debug, Clone, Copy)]
pub struct PackedKv<'a> {
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    /// Keys and values.
    pub prefix: Option<(&'a Tensor, &'a Tensor)>,
}

/// Of a forward, for its backward: per task the logarithm of each row's softmax denominator.
#[derive(Debug, Clone)]
pub struct LogSums(Vec<Vec<f32>>);

/// Gradients, each laid out like its tensor.
#[derive(Debug)]
pub struct PackedGradients {
    pub prefix_keys: Vec<f32>,
    pub prefix_values: Vec<f32>,
    /// Of `q`, `k` and `v`, if they were asked for.
    pub own: Option<[Vec<f32>; 3]>,
}

impl PackedAttention {
    /// Sequence `i` is the tokens `cu_seqlens[i] .. cu_seqlens[i + 1]`; `queries` are the tokens, ascending,
    /// whose output is wanted.
    pub fn new(cu_seqlens: &[u32], queries: &[u32], heads: Heads, scale: f32) -> Result<Self> {
        if heads.kv_heads == 0 || !heads.heads.is_multiple_of(heads.kv_heads) {
            let Heads { heads, kv_heads, .. } = heads;
            candle_core::bail!("prefix attention: {heads} heads over {kv_heads} KV heads");
        }
        Ok(Self { plan: Plan::new(cu_seqlens, queries, heads)?, heads, scale })
    }

    /// The output like `q`, and what [`Self::backward`] needs of this pass.
    pub fn forward(&self, q: &Tensor, kv: PackedKv<'_>) -> Result<(Tensor, LogSums)> {
        let (shape, numbers) = (q.shape().clone(), self.numbers(q, kv)?);
        let (out, log_sums) = packed_cpu::forward(&self.inputs(&numbers)?);
        Ok((Tensor::from_vec(out, shape, &Device::Cpu)?, LogSums(log_sums)))
    }

    /// The gradients, given `grad` with respect to the output `out` of [`Self::forward`]; those of `q`, `k`
    /// and `v` if `own` says so. They have the same bits whatever the number of threads.
    pub fn backward(
        &self,
        q: &Tensor,
        kv: PackedKv<'_>,
        (out, log_sums): (&Tensor, &LogSums),
        grad: &[f32],
        own: bool,
    ) -> Result<PackedGradients> {
        let numbers = self.numbers(q, kv)?;
        let (inputs, out) = (self.inputs(&numbers)?, Numbers::of(out)?);
        if out.len() != inputs.q.len() || grad.len() != out.len() {
            candle_core::bail!("prefix attention: a gradient of {} for {}", grad.len(), out.len());
        }
        Ok(packed_cpu::backward(&inputs, &log_sums.0, &out, grad, own))
    }

    /// Of `q`, `k`, `v` and the prefix's keys and values.
    fn numbers<'a>(&self, q: &'a Tensor, kv: PackedKv<'a>) -> Result<[Option<Numbers<'a>>; 5]> {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let fits = q.dims() == [self.plan.positions.len(), heads, head_dim]
            && [kv.k, kv.v].iter().all(|t| t.dims() == [self.plan.tokens, kv_heads, head_dim]);
        let prefix = kv.prefix.is_none_or(|(keys, values)| {
            let (heads, _, dim) = keys.dims3().unwrap_or_default();
            (heads, dim) == (kv_heads, head_dim) && keys.dims() == values.dims()
        });
        if !fits || !prefix {
            let (q, k, v) = (q.dims(), kv.k.dims(), kv.v.dims());
            let prefix = kv.prefix.map(|(keys, values)| (keys.dims(), values.dims()));
            candle_core::bail!(
                "prefix attention: queries {q:?}, keys {k:?}, values {v:?}, prefix {prefix:?}"
            );
        }
        let of = |tensor| Numbers::of(tensor).map(Some);
        let (keys, values) = match kv.prefix {
            Some((keys, values)) => (of(keys)?, of(values)?),
            None => (None, None),
        };
        Ok([of(q)?, of(kv.k)?, of(kv.v)?, keys, values])
    }

    fn inputs<'a>(&'a self, numbers: &'a [Option<Numbers<'_>>; 5]) -> Result<Inputs<'a>> {
        let [q, k, v, prefix_keys, prefix_values] =
            numbers.each_ref().map(|numbers| numbers.as_deref().unwrap_or_default());
        let (plan, heads, scale) = (&self.plan, self.heads, self.scale);
        Ok(Inputs { plan, heads, scale, q, k, v, prefix_keys, prefix_values })
    }
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
