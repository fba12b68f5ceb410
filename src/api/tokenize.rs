//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes. Prompts are built as the generation routes
//! build them without cartridges.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::{
    AppState,
    error::ApiError,
    extract::{Body, field_names, parse, unknown_keys},
    openai::{
        fields::ChatFields,
        params::unknown_token,
        prompt::{ChatPrompt, check_text},
    },
    request::{self, Notes, headers_of, with_headers},
};

/// `prompt`, or `messages` with the fields that shape a chat prompt.
#[derive(Debug, Deserialize)]
struct TokenizeFields {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
    tools: Option<Vec<Value>>,
    documents: Option<Value>,
    chat_template: Option<String>,
    chat_template_kwargs: Option<Map<String, Value>>,
    apply_chat_template_overrides: Option<Map<String, Value>>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct DetokenizeFields {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// The fields, and the names of those that are ignored.
fn parse_named<T: DeserializeOwned>(json: &[u8]) -> Result<(T, Vec<String>), ApiError> {
    let ignored = unknown_keys(json, &[field_names::<T>()])?;
    Ok((parse(json)?, ignored))
}

/// Text or messages to token ids.
pub async fn tokenize(
    State(state): State<Arc<AppState>>,
    body: Body,
) -> Result<Response, ApiError> {
    let (fields, ignored) = body.read(parse_named::<TokenizeFields>).await?;
    let mut notes = Notes { ignored, warnings: Vec::new() };
    request::resolve_model(&state, fields.model.as_deref(), &mut notes.warnings)?;
    let max_model_len = state.max_model_len();
    let strings = fields.return_token_strs.unwrap_or(false);
    let reply = match (fields.prompt, fields.messages) {
        (Some(text), None) => {
            let special = fields.add_special_tokens.unwrap_or(true);
            let how = request::tokenising(&state, false, special);
            let work = move |model: &super::ServedModel| {
                check_text(model, &text, how.max_context)?;
                let ids = model.tokenizer.encode(&text, special)?;
                Ok(reply(model, &ids, strings, max_model_len))
            };
            request::off_thread(&state, work).await?
        }
        (None, Some(messages)) => {
            let special = fields.add_special_tokens.unwrap_or(false);
            let prompt = ChatPrompt::new(ChatFields {
                messages,
                logprobs: None,
                top_logprobs: None,
                tools: fields.tools,
                documents: fields.documents,
                chat_template: fields.chat_template,
                chat_template_kwargs: fields.chat_template_kwargs,
                apply_chat_template_overrides: fields.apply_chat_template_overrides,
                add_generation_prompt: fields.add_generation_prompt,
                continue_final_message: fields.continue_final_message,
            })?;
            let how = request::tokenising(&state, false, special);
            let work = move |model: &super::ServedModel| {
                let prompt = prompt.tokenise(model, how, &mut Vec::new())?;
                Ok(reply(model, &prompt.ids, strings, max_model_len))
            };
            request::off_thread(&state, work).await?
        }
        _ => {
            let message = "exactly one of prompt and messages must be set";
            return Err(ApiError::invalid("prompt", message));
        }
    };
    Ok(with_headers(Json(reply).into_response(), headers_of(&notes)))
}

fn reply(model: &super::ServedModel, ids: &[u32], strings: bool, max_model_len: usize) -> Value {
    let strings =
        strings.then(|| ids.iter().map(|&id| model.tokenizer.token_string(id)).collect::<Vec<_>>());
    json!({
        "count": ids.len(),
        "max_model_len": max_model_len,
        "tokens": ids,
        "token_strs": strings,
    })
}

/// Token ids to text, special tokens included.
pub async fn detokenize(
    State(state): State<Arc<AppState>>,
    body: Body,
) -> Result<Response, ApiError> {
    let (fields, ignored) = body.read(parse_named::<DetokenizeFields>).await?;
    let mut notes = Notes { ignored, warnings: Vec::new() };
    request::resolve_model(&state, fields.model.as_deref(), &mut notes.warnings)?;
    let vocab_size = state.engine.info().vocab_size;
    let outside = |(_, id): &(usize, &u32)| **id as usize >= vocab_size;
    if let Some((i, &id)) = fields.tokens.iter().enumerate().find(outside) {
        return Err(unknown_token(&format!("tokens[{i}]"), i64::from(id), vocab_size));
    }
    let work =
        move |model: &super::ServedModel| Ok(model.tokenizer.decode(&fields.tokens, false)?);
    let text = request::off_thread(&state, work).await?;
    Ok(with_headers(Json(json!({"prompt": text})).into_response(), headers_of(&notes)))
}
