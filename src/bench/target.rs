//! What a server tells about itself, and how long its prompts are in tokens.

use serde::Serialize;
use serde_json::{Value, json};

use super::client::{Connection, error_message};
use super::sse::Usage;
use super::workload::Which;
use super::{BenchError, Failure, Prefix, PromptSource, Target, Workload};

/// Fewer words than this of one token count each, and random prompts would repeat themselves.
const MIN_WORDS: usize = 32;

/// What the report says of a server.
#[derive(Debug, Clone, Serialize)]
pub struct TargetFacts {
    pub label: String,
    pub url: String,
    pub model: String,
    pub owned_by: Option<String>,
    pub max_model_len: Option<u64>,
    /// Its `Server` header.
    pub server: Option<String>,
}

/// How random words become tokens.
#[derive(Debug, Clone, Serialize)]
pub struct Calibration {
    pub tokens_per_word: f64,
    /// Tokens of a prompt that are not its words: template, beginning of text.
    pub template_tokens: f64,
    /// Words to draw from.
    pub words: usize,
    /// False: the server counted nothing, and a word is taken for a token.
    pub measured: bool,
    pub prefix_words: usize,
    pub prompt_words: usize,
}

impl Target {
    fn failed(&self, failure: Failure) -> BenchError {
        BenchError::Target { label: self.label.clone(), url: self.url.clone(), failure }
    }

    fn setup(&self, reason: impl Into<String>) -> BenchError {
        BenchError::Setup { label: self.label.clone(), reason: reason.into() }
    }

    /// Asks for the model's name, which `model` overrides. Fails if nobody answers.
    pub async fn facts(&self, model: Option<&str>) -> Result<TargetFacts, BenchError> {
        let answer =
            self.endpoint.ask("/v1/models", None).await.map_err(|failure| self.failed(failure))?;
        let listed: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let first = listed.pointer("/data/0").unwrap_or(&Value::Null);
        let text = |key: &str| first.get(key).and_then(Value::as_str).map(str::to_owned);
        let Some(name) = model.map(str::to_owned).or_else(|| text("id")) else {
            let reason = format!(
                "/v1/models answered {} and names no model ({}); give --model",
                answer.status,
                error_message(&answer.body)
            );
            return Err(self.setup(reason));
        };
        Ok(TargetFacts {
            label: self.label.clone(),
            url: self.url.clone(),
            model: name,
            owned_by: text("owned_by"),
            max_model_len: first.get("max_model_len").and_then(Value::as_u64),
            server: answer.server,
        })
    }

    /// Tokens the KV cache holds, as our servers' `/metrics` tells.
    pub async fn kv_tokens(&self) -> Result<usize, BenchError> {
        let answer = self.endpoint.ask("/metrics", None).await.map_err(|f| self.failed(f))?;
        let text = String::from_utf8_lossy(&answer.body);
        let blocks = text.lines().find_map(|line| line.strip_prefix("cartouche_kv_blocks "));
        match blocks.and_then(|value| value.trim().parse::<f64>().ok()) {
            Some(blocks) => Ok(blocks as usize * crate::engine::BLOCK_TOKENS),
            None => Err(self.setup("its /metrics has no cartouche_kv_blocks; give --kv-tokens")),
        }
    }

