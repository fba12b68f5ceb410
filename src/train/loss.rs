//! The distillation loss and its gradient, fused with the LM head.
//!
//! Logits exist for a few rows at a time only: with a vocabulary of 128 thousand those of one pack would
//! take a gigabyte. What leaves is one number and a gradient of the size of the hidden states.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Targets, TrainError};
use crate::gpu::loss::LossRows;
use crate::gpu::ops::room;
use crate::gpu::{Machine, machine_of};
use crate::ops::{Linear, change_f32, exp_in_place, exp_sum, max};

/// Logits held at once: 64 MiB of f32.
const MAX_CHUNK_LOGITS: usize = 16 << 20;
/// Rows of logits at once, whatever the vocabulary: enough to make products with the head efficient.
const CHUNK_ROWS: std::ops::RangeInclusive<usize> = 64..=256;

/// What the sum over the target entries is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Normalizer {
    /// Rows that have a target.
    #[default]
    Tokens,
    /// Target entries.
    Entries,
}

/// The cross entropy of the student with sparse targets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossOnly {
    /// `nll_sum` over the number of rows or of entries, as the normaliser says.
    pub loss: f64,
    /// Minus the sum over entries of `p · ln q`.
    pub nll_sum: f64,
    /// Sum over entries of `p · ln p`. Added to `nll_sum` it gives the Kullback-Leibler divergence over the
    /// entries' support.
    pub entropy_sum: f64,
    /// Rows with a target.
    pub rows: usize,
    pub entries: usize,
}

/// How the loss is computed.
#[derive(Debug, Clone, Copy)]
pub(super) struct LossOptions {
    pub normalizer: Normalizer,
    /// Divides the student's logits.
    pub temperature: f32,
    /// Whether the gradient is wanted.
    pub gradient: bool,
}

/// Target entries grouped by row.
#[derive(Debug)]
pub(super) struct TargetRows<'a> {
    targets: &'a Targets,
    /// The distinct rows, ascending.
    pub rows: Vec<u32>,
    /// Where the entries of each begin, and the end of the last.
    starts: Vec<usize>,
}

impl<'a> TargetRows<'a> {
    /// `targets.rows` must ascend.
    pub fn new(targets: &'a Targets) -> Self {
        let (mut rows, mut starts) = (Vec::new(), Vec::new());
        for (entry, row) in targets.rows.iter().enumerate() {
            if rows.last() != Some(row) {
                rows.push(*row);
                starts.push(entry);
            }
        }
        starts.push(targets.len());
        Self { targets, rows, starts }
    }

    /// Ids and probabilities of the `index`-th distinct row.
    fn entries(&self, index: usize) -> impl Iterator<Item = (usize, f32)> + Clone + '_ {
        let range = self.starts[index]..self.starts[index + 1];
        let ids = self.targets.ids[range.clone()].iter().map(|id| *id as usize);
        ids.zip(self.targets.probs[range].iter().copied())
    }

    /// On a GPU, with room for the losses, and for gradients.
    fn on(&self, device: &Device, gradient: bool) -> candle_core::Result<LossRows> {
        let Targets { ids, probs, .. } = self.targets;
        let integers = |numbers: Vec<i32>| Tensor::new(numbers, device);
        Ok(LossRows {
            starts: integers(self.starts.iter().map(|start| *start as i32).collect())?,
            ids: integers(ids.iter().map(|id| *id as i32).collect())?,
            probs: Tensor::new(probs.as_slice(), device)?,
            losses: room(self.rows.len(), DType::F32, device)?,
            slopes: gradient.then(|| room(probs.len(), DType::F32, device)).transpose()?,
        })
    }

    fn entropy_sum(&self) -> f64 {
        let probs = self.targets.probs.iter().map(|p| f64::from(*p));
        probs.filter(|p| *p > 0.0).map(|p| p * p.ln()).sum()
    }
}

