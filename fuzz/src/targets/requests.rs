//! Bodies of the generation routes, from bytes to validated settings: the steps of `api/chat.rs` and
//! `api/completions.rs` up to the prompt. `routes` takes the same bodies through a whole server.

use axum::response::IntoResponse;
use cartouche::{
    api::{
        ApiError, cartridge_blocks,
        cartridges::{ModelName, collect},
        extract::check_values,
        openai::{
            fields::{ChatFields, CommonFields, CompletionFields, RequestBody},
            params::{
                Bounds as RequestBounds, LogprobRequest, Settings, chat_logprobs,
                completion_logprobs,
            },
            prompt::ChatPrompt,
            prompt_field::Input,
        },
    },
    cartridge::CartridgeRef,
    limits,
};
use serde_json::Value;

use super::{Bounds, Linear, Outcome, Target};
use crate::mutate;

pub const CHAT: Target = Target {
    name: "chat_request",
    seeds: || texts(&CHAT_SEEDS),
    mutate: |data, random| mutate::json(data, &KEYS, random),
    run: |body| outcome(chat(body)),
    bounds: BOUNDS,
    needs_system: false,
};

pub const COMPLETION: Target = Target {
    name: "completion_request",
    seeds: || texts(&COMPLETION_SEEDS),
    mutate: |data, random| mutate::json(data, &KEYS, random),
    run: |body| outcome(completion(body)),
    bounds: BOUNDS,
    needs_system: false,
};

/// A JSON value of two bytes takes some hundred in memory. A body is read once for each struct of its fields.
const BOUNDS: Bounds = Bounds {
    memory: Linear { base: 128 << 10, per_byte: 200 },
    work: Linear { base: 512 << 10, per_byte: 1500 },
};

/// Names that a body, a message or a cartridge can have.
pub const KEYS: [&str; 72] = [
    "model",
    "messages",
    "prompt",
    "cartridges",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "add_special_tokens",
    "prompt_logprobs",
    "logprobs",
    "top_logprobs",
    "logprobs_in_fingerprint",
    "logprobs_ignore_temperature",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "stream",
    "stream_options",
    "include_usage",
    "priority",
    "tools",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "apply_chat_template_overrides",
    "add_generation_prompt",
    "continue_final_message",
    "echo",
    "best_of",
    "response_format",
    "tool_choice",
    "suffix",
    "user",
    "role",
    "content",
    "name",
    "type",
    "text",
    "tool_calls",
    "function",
    "arguments",
    "reasoning_content",
    "id",
    "source",
    "force_redownload",
    "tokens",
    "return_token_strs",
    "5",
    "99",
    "developer",
    "image_url",
    "refusal",
    "metadata",
    "parameters",
    "description",
    "thinking",
    "tool_call_id",
    "truncate_prompt_tokens",
];

pub const CHAT_SEEDS: [&str; 6] = [
    r#"{"model":"m","messages":[{"role":"user","content":"Hello"}],"max_tokens":4}"#,
    r#"{"messages":[{"role":"developer","content":"Be brief.\n<cartridge>{\"id\":\"alpha\",\"source\":\"local\"}</cartridge>"},
        {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}],"n":2,"temperature":0.5,"top_p":0.9,
        "top_k":4,"min_p":0.01,"seed":7,"stop":["x","\n\n"],"stop_token_ids":[9],"logit_bias":{"5":-100,"6":1.5},
        "presence_penalty":1,"frequency_penalty":-1,"repetition_penalty":1.1,"max_completion_tokens":3,"min_tokens":1}"#,
    r#"{"model":"m:alpha","messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"I am"}],
        "cartridges":[{"id":"alpha","source":"local","force_redownload":false},{"id":"beta"}],"logprobs":true,"top_logprobs":5,
        "logprobs_in_fingerprint":true,"stream":true,"stream_options":{"include_usage":true},"max_tokens":2}"#,
    r#"{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function",
        "function":{"name":"f","arguments":"{\"a\": [1, {\"b\": null}]}"}}]},{"role":"tool","tool_call_id":"c","content":"3"}],
        "tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"a":{"type":"string"}}}}}],
        "chat_template_kwargs":{"enable_thinking":false},"apply_chat_template_overrides":{"add_generation_prompt":true},"max_tokens":1}"#,
    r#"{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"text"},"tool_choice":"auto","user":"u","metadata":{"a":1},
        "priority":"batch","prompt_logprobs":2,"return_token_ids":true,"ignore_eos":true,"max_tokens":2,"documents":[]}"#,
    r#"{"messages":[{"role":"user","content":"x"}],"continue_final_message":true,"add_generation_prompt":false,"max_tokens":2}"#,
];

