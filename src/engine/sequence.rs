//! One completion in progress.

use std::rc::Rc;

use super::blocks::BlockTable;
use super::handle::Reply;
use super::logprobs::token_logprobs;
use super::sampler::Sampler;
use super::{EngineError, Event, FinishReason, GenerateRequest, SampledToken};

/// A request whose choices are running or waiting.
pub(super) struct ActiveRequest {
    pub request: GenerateRequest,
    pub reply: Reply,
    pub cartridge_tokens: usize,
}

/// One choice of a request.
pub(super) struct Sequence {
    pub active: Rc<ActiveRequest>,
    pub choice: usize,
    /// Prompt, then what was generated.
    pub tokens: Vec<u32>,
    /// Tokens whose keys and values are stored.
    pub computed: usize,
    /// Held from admission on.
    pub table: Option<BlockTable>,
    sampler: Sampler,
    /// Gathered chunk by chunk for the first choice, when asked for.
    prompt_logprobs: Vec<Option<SampledToken>>,
}

impl Sequence {
    pub fn new(active: Rc<ActiveRequest>, choice: usize) -> Self {
        let request = &active.request;
        Self {
            choice,
            tokens: request.prompt.clone(),
            computed: 0,
            table: None,
            sampler: Sampler::new(&request.sampling, choice, &request.prompt),
            prompt_logprobs: Vec::new(),
            active,
        }
    }

    fn prompt_len(&self) -> usize {
        self.active.request.prompt.len()
    }

    /// Whether logits of prompt positions are wanted from this sequence.
    pub fn wants_prompt_logprobs(&self) -> bool {
        self.choice == 0
            && self.active.request.logprobs.prompt_top.is_some()
            && self.prompt_logprobs.len() < self.prompt_len()
    }

    pub fn prefill_done(&self) -> bool {
        self.computed >= self.prompt_len()
    }

    /// Rotary position of the token at `index` of this sequence.
    pub fn position(&self, index: usize) -> u32 {
        (self.active.cartridge_tokens + index) as u32
    }

    /// Takes the logits that predict the prompt token at `index`.
    pub fn add_prompt_logprobs(&mut self, index: usize, logits: &[f32]) {
        let options = self.active.request.logprobs;
        if self.prompt_logprobs.is_empty() {
            self.prompt_logprobs.push(None); // nothing predicts the first token
        }
        let (Some(top), Some(&id)) = (options.prompt_top, self.active.request.prompt.get(index))
        else {
            return;
        };
        let temperature = self.temperature_of_logprobs();
        self.prompt_logprobs.push(Some(token_logprobs(logits, id, temperature, top)));
    }

    fn temperature_of_logprobs(&self) -> f32 {
        match self.active.request.logprobs.ignore_temperature {
            true => 1.0,
            false => self.active.request.sampling.temperature,
        }
    }

    /// Announces that the prompt is computed. Only the first choice speaks for the request.
    pub fn finish_prompt(&mut self) {
        if self.choice == 0 {
            let mut logprobs = std::mem::take(&mut self.prompt_logprobs);
            if self.active.request.logprobs.prompt_top.is_some() && logprobs.is_empty() {
                logprobs.push(None); // a prompt of one token
            }
            self.send(Event::PromptDone { cached_tokens: 0, logprobs });
        }
    }

    /// Draws the next token from `logits`; `Some` when the sequence ends with it.
    pub fn step(&mut self, logits: &[f32]) -> Result<Option<FinishReason>, EngineError> {
        let sampling = &self.active.request.sampling;
        if sampling.max_tokens == 0 {
            return Ok(Some(FinishReason::Length));
        }
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(EngineError::NonFiniteLogits);
        }
        let generated = self.tokens.len() - self.prompt_len();
        let stops = &self.active.request.stop_token_ids;
        let forbidden = if generated < sampling.min_tokens { stops.as_slice() } else { &[] };
        let id = self.sampler.sample(logits, forbidden);
        let temperature = self.temperature_of_logprobs();
        let top = self.active.request.logprobs.top;
        let token = token_logprobs(logits, id, temperature, top);
        let reason = match () {
            () if generated + 1 >= sampling.max_tokens => Some(FinishReason::Length),
            () if stops.contains(&id) => Some(FinishReason::Stop),
            () => None,
        };
        self.tokens.push(id);
        self.send(Event::Token { choice: self.choice, token });
        Ok(reason)
    }

    pub fn is_cancelled(&self) -> bool {
        self.active.reply.is_cancelled(self.choice)
    }

    pub fn send(&self, event: Event) {
        // A receiver that is gone is noticed as a cancellation before the next step.
        let _ = self.active.reply.events.send(event);
    }
}
