//! Request bodies. A null field is the same as an absent one. `docs/compatibility.md` lists every field.
//!
//! A body is read as several structs (its route's fields, the common ones, the refused ones): wrong types
//! are then reported with their path, which one flattened struct would lose.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::{
    super::{
        error::ApiError,
        extract::{field_names, parse, unknown_keys},
    },
    prompt_field::PromptField,
};
use crate::cartridge::CartridgeRef;

/// Fields of both generation routes.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct CommonFields {
    pub model: Option<String>,
    pub cartridges: Option<Vec<CartridgeRef>>,
    pub n: Option<i64>,
    pub max_tokens: Option<i64>,
    pub max_completion_tokens: Option<i64>,
    pub min_tokens: Option<i64>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub logit_bias: Option<Map<String, Value>>,
    pub seed: Option<i64>,
    pub stop: Option<Value>,
    pub stop_token_ids: Option<Vec<u32>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub skip_special_tokens: Option<bool>,
    pub add_special_tokens: Option<bool>,
    pub prompt_logprobs: Option<i64>,
    pub logprobs_in_fingerprint: Option<bool>,
    pub logprobs_ignore_temperature: Option<bool>,
    pub return_token_ids: Option<bool>,
    pub return_tokens_as_token_ids: Option<bool>,
    pub priority: Option<Value>,
    pub cache_salt: Option<String>,
    pub stream: Option<bool>,
    pub stream_options: Option<Map<String, Value>>,
}

/// Fields of chat completions alone.
#[derive(Debug, Deserialize)]
pub struct ChatFields {
    pub messages: Vec<Value>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<i64>,
    pub tools: Option<Vec<Value>>,
    pub documents: Option<Value>,
    pub chat_template: Option<String>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub apply_chat_template_overrides: Option<Map<String, Value>>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
}

/// Fields of text completions alone.
#[derive(Debug, Deserialize)]
pub struct CompletionFields {
    pub prompt: PromptField,
    pub logprobs: Option<i64>,
    pub echo: Option<bool>,
}

/// Fields that would change the answer and cannot be honoured. Values that ask for nothing pass.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RefusedFields {
    allowed_token_ids: Option<Value>,
    audio: Option<Value>,
    bad_words: Option<Value>,
    best_of: Option<Value>,
    function_call: Option<Value>,
    functions: Option<Value>,
    guided_choice: Option<Value>,
    guided_grammar: Option<Value>,
    guided_json: Option<Value>,
    guided_regex: Option<Value>,
    length_penalty: Option<Value>,
    logits_processors: Option<Value>,
    modalities: Option<Value>,
    prompt_embeds: Option<Value>,
    response_format: Option<Value>,
    structured_outputs: Option<Value>,
    suffix: Option<Value>,
    tool_choice: Option<Value>,
    truncate_prompt_tokens: Option<Value>,
    use_beam_search: Option<Value>,
    web_search_options: Option<Value>,
}

#[derive(Deserialize)]
struct ChatEcho {
    echo: Option<bool>,
}

const NO_CONSTRAINTS: &str = "output is not constrained to a schema or grammar";

/// Name, value, whether the value asks for nothing, what to do instead.
type Rule<'a> = (&'static str, Option<Value>, &'a dyn Fn(&Value) -> bool, &'static str);

impl RefusedFields {
    fn check(self, n: Option<i64>) -> Result<(), ApiError> {
        let empty = |v: &Value| match v {
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::String(text) => text.is_empty(),
            Value::Bool(flag) => !flag,
            _ => false,
        };
        let type_is_text = |v: &Value| v.get("type").and_then(Value::as_str) == Some("text");
        let is_one = |v: &Value| v.as_f64() == Some(1.0);
        let auto = |v: &Value| matches!(v.as_str(), Some("auto" | "none"));
        let text_only = |v: &Value| v.as_array().is_some_and(|m| m.iter().all(|m| m == "text"));
        let rules: [Rule<'_>; 21] = [
            ("allowed_token_ids", self.allowed_token_ids, &empty, "use logit_bias"),
            ("audio", self.audio, &empty, "this server speaks text"),
            ("bad_words", self.bad_words, &empty, "use logit_bias"),
            (
                "best_of",
                self.best_of,
                &|v| v.as_i64() == Some(n.unwrap_or(1)),
                "choices are not ranked; use n",
            ),
            ("function_call", self.function_call, &auto, "output is not parsed into calls"),
            ("functions", self.functions, &empty, "use tools"),
            ("guided_choice", self.guided_choice, &empty, NO_CONSTRAINTS),
            ("guided_grammar", self.guided_grammar, &empty, NO_CONSTRAINTS),
            ("guided_json", self.guided_json, &empty, NO_CONSTRAINTS),
            ("guided_regex", self.guided_regex, &empty, NO_CONSTRAINTS),
            ("length_penalty", self.length_penalty, &is_one, "there is no beam search"),
            ("logits_processors", self.logits_processors, &empty, "no code is run for a request"),
            ("modalities", self.modalities, &text_only, "this server speaks text"),
            ("prompt_embeds", self.prompt_embeds, &empty, "send text or token ids"),
            ("response_format", self.response_format, &type_is_text, NO_CONSTRAINTS),
            ("structured_outputs", self.structured_outputs, &empty, NO_CONSTRAINTS),
            ("suffix", self.suffix, &empty, "the model completes from the left only"),
            ("tool_choice", self.tool_choice, &auto, "output is not constrained to a tool call"),
            ("truncate_prompt_tokens", self.truncate_prompt_tokens, &empty, "truncate the prompt"),
            ("use_beam_search", self.use_beam_search, &empty, "use n"),
            ("web_search_options", self.web_search_options, &empty, "this server does not search"),
        ];
        for (name, value, asks_for_nothing, why) in rules {
            if value.is_some_and(|v| !asks_for_nothing(&v)) {
                return Err(ApiError::unsupported(name, why));
            }
        }
        Ok(())
    }
}

