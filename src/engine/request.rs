//! What callers ask of the engine and what it answers.

use super::CacheSalt;
use crate::cartridge::Lease;

/// How the next token is chosen. Fields carry their OpenAI / vLLM names and meanings.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Subtracted from the logit of every token generated so far.
    pub presence_penalty: f32,
    /// Subtracted once per earlier occurrence among the generated tokens.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Choice `i` of a request draws from the stream `(seed, i)`; `None` takes a random seed.
    pub seed: Option<u64>,
    /// Tokens to generate at most; 0 only together with `LogprobOptions::prompt_top`, to score a prompt.
    pub max_tokens: usize,
    /// End tokens are not sampled before this many tokens.
    pub min_tokens: usize,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: None,
            max_tokens: 16,
            min_tokens: 0,
        }
    }
}

/// Who goes first when not everybody can run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody is waiting for the answer.
    #[default]
    Interactive,
    /// Work that takes what interactive requests leave, and gives its blocks up first.
    Batch,
}

/// Which log-probabilities to compute. They are natural logs over the whole vocabulary, taken before
/// penalties, bias and truncation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogprobOptions {
    /// Alternatives per generated token, most likely first.
    pub top: usize,
    /// Alternatives per prompt token; `Some(0)` gives the prompt tokens' own log-probabilities only.
    pub prompt_top: Option<usize>,
    /// Describe the distribution at temperature 1 instead of the one that is sampled from.
    pub ignore_temperature: bool,
}

/// One prompt, `n` completions of it.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Attended to before the prompt, in this order; prompt positions start at their total token count.
    pub cartridges: Vec<Lease>,
    pub n: usize,
    pub sampling: SamplingParams,
    /// Generation of a choice ends with any of these (the token is part of the output).
    pub stop_token_ids: Vec<u32>,
    pub logprobs: LogprobOptions,
    pub priority: Priority,
    /// Whose blocks of the prefix cache it may use, and who may use its own: those of the same salt.
    pub cache_salt: Option<CacheSalt>,
}

impl GenerateRequest {
    pub(super) fn temperature_of_logprobs(&self) -> f32 {
        match self.logprobs.ignore_temperature {
            true => 1.0,
            false => self.sampling.temperature,
        }
    }
}

/// A token with its log-probability and the most likely alternatives (id, log-probability), descending.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    pub id: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// One of `stop_token_ids` was generated.
    Stop,
    /// `max_tokens` were generated; also when the last of them is a stop token (as Tokasaurus reports it).
    Length,
}

/// What a [`super::TokenStream`] yields. A stream ends with one `Finished` per choice, or one `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    /// Once, before the first token, when the prompt has been processed.
    PromptDone {
        /// Prompt tokens whose keys and values were reused instead of computed.
        cached_tokens: usize,
        /// One entry per prompt token when `LogprobOptions::prompt_top` is set. Nothing predicts the
        /// first token, so its entry is `None`.
        logprobs: Vec<Option<SampledToken>>,
    },
    Token {
        choice: usize,
        token: SampledToken,
    },
    Finished {
        choice: usize,
        reason: FinishReason,
    },
    /// The request ended without finishing, e.g. the model produced non-finite logits.
    Failed(super::EngineError),
}
