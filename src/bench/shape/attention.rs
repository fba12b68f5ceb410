//! The attention of training over packed sequences, and its gradient: one layer, no weights.

use candle_core::Tensor;

use super::measure::{Unmeasured, time};
use super::roofline::Packed;
use super::{Bench, Case, Part};
use crate::bench::BenchError;
use crate::model::{ModelConfig, Placement, noise};
use crate::ops::attention::{Heads, LogSums, PackedAttention, PackedGradients, PackedKv};

pub(super) fn run(bench: &mut Bench<'_>) -> Result<(), BenchError> {
    crate::train::keep_freed_memory();
    for length in bench.lengths.sequences {
        for prefix in [0, bench.lengths.prefix] {
            let sequences = (bench.lengths.pack / length).max(1);
            both(bench, Packed { sequences, length, prefix })?;
        }
    }
    Ok(())
}

/// Forward and backward of one pack.
fn both(bench: &mut Bench<'_>, pack: Packed) -> Result<(), BenchError> {
    let (config, placement) = (&bench.plan.config, &bench.plan.placement);
    let case = |pass: &str, work| Case {
        what: Part::Attention.name(),
        name: format!(
            "pass={pass} tokens={} length={} prefix={}",
            pack.tokens(),
            pack.length,
            pack.prefix,
        ),
        work,
        tokens: Some(pack.tokens()),
        sequences: Some(pack.sequences),
        note: "one layer".to_owned(),
    };
    let forward = case("forward", bench.costs.packed_forward(pack));
    let backward = case("backward", bench.costs.packed_backward(pack));
    let lengths = vec![pack.length; pack.sequences];
    let operands = || Operands::new(config, placement, &lengths, pack.prefix);
    bench.measure(forward, |device, timing| {
        let operands = operands()?;
        time(device, timing, || operands.forward().map(drop))
    })?;
    bench.measure(backward, |device, timing| {
        let operands = operands()?;
        let result = operands.forward()?;
        time(device, timing, || operands.backward(&result).map(drop))
    })?;
    Ok(())
}

/// One layer's attention and what it is given.
pub(super) struct Operands {
    attention: PackedAttention,
    pub cu_seqlens: Vec<u32>,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub prefix: Option<(Tensor, Tensor)>,
    /// Of the result, `[tokens, heads, head_dim]`.
    pub grad: Tensor,
}

impl Operands {
    /// Sequences of these lengths, every row a query.
    pub fn new(
        config: &ModelConfig,
        placement: &Placement,
        lengths: &[usize],
        prefix: usize,
    ) -> Result<Self, Unmeasured> {
        let ModelConfig { heads, kv_heads, head_dim, .. } = *config;
        let mut cu_seqlens = vec![0u32];
        let mut tokens = 0;
        for length in lengths {
            tokens += length;
            cu_seqlens.push(tokens as u32);
        }
        let queries: Vec<u32> = (0..tokens as u32).collect();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let heads_of = Heads { heads, kv_heads, head_dim };
        let numbers = |shape: (usize, usize, usize), seed| noise(shape, 1.0, placement, seed);
        let prefix = match prefix {
            0 => None,
            _ => Some((
                numbers((kv_heads, prefix, head_dim), 4)?,
                numbers((kv_heads, prefix, head_dim), 5)?,
            )),
        };
        Ok(Self {
            attention: PackedAttention::new(
                &cu_seqlens,
                &queries,
                heads_of,
                scale,
                &placement.device,
            )?,
            cu_seqlens,
            q: numbers((tokens, heads, head_dim), 1)?,
            k: numbers((tokens, kv_heads, head_dim), 2)?,
            v: numbers((tokens, kv_heads, head_dim), 3)?,
            prefix,
            grad: numbers((tokens, heads, head_dim), 6)?,
        })
    }

    fn kv(&self) -> PackedKv<'_> {
        let prefix = self.prefix.as_ref().map(|(keys, values)| (keys, values));
        PackedKv { k: &self.k, v: &self.v, prefix }
    }

    pub fn forward(&self) -> Result<(Tensor, LogSums), Unmeasured> {
        Ok(self.attention.forward(&self.q, self.kv())?)
    }

    /// Given the result of [`Self::forward`].
    pub fn backward(&self, of: &(Tensor, LogSums)) -> Result<PackedGradients, Unmeasured> {
        let (out, log_sums) = of;
        let kv = self.kv();
        Ok(self.attention.backward(&self.q, kv, (out, log_sums), &self.grad, true)?)
    }
}
