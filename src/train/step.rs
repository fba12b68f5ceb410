//! The gradient of one micro-step: a pack in, the loss and a gradient for every cartridge tensor out.
//!
//! The way back is written out layer by layer, without candle's graph, and computes nothing that the
//! gradient does not need: the model's weights are frozen, so nothing before the first layer's keys and values
//! is learned; and of the last layer only the rows with a target lead to the loss, so its queries, and all
//! that follows them, exist for these rows alone.

use candle_core::Tensor;

use super::attention::{Prefix, PrefixAttention};
use super::check::{check_pack, check_prefix};
use super::loss::{LossOptions, TargetRows, distillation_loss};
use super::{LossOnly, Normalizer, Pack, TrainError};
use crate::model::{Angles, Chosen, Decoder, Trace};
use crate::ops::attention::{Heads, LogSums, PackedAttention};

/// Keys (after RoPE) and values of one layer of the cartridge, each `[kv_heads, p, head_dim]` in f32, on any
/// device.
#[derive(Debug, Clone)]
pub struct PrefixLayer {
    pub keys: Tensor,
    pub values: Tensor,
}

/// How a micro-step is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOptions {
    pub normalizer: Normalizer,
    /// Divides the student's logits; 1 leaves them as they are.
    pub temperature: f32,
    /// Keep only each layer's input and compute the layer again for its gradient: half as much work again, and
    /// the activations of one layer in memory instead of all. The result is the same.
    pub recompute: bool,
}

impl Default for StepOptions {
    fn default() -> Self {
        Self { normalizer: Normalizer::default(), temperature: 1.0, recompute: false }
    }
}

/// The loss of a pack, as in [`LossOnly`], and where it leads.
#[derive(Debug, Clone)]
pub struct StepOutput {
    /// As normalised.
    pub loss: f64,
    pub nll_sum: f64,
    pub entropy_sum: f64,
    pub rows: usize,
    pub entries: usize,
    /// Per layer the gradients of `loss` with respect to keys and values, shaped like them, in f32 on the
    /// decoder's device. Frozen tokens have theirs too.
    pub gradients: Vec<(Tensor, Tensor)>,
}

impl StepOutput {
    fn new(loss: LossOnly, gradients: Vec<(Tensor, Tensor)>) -> Self {
        let LossOnly { loss, nll_sum, entropy_sum, rows, entries } = loss;
        Self { loss, nll_sum, entropy_sum, rows, entries, gradients }
    }
}

/// The loss of `pack` and its gradient with respect to every tensor of `prefix`, which must have one layer
/// for each of the model's.
///
/// A sequence's tokens see the whole prefix and their own predecessors; the first is at position `p`. On the
/// CPU the result has the same bits whatever the number of threads.
pub fn gradients(
    decoder: &Decoder,
    prefix: &[PrefixLayer],
    pack: &Pack,
    options: &StepOptions,
) -> Result<StepOutput, TrainError> {
    if prefix.is_empty() {
        let reason = "it has no layers, so there is nothing to train".to_owned();
        return Err(TrainError::Prefix { reason });
    }
    let pass = Pass::new(decoder, prefix, pack, options, true)?;
    let prefix = placed(prefix, decoder)?;
    let (hidden, mut kept) = pass.forward(&prefix, options.recompute)?;
    let AtHead { loss, gradient } = pass.loss(&hidden)?;
    drop(hidden);
    let mut upstream = gradient;
    let mut gradients = Vec::with_capacity(prefix.len());
    for (index, prefix) in prefix.iter().enumerate().rev() {
        let (Some(kept), Some(grad)) = (kept.pop(), upstream.take()) else {
            return Err(candle_core::Error::msg("a layer without a way back").into());
        };
        let (trace, log_sums) = match kept {
            Kept::Whole(trace, log_sums) => (*trace, log_sums),
            Kept::Input(input) => {
                let (_, trace, log_sums) = pass.layer(index, &input, Some(prefix))?;
                (trace, log_sums)
            }
        };
        let (below, found) = pass.layer_backward(index, prefix, trace, log_sums, grad)?;
        upstream = below;
        gradients.push(found);
    }
    gradients.reverse();
    Ok(StepOutput::new(loss, gradients))
}

/// The loss of `pack` alone; an empty `prefix` is the model without a cartridge.
pub fn evaluate(
    decoder: &Decoder,
    prefix: &[PrefixLayer],
    pack: &Pack,
    options: &StepOptions,
) -> Result<LossOnly, TrainError> {
    let pass = Pass::new(decoder, prefix, pack, options, false)?;
    let prefix = placed(prefix, decoder)?;
    let mut hidden = decoder.embed(&pack.tokens)?;
    for index in 0..decoder.config().layers {
        (hidden, ..) = pass.layer(index, &hidden, prefix.get(index))?;
    }
    Ok(pass.loss(&hidden)?.loss)
}

/// As the decoder's attention reads it: on a GPU in its 16 bits, rounded anew for every pass.
fn placed(prefix: &[PrefixLayer], decoder: &Decoder) -> candle_core::Result<Vec<Prefix>> {
    let tensor = |tensor: &Tensor| {
        tensor.to_device(decoder.device())?.to_dtype(decoder.dtype())?.contiguous()
    };
    prefix.iter().map(|layer| Ok((tensor(&layer.keys)?, tensor(&layer.values)?))).collect()
}

