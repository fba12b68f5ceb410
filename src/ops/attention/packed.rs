//! Attention of packed sequences over a shared prefix and their own earlier tokens, and its gradient: what
//! training needs.
//!
//! Nothing of the size of tokens by tokens exists: the forward keeps one number per row and head, and the
//! backward computes the scores again, tile by tile (FlashAttention's scheme).

use candle_core::{Device, Result, Tensor};

use super::Heads;
use super::packed_cpu::{self, Inputs};
use super::packed_plan::Plan;
use crate::gpu::machine_of;
use crate::gpu::packed_attention::PackedSequences;
use crate::ops::{Numbers, Rows};

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
    /// For a GPU: where sequences begin and end, as its kernels read it.
    cu_seqlens: Tensor,
    /// Tokens of the longest sequence.
    longest: usize,
    /// For a GPU, whose kernels compute all tokens: the queries, where they are not all.
    queries: Option<Rows>,
}

/// What attention is computed from, apart from the queries.
#[derive(Debug, Clone, Copy)]
pub struct PackedKv<'a> {
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    /// Keys and values.
    pub prefix: Option<(&'a Tensor, &'a Tensor)>,
}

/// Of a forward, for its backward: the logarithm of each row's softmax denominator.
#[derive(Debug, Clone)]
pub struct LogSums(Sums);

#[derive(Debug, Clone)]
enum Sums {
    /// Per task.
    Cpu(Vec<Vec<f32>>),
    /// `[tokens, heads]`.
    Gpu(Tensor),
}

/// Gradients, each shaped like its tensor.
#[derive(Debug)]
pub struct PackedGradients {
    /// Of the prefix's keys and values, in f32.
    pub prefix: Option<(Tensor, Tensor)>,
    /// Of `q`, `k` and `v`, if they were asked for.
    pub own: Option<[Tensor; 3]>,
}

impl PackedAttention {
    /// Sequence `i` is the tokens `cu_seqlens[i] .. cu_seqlens[i + 1]`; `queries` are the tokens, ascending,
    /// whose output is wanted. `device` is that of the tensors.
    pub fn new(
        cu_seqlens: &[u32],
        queries: &[u32],
        heads: Heads,
        scale: f32,
        device: &Device,
    ) -> Result<Self> {
        if heads.kv_heads == 0 || !heads.heads.is_multiple_of(heads.kv_heads) {
            let Heads { heads, kv_heads, .. } = heads;
            candle_core::bail!("prefix attention: {heads} heads over {kv_heads} KV heads");
        }
        let plan = Plan::new(cu_seqlens, queries, heads)?;
        let longest = cu_seqlens.windows(2).map(|ends| ends[1] - ends[0]).max().unwrap_or(0);
        let queries = match queries.len() < plan.tokens {
            true => Some(Rows::new(queries.to_vec(), plan.tokens, device)?),
            false => None,
        };
        Ok(Self {
            queries,
            cu_seqlens: Tensor::from_iter(cu_seqlens.iter().map(|end| *end as i32), device)?,
            longest: longest as usize,
            plan,
            heads,
            scale,
        })
    }

    /// The output like `q`, and what [`Self::backward`] needs of this pass.
    pub fn forward(&self, q: &Tensor, kv: PackedKv<'_>) -> Result<(Tensor, LogSums)> {
        self.check(q, kv)?;
        if let Some(gpu) = machine_of(q)? {
            let q = self.all_rows(q)?;
            let (out, sums) = self.sequences().forward(&*gpu, &q, kv)?;
            return Ok((self.wanted(&out)?, LogSums(Sums::Gpu(sums))));
        }
        let numbers = numbers(q, kv)?;
        let (out, log_sums) = packed_cpu::forward(&self.inputs(&numbers));
        Ok((Tensor::from_vec(out, q.shape(), &Device::Cpu)?, LogSums(Sums::Cpu(log_sums))))
    }

