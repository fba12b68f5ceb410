//! Reply bodies. Members that the OpenAI types have are present even when null, because clients built on
//! those types read them; members of our own follow.

use serde::{Serialize, Serializer, ser::SerializeStruct};
use serde_json::Value;

use super::super::logprobs::PromptLogprobs;
use crate::cartridge::Lease;

/// `usage`. Cartridge tokens are not prompt tokens (as in Tokasaurus); they are told apart in the details.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct PromptTokensDetails {
    pub cached_tokens: usize,
    pub cartridge_tokens: usize,
}

/// Which content answered: the generation a cartridge id stood for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CartridgeUsed {
    pub id: String,
    pub generation: String,
    pub tokens: usize,
}

impl From<&Lease> for CartridgeUsed {
    fn from(lease: &Lease) -> Self {
        Self {
            id: lease.id().to_owned(),
            generation: lease.generation().to_hex(),
            tokens: lease.tokens(),
        }
    }
}

/// Chat completions, chunks, and text completions; `choices` (a list of some kind) tell them apart.
#[derive(Debug, Serialize)]
pub struct Reply<'a, C> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: C,
    pub usage: Option<Usage>,
    pub system_fingerprint: Option<String>,
    pub service_tier: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub cartridges: &'a [CartridgeUsed],
}

#[derive(Debug, Serialize)]
pub struct ChatChoice {
    pub index: usize,
    pub message: AssistantMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: &'static str,
    pub stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize)]
pub struct AssistantMessage {
    pub role: &'static str,
    pub content: String,
    pub refusal: Option<()>,
    pub annotations: Option<()>,
    pub audio: Option<()>,
    pub function_call: Option<()>,
    pub tool_calls: Option<()>,
}

impl AssistantMessage {
    pub fn new(content: String) -> Self {
        Self {
            role: "assistant",
            content,
            refusal: None,
            annotations: None,
            audio: None,
            function_call: None,
            tool_calls: None,
        }
    }
}

#[derive(Debug, Serialize)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: Delta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Default, Serialize)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

#[derive(Debug, PartialEq, Serialize)]
pub struct ChatLogprobs {
    pub content: Vec<TokenLogprob>,
    pub refusal: Option<()>,
}

/// A generated token in `logprobs.content`.
#[derive(Debug, PartialEq, Serialize)]
pub struct TokenLogprob {
    pub token: String,
    pub id: u32,
    pub bytes: Vec<u8>,
    pub logprob: f32,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, PartialEq, Serialize)]
pub struct TopLogprob {
    pub token: String,
    pub id: u32,
    pub bytes: Vec<u8>,
    pub logprob: f32,
}

/// A choice of text completions, whole or a chunk of it.
#[derive(Debug, Serialize)]
pub struct TextChoice<'a> {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<Joined<'a>>,
    pub finish_reason: Option<&'static str>,
    pub stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// `logprobs` of text completions: four lists, one entry per token.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct TextLogprobs {
    pub tokens: Vec<String>,
    /// Null for the first token of a prompt, which nothing predicts.
    pub token_logprobs: Vec<Option<f32>>,
    /// Null as a whole for `logprobs: 0`.
    pub top_logprobs: Option<Vec<Option<TopMap>>>,
    /// Chars (not bytes) of `text` before each token.
    pub text_offset: Vec<usize>,
}

/// The lists of an echoed prompt, shared by its choices, and then a choice's own: one object on the wire.
#[derive(Debug)]
pub struct Joined<'a> {
    pub prompt: &'a TextLogprobs,
    pub own: TextLogprobs,
}

impl Serialize for Joined<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (a, b) = (self.prompt, &self.own);
        let top = match (&a.top_logprobs, &b.top_logprobs) {
            (None, None) => None,
            (a, b) => Some(Chain(a.as_deref().unwrap_or(&[]), b.as_deref().unwrap_or(&[]))),
        };
        let mut object = serializer.serialize_struct("TextLogprobs", 4)?;
        object.serialize_field("tokens", &Chain(&a.tokens, &b.tokens))?;
        object.serialize_field("token_logprobs", &Chain(&a.token_logprobs, &b.token_logprobs))?;
        object.serialize_field("top_logprobs", &top)?;
        object.serialize_field("text_offset", &Chain(&a.text_offset, &b.text_offset))?;
        object.end()
    }
}

/// Two lists that are one.
struct Chain<'a, T>(&'a [T], &'a [T]);

impl<T: Serialize> Serialize for Chain<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().chain(self.1))
    }
}

/// Token string to log-probability, most likely first. Not a JSON value, which would widen the numbers to
/// f64: clients compare them with `token_logprobs`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TopMap(pub Vec<(String, f32)>);

impl Serialize for TopMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}
