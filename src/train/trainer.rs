//! The loop, one update at a time.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::checkpoint::digest_of;
use super::optimizer::{Adam, AdamOptions};
use super::packing::epoch_order;
use super::schedule::{Decay, Schedule};
use super::step::{StepOptions, gradients};
use super::{Pack, Parameters, TrainError};
use crate::model::Decoder;
use crate::ops::add_scaled;

/// What decides the course of a run, besides its packs and its start. A checkpoint can be resumed only with
/// the same.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerOptions {
    pub schedule: Schedule,
    pub adam: AdamOptions,
    /// Packs per update; their gradients are averaged.
    pub global_batch_size: usize,
    pub step: StepOptions,
    pub seed: u64,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Updates made.
    pub step: u64,
    /// Packs seen, over all epochs.
    pub packs: u64,
    /// Input tokens and supervised rows of them.
    pub input_tokens: u64,
    pub target_tokens: u64,
}

/// One update, measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Where the run stands after it.
    pub position: Position,
    pub epoch: u64,
    /// Mean over the packs of the update, as normalised.
    pub loss: f64,
    /// Kullback-Leibler divergence from the teacher, per supervised token: the loss less the teacher's own
    /// entropy, both over the entries kept.
    pub kl: f64,
    pub lr: f64,
    pub grad_norm: f64,
    pub input_tokens: u64,
    pub target_tokens: u64,
}

/// Learns [`Parameters`] from packs. Drive it with [`Self::step`]; between two calls everything may be saved.
#[derive(Debug)]
pub struct Trainer {
    pub(super) decoder: Decoder,
    pub(super) options: TrainerOptions,
    packs: Vec<Pack>,
    /// Digest of the frozen weights when training began.
    weights: String,
    fingerprint: String,
    pub(super) parameters: Parameters,
    pub(super) adam: Adam,
    pub(super) position: Position,
    /// Order of the packs in an epoch.
    order: (u64, Vec<usize>),
}

impl Trainer {
    /// # Errors
    /// [`TrainError::Invalid`] without packs, or for a start that does not fit the model.
    pub fn new(
        decoder: Decoder,
        parameters: Parameters,
        packs: Vec<Pack>,
        options: TrainerOptions,
    ) -> Result<Self, TrainError> {
        let (have, want) = (parameters.shape(), decoder.config().kv_shape());
        if have != want {
            let reason = format!("the start has the shape {have:?}, the model {want:?}");
            return Err(TrainError::Invalid(reason));
        }
        if packs.is_empty() || options.global_batch_size == 0 {
            let reason = "there is nothing to learn: no row has targets, or global_batch_size is 0";
            return Err(TrainError::Invalid(reason.to_owned()));
        }
        if options.schedule.max_steps == 0 {
            let reason = "not a single update: epochs times packs are fewer than global_batch_size, or \
                          max_optimizer_steps is 0";
            return Err(TrainError::Invalid(reason.to_owned()));
        }
        let weights = decoder.weights_digest()?;
        let fingerprint = fingerprint(&options, &parameters, &packs, &weights);
        let order = (0, epoch_order(options.seed, 0, packs.len()));
        let adam = Adam::new(options.adam, &parameters);
        let position = Position::default();
        Ok(Self {
            decoder,
            options,
            packs,
            weights,
            fingerprint,
            parameters,
            adam,
            position,
            order,
        })
    }

    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    pub fn position(&self) -> Position {
        self.position
    }

    pub fn packs(&self) -> &[Pack] {
        &self.packs
    }

    /// # Errors
    /// [`TrainError::WeightsChanged`] if the frozen weights are not what they were at the start.
    pub fn check_weights(&self) -> Result<(), TrainError> {
        match self.decoder.weights_digest()? == self.weights {
            true => Ok(()),
            false => Err(TrainError::WeightsChanged),
        }
    }

    pub fn is_done(&self) -> bool {
        self.position.step >= self.options.schedule.max_steps
    }

    /// One update over `global_batch_size` packs, going round the packs epoch by epoch.
    ///
    /// # Errors
    /// [`TrainError::AtStep`]; parameters and optimiser are then as they were before the call.
    pub fn step(&mut self) -> Result<StepReport, TrainError> {
        let step = self.position.step;
        let mut pack = 0;
        self.try_step(&mut pack).map_err(|e| TrainError::AtStep {
            step,
            pack,
            dataset_rows: rows_to_blame(&self.packs[pack], &e),
            source: Box::new(e),
        })
    }

