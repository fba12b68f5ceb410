//! Log-probabilities on the wire: the OpenAI lists, vLLM's `prompt_logprobs`, Tokasaurus's fingerprint.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Serialize, Serializer};
use serde_json::json;

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
#[derive(Debug, Clone)]
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

    /// vLLM's `prompt_logprobs` with `k` alternatives.
    pub fn prompt<'a>(
        &'a self,
        positions: &'a [Option<SampledToken>],
        k: usize,
    ) -> PromptLogprobs<'a> {
        PromptLogprobs { writer: self, positions, k }
    }
}

/// vLLM's `prompt_logprobs`: per prompt token null, or an object from token id to its log-probability, rank
/// (null when it is not among the `k` most likely) and text. Borrowed: every choice of a prompt shows it, and
/// as JSON values it would take a hundred bytes per number.
#[derive(Debug, Clone, Copy)]
pub struct PromptLogprobs<'a> {
    writer: &'a TokenWriter,
    positions: &'a [Option<SampledToken>],
    k: usize,
}

impl Serialize for PromptLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let position = |token| Position { writer: self.writer, token, k: self.k };
        serializer.collect_seq(self.positions.iter().map(|p| p.as_ref().map(position)))
    }
}

/// One prompt token and its alternatives.
struct Position<'a> {
    writer: &'a TokenWriter,
    token: &'a SampledToken,
    k: usize,
}

#[derive(Serialize)]
struct PositionEntry {
    logprob: f32,
    rank: Option<usize>,
    decoded_token: String,
}

impl Serialize for Position<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { writer, token, k } = self;
        let entry = |id: u32, logprob: f32, rank: Option<usize>| {
            (id, PositionEntry { logprob: finite(logprob), rank, decoded_token: writer.name(id) })
        };
        let rank = token.top.iter().position(|(id, _)| *id == token.id).map(|i| i + 1);
        let alternatives = token.top.iter().take(*k).enumerate();
        let others = alternatives
            .filter(|(_, (id, _))| *id != token.id)
            .map(|(i, &(id, logprob))| entry(id, logprob, Some(i + 1)));
        serializer.collect_map(std::iter::once(entry(token.id, token.logprob, rank)).chain(others))
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