pub const COMPLETION_SEEDS: [&str; 5] = [
    r#"{"model":"m","prompt":"The harbour log says","max_tokens":4}"#,
    r#"{"prompt":[5,6,7,8],"echo":true,"logprobs":3,"max_tokens":0,"n":2,"seed":1}"#,
    r#"{"prompt":["a","b c"],"max_tokens":2,"stop":".","stream":true,"best_of":1,"suffix":"","temperature":0}"#,
    r#"{"prompt":[[5,6],[7]],"cartridges":[{"id":"alpha","source":"huggingface"}],"max_tokens":1,"add_special_tokens":true}"#,
    r#"{"prompt":"x","prompt_logprobs":1,"return_tokens_as_token_ids":true,"max_tokens":2,"priority":-3,"truncate_prompt_tokens":null}"#,
];

pub fn texts(seeds: &[&str]) -> Vec<Vec<u8>> {
    seeds.iter().map(|text| text.as_bytes().to_vec()).collect()
}

const VOCAB: usize = 100;
const TOP: usize = 20;

const REQUEST_BOUNDS: RequestBounds<'static> =
    RequestBounds { vocab_size: VOCAB, max_top_logprobs: TOP, eos_token_ids: &[2] };

fn outcome(result: Result<String, ApiError>) -> Outcome {
    match result {
        Ok(kind) => Outcome::accepted(kind),
        Err(error) => {
            assert!(error.status.is_client_error(), "{error:?}");
            assert!(!error.message.is_empty());
            let field = error.param.clone().unwrap_or_default();
            let field = field.split(['.', '[']).next().unwrap_or_default().to_owned();
            // Names of the client's own choice would make every error another one.
            let field = if KEYS.contains(&field.as_str()) { field } else { String::new() };
            let refused = Outcome::refused(format_args!("{field} {}", error.message));
            assert!(error.into_response().status().is_client_error());
            refused
        }
    }
}

fn chat(body: &[u8]) -> Result<String, ApiError> {
    check_values(body)?;
    let RequestBody { own, common, ignored } = RequestBody::<ChatFields>::parse(body)?;
    check_ignored(&ignored);
    let logprobs = chat_logprobs(own.logprobs, own.top_logprobs, REQUEST_BOUNDS)?;
    let settings = settings(&common, logprobs, false)?;
    let mut prompt = ChatPrompt::new(own)?;
    let blocks = cartridge_blocks::take(&mut prompt.messages)?;
    let attached = attach(&common, blocks)?;
    assert!((1..=limits::MAX_MESSAGES).contains(&prompt.messages.len()));
    for message in &prompt.messages {
        let text = |name: &str| message.get(name).and_then(Value::as_str);
        assert!(text("role").is_some_and(|role| !role.is_empty() && role != "developer"));
        assert!(text("content").is_some());
        assert!(message.as_object().is_some_and(|m| m.values().all(|value| !value.is_null())));
    }
    Ok(shape(&settings, attached, prompt.messages.len()))
}

