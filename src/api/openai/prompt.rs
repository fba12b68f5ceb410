//! From a request to the token ids of its prompt. Slow for long texts: call it off the async threads.

use serde_json::{Map, Value};

use super::{super::error::ApiError, fields::ChatFields, messages, params::unknown_token};
use crate::{
    api::state::ServedModel,
    limits,
    text::{TemplateRequest, llama3_cartridge_prompt},
};

/// A prompt as the engine takes it and as `echo` shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// The client's own text; `None` when it sent token ids.
    pub text: Option<String>,
}

/// What of a chat request shapes its prompt.
#[derive(Debug)]
pub struct ChatPrompt {
    pub messages: Vec<Value>,
    tools: Option<Value>,
    kwargs: Map<String, Value>,
    add_generation_prompt: bool,
    continue_final_message: bool,
}

impl ChatPrompt {
    /// Checks and normalises the messages, merges the template arguments, and settles how the prompt ends:
    /// after an assistant message the model goes on writing it, after any other it begins a new one. The
    /// request's own flags, then its template overrides, take precedence.
    pub fn new(fields: ChatFields) -> Result<Self, ApiError> {
        let messages = messages::normalise(fields.messages)?;
        let mut kwargs = fields.chat_template_kwargs.unwrap_or_default();
        for (name, value) in [
            ("documents", fields.documents),
            ("chat_template", fields.chat_template.map(Value::String)),
        ] {
            if let Some(value) = value {
                kwargs.insert(name.to_owned(), value);
            }
        }
        kwargs.extend(fields.apply_chat_template_overrides.unwrap_or_default());

        let generate = flag(&mut kwargs, "add_generation_prompt", fields.add_generation_prompt)?;
        let resume = flag(&mut kwargs, "continue_final_message", fields.continue_final_message)?;
        if generate == Some(true) && resume == Some(true) {
            let message = "continue_final_message and add_generation_prompt exclude each other";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        let ends_with_assistant =
            messages.last().is_some_and(|m| m.get("role").is_some_and(|r| r == "assistant"));
        let continue_final_message =
            resume.unwrap_or(ends_with_assistant && generate != Some(true));
        Ok(Self {
            messages,
            tools: fields.tools.filter(|t| !t.is_empty()).map(Value::Array),
            kwargs,
            add_generation_prompt: generate.unwrap_or(!continue_final_message),
            continue_final_message,
        })
    }

    /// Renders and tokenises. Special tokens come from the template alone, unless `add_special_tokens`.
    ///
    /// With cartridges a Llama-3 model gets the prompt its cartridges are trained with: no BOS (the
    /// cartridge holds it) and no default system text. Names of arguments that this form has no place for
    /// are added to `ignored`.
    pub fn tokenise(
        &self,
        model: &ServedModel,
        has_cartridges: bool,
        add_special_tokens: bool,
        ignored: &mut Vec<String>,
    ) -> Result<Prompt, ApiError> {
        let own_template = self.kwargs.contains_key("chat_template");
        let text = if has_cartridges && model.is_llama3 && !own_template {
            ignored.extend(self.tools.is_some().then(|| "tools".to_owned()));
            ignored.extend(self.kwargs.keys().map(|key| format!("chat_template_kwargs.{key}")));
            llama3_cartridge_prompt(
                &self.messages,
                self.add_generation_prompt,
                self.continue_final_message,
            )?
        } else {
            self.render(model)?
        };
        encode(model, text, add_special_tokens, "messages")
    }

    fn render(&self, model: &ServedModel) -> Result<String, ApiError> {
        let Some(template) = &model.chat_template else {
            return Err(ApiError::invalid(
                "messages",
                "this model has no chat template; use /v1/completions, or start the server with a \
                 model folder that has one (chat_template.jinja or tokenizer_config.json)",
            ));
        };
        Ok(template.render(&TemplateRequest {
            messages: &self.messages,
            tools: self.tools.as_ref(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            kwargs: &self.kwargs,
        })?)
    }
}

/// A text with the model's special tokens (BOS), or without.
pub fn encode(
    model: &ServedModel,
    text: String,
    add_special_tokens: bool,
    field: &str,
) -> Result<Prompt, ApiError> {
    let ids = model.tokenizer.encode(&text, add_special_tokens)?;
    if ids.is_empty() {
        return Err(ApiError::invalid(field, format!("{field}: the prompt has no tokens")));
    }
    Ok(Prompt { ids, text: Some(text) })
}

/// One prompt of a completions request.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    Text(String),
    Ids(Vec<u32>),
}

/// `prompt`: a string, a list of token ids, a list of strings, or a list of lists of token ids.
pub fn completion_inputs(prompt: Value, vocab_size: usize) -> Result<Vec<Input>, ApiError> {
    let list = match prompt {
        Value::String(text) => return Ok(vec![Input::Text(text)]),
        Value::Array(list) => list,
        _ => return Err(invalid_prompt("prompt")),
    };
    if list.first().is_some_and(Value::is_number) {
        return Ok(vec![Input::Ids(token_ids("prompt", list, vocab_size)?)]);
    }
    if list.is_empty() {
        return Err(ApiError::invalid("prompt", "prompt must not be an empty list"));
    }
    if list.len() > limits::MAX_PROMPTS {
        let message = format!("prompt holds more than {} prompts", limits::MAX_PROMPTS);
        return Err(ApiError::invalid("prompt", message));
    }
    list.into_iter()
        .enumerate()
        .map(|(i, item)| match item {
            Value::String(text) => Ok(Input::Text(text)),
            Value::Array(ids) => {
                Ok(Input::Ids(token_ids(&format!("prompt[{i}]"), ids, vocab_size)?))
            }
            _ => Err(invalid_prompt(&format!("prompt[{i}]"))),
        })
        .collect()
}

fn invalid_prompt(path: &str) -> ApiError {
    let message = format!(
        "Invalid type for prompt: {path} must be a string, a list of token ids, or a list of either"
    );
    ApiError::invalid(path, message)
}

fn token_ids(path: &str, list: Vec<Value>, vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    if list.is_empty() {
        return Err(ApiError::invalid(path, format!("{path}: the prompt has no tokens")));
    }
    list.iter()
        .enumerate()
        .map(|(i, id)| {
            let path = || format!("{path}[{i}]");
            let Some(id) = id.as_i64() else {
                return Err(ApiError::invalid(path(), format!("{}: not a token id", path())));
            };
            match u32::try_from(id) {
                Ok(small) if (small as usize) < vocab_size => Ok(small),
                _ => Err(unknown_token(&path(), id, vocab_size)),
            }
        })
        .collect()
}

/// Takes a flag out of the template arguments; there it wins over the request's own field.
fn flag(
    kwargs: &mut Map<String, Value>,
    name: &str,
    field: Option<bool>,
) -> Result<Option<bool>, ApiError> {
    match kwargs.remove(name) {
        None | Some(Value::Null) => Ok(field),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(_) => Err(ApiError::invalid(name, format!("{name} must be true or false"))),
    }
}

#[cfg(test)]
#[path = "prompt_tests.rs"]
mod tests;
