//! One completion in progress.

use std::ops::Range;
use std::sync::Arc;

use super::blocks::{BLOCK_TOKENS, BlockTable};
use super::draw::Draw;
use super::handle::Reply;
use super::prefix_cache::BlockTokens;
use super::sampler::Sampler;
use super::scheduler::SequenceId;
use super::{Event, FinishReason, GenerateRequest, SampledToken};

/// A request whose choices are running or waiting.
pub(super) struct ActiveRequest {
    pub request: GenerateRequest,
    pub reply: Reply,
    /// The id of the first choice's sequence; the others follow.
    pub first_id: SequenceId,
    pub cartridge_tokens: usize,
}

/// One choice of a request.
pub(super) struct Sequence {
    pub active: Arc<ActiveRequest>,
    pub choice: usize,
    generated: Vec<u32>,
    /// Tokens whose keys and values are stored.
    pub computed: usize,
    pub table: BlockTable,
    /// Made when the sequence first runs, so that waiting ones cost next to nothing; lent to [`Draw`].
    sampler: Option<Sampler>,
    started: bool,
    /// Gathered chunk by chunk for the first choice, when asked for.
    prompt_logprobs: Vec<Option<SampledToken>>,
    /// Prompt tokens taken over from the prefix cache on the first admission.
    cached_tokens: usize,
    prompt_announced: bool,
}

impl Sequence {
    pub fn new(active: Arc<ActiveRequest>, choice: usize, table: BlockTable) -> Self {
        Self {
            active,
            choice,
            generated: Vec::new(),
            computed: 0,
            table,
            sampler: None,
            started: false,
            prompt_logprobs: Vec::new(),
            cached_tokens: 0,
            prompt_announced: false,
        }
    }

    /// Called on every admission, with `cached` tokens already computed. True the first time.
    pub fn start(&mut self, cached: usize) -> bool {
        self.computed = cached;
        if std::mem::replace(&mut self.started, true) {
            return false;
        }
        self.cached_tokens = cached;
        let request = &self.active.request;
        self.sampler = Some(Sampler::new(&request.sampling, self.choice, &request.prompt));
        true
    }

    pub fn has_started(&self) -> bool {
        self.started
    }

    /// Gives the blocks back; everything is computed again later, nothing is sampled again.
    pub fn release(&mut self) {
        self.table.clear();
        self.computed = 0;
    }

    /// Takes over the cached beginning of the tokens. At least the last token is left, for its logits; all
    /// of them are when the logits of every prompt token are wanted. Returns the blocks.
    pub fn attach(&mut self) -> usize {
        if self.wants_prompt_logprobs() {
            return 0;
        }
        let full = (self.tokens() - 1) / BLOCK_TOKENS;
        let (prompt, generated) = (&self.active.request.prompt, &self.generated);
        self.table.attach((0..full).map(|block| block_tokens(prompt, generated, block)))
    }

    /// Lets others share the computed blocks. Only for a sequence whose results are finite.
    pub fn publish(&mut self) {
        let full = self.computed / BLOCK_TOKENS;
        if full > self.table.shared() {
            let (prompt, generated) = (&self.active.request.prompt, &self.generated);
            self.table.publish(full, |block| block_tokens(prompt, generated, block));
        }
    }

    pub fn prompt_len(&self) -> usize {
        self.active.request.prompt.len()
    }

    /// Prompt and generated tokens.
    fn tokens(&self) -> usize {
        self.prompt_len() + self.generated.len()
    }

    /// The next `count` tokens to compute.
    pub fn next_tokens(&self, count: usize) -> impl Iterator<Item = u32> {
        token_range(&self.active.request.prompt, &self.generated, self.computed, count)
    }

    /// Whether every token has its keys and values, so that the next can be sampled.
    pub fn is_computed(&self) -> bool {
        self.computed == self.tokens()
    }

    /// Whether logits of prompt positions are wanted from this sequence.
    pub fn wants_prompt_logprobs(&self) -> bool {
        self.choice == 0
            && !self.prompt_announced
            && self.active.request.logprobs.prompt_top.is_some()
    }

    /// Rotary position of the token at `index` of this sequence.
    pub fn position(&self, index: usize) -> u32 {
        (self.active.cartridge_tokens + index) as u32
    }

    /// Prompt tokens predicted by the next `count` tokens to compute that have no log-probability yet: after
    /// a preemption the same come by again.
    pub fn unscored(&self, count: usize) -> Range<usize> {
        // Nothing predicts the first token.
        let start = (self.computed + 1).max(self.prompt_logprobs.len());
        start..(self.computed + 1 + count).min(self.prompt_len()).max(start)
    }

    /// Takes the log-probabilities of the first [`Self::unscored`] tokens.
    pub fn add_prompt_logprobs(&mut self, scores: Vec<SampledToken>) {
        if self.prompt_logprobs.is_empty() {
            self.prompt_logprobs.push(None); // the first token's
        }
        self.prompt_logprobs.extend(scores.into_iter().map(Some));
    }

    /// Announces, once, that the prompt is computed. Only the first choice speaks for the request.
    pub fn announce_prompt(&mut self) {
        if self.choice != 0 || std::mem::replace(&mut self.prompt_announced, true) {
            return;
        }
        let mut logprobs = std::mem::take(&mut self.prompt_logprobs);
        if self.active.request.logprobs.prompt_top.is_some() && logprobs.is_empty() {
            logprobs.push(None); // a prompt of one token
        }
        self.send(Event::PromptDone { cached_tokens: self.cached_tokens, logprobs });
    }

    /// Hands out what drawing the next token takes, until [`Self::take_back`].
    pub fn draw(&mut self) -> Option<Draw> {
        let (active, generated) = (Arc::clone(&self.active), self.generated.len());
        self.sampler.take().map(|sampler| Draw { active, sampler, generated })
    }

    /// Takes the sampler back and sends the token, if one was drawn; `Some` when the sequence ends here.
    pub fn take_back(&mut self, draw: Draw, token: Option<SampledToken>) -> Option<FinishReason> {
        self.sampler = Some(draw.sampler);
        let Some(token) = token else { return Some(FinishReason::Length) };
        self.generated.push(token.id);
        let request = &self.active.request;
        let reason = match () {
            () if self.generated.len() >= request.sampling.max_tokens => Some(FinishReason::Length),
            () if request.stop_token_ids.contains(&token.id) => Some(FinishReason::Stop),
            () => None,
        };
        self.send(Event::Token { choice: self.choice, token });
        reason
    }

    pub fn send(&self, event: Event) {
        self.active.reply.send(event);
    }
}

/// Tokens `start..start + count` of a prompt and what follows it.
fn token_range<'a>(
    prompt: &'a [u32],
    generated: &'a [u32],
    start: usize,
    count: usize,
) -> impl Iterator<Item = u32> + 'a {
    let of_prompt = &prompt[start.min(prompt.len())..(start + count).min(prompt.len())];
    let generated = generated.iter().skip(start.saturating_sub(prompt.len()));
    of_prompt.iter().chain(generated.take(count - of_prompt.len())).copied()
}

fn block_tokens(prompt: &[u32], generated: &[u32], block: usize) -> BlockTokens {
    let mut tokens = [0; BLOCK_TOKENS];
    let range = token_range(prompt, generated, block * BLOCK_TOKENS, BLOCK_TOKENS);
    tokens.iter_mut().zip(range).for_each(|(to, from)| *to = from);
    tokens
}