    fn try_step(&mut self, at: &mut usize) -> Result<StepReport, TrainError> {
        let prefix = self.parameters.prefix(self.decoder.device())?;
        // Where the gradients come about, so that only their sums leave a GPU.
        let mut sums = Vec::with_capacity(2 * prefix.len());
        for tensor in prefix.iter().flat_map(|layer| [&layer.keys, &layer.values]) {
            sums.push(tensor.zeros_like()?);
        }
        let share = 1.0 / self.options.global_batch_size as f32;
        let mut position = self.position;
        let (mut loss, mut kl, mut epoch) = (0.0, 0.0, 0);
        for _ in 0..self.options.global_batch_size {
            epoch = position.packs / self.packs.len() as u64;
            *at = self.pack_index(position.packs);
            let pack = &self.packs[*at];
            let out = gradients(&self.decoder, &prefix, pack, &self.options.step)?;
            let tensors = out.gradients.into_iter().flat_map(|(keys, values)| [keys, values]);
            let added = sums.into_iter().zip(tensors);
            let added = added.map(|(sum, gradient)| add_scaled(sum, &gradient, share));
            sums = added.collect::<candle_core::Result<_>>()?;
            loss += out.loss * f64::from(share);
            kl += (out.nll_sum + out.entropy_sum) / out.rows.max(1) as f64 * f64::from(share);
            position.packs += 1;
            position.input_tokens += pack.tokens.len() as u64;
            position.target_tokens += out.rows as u64;
        }
        let on_host = |sum: Tensor| sum.flatten_all()?.to_vec1::<f32>();
        let sums: Vec<_> = sums.into_iter().map(on_host).collect::<candle_core::Result<_>>()?;
        if let Some(bad) = sums.iter().flatten().position(|g| !g.is_finite()) {
            let reason = format!(
                "the gradient is not finite (number {bad}); a lower learning rate may help"
            );
            return Err(TrainError::Invalid(reason));
        }
        let lr = self.options.schedule.lr(position.step);
        let grad_norm = self.adam.update(&mut self.parameters, &sums, lr);
        position.step += 1;
        let (input_tokens, target_tokens) = (
            position.input_tokens - self.position.input_tokens,
            position.target_tokens - self.position.target_tokens,
        );
        self.position = position;
        Ok(StepReport { position, epoch, loss, kl, lr, grad_norm, input_tokens, target_tokens })
    }

    pub(super) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Updates in all.
    pub fn max_steps(&self) -> u64 {
        self.options.schedule.max_steps
    }

    /// Which pack is the `count`-th of the run.
    fn pack_index(&mut self, count: u64) -> usize {
        let packs = self.packs.len() as u64;
        let epoch = count / packs;
        if self.order.0 != epoch {
            self.order = (epoch, epoch_order(self.options.seed, epoch, self.packs.len()));
        }
        self.order.1[(count % packs) as usize]
    }
}

/// The dataset rows of a pack an error can come from.
pub(super) fn rows_to_blame(pack: &Pack, error: &TrainError) -> Vec<u32> {
    let rows = &pack.dataset_rows;
    match error {
        TrainError::NonFiniteLoss { row } => {
            rows.get(pack.sequence_of(*row)).copied().into_iter().collect()
        }
        _ => rows.clone(),
    }
}

/// What a run is known by: resuming with anything else would not be the same run.
fn fingerprint(
    options: &TrainerOptions,
    parameters: &Parameters,
    packs: &[Pack],
    weights: &str,
) -> String {
    let mut digest = Sha256::new();
    let mut options = options.clone();
    if options.schedule.decay == Decay::Constant {
        // Nothing so far depended on where the run ends: it may be made longer.
        (options.schedule.max_steps, options.schedule.alpha_f) = (0, 0.0);
    }
    let facts = (parameters.shape(), parameters.tokens(), parameters.frozen());
    digest.update(format!("{options:?} {facts:?} {weights}"));
    digest_of(packs, &mut digest);
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
