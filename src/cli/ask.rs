//! One question, answered greedily by the engine of this process.

use std::time::Instant;

use super::CliError;
use super::runtime::Runtime;
use crate::cartridge::Lease;
use crate::engine::{Event, GenerateRequest, LogprobOptions, SamplingParams, TokenStream};

/// A question on its way to being answered.
pub struct Asked {
    stream: TokenStream,
    submitted: Instant,
}

pub struct Answer {
    pub text: String,
    /// Milliseconds from submitting to the first token.
    pub ttft_ms: f64,
}

/// Puts `prompt` to the model, with `cartridges` before it.
pub fn ask(
    runtime: &Runtime,
    prompt: Vec<u32>,
    cartridges: Vec<Lease>,
    max_tokens: usize,
) -> Result<Asked, CliError> {
    let submitted = Instant::now();
    let stream = runtime.engine.submit(GenerateRequest {
        prompt,
        cartridges,
        n: 1,
        sampling: SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() },
        stop_token_ids: runtime.model.eos_token_ids.clone(),
        logprobs: LogprobOptions::default(),
        priority: Default::default(),
        cache_salt: None,
    })?;
    Ok(Asked { stream, submitted })
}

impl Asked {
    pub fn answer(mut self, runtime: &Runtime) -> Result<Answer, CliError> {
        let mut ids = Vec::new();
        let mut ttft_ms = 0.0;
        while let Some(event) = self.stream.blocking_next() {
            match event {
                Event::Token { token, .. } => {
                    if ids.is_empty() {
                        ttft_ms = self.submitted.elapsed().as_secs_f64() * 1e3;
                    }
                    ids.push(token.id);
                }
                Event::Failed(error) => return Err(error.into()),
                Event::PromptDone { .. } | Event::Finished { .. } => {}
            }
        }
        Ok(Answer { text: runtime.model.tokenizer.decode(&ids, true)?, ttft_ms })
    }
}