/// What the way back needs of a layer.
enum Kept {
    Whole(Box<Trace>, LogSums),
    /// Its input, from which it is computed again.
    Input(Tensor),
}

/// What is the same for every layer of a pass.
struct Pass<'a> {
    decoder: &'a Decoder,
    pack: &'a Pack,
    targets: TargetRows<'a>,
    angles: Angles,
    attention: PackedAttention,
    /// Of the last layer: rows with a target, and their attention.
    chosen: Chosen,
    last_attention: PackedAttention,
    options: LossOptions,
}

impl<'a> Pass<'a> {
    fn new(
        decoder: &'a Decoder,
        prefix: &[PrefixLayer],
        pack: &'a Pack,
        options: &StepOptions,
        gradient: bool,
    ) -> Result<Self, TrainError> {
        if !(options.temperature > 0.0 && options.temperature.is_finite()) {
            return Err(TrainError::Temperature { temperature: options.temperature });
        }
        let config = decoder.config();
        let start = check_prefix(prefix, config)? as u32;
        check_pack(pack, config)?;
        let lengths = pack.cu_seqlens.windows(2).map(|ends| ends[1] - ends[0]);
        let positions: Vec<u32> = lengths.flat_map(|len| start..start + len).collect();
        let angles = decoder.angles(&positions)?;
        let targets = TargetRows::new(&pack.targets);
        let chosen = Chosen::new(targets.rows.clone(), &angles)?;
        let attention = |queries: &[u32]| {
            let heads =
                Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
            let scale = 1.0 / (config.head_dim as f32).sqrt();
            PackedAttention::new(&pack.cu_seqlens, queries, heads, scale, decoder.device())
        };
        let all: Vec<u32> = (0..pack.tokens.len() as u32).collect();
        let StepOptions { normalizer, temperature, .. } = *options;
        Ok(Self {
            attention: attention(&all)?,
            last_attention: attention(chosen.rows.chosen())?,
            decoder,
            pack,
            targets,
            angles,
            chosen,
            options: LossOptions { normalizer, temperature, gradient },
        })
    }

    /// Which rows of a layer's output are wanted, if not all, and its attention.
    fn rows(&self, index: usize) -> (Option<&Chosen>, &PackedAttention) {
        match index + 1 == self.decoder.config().layers {
            true => (Some(&self.chosen), &self.last_attention),
            false => (None, &self.attention),
        }
    }

    fn layer(
        &self,
        index: usize,
        hidden: &Tensor,
        prefix: Option<&Prefix>,
    ) -> candle_core::Result<(Tensor, Trace, LogSums)> {
        let (chosen, packed) = self.rows(index);
        let mut attention = PrefixAttention { packed, prefix, log_sums: None };
        let (output, trace) =
            self.decoder.layer(index, hidden, &self.angles, chosen, &mut attention)?;
        match attention.log_sums {
            Some(log_sums) => Ok((output, trace, log_sums)),
            None => candle_core::bail!("a layer that did not attend"),
        }
    }

    /// The hidden states of the target rows behind the last layer, and what is kept of each layer.
    fn forward(
        &self,
        prefix: &[Prefix],
        recompute: bool,
    ) -> candle_core::Result<(Tensor, Vec<Kept>)> {
        let mut hidden = self.decoder.embed(&self.pack.tokens)?;
        let mut kept = Vec::with_capacity(prefix.len());
        for (index, layer) in prefix.iter().enumerate() {
            let (output, trace, log_sums) = self.layer(index, &hidden, Some(layer))?;
            // The last layer is the first on the way back.
            kept.push(match recompute && index + 1 < prefix.len() {
                true => Kept::Input(trace.hidden),
                false => Kept::Whole(Box::new(trace), log_sums),
            });
            hidden = output;
        }
        Ok((hidden, kept))
    }

    /// Of the target rows' hidden states behind the last layer.
    fn loss(&self, hidden: &Tensor) -> Result<AtHead, TrainError> {
        let rows = self.decoder.normed(hidden)?;
        let (loss, gradient) =
            distillation_loss(&rows, self.decoder.head(), &self.targets, self.options)?;
        let gradient = gradient.map(|grad| self.decoder.normed_backward(hidden, &grad));
        Ok(AtHead { loss, gradient: gradient.transpose()? })
    }

    /// From the gradient of a layer's output to those of its input, unless it is the first, and its prefix.
    fn layer_backward(
        &self,
        index: usize,
        prefix: &Prefix,
        trace: Trace,
        log_sums: LogSums,
        grad: Tensor,
    ) -> candle_core::Result<(Option<Tensor>, (Tensor, Tensor))> {
        let (chosen, packed) = self.rows(index);
        let attention = PrefixAttention { packed, prefix: Some(prefix), log_sums: Some(log_sums) };
        let mut found = None;
        let mut back = |trace: &Trace, grad: &Tensor| {
            let gradients = attention.backward(trace, grad, index > 0)?;
            found = gradients.prefix;
            Ok(gradients.own)
        };
        let input =
            self.decoder.layer_backward(index, trace, &self.angles, chosen, grad, &mut back)?;
        match found {
            Some(found) => Ok((input, found)),
            None => candle_core::bail!("no gradient reached the prefix of layer {index}"),
        }
    }
}

/// Where the layers end and the loss begins.
struct AtHead {
    loss: LossOnly,
    /// Of the loss with respect to the hidden states of the target rows, if it was asked for.
    gradient: Option<Tensor>,
}
