//! From engine events to text: one [`Assembly`] per prompt turns tokens into pieces of text, applies stop
//! strings and says when a choice is done. Streams and whole replies are built on the same updates.

use std::collections::HashSet;

use serde_json::Value;

use crate::{
    engine::{EngineError, Event, FinishReason, SampledToken},
    text::{Detokenizer, StopMatcher, Tokenizer},
};

/// Prompt tokens that give the detokenizer of a text completion its context.
const CONTEXT_TOKENS: usize = 16;

/// Why a choice ended, in the words of the API.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// `stop` or `length`.
    pub reason: &'static str,
    /// The stop string or `stop_token_ids` entry that ended it; null for the model's own end token.
    pub stop: Value,
}

/// What happened to a request. Text is in order and final: it is never taken back.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// Once, before all others.
    Prompt { cached_tokens: usize, logprobs: Vec<Option<SampledToken>> },
    Delta {
        choice: usize,
        text: String,
        /// The token and the chars of the choice's text before it.
        token: Option<(SampledToken, usize)>,
        /// Set once per choice, in its last update.
        finish: Option<Finish>,
    },
}

/// How the tokens of one prompt's choices become text.
#[derive(Debug, Clone)]
pub struct TextOptions {
    pub n: usize,
    pub stop: Vec<String>,
    pub include_stop: bool,
    pub skip_special_tokens: bool,
    /// Ends that are the model's, and ends that the request asked for.
    pub eos_token_ids: Vec<u32>,
    pub stop_token_ids: Vec<u32>,
    /// Text of this many tokens is not searched for stop strings.
    pub min_tokens: usize,
}

/// The choices of one prompt.
pub struct Assembly {
    choices: Vec<Choice>,
    stop: Vec<String>,
    include_stop: bool,
    eos: HashSet<u32>,
    stop_token_ids: HashSet<u32>,
    min_tokens: usize,
    open: usize,
}

struct Choice {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    chars: usize,
    tokens: usize,
    last: Option<u32>,
    done: bool,
}

impl Assembly {
    /// `context`: the prompt, for text that goes on from it (so that a leading space is kept); empty when
    /// the text stands alone.
    pub fn new(tokenizer: &Tokenizer, options: &TextOptions, context: &[u32]) -> Self {
        let mut detokenizer = Detokenizer::new(tokenizer, options.skip_special_tokens);
        for &id in &context[context.len().saturating_sub(CONTEXT_TOKENS)..] {
            detokenizer.push(id);
        }
        // A newline of a byte-fallback vocabulary is held back, and is the prompt's.
        detokenizer.settle();
        let choice = || Choice {
            detokenizer: detokenizer.clone(),
            matcher: StopMatcher::new(options.stop.clone()),
            chars: 0,
            tokens: 0,
            last: None,
            done: false,
        };
        Self {
            choices: std::iter::repeat_with(choice).take(options.n).collect(),
            stop: options.stop.clone(),
            include_stop: options.include_stop,
            eos: options.eos_token_ids.iter().copied().collect(),
            stop_token_ids: options.stop_token_ids.iter().copied().collect(),
            min_tokens: options.min_tokens,
            open: options.n,
        }
    }

    /// Whether every choice has its finish.
    pub fn is_done(&self) -> bool {
        self.open == 0
    }

    /// Reads one event. When the update finishes a choice by a stop string, the engine does not know yet:
    /// the caller cancels that choice. Events of a finished choice yield nothing.
    pub fn on_event(&mut self, event: Event) -> Result<Option<Update>, EngineError> {
        match event {
            Event::PromptDone { cached_tokens, logprobs } => {
                Ok(Some(Update::Prompt { cached_tokens, logprobs }))
            }
            Event::Token { choice, token } => Ok(self.on_token(choice, token)),
            Event::Finished { choice, reason } => Ok(self.on_finished(choice, reason)),
            Event::Failed(error) => Err(error),
        }
    }

    fn on_token(&mut self, index: usize, token: SampledToken) -> Option<Update> {
        let choice = self.choices.get_mut(index).filter(|c| !c.done)?;
        choice.last = Some(token.id);
        choice.tokens += 1;
        let offset = choice.chars;
        let ends = self.eos.contains(&token.id) || self.stop_token_ids.contains(&token.id);
        let (mut text, mut finish) = (String::new(), None);
        if !ends || self.include_stop {
            let new = choice.detokenizer.push(token.id);
            choice.chars += new.chars().count();
            if choice.tokens <= self.min_tokens {
                text = new;
            } else {
                let push = choice.matcher.push(&new);
                text = push.emit;
                finish = push.matched.map(|i| self.stop[i].clone());
            }
        }
        let finish = finish.map(|stop| {
            text.push_str(if self.include_stop { &stop } else { "" });
            choice.done = true;
            self.open -= 1;
            Finish { reason: "stop", stop: stop.into() }
        });
        Some(Update::Delta { choice: index, text, token: Some((token, offset)), finish })
    }

    fn on_finished(&mut self, index: usize, reason: FinishReason) -> Option<Update> {
        let choice = self.choices.get_mut(index).filter(|c| !c.done)?;
        choice.done = true;
        self.open -= 1;
        let push = choice.matcher.push(&choice.detokenizer.finish());
        let mut text = push.emit;
        let finish = match (push.matched.map(|i| &self.stop[i]), reason) {
            (Some(stop), _) => {
                text.push_str(if self.include_stop { stop } else { "" });
                Finish { reason: "stop", stop: stop.clone().into() }
            }
            (None, FinishReason::Length) => Finish { reason: "length", stop: Value::Null },
            (None, FinishReason::Stop) => {
                let asked = choice.last.filter(|id| self.stop_token_ids.contains(id));
                Finish { reason: "stop", stop: asked.map_or(Value::Null, Value::from) }
            }
        };
        text.push_str(&choice.matcher.finish());
        Some(Update::Delta { choice: index, text, token: None, finish: Some(finish) })
    }
}

#[cfg(test)]
#[path = "generate_tests.rs"]
mod tests;
