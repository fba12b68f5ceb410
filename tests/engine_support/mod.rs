//! Shared by the engine's tests: engines on fixtures, requests, and what comes out.
#![allow(dead_code)] // each test binary uses its own part

use cartouche::engine::{
    EngineError, EngineHandle, EngineOptions, EngineStats, Event, FinishReason, GenerateRequest,
    LogprobOptions, Priority, SampledToken, SamplingParams, TokenStream, start,
};

use crate::common::ModelFixture;

pub fn start_engine(fixture: &ModelFixture, options: &EngineOptions) -> EngineHandle {
    start(fixture.decoder(), options).unwrap().0
}

/// KV bytes of `blocks` blocks for a fixture.
pub fn kv_bytes(fixture: &ModelFixture, blocks: u64) -> u64 {
    let shape = fixture.decoder().config().kv_shape();
    blocks * 16 * (2 * 4 * shape.layers * shape.kv_heads * shape.head_dim) as u64
}

pub fn greedy(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.to_vec(),
        cartridges: vec![],
        n: 1,
        sampling: SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() },
        stop_token_ids: vec![],
        logprobs: LogprobOptions::default(),
        priority: Priority::Interactive,
        cache_salt: None,
    }
}

/// What a stream yields, per choice, once it has ended.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    pub cached_tokens: usize,
    pub prompt: Vec<Option<SampledToken>>,
    pub tokens: Vec<Vec<SampledToken>>,
    pub reasons: Vec<Option<FinishReason>>,
}

impl Outcome {
    pub fn ids(&self, choice: usize) -> Vec<u32> {
        self.tokens[choice].iter().map(|t| t.id).collect()
    }

    pub fn ids_of_all(&self) -> Vec<Vec<u32>> {
        (0..self.tokens.len()).map(|choice| self.ids(choice)).collect()
    }
}

pub fn collect(mut stream: TokenStream, n: usize) -> Result<Outcome, EngineError> {
    let mut outcome =
        Outcome { tokens: vec![vec![]; n], reasons: vec![None; n], ..Outcome::default() };
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::PromptDone { cached_tokens, logprobs } => {
                (outcome.cached_tokens, outcome.prompt) = (cached_tokens, logprobs);
            }
            Event::Token { choice, token } => outcome.tokens[choice].push(token),
            Event::Finished { choice, reason } => outcome.reasons[choice] = Some(reason),
            Event::Failed(error) => return Err(error),
        }
    }
    Ok(outcome)
}

pub fn wait_until(engine: &EngineHandle, done: impl Fn(EngineStats) -> bool) {
    for _ in 0..400 {
        if done(engine.stats()) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("never reached: {:?}", engine.stats());
}