/// The loss of the rows of `hidden` `[rows, hidden]`, after the final norm and one for each of the target's
/// distinct rows, and if asked for the gradient of [`LossOnly::loss`] with respect to them, of the same shape.
///
/// Sums are in f64 and in the order of the rows. A loss that is not finite is an error that names its row.
pub(super) fn distillation_loss(
    hidden: &Tensor,
    head: &Linear,
    targets: &TargetRows<'_>,
    options: LossOptions,
) -> Result<(LossOnly, Option<Tensor>), TrainError> {
    let (rows, entries) = (targets.rows.len(), targets.targets.len());
    let divisor = match options.normalizer {
        Normalizer::Tokens => rows,
        Normalizer::Entries => entries,
    };
    let step = chunk_rows(head.outputs()?);
    let scale = 1.0 / options.temperature;
    // What one unit of a row's probability adds to the gradient.
    let unit = options.gradient.then(|| f64::from(scale) / divisor as f64);
    let mut losses = RowLosses::new(hidden, targets, scale, unit)?;
    let mut gradients = Vec::new();
    for first in (0..rows).step_by(step) {
        let logits = head.forward_f32(&hidden.narrow(0, first, step.min(rows - first))?)?;
        losses.compute(first, &logits)?;
        if options.gradient {
            gradients.push(head.backward(&logits.to_dtype(hidden.dtype())?)?);
        }
    }
    let losses = losses.finish()?;
    if let Some(i) = losses.iter().position(|loss| !loss.is_finite()) {
        return Err(TrainError::NonFiniteLoss { row: targets.rows[i] as usize });
    }
    let nll_sum = losses.chunks(step).map(|some| some.iter().sum::<f64>()).sum();
    let entropy_sum = targets.entropy_sum();
    let loss = LossOnly { loss: nll_sum / divisor as f64, nll_sum, entropy_sum, rows, entries };
    let gradient = match gradients.len() {
        0 => None,
        1 => gradients.pop(),
        _ => Some(Tensor::cat(&gradients, 0)?),
    };
    Ok((loss, gradient))
}

fn chunk_rows(vocab: usize) -> usize {
    (MAX_CHUNK_LOGITS / vocab.max(1)).clamp(*CHUNK_ROWS.start(), *CHUNK_ROWS.end())
}

/// Turns logits into losses, and into the gradient of the loss with respect to them if `unit` says so.
struct RowLosses<'a> {
    targets: &'a TargetRows<'a>,
    scale: f32,
    unit: Option<f64>,
    place: Place,
}

/// Where the losses of the rows so far are.
enum Place {
    Cpu(Vec<f64>),
    Gpu(Machine, LossRows),
}

impl<'a> RowLosses<'a> {
    /// Where `hidden` is.
    fn new(
        hidden: &Tensor,
        targets: &'a TargetRows<'a>,
        scale: f32,
        unit: Option<f64>,
    ) -> candle_core::Result<Self> {
        let place = match machine_of(hidden)? {
            None => Place::Cpu(Vec::with_capacity(targets.rows.len())),
            Some(gpu) => Place::Gpu(gpu, targets.on(hidden.device(), unit.is_some())?),
        };
        Ok(Self { targets, scale, unit, place })
    }

    /// Of the rows of `logits` `[rows, vocab]` in f32, the first of which is the `first` of the target's
    /// distinct rows: the next after those before.
    fn compute(&mut self, first: usize, logits: &Tensor) -> candle_core::Result<()> {
        let (targets, scale, unit) = (self.targets, self.scale, self.unit);
        match &mut self.place {
            Place::Gpu(gpu, rows) => {
                rows.compute(&**gpu, logits, first, (scale, unit.unwrap_or_default() as f32))
            }
            Place::Cpu(losses) => {
                change_f32(logits, |values| {
                    let rows = values.par_chunks_exact_mut(logits.dim(1)?).enumerate();
                    losses.par_extend(rows.map(|(i, logits)| {
                        row_loss(logits, targets.entries(first + i), scale, unit)
                    }));
                    Ok(())
                })
            }
        }
    }

    /// Of each row, before the division.
    fn finish(self) -> candle_core::Result<Vec<f64>> {
        match self.place {
            Place::Cpu(losses) => Ok(losses),
            Place::Gpu(_, rows) => {
                Ok(rows.losses.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
            }
        }
    }
}

/// The loss of one row of logits: minus the sum over `entries` (id, p) of `p · ln softmax(scale · logits)`.
///
/// With `unit`, the logits become `unit` times the gradient of the loss with respect to `scale · logits`.
/// Not finite if a logit of a target or the largest one is not. Panics if an id is not below the vocabulary.
pub fn row_loss(
    logits: &mut [f32],
    entries: impl Iterator<Item = (usize, f32)> + Clone,
    scale: f32,
    unit: Option<f64>,
) -> f64 {
    let largest = max(logits);
    let chosen: Vec<f32> = entries.clone().map(|(id, _)| logits[id]).collect();
    let sum = match unit {
        Some(_) => exp_in_place(logits, largest, scale),
        None => exp_sum(logits, largest, scale),
    };
    if let Some(unit) = unit {
        let mass: f64 = entries.clone().map(|(_, p)| f64::from(p)).sum();
        let factor = (mass * unit / sum) as f32;
        logits.iter_mut().for_each(|value| *value *= factor);
        for (id, p) in entries.clone() {
            logits[id] -= (f64::from(p) * unit) as f32;
        }
    }
    let log_q = |logit: f32| f64::from(logit - largest) * f64::from(scale) - sum.ln();
    -entries.zip(chosen).map(|((_, p), logit)| f64::from(p) * log_q(logit)).sum::<f64>()
}