fn completion(body: &[u8]) -> Result<String, ApiError> {
    check_values(body)?;
    let RequestBody { own, common, ignored } = RequestBody::<CompletionFields>::parse(body)?;
    check_ignored(&ignored);
    let echo = own.echo.unwrap_or(false);
    let logprobs = completion_logprobs(own.logprobs, echo, REQUEST_BOUNDS)?;
    let settings = settings(&common, logprobs, echo)?;
    let inputs = own.prompt.into_inputs(VOCAB)?;
    assert!((1..=limits::MAX_PROMPTS).contains(&inputs.len()));
    for input in &inputs {
        if let Input::Ids(ids) = input {
            assert!(!ids.is_empty() && ids.iter().all(|id| (*id as usize) < VOCAB));
        }
    }
    let attached = attach(&common, Vec::new())?;
    let lengths = vec![10; inputs.len()];
    let max_tokens = settings.max_tokens.unwrap_or(16).min(1000);
    settings.check_work(&lengths, max_tokens)?;
    assert!(settings.n * inputs.len() <= limits::MAX_CHOICES_PER_REQUEST);
    Ok(shape(&settings, attached, inputs.len()))
}

fn settings(
    common: &CommonFields,
    logprobs: LogprobRequest,
    zero: bool,
) -> Result<Settings, ApiError> {
    let settings = Settings::new(common, logprobs, zero, REQUEST_BOUNDS)?;
    check_settings(&settings, zero);
    Ok(settings)
}

/// Every limit holds for what is accepted.
fn check_settings(s: &Settings, zero: bool) {
    assert!((1..=limits::MAX_CHOICES).contains(&s.n));
    assert!(s.max_tokens.is_none_or(|max| max >= usize::from(!zero)));
    assert!(s.max_tokens.is_none_or(|max| s.sampling.min_tokens <= max));
    assert!(s.stop.len() <= limits::MAX_STOP_STRINGS);
    assert!(s.stop.iter().all(|stop| (1..=limits::MAX_STOP_BYTES).contains(&stop.len())));
    assert!(s.stop_token_ids.len() <= limits::MAX_LOGIT_BIAS);
    assert!(s.stop_token_ids.iter().all(|id| (*id as usize) < VOCAB));
    let p = &s.sampling;
    assert!(p.temperature >= 0.0 && p.temperature.is_finite());
    assert!(p.top_p > 0.0 && p.top_p <= 1.0 && (0.0..=1.0).contains(&p.min_p));
    assert!(
        (-2.0..=2.0).contains(&p.presence_penalty) && (-2.0..=2.0).contains(&p.frequency_penalty)
    );
    assert!(p.repetition_penalty >= 0.0 && p.repetition_penalty.is_finite());
    assert!(p.logit_bias.len() <= limits::MAX_LOGIT_BIAS);
    let sound = |(id, bias): &(u32, f32)| (*id as usize) < VOCAB && (-100.0..=100.0).contains(bias);
    assert!(p.logit_bias.iter().all(sound));
    assert!(s.logprobs.top <= TOP && s.logprobs.prompt.is_none_or(|k| k <= TOP));
    assert!(!(s.stream && s.logprobs.prompt.is_some()));
}

fn check_ignored(ignored: &[String]) {
    for name in ["n", "stop", "cartridges", "temperature", "response_format", "suffix"] {
        assert!(!ignored.iter().any(|ignored| ignored == name), "{name} is read, not ignored");
    }
}

fn attach(common: &CommonFields, blocks: Vec<CartridgeRef>) -> Result<usize, ApiError> {
    let suffix = match ModelName::parse(common.model.as_deref(), "m") {
        ModelName::WithCartridge(id) => Some(id),
        _ => None,
    };
    let list = common.cartridges.clone().unwrap_or_default();
    let attached = collect(suffix, blocks, list, false)?;
    assert!(attached.len() <= limits::MAX_CARTRIDGES_PER_REQUEST);
    for (i, reference) in attached.iter().enumerate() {
        assert!((1..=limits::MAX_CARTRIDGE_ID_BYTES).contains(&reference.id.len()));
        let same =
            |other: &CartridgeRef| other.id == reference.id && other.source == reference.source;
        assert!(!attached[..i].iter().any(same), "attached twice");
    }
    Ok(attached.len())
}

fn shape(s: &Settings, attached: usize, parts: usize) -> String {
    format!(
        "{} cartridges, {} parts, n>1 {}, stream {}, logprobs {}",
        attached.min(3),
        parts.min(3),
        s.n > 1,
        s.stream,
        s.logprobs.show
    )
}