    /// Chooses the words, and how many make the prompts that the options ask for.
    pub async fn calibrate(
        &self,
        model: &str,
        workload: &mut Workload,
    ) -> Result<Option<Calibration>, BenchError> {
        let (prompt_tokens, prefix_tokens) =
            match (&workload.options.prompt, &workload.options.prefix) {
                (PromptSource::Random { tokens }, Prefix::Text { tokens: prefix, .. }) => {
                    (*tokens, *prefix)
                }
                (PromptSource::Random { tokens }, _) => (*tokens, 0),
                (PromptSource::File { .. }, Prefix::Text { tokens: prefix, .. }) => (0, *prefix),
                (PromptSource::File { .. }, _) => return Ok(None),
            };
        self.choose_words(model, workload).await?;
        let short = self.count_prompt(model, workload, 16).await?;
        let long = self.count_prompt(model, workload, 48).await?;
        let words = if prefix_tokens > 0 { 2.0 } else { 1.0 };
        let (tokens_per_word, template_tokens, measured) = match short.zip(long) {
            Some((short, long)) if long > short => {
                let slope = (long - short) / (32.0 * words);
                (slope, short - 16.0 * words * slope, true)
            }
            _ => (1.0, 0.0, false),
        };
        let all = (prompt_tokens + prefix_tokens) as f64 - template_tokens;
        let prefix_words = (prefix_tokens as f64 / tokens_per_word).round();
        let prompt_words = (all / tokens_per_word).round() - prefix_words;
        let random = matches!(workload.options.prompt, PromptSource::Random { .. });
        if random && prompt_words < 1.0 {
            return Err(self.setup(format!(
                "--prompt-tokens {prompt_tokens} leaves no room for a word: the template alone takes \
                 {template_tokens:.0} tokens"
            )));
        }
        workload.prefix_words = prefix_words as usize;
        workload.prompt_words = prompt_words.max(1.0) as usize;
        Ok(Some(Calibration {
            tokens_per_word,
            template_tokens,
            words: workload.words.len(),
            measured,
            prefix_words: workload.prefix_words,
            prompt_words: workload.prompt_words,
        }))
    }

    /// Keeps words of one token, if `/tokenize` (ours, vLLM's or llama.cpp's) is there and finds enough.
    async fn choose_words(&self, model: &str, workload: &mut Workload) -> Result<(), BenchError> {
        let mut connection = None;
        let mut single = Vec::new();
        for word in &workload.words {
            match self.count_text(&mut connection, model, &format!(" {word}")).await? {
                Some(1) => single.push(word.clone()),
                Some(_) => {}
                None => return Ok(()),
            }
        }
        if single.len() >= MIN_WORDS {
            workload.words = single;
        }
        Ok(())
    }

    /// `None` if the server has no such route.
    async fn count_text(
        &self,
        connection: &mut Option<Connection>,
        model: &str,
        text: &str,
    ) -> Result<Option<usize>, BenchError> {
        // The union of both shapes: each server ignores the other's members.
        let body = json!({
            "model": model, "prompt": text, "add_special_tokens": false,
            "content": text, "add_special": false,
        });
        let answer = self.endpoint.ask_on(connection, "/tokenize", Some(&body)).await;
        let answer = answer.map_err(|failure| self.failed(failure))?;
        let reply: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let tokens = reply.get("tokens").and_then(Value::as_array).map(Vec::len);
        Ok(tokens.filter(|_| answer.status == 200))
    }

    /// Prompt tokens of a request with so many random words (and as many in a text prefix), as its
    /// usage tells. `None` if it tells nothing.
    async fn count_prompt(
        &self,
        model: &str,
        workload: &Workload,
        words: usize,
    ) -> Result<Option<f64>, BenchError> {
        let mut sample = workload.clone();
        (sample.prefix_words, sample.prompt_words) = (words, words);
        sample.options.prompt = PromptSource::Random { tokens: words };
        (sample.options.output_tokens, sample.options.exact_output) = (1, false);
        sample.forget_file();
        let which = Which { round: usize::MAX, warmup: true, client: 0, clients: 1, index: words };
        let body = Value::Object(sample.members(model, which, false));
        let path = workload.options.api.path();
        let answer = self.endpoint.ask(path, Some(&body)).await.map_err(|f| self.failed(f))?;
        if answer.status != 200 {
            let message = error_message(&answer.body);
            return Err(self.failed(Failure::Status { code: answer.status, message }));
        }
        let reply: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        Ok(Usage::of(&reply).map(|usage| usage.prompt_tokens as f64))
    }
}