    /// The gradients, given `grad` with respect to the output `out` of [`Self::forward`]; those of `q`, `k`
    /// and `v` if `own` says so. On the CPU they have the same bits whatever the number of threads.
    pub fn backward(
        &self,
        q: &Tensor,
        kv: PackedKv<'_>,
        (out, log_sums): (&Tensor, &LogSums),
        grad: &Tensor,
        own: bool,
    ) -> Result<PackedGradients> {
        self.check(q, kv)?;
        if out.dims() != q.dims() || grad.dims() != q.dims() {
            let (grad, out) = (grad.dims(), out.dims());
            candle_core::bail!("prefix attention: a gradient {grad:?} for {out:?}");
        }
        match (machine_of(q)?, &log_sums.0) {
            (Some(gpu), Sums::Gpu(sums)) => {
                // The gradient of an output that nobody wants is zero, and so is all that follows from it.
                let (q, out, grad) = (self.all_rows(q)?, self.all_rows(out)?, self.all_rows(grad)?);
                let pass = (&out, sums);
                let mut found = self.sequences().backward(&*gpu, &q, kv, pass, &grad, own)?;
                if let Some([dq, ..]) = &mut found.own {
                    *dq = self.wanted(dq)?;
                }
                Ok(found)
            }
            (None, Sums::Cpu(log_sums)) => {
                let numbers = numbers(q, kv)?;
                let (out, grad) = (Numbers::of(out)?, Numbers::of(grad)?);
                let found =
                    packed_cpu::backward(&self.inputs(&numbers), log_sums, &out, &grad, own);
                let tensor =
                    |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu);
                let [keys, values] = found.prefix;
                let prefix = match kv.prefix {
                    Some(like) => Some((tensor(keys, like.0)?, tensor(values, like.1)?)),
                    None => None,
                };
                let own = match found.own {
                    Some([dq, dk, dv]) => {
                        Some([tensor(dq, q)?, tensor(dk, kv.k)?, tensor(dv, kv.v)?])
                    }
                    None => None,
                };
                Ok(PackedGradients { prefix, own })
            }
            _ => candle_core::bail!("prefix attention: the forward pass was on another device"),
        }
    }

    fn check(&self, q: &Tensor, kv: PackedKv<'_>) -> Result<()> {
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
        Ok(())
    }

    fn inputs<'a>(&'a self, numbers: &'a [Option<Numbers<'_>>; 5]) -> Inputs<'a> {
        let [q, k, v, prefix_keys, prefix_values] =
            numbers.each_ref().map(|numbers| numbers.as_deref().unwrap_or_default());
        let (plan, heads, scale) = (&self.plan, self.heads, self.scale);
        Inputs { plan, heads, scale, q, k, v, prefix_keys, prefix_values }
    }

    fn sequences(&self) -> PackedSequences<'_> {
        PackedSequences {
            heads: self.heads,
            scale: self.scale,
            cu_seqlens: &self.cu_seqlens,
            longest: self.longest,
        }
    }

    /// Rows of queries as rows of all tokens.
    fn all_rows(&self, x: &Tensor) -> Result<Tensor> {
        self.queries.as_ref().map_or(Ok(x.clone()), |queries| queries.spread(x))
    }

    /// Of the rows of all tokens those of the queries.
    fn wanted(&self, x: &Tensor) -> Result<Tensor> {
        self.queries.as_ref().map_or(Ok(x.clone()), |queries| queries.pick(x))
    }
}

/// Of `q`, `k`, `v` and the prefix's keys and values.
fn numbers<'a>(q: &'a Tensor, kv: PackedKv<'a>) -> Result<[Option<Numbers<'a>>; 5]> {
    let of = |tensor| Numbers::of(tensor).map(Some);
    let (keys, values) = match kv.prefix {
        Some((keys, values)) => (of(keys)?, of(values)?),
        None => (None, None),
    };
    Ok([of(q)?, of(kv.k)?, of(kv.v)?, keys, values])
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