/// A request body, read but not yet validated.
#[derive(Debug)]
pub struct RequestBody<F> {
    pub own: F,
    pub common: CommonFields,
    /// Names of the fields that nothing reads, sorted.
    pub ignored: Vec<String>,
}

impl<F: DeserializeOwned> RequestBody<F> {
    /// Reads a body; errors are 400s that name the place or the field.
    pub fn parse(json: &[u8]) -> Result<Self, ApiError> {
        let known =
            [field_names::<F>(), field_names::<CommonFields>(), field_names::<RefusedFields>()];
        let mut ignored = unknown_keys(json, &known)?;
        let common: CommonFields = parse(json)?;
        let own = parse(json)?;
        parse::<RefusedFields>(json)?.check(common.n)?;
        if ignored.iter().any(|key| key == "echo") {
            // Completions have it of their own; in chat it would show the last message before the reply.
            if parse::<ChatEcho>(json)?.echo == Some(true) {
                return Err(ApiError::unsupported(
                    "echo",
                    "only /v1/completions echoes its prompt",
                ));
            }
            ignored.retain(|key| key != "echo");
        }
        for key in common.stream_options.iter().flat_map(Map::keys) {
            if key != "include_usage" {
                ignored.push(format!("stream_options.{key}"));
            }
        }
        Ok(Self { own, common, ignored })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(extra: &str) -> Result<RequestBody<ChatFields>, ApiError> {
        RequestBody::parse(
            format!(r#"{{"messages":[{{"role":"user","content":"x"}}]{extra}}}"#).as_bytes(),
        )
    }

    #[test]
    fn unknown_fields_are_named_and_known_ones_are_not() {
        let body = chat(r#","user":"me","top_k":3,"zebra":{"a":1},"metadata":null,"suffix":null"#);
        assert_eq!(body.unwrap().ignored, ["user", "zebra"]);
        let body = chat(r#","stream_options":{"include_usage":true,"other":1}"#).unwrap();
        assert_eq!(body.ignored, ["stream_options.other"]);
    }

    #[test]
    fn fields_that_cannot_be_honoured_are_refused_by_name() {
        for (field, value) in [
            ("response_format", r#"{"type":"json_object"}"#),
            ("response_format", r#"{"type":"json_schema","json_schema":{}}"#),
            ("tool_choice", r#""required""#),
            ("tool_choice", r#"{"type":"function","function":{"name":"f"}}"#),
            ("best_of", "3"),
            ("suffix", r#""end""#),
            ("audio", r#"{"voice":"x"}"#),
            ("modalities", r#"["text","audio"]"#),
            ("guided_json", r#"{"type":"object"}"#),
            ("use_beam_search", "true"),
            ("echo", "true"),
            ("truncate_prompt_tokens", "5"),
        ] {
            let error = chat(&format!(r#","{field}":{value}"#)).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(field));
            assert!(error.message.starts_with(&format!("{field} not supported")));
        }
    }

    #[test]
    fn neutral_values_of_refused_fields_pass() {
        for (field, value) in [
            ("response_format", r#"{"type":"text"}"#),
            ("tool_choice", r#""auto""#),
            ("best_of", "1"),
            ("suffix", r#""""#),
            ("modalities", r#"["text"]"#),
            ("use_beam_search", "false"),
            ("echo", "false"),
            ("length_penalty", "1"),
        ] {
            let body = chat(&format!(r#","{field}":{value}"#)).unwrap();
            assert!(body.ignored.is_empty());
        }
        assert!(chat(r#","best_of":4,"n":4"#).is_ok());
    }

    #[test]
    fn wrong_types_name_the_field() {
        for (extra, path) in [
            (r#","temperature":"hot""#, "temperature"),
            (r#","max_tokens":1.5"#, "max_tokens"),
            (r#","logprobs":5"#, "logprobs"),
            (r#","cartridges":[{"id":"a"},{"source":"local"}]"#, "cartridges[1]"),
            (r#","cartridges":[{"id":"a","source":"s3"}]"#, "cartridges[0].source"),
            (r#","stop_token_ids":[1,-1]"#, "stop_token_ids[1]"),
        ] {
            let error = chat(extra).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(path), "{}", error.message);
        }
        let error = RequestBody::<ChatFields>::parse(b"{}").unwrap_err();
        assert!(error.message.contains("missing field `messages`"));
    }
}
