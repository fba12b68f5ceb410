//! From a request to the token ids of its prompt. Slow for long texts: call it off the async threads.

use serde_json::{Map, Value};

use super::{super::error::ApiError, fields::ChatFields, messages};
use crate::{
    api::state::ServedModel,
    text::{TemplateRequest, TextError, llama3_cartridge_prompt},
};

/// Names of ignored message members that are kept for the header, which is short.
const MAX_IGNORED_NAMES: usize = 64;

/// A prompt as the engine takes it and as `echo` shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// The client's own text; `None` when it sent token ids or does not want it back.
    pub text: Option<String>,
    /// Ids at the beginning that stand for nothing of the text (BOS).
    pub added: usize,
}

/// How a prompt becomes tokens, apart from what it says.
#[derive(Debug, Clone, Copy)]
pub struct Tokenising {
    pub has_cartridges: bool,
    pub add_special_tokens: bool,
    /// Whether a request may bring the source of a chat template.
    pub request_templates: bool,
    /// Tokens a request can have at most; a text that cannot fit is refused before it is tokenised.
    pub max_context: usize,
}

/// What of a chat request shapes its prompt.
#[derive(Debug)]
pub struct ChatPrompt {
    pub messages: Vec<Value>,
    tools: Option<Value>,
    kwargs: Map<String, Value>,
    add_generation_prompt: bool,
    /// The reply goes on with the text of the last message.
    pub continue_final_message: bool,
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
        kwargs.extend(
            fields
                .apply_chat_template_overrides
                .unwrap_or_default()
                .into_iter()
                .filter(|(name, value)| name != "chat_template" || !value.is_null()),
        );
        if kwargs.get("chat_template").is_some_and(Value::is_null) {
            kwargs.shift_remove("chat_template");
        }

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
        how: Tokenising,
        ignored: &mut Vec<String>,
    ) -> Result<Prompt, ApiError> {
        let own_template = self.kwargs.contains_key("chat_template");
        let text = if how.has_cartridges && model.is_llama3 && !own_template {
            self.render_llama3(ignored)?
        } else {
            self.render(model, how.request_templates)?
        };
        encode(model, text, how, "messages")
    }

    fn render_llama3(&self, ignored: &mut Vec<String>) -> Result<String, ApiError> {
        ignored.extend(self.tools.is_some().then(|| "tools".to_owned()));
        ignored.extend(self.kwargs.keys().map(|key| format!("chat_template_kwargs.{key}")));
        for (i, message) in self.messages.iter().enumerate() {
            for key in message.as_object().into_iter().flat_map(Map::keys) {
                match key.as_str() {
                    "role" | "content" => {}
                    "tool_calls" => {
                        let why = "a Llama-3 cartridge prompt has no form for earlier calls";
                        return Err(ApiError::unsupported(&format!("messages[{i}].{key}"), why));
                    }
                    key => {
                        let name = format!("messages.{key}");
                        if !ignored.contains(&name) && ignored.len() < MAX_IGNORED_NAMES {
                            ignored.push(name);
                        }
                    }
                }
            }
        }
        let (generate, resume) = (self.add_generation_prompt, self.continue_final_message);
        Ok(llama3_cartridge_prompt(&self.messages, generate, resume)?)
    }

    fn render(&self, model: &ServedModel, trusted: bool) -> Result<String, ApiError> {
        let named = |name: &str| model.chat_template.as_ref().is_some_and(|t| t.has_named(name));
        let given = self.kwargs.get("chat_template").and_then(Value::as_str);
        let given = given.filter(|source| !named(source));
        if given.is_some() && !trusted {
            return Err(TextError::RequestTemplate.into());
        }
        let Some(template) = &model.chat_template else {
            return Err(ApiError::invalid(
                "messages",
                "this model has no chat template; use /v1/completions, or start the server with a \
                 model folder that has one (chat_template.jinja or tokenizer_config.json)",
            ));
        };
        let request = TemplateRequest {
            messages: &self.messages,
            tools: self.tools.as_ref(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            kwargs: &self.kwargs,
        };
        if given.is_none() {
            return Ok(template.render(&request)?);
        }
        template.render_trusted(&request).map_err(|error| match error {
            // The template is the client's: so is the fault.
            TextError::TemplateSyntax { .. }
            | TextError::TemplateRender { .. }
            | TextError::TemplateRaised { .. }
            | TextError::TemplateFuel { .. }
            | TextError::TemplateTooLarge { .. } => {
                ApiError::invalid("chat_template", error.to_string())
            }
            error => error.into(),
        })
    }
}

/// A text with the model's special tokens (BOS), or without.
pub fn encode(
    model: &ServedModel,
    text: String,
    how: Tokenising,
    field: &str,
) -> Result<Prompt, ApiError> {
    check_text(model, &text, how.max_context)?;
    let (ids, added) = model.tokenizer.encode_counting(&text, how.add_special_tokens)?;
    if ids.is_empty() {
        return Err(ApiError::invalid(field, format!("{field}: the prompt has no tokens")));
    }
    Ok(Prompt { ids, text: Some(text), added })
}

/// Refuses a text that cannot fit into the context, whatever it says: tokenising takes many times its bytes.
pub fn check_text(model: &ServedModel, text: &str, max_context: usize) -> Result<(), ApiError> {
    match model.tokenizer.max_text_bytes(max_context) {
        Some(limit) if text.len() > limit => Err(ApiError::text_too_long(text.len(), max_context)),
        _ => Ok(()),
    }
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
