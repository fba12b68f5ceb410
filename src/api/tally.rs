//! What a reply says about its request as a whole: usage, fingerprint, cartridges.

use super::{
    generate::Update,
    logprobs::Fingerprint,
    openai::{
        params::Settings,
        reply::{CartridgeUsed, PromptTokensDetails, Usage},
    },
};

/// Counts while updates pass; whole replies and streams end with the same numbers.
pub struct Tally {
    pub fingerprint: Fingerprint,
    pub cartridges: Vec<CartridgeUsed>,
    prompt_tokens: usize,
    cached_tokens: usize,
    choices_per_prompt: usize,
    open: usize,
}

impl Tally {
    /// `prompts`: their lengths in tokens.
    pub fn new(prompts: &[usize], settings: &Settings, cartridges: Vec<CartridgeUsed>) -> Self {
        let choices = prompts.len() * settings.n;
        let logprobs = &settings.logprobs;
        let prompt_tokens = prompts.iter().sum();
        Self {
            fingerprint: Fingerprint::new(choices, logprobs.in_fingerprint, logprobs.top),
            cartridges,
            prompt_tokens,
            cached_tokens: 0,
            choices_per_prompt: settings.n,
            open: choices,
        }
    }

    /// Index of a prompt's choice among all choices of the reply (prompt by prompt).
    pub fn index(&self, prompt: usize, choice: usize) -> usize {
        prompt * self.choices_per_prompt + choice
    }

    /// Counts an update.
    pub fn observe(&mut self, prompt: usize, update: &Update) {
        match update {
            Update::Prompt { cached_tokens, .. } => self.cached_tokens += cached_tokens,
            Update::Delta { choice, token, finish, .. } => {
                if let Some((token, _)) = token {
                    self.fingerprint.push(self.index(prompt, *choice), token);
                }
                self.open -= usize::from(finish.is_some());
            }
        }
    }

    /// Whether every choice has finished.
    pub fn is_complete(&self) -> bool {
        self.open == 0
    }

    /// `usage` so far. Each prompt counts once, whatever `n` is.
    pub fn usage(&self) -> Usage {
        let completion_tokens = self.fingerprint.total_tokens();
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            total_tokens: self.prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: self.cached_tokens,
                cartridge_tokens: self.cartridges.iter().map(|c| c.tokens).sum(),
            },
        }
    }
}
