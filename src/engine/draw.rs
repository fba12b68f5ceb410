//! The next tokens of a step's sequences, drawn side by side.

use std::sync::Arc;

use rayon::prelude::*;

use super::logprobs::token_logprobs;
use super::sampler::Sampler;
use super::scheduler::SequenceId;
use super::sequence::ActiveRequest;
use super::{EngineError, SampledToken};
use crate::ops;

/// What drawing a token of one sequence takes, on any thread.
pub(super) struct Draw {
    pub active: Arc<ActiveRequest>,
    pub sampler: Sampler,
    /// Tokens drawn before.
    pub generated: usize,
}

/// Draws from the rows of `logits` `[draws, vocab]`. `None` where no token is wanted.
///
/// Each result depends on its own row and sampler alone.
pub(super) fn draw_all(
    draws: &mut [(SequenceId, Draw)],
    logits: &[f32],
    vocab: usize,
) -> Vec<Result<Option<SampledToken>, EngineError>> {
    draws
        .par_iter_mut()
        .zip(logits.par_chunks_exact(vocab))
        .map(|((_, draw), row)| draw.draw(row))
        .collect()
}

impl Draw {
    fn draw(&mut self, logits: &[f32]) -> Result<Option<SampledToken>, EngineError> {
        check_finite(logits)?;
        let request = &self.active.request;
        if request.sampling.max_tokens == 0 {
            return Ok(None);
        }
        let forbidden = match self.generated < request.sampling.min_tokens {
            true => request.stop_token_ids.as_slice(),
            false => &[],
        };
        let id = self.sampler.sample(logits, forbidden);
        let (temperature, top) = (request.temperature_of_logprobs(), request.logprobs.top);
        Ok(Some(token_logprobs(logits, id, temperature, top)))
    }
}

pub(super) fn check_finite(logits: &[f32]) -> Result<(), EngineError> {
    match ops::all_finite(logits) {
        true => Ok(()),
        false => Err(EngineError::NonFiniteLogits),
    }
}
