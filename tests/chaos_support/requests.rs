//! The requests of the chaos test, and the one right answer to each: what the same request gets alone, from a
//! server without a prefix cache.

use std::{collections::HashMap, path::Path};

use cartouche::{api::ApiOptions, demo, engine::EngineOptions};
use rand_chacha::{ChaCha8Rng, rand_core::Rng};
use serde_json::{Value, json};

use crate::api_support::{MODEL, Server, merge};

/// Most tokens a request generates.
pub const MAX_TOKENS: usize = 16;
/// Choices of which there is a reference.
const CHOICES: usize = 3;
const PROMPTS: usize = 8;

/// A number below `bound`.
pub fn below(rng: &mut ChaCha8Rng, bound: usize) -> usize {
    (rng.next_u64() % bound as u64) as usize
}

/// True about once in `times`.
pub fn once_in(rng: &mut ChaCha8Rng, times: usize) -> bool {
    below(rng, times) == 0
}

/// What decides the answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Question {
    prompt: usize,
    /// Generations of the cartridges, in order.
    generations: Vec<String>,
    seed: Option<u64>,
}

/// A request and what is needed to check its answer.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: &'static str,
    pub body: Value,
    pub stream: bool,
    is_checked: bool,
    prompt: usize,
    seed: Option<u64>,
    max_tokens: usize,
    n: usize,
}

/// The token ids of every choice, by question.
pub struct References {
    answers: HashMap<Question, Vec<Vec<u32>>>,
}

/// Chat and text prompts, long and short, many of which begin alike. The last two differ from others in one
/// token of their first block only, before much that is the same.
fn prompt(index: usize) -> (&'static str, Value) {
    let document = demo::DOCUMENTS[index % 2].text;
    let mut start: String = document.chars().take(200 * (1 + index / 2).min(3)).collect();
    if index >= PROMPTS - 2 {
        let (from, to) = [(" evening", " morning"), (" night", " noon")][index % 2];
        start = start.replacen(from, to, 1);
    }
    if index.is_multiple_of(4) {
        let user = json!({"role": "user", "content": format!("What about number {index}?")});
        let system = json!({"role": "system", "content": start});
        return ("/v1/chat/completions", json!({"messages": [system, user]}));
    }
    ("/v1/completions", json!({"prompt": format!("{start} {index}")}))
}

fn body(prompt_index: usize, seed: Option<u64>) -> (&'static str, Value) {
    let (path, body) = prompt(prompt_index);
    let sampling = match seed {
        None => json!({"temperature": 0}),
        Some(seed) => json!({"temperature": 1, "seed": seed}),
    };
    let common = json!({"model": MODEL, "ignore_eos": true, "return_token_ids": true});
    (path, merge(merge(body, common), sampling))
}

impl References {
    /// Asks every question, one at a time. `lists` are the cartridges a request may attach.
    pub async fn compute(dir: &Path, lists: &[&[&str]]) -> Self {
        let engine = EngineOptions { prefix_cache: false, ..EngineOptions::default() };
        let dir = Some(dir.to_owned());
        let server = Server::with_cartridge_dir(ApiOptions::default(), engine, dir);
        let mut answers = HashMap::new();
        for prompt in 0..PROMPTS {
            for list in lists {
                for seed in [None, Some(7)] {
                    let (path, body) = body(prompt, seed);
                    let n = if seed.is_some() { CHOICES } else { 1 };
                    let extra =
                        json!({"max_tokens": MAX_TOKENS, "n": n, "cartridges": named(list)});
                    let reply = server.post(path, merge(body, extra)).await.ok();
                    let generated = match super::client::ending(&reply.to_string(), false) {
                        super::client::Ending::Finished(generated) => generated,
                        other => panic!("{other:?}"),
                    };
                    let question =
                        Question { prompt, generations: generated.generations.clone(), seed };
                    let ids = generated.choices.into_values().map(|(ids, _)| ids).collect();
                    answers.insert(question, ids);
                }
            }
        }
        Self { answers }
    }

    /// What is wrong with an answer, if anything is.
    pub fn check(&self, request: &Request, got: &super::client::Generated) -> Result<(), String> {
        if !request.is_checked {
            return Ok(());
        }
        let question = Question {
            prompt: request.prompt,
            generations: got.generations.clone(),
            seed: request.seed,
        };
        let expected = self.answers.get(&question).ok_or("no reference for this content")?;
        if got.choices.len() != request.n {
            return Err(format!("{} choices for n = {}", got.choices.len(), request.n));
        }
        for (index, (ids, reason)) in &got.choices {
            // All greedy choices are the same.
            let expected = expected.get(*index as usize).unwrap_or(&expected[0]);
            if *ids != expected[..request.max_tokens] || reason.as_deref() != Some("length") {
                return Err(format!("choice {index} is {ids:?}, alone it is {expected:?}"));
            }
        }
        Ok(())
    }
}

fn named(ids: &[&str]) -> Value {
    ids.iter().map(|id| json!({"id": id, "source": "local"})).collect()
}

impl Request {
    /// A random request with these cartridges.
    pub fn random(rng: &mut ChaCha8Rng, cartridges: &[&str]) -> Self {
        let prompt = below(rng, PROMPTS);
        let seed = once_in(rng, 3).then_some(7);
        let max_tokens = 1 + below(rng, MAX_TOKENS);
        let n = if once_in(rng, 4) { 2 + below(rng, CHOICES - 1) } else { 1 };
        let stream = once_in(rng, 2);
        let priority = match below(rng, 4) {
            0 => json!("batch"),
            1 => json!("interactive"),
            2 => json!(below(rng, 3)),
            _ => json!(null),
        };
        let (path, body) = body(prompt, seed);
        let mut list = named(cartridges);
        if let Some(first) = list.get_mut(0)
            && once_in(rng, 4)
        {
            first["force_redownload"] = json!(true);
        }
        let own = json!({"max_tokens": max_tokens, "n": n, "stream": stream, "priority": priority,
                         "cartridges": list});
        Self { path, body: merge(body, own), stream, is_checked: true, prompt, seed, max_tokens, n }
    }

    /// The same as a stream of megabytes, for clients that do not keep up. Nobody knows its right end.
    pub fn heavy(mut self) -> Self {
        (self.stream, self.is_checked) = (true, false);
        let extra = match self.path {
            "/v1/completions" => json!({"logprobs": 64}),
            _ => json!({"logprobs": true, "top_logprobs": 64}),
        };
        self.body =
            merge(merge(self.body, json!({"stream": true, "max_tokens": 300, "n": 1})), extra);
        self
    }
}
