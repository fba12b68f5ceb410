//! The gradient of one micro-step: a pack in, the loss and a gradient for every cartridge tensor out.
//!
//! The model's weights are plain tensors that candle's graph never follows; only the cartridge's keys and
//! values, and in between the hidden states, are variables.

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, Var};

use super::attention::{Prefix, PrefixAttention};
use super::check::{check_pack, check_prefix};
use super::loss::{LossOptions, TargetRows, distillation_loss};
use super::{LossOnly, Normalizer, Pack, TrainError};
use crate::model::Decoder;

/// Keys (after RoPE) and values of one layer of the cartridge, each `[kv_heads, p, head_dim]` in f32.
/// Tensors of a [`Var`] are used in place, others are copied.
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
    /// Per layer the gradients of `loss` with respect to keys and values, shaped like them. Frozen tokens
    /// have theirs too.
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
/// A sequence's tokens see the whole prefix and their own predecessors; the first is at position `p`. The
/// result has the same bits whatever the number of threads.
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
    if options.recompute { pass.by_layer(prefix) } else { pass.at_once(prefix) }
}

/// The loss of `pack` alone; an empty `prefix` is the model without a cartridge.
pub fn evaluate(
    decoder: &Decoder,
    prefix: &[PrefixLayer],
    pack: &Pack,
    options: &StepOptions,
) -> Result<LossOnly, TrainError> {
    let pass = Pass::new(decoder, prefix, pack, options, false)?;
    let prefix: Vec<Prefix> = prefix.iter().map(PrefixLayer::detached).collect();
    let mut hidden = decoder.embed(&pack.tokens)?;
    for index in 0..decoder.config().layers {
        hidden = pass.layer(index, &hidden, prefix.get(index))?;
    }
    Ok(pass.loss(&hidden)?.loss)
}

impl PrefixLayer {
    fn detached(&self) -> Prefix {
        (self.keys.detach(), self.values.detach())
    }

    fn variables(&self) -> candle_core::Result<Prefix> {
        let keys = Var::from_tensor(&self.keys)?.into_inner();
        Ok((keys, Var::from_tensor(&self.values)?.into_inner()))
    }
}

/// What is the same for every layer of a pass.
struct Pass<'a> {
    decoder: &'a Decoder,
    pack: &'a Pack,
    targets: TargetRows<'a>,
    target_rows: Tensor,
    angles: (Tensor, Tensor),
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
        let start = check_prefix(prefix, decoder.config())? as u32;
        check_pack(pack, decoder.config())?;
        let lengths = pack.cu_seqlens.windows(2).map(|ends| ends[1] - ends[0]);
        let positions: Vec<u32> = lengths.flat_map(|len| start..start + len).collect();
        let targets = TargetRows::new(&pack.targets);
        let StepOptions { normalizer, temperature, .. } = *options;
        Ok(Self {
            decoder,
            pack,
            target_rows: Tensor::new(targets.rows.as_slice(), decoder.device())?,
            targets,
            angles: decoder.angles(&positions)?,
            options: LossOptions { normalizer, temperature, gradient },
        })
    }

    fn layer(
        &self,
        index: usize,
        hidden: &Tensor,
        prefix: Option<&Prefix>,
    ) -> candle_core::Result<Tensor> {
        let mut attention = PrefixAttention { prefix, cu_seqlens: &self.pack.cu_seqlens };
        self.decoder.layer(index, hidden, &self.angles, &mut attention)
    }

    /// Of the hidden states behind the last layer.
    fn loss(&self, hidden: &Tensor) -> Result<AtHead, TrainError> {
        let rows = self.decoder.normed(&hidden.index_select(&self.target_rows, 0)?)?;
        let head = self.decoder.head();
        let (loss, gradient) =
            distillation_loss(&rows.detach(), head, &self.targets, self.options)?;
        Ok(AtHead { loss, rows, gradient })
    }

    fn at_once(&self, prefix: &[PrefixLayer]) -> Result<StepOutput, TrainError> {
        let prefix: Vec<Prefix> =
            prefix.iter().map(PrefixLayer::variables).collect::<candle_core::Result<_>>()?;
        let mut hidden = self.decoder.embed(&self.pack.tokens)?;
        for (index, prefix) in prefix.iter().enumerate() {
            hidden = self.layer(index, &hidden, Some(prefix))?;
        }
        let head = self.loss(&hidden)?;
        let mut found = head.backward()?;
        let gradients = prefix.iter().map(|prefix| take_prefix(&mut found, prefix));
        Ok(StepOutput::new(head.loss, gradients.collect::<candle_core::Result<_>>()?))
    }

    fn by_layer(&self, prefix: &[PrefixLayer]) -> Result<StepOutput, TrainError> {
        let mut inputs = vec![self.decoder.embed(&self.pack.tokens)?];
        // The last layer is computed below, once, with its graph.
        for (index, layer) in prefix[..prefix.len() - 1].iter().enumerate() {
            let output = self.layer(index, &inputs[index], Some(&layer.detached()))?;
            inputs.push(output);
        }
        let mut gradients = Vec::with_capacity(prefix.len());
        let mut loss = None;
        // With respect to the output of the layer at hand.
        let mut upstream: Option<Tensor> = None;
        for (index, layer) in prefix.iter().enumerate().rev() {
            let layer = layer.variables()?;
            let Some(input) = inputs.pop() else {
                return Err(candle_core::Error::msg("a layer without an input").into());
            };
            // What comes before the first layer is frozen.
            let input = if index == 0 { input } else { Var::from_tensor(&input)?.into_inner() };
            let output = self.layer(index, &input, Some(&layer))?;
            let mut found = match upstream.take() {
                Some(gradient) => backward(&output, gradient)?,
                None => {
                    let head = self.loss(&output)?;
                    loss = Some(head.loss);
                    head.backward()?
                }
            };
            drop(output);
            gradients.push(take_prefix(&mut found, &layer)?);
            upstream = found.remove(&input);
        }
        gradients.reverse();
        match loss {
            Some(loss) => Ok(StepOutput::new(loss, gradients)),
            None => Err(candle_core::Error::msg("a model without layers").into()),
        }
    }
}

/// Where the graph of the layers ends and the loss begins.
struct AtHead {
    loss: LossOnly,
    /// Normed hidden states of the target rows.
    rows: Tensor,
    /// Of the loss with respect to them, if it was asked for.
    gradient: Option<Tensor>,
}

impl AtHead {
    fn backward(&self) -> candle_core::Result<GradStore> {
        match &self.gradient {
            Some(gradient) => backward(&self.rows, gradient.clone()),
            None => candle_core::bail!("the loss was computed without a gradient"),
        }
    }
}

fn take_prefix(
    found: &mut GradStore,
    (keys, values): &Prefix,
) -> candle_core::Result<(Tensor, Tensor)> {
    let mut take = |tensor: &Tensor, kind| match found.remove(tensor) {
        Some(gradient) => Ok(gradient),
        None => candle_core::bail!("no gradient reached the {kind} of a layer"),
    };
    Ok((take(keys, "keys")?, take(values, "values")?))
}

/// Gradients of the variables below `output`, given `gradient` with respect to it.
fn backward(output: &Tensor, gradient: Tensor) -> candle_core::Result<GradStore> {
    output.apply_op1(Known { gradient })?.backward()
}

/// A number whose gradient is known: it stands for the rest of the computation, which is not in the graph.
struct Known {
    gradient: Tensor,
}

impl CustomOp1 for Known {
    fn name(&self) -> &'static str {
        "known_gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.gradient.clone()))
    }
}
