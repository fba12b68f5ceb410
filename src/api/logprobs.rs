//! Log-probabilities on the wire: the OpenAI lists, vLLM's `prompt_logprobs`, Tokasaurus's fingerprint.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

use super::openai::reply::{ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob, TopMap};
use crate::{engine::SampledToken, text::Tokenizer};

/// Stands for minus infinity, which JSON cannot say (vLLM sends the same number).
const LOWEST_LOGPROB: f32 = -9999.0;

/// How token strings are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenStyle {
    /// Its text; a token that is not valid UTF-8 by itself as `bytes:\xe2\x80`, as OpenAI writes it.
    Text,
    /// Its entry in the vocabulary (`Ġthe`), as Tokasaurus writes it.
    Piece,
    /// `token_id:17` (vLLM's `return_tokens_as_token_ids`).
    Id,
}

/// Writes tokens for one request.
#[derive(Clone)]
pub struct TokenWriter {
    pub tokenizer: Tokenizer,
    pub style: TokenStyle,
}

impl TokenWriter {
    fn name(&self, id: u32) -> String {
        match self.style {
            TokenStyle::Id => format!("token_id:{id}"),
            TokenStyle::Piece => self.tokenizer.token_string(id),
            TokenStyle::Text => {
                String::from_utf8(self.tokenizer.token_bytes(id)).unwrap_or_else(|e| {
                    let hex = |b: &u8| format!("\\x{b:02x}");
                    format!("bytes:{}", e.as_bytes().iter().map(hex).collect::<String>())
                })
            }
        }
    }

    /// `choices[].logprobs` of a chat reply.
    pub fn chat(&self, tokens: &[SampledToken]) -> ChatLogprobs {
        let content = tokens
            .iter()
            .map(|t| TokenLogprob {
                token: self.name(t.id),
                id: t.id,
                bytes: self.tokenizer.token_bytes(t.id),
                logprob: finite(t.logprob),
                top_logprobs: t
                    .top
                    .iter()
                    .map(|&(id, logprob)| self.alternative(id, logprob))
                    .collect(),
            })
            .collect();
        ChatLogprobs { content, refusal: None }
    }

    fn alternative(&self, id: u32, logprob: f32) -> TopLogprob {
        TopLogprob {
            token: self.name(id),
            id,
            bytes: self.tokenizer.token_bytes(id),
            logprob: finite(logprob),
        }
    }

    /// Appends a token to the lists of a text completion. `sampled` is `None` for a prompt token without
    /// a prediction; `top`: whether alternatives were asked for.
    pub fn push_text(
        &self,
        lists: &mut TextLogprobs,
        id: u32,
        sampled: Option<&SampledToken>,
        top: bool,
        offset: usize,
    ) {
        lists.tokens.push(self.name(id));
        lists.token_logprobs.push(sampled.map(|t| finite(t.logprob)));
        lists.text_offset.push(offset);
        if top {
            let map = sampled.map(|t| {
                let mut map = TopMap::default();
                // The token itself is always there (OpenAI), also when it is not among the most likely.
                for &(id, logprob) in t.top.iter().chain([&(t.id, t.logprob)]) {
                    let name = self.name(id);
                    if map.0.iter().all(|(seen, _)| *seen != name) {
                        map.0.push((name, finite(logprob)));
                    }
                }
                map
            });
            lists.top_logprobs.get_or_insert_default().push(map);
        }
    }

    /// vLLM's `prompt_logprobs`: per prompt token null, or an object from token id to its
    /// log-probability, rank (null when it is not among the `k` most likely) and text.
    pub fn prompt(&self, positions: &[Option<SampledToken>], k: usize) -> Value {
        let entry = |id: u32, logprob: f32, rank: Option<usize>| {
            let entry =
                json!({"logprob": finite(logprob), "rank": rank, "decoded_token": self.name(id)});
            (id.to_string(), entry)
        };
        let position = |t: &SampledToken| {
            let rank = t.top.iter().position(|(id, _)| *id == t.id).map(|i| i + 1);
            let mut map = Map::from_iter([entry(t.id, t.logprob, rank)]);
            for (i, &(id, logprob)) in t.top.iter().take(k).enumerate() {
                if id != t.id {
                    map.extend([entry(id, logprob, Some(i + 1))]);
                }
            }
            Value::Object(map)
        };
        positions.iter().map(|p| p.as_ref().map_or(Value::Null, position)).collect()
    }
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LOWEST_LOGPROB)
}

/// `system_fingerprint` of Tokasaurus: the token ids of every choice and, when asked for, their
/// log-probabilities as base64 of little-endian arrays (`[T]` f32, `[T, K]` i32, `[T, K]` f32).
#[derive(Debug, Clone)]
pub struct Fingerprint {
    pack: bool,
    top: usize,
    choices: Vec<PackedChoice>,
}

#[derive(Debug, Clone, Default)]
struct PackedChoice {
    ids: Vec<u32>,
    chosen: Vec<u8>,
    top_ids: Vec<u8>,
    top_logprobs: Vec<u8>,
}

impl Fingerprint {
    /// `pack`: `logprobs_in_fingerprint`; `top`: K, 0 when no alternatives were asked for.
    pub fn new(choices: usize, pack: bool, top: usize) -> Self {
        Self { pack, top, choices: vec![PackedChoice::default(); choices] }
    }

    /// Adds the next token of a choice. The engine returns exactly K alternatives per token.
    pub fn push(&mut self, choice: usize, token: &SampledToken) {
        let Some(choice) = self.choices.get_mut(choice) else { return };
        choice.ids.push(token.id);
        if self.pack {
            choice.chosen.extend(token.logprob.to_le_bytes());
            for &(id, logprob) in token.top.iter().take(self.top) {
                choice.top_ids.extend((id as i32).to_le_bytes());
                choice.top_logprobs.extend(logprob.to_le_bytes());
            }
        }
    }

    /// Tokens of one choice so far.
    pub fn ids(&self, choice: usize) -> &[u32] {
        self.choices.get(choice).map_or(&[], |c| &c.ids)
    }

    /// Tokens of all choices so far.
    pub fn total_tokens(&self) -> usize {
        self.choices.iter().map(|c| c.ids.len()).sum()
    }

    /// The JSON string.
    pub fn to_json(&self) -> String {
        let packed = |wanted: bool, bytes: fn(&PackedChoice) -> &[u8]| {
            let encode = |c| STANDARD.encode(bytes(c));
            wanted.then(|| self.choices.iter().map(encode).collect::<Vec<_>>())
        };
        let top = self.pack && self.top > 0;
        json!({
            "completion_ids": self.choices.iter().map(|c| &c.ids).collect::<Vec<_>>(),
            "packed_chosen_logprobs": packed(self.pack, |c| &c.chosen),
            "packed_topk_indices": packed(top, |c| &c.top_ids),
            "packed_topk_logprobs": packed(top, |c| &c.top_logprobs),
        })
        .to_string()
    }
}

#[cfg(test)]
#[path = "logprobs_tests.rs"]
mod tests;
