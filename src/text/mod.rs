//! Text in and out: tokenizer, chat template, incremental detokenizer, stop strings.
//!
//! Nothing here knows of requests, cartridges or the engine. All of it can run on any thread; none
//! of it runs on the engine's (tokenising a long prompt or rendering a template would stall every
//! sequence).

mod chat_template;
mod detokenizer;
mod jinja;
mod json;
mod llama3;
mod pystr;
mod stop;
mod tokenizer;

pub use chat_template::{ChatTemplate, TemplateRequest};
pub use detokenizer::Detokenizer;
pub use llama3::llama3_cartridge_prompt;
pub use stop::{StopMatcher, StopPush};
pub use tokenizer::Tokenizer;

/// What can go wrong between messages, text and token ids.
///
/// Every variant but [`TextError::Tokenizer`], [`TextError::Config`] and
/// [`TextError::TemplateSyntax`] of the model's own template is about the request, not the server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// `tokenizer.json` cannot be used.
    #[error("tokenizer.json cannot be read: {reason}")]
    Tokenizer {
        /// What the parser says.
        reason: String,
    },
    /// The tokenizer refused a text.
    #[error("the text cannot be tokenised: {reason}")]
    Encode {
        /// What the tokenizer says.
        reason: String,
    },
    /// The tokenizer's decoder refused a list of ids.
    #[error("the token ids cannot be decoded: {reason}")]
    Decode {
        /// What the decoder says.
        reason: String,
    },
    /// A field of `tokenizer_config.json` has a form that is not understood.
    #[error("tokenizer_config.json: `{field}` {reason}")]
    Config {
        /// Name of the field.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The chat template does not parse.
    #[error("the chat template has a syntax error{}: {reason}", at_line(*line))]
    TemplateSyntax {
        /// Line of the template, from 1, when known.
        line: Option<usize>,
        /// What the parser says.
        reason: String,
    },
    /// The template called `raise_exception`: it does not accept these messages.
    #[error("the chat template refuses the messages: {message}")]
    TemplateRaised {
        /// The template's own words.
        message: String,
    },
    /// Rendering failed (an undefined value was used, a filter got a wrong type, ...).
    #[error("the chat template cannot be rendered{}: {reason}", at_line(*line))]
    TemplateRender {
        /// Line of the template, from 1, when known.
        line: Option<usize>,
        /// What the template engine says.
        reason: String,
    },
    /// Rendering passed [`crate::limits::CHAT_TEMPLATE_FUEL`] instructions.
    #[error(
        "the chat template ran more than {limit} instructions; send fewer messages or fix its loop"
    )]
    TemplateFuel {
        /// The limit, in template instructions.
        limit: u64,
    },
    /// The rendered text passed [`crate::limits::MAX_RENDERED_PROMPT_BYTES`].
    #[error("the rendered prompt is longer than {limit} bytes; send shorter messages")]
    TemplateTooLarge {
        /// The limit, in bytes of UTF-8.
        limit: usize,
    },
    /// No template answers to the name asked for, or none is called `default`.
    #[error("no chat template is named `{name}`; the model has: {}", known.join(", "))]
    NoTemplate {
        /// The name looked for.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// The request brings a template of its own, and the renderer was not told to trust it.
    #[error(
        "this server uses only the model's own templates; an operator whose clients are all trusted \
         may allow others (--allow-request-templates)"
    )]
    RequestTemplate,
    /// A key of `chat_template_kwargs` / `apply_chat_template_overrides` has a wrong type or is
    /// reserved.
    #[error("chat template argument `{name}` {reason}")]
    InvalidKwarg {
        /// The key.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The messages do not have the form a template can read.
    #[error("messages: {reason}")]
    InvalidMessages {
        /// What is wrong, with the index of the message.
        reason: String,
    },
    /// `continue_final_message` was asked for and cannot be honoured.
    #[error("continue_final_message: {reason}")]
    ContinueFinal {
        /// Why the final message cannot be continued.
        reason: String,
    },
}

fn at_line(line: Option<usize>) -> String {
    line.map(|n| format!(" on line {n}")).unwrap_or_default()
}
