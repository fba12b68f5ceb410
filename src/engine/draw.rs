//! From logits to tokens: the next ones of a step's sequences, and the scores of a prompt's.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::logprobs::token_logprobs;
use super::sampler::Sampler;
use super::scheduler::SequenceId;
use super::sequence::{ActiveRequest, Sequence};
use super::{EngineError, SampledToken};
use crate::gpu::sampling::{self, MAX_TOP, MAX_VOCAB, Wanted};
use crate::gpu::{Machine, SampleRow, machine};
use crate::model::Decoder;
use crate::ops::{all_finite, on_host, with_f32};

/// Rows of logits `[rows, vocab]` held at once while scoring a prompt: on the host, and on a GPU, where each
/// product with the output head reads all of its weights (64 MiB of logits over 131,072 tokens).
const PROMPT_ROWS: usize = 32;
const GPU_PROMPT_ROWS: usize = 128;

/// What drawing a token of one sequence takes, on any thread.
pub(super) struct Draw {
    pub active: Arc<ActiveRequest>,
    pub sampler: Sampler,
    /// Tokens drawn before.
    pub generated: usize,
}

/// The token drawn for a sequence; `None` if it wants none.
pub(super) type Drawn = std::result::Result<Option<SampledToken>, EngineError>;

/// Logits `[rows, vocab]` in f32, where they are worked on.
pub(super) enum Logits {
    Host(Tensor),
    Gpu(Machine, Tensor),
}

impl Logits {
    /// Of hidden states `[rows, hidden]`.
    pub fn of(decoder: &Decoder, hidden: &Tensor) -> Result<Self> {
        let logits = decoder.logits(hidden)?;
        match machine(decoder.device(), decoder.dtype())? {
            Some(gpu) if logits.dim(1)? <= MAX_VOCAB => Ok(Self::Gpu(gpu, logits.contiguous()?)),
            _ => Ok(Self::Host(on_host(&logits)?)),
        }
    }

    /// Draws from each row for the sequence at the same place.
    ///
    /// Each result depends on its own row and sampler alone.
    pub fn draw(&self, draws: &mut [(SequenceId, Draw)]) -> Result<Vec<Drawn>> {
        match self {
            Self::Host(logits) => {
                let vocab = logits.dim(1)?;
                with_f32(logits, |logits| {
                    let rows = logits.par_chunks_exact(vocab);
                    Ok(draws
                        .par_iter_mut()
                        .zip(rows)
                        .map(|((_, draw), row)| draw.draw(row))
                        .collect())
                })
            }
            Self::Gpu(gpu, logits) => {
                let rows: Vec<_> = draws.iter_mut().map(|(_, draw)| draw.row()).collect();
                let tokens = sampling::draw(&**gpu, logits, &rows)?;
                let drawn = draws.iter_mut().zip(tokens).enumerate();
                drawn.map(|(row, ((_, draw), token))| draw.drew(token, logits, row)).collect()
            }
        }
    }

    /// Log-probabilities of `tokens[i]` and of the `top` likeliest in row i; `None` where it is not finite.
    fn score(
        &self,
        tokens: &[u32],
        temperature: f32,
        top: usize,
    ) -> Result<Vec<Option<SampledToken>>> {
        let on_host = |logits: &Tensor| {
            let vocab = logits.dim(1)?;
            with_f32(logits, |logits| {
                let rows = logits.par_chunks_exact(vocab).zip(tokens);
                let score = |row, id| token_logprobs(row, id, temperature, top);
                Ok(rows.map(|(row, id)| all_finite(row).then(|| score(row, *id))).collect())
            })
        };
        match self {
            Self::Host(logits) => on_host(logits),
            Self::Gpu(_, logits) if top > MAX_TOP => on_host(&crate::ops::on_host(logits)?),
            Self::Gpu(gpu, logits) => {
                sampling::score(&**gpu, logits, tokens, Wanted { temperature, top })
            }
        }
    }
}

impl Draw {
    fn draw(&mut self, logits: &[f32]) -> Drawn {
        if !all_finite(logits) {
            return Err(EngineError::NonFiniteLogits);
        }
        let request = &self.active.request;
        if request.sampling.max_tokens == 0 {
            return Ok(None);
        }
        let id = self.sampler.sample(logits, forbidden(&self.active, self.generated));
        let (temperature, top) = (request.temperature_of_logprobs(), request.logprobs.top);
        Ok(Some(token_logprobs(logits, id, temperature, top)))
    }

    /// What a GPU needs to know to do the same.
    fn row(&mut self) -> (SampleRow<'_>, Wanted) {
        let request = &self.active.request;
        let top = request.logprobs.top;
        let wanted = Wanted {
            temperature: request.temperature_of_logprobs(),
            // More are the host's, of the same logits.
            top: if top > MAX_TOP { 0 } else { top },
        };
        (self.sampler.row(forbidden(&self.active, self.generated)), wanted)
    }

    /// Takes what it drew from a row of `logits`.
    fn drew(&mut self, token: Option<SampledToken>, logits: &Tensor, row: usize) -> Result<Drawn> {
        let Some(token) = token else { return Ok(Err(EngineError::NonFiniteLogits)) };
        let request = &self.active.request;
        if request.sampling.max_tokens == 0 {
            return Ok(Ok(None));
        }
        self.sampler.drew(token.id);
        let (temperature, top) = (request.temperature_of_logprobs(), request.logprobs.top);
        if top <= MAX_TOP {
            return Ok(Ok(Some(token)));
        }
        // Copied apart first: a tensor comes to the host with all that its memory holds.
        let row = on_host(&logits.narrow(0, row, 1)?.force_contiguous()?)?;
        with_f32(&row, |row| Ok(Ok(Some(token_logprobs(row, token.id, temperature, top)))))
    }
}

/// Tokens that must not be drawn after `generated` ones.
fn forbidden(active: &ActiveRequest, generated: usize) -> &[u32] {
    match generated < active.request.sampling.min_tokens {
        true => &active.request.stop_token_ids,
        false => &[],
    }
}

/// Log-probabilities of the prompt tokens that `hidden` `[rows, hidden]` of a sequence predicts. The inner
/// error is the request's own.
pub(super) fn score_prompt(
    decoder: &Decoder,
    sequence: &mut Sequence,
    hidden: &Tensor,
) -> Result<std::result::Result<(), EngineError>> {
    let active = Arc::clone(&sequence.active);
    let Some(top) = active.request.logprobs.prompt_top else { return Ok(Ok(())) };
    let rows_at_once = match crate::gpu::is_gpu(decoder.device(), decoder.dtype()) {
        true => GPU_PROMPT_ROWS,
        false => PROMPT_ROWS,
    };
    let predicted = sequence.unscored(hidden.dim(0)?);
    for start in predicted.clone().step_by(rows_at_once) {
        let tokens = &active.request.prompt[start..predicted.end.min(start + rows_at_once)];
        // The token before it is what predicts one.
        let rows = hidden.narrow(0, start - 1 - sequence.computed, tokens.len())?;
        let logits = Logits::of(decoder, &rows)?;
        let scores = logits.score(tokens, active.request.temperature_of_logprobs(), top)?;
        match scores.into_iter().collect::<Option<Vec<_>>>() {
            Some(scores) => sequence.add_prompt_logprobs(scores),
            None => return Ok(Err(EngineError::NonFiniteLogits)),
        }
    }
    Ok(Ok(()))
}
