//! Chat templates: messages to prompt text, byte for byte as transformers' `apply_chat_template`
//! renders.

use chrono::NaiveDateTime;
use minijinja::value::Value as Var;
use serde_json::{Map, Value};

use super::TextError;
use super::jinja::{Compiled, to_value};
use super::pystr::is_space;

/// Names under which a message's reasoning travels. Templates read the first (gpt-oss' the second).
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Marks the end of the message to continue. The space shows whether the template trims the
/// content.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The chat template, or named templates, of one model.
#[derive(Debug)]
pub struct ChatTemplate {
    /// Name and template; a single template is `default`.
    templates: Vec<(String, Compiled)>,
    special_tokens: Map<String, Value>,
    clock: Option<NaiveDateTime>,
}

/// One rendering.
#[derive(Clone, Copy, Debug)]
pub struct TemplateRequest<'a> {
    /// OpenAI messages. Keys whose value is null are left out, as transformers does.
    pub messages: &'a [Value],
    /// OpenAI tools (a list of JSON schemas), or none.
    pub tools: Option<&'a Value>,
    /// Whether the prompt ends with the beginning of an assistant message.
    pub add_generation_prompt: bool,
    /// Whether the last message is left open for the model to continue. Wins over
    /// `add_generation_prompt`.
    pub continue_final_message: bool,
    /// `chat_template_kwargs` / `apply_chat_template_overrides`: any template variable, and
    /// `chat_template` (a name or a source), `add_generation_prompt`, `continue_final_message`
    /// (also the name of the field to continue), `tools`, `documents`.
    pub kwargs: &'a Map<String, Value>,
}

/// What the request asks for once `kwargs` are taken into account.
struct Resolved<'a> {
    source: Option<&'a str>,
    tools: Option<&'a Value>,
    documents: Option<&'a Value>,
    add_generation_prompt: bool,
    /// The field of the last message to continue.
    continue_field: Option<&'a str>,
    variables: Vec<(&'a str, &'a Value)>,
}

impl ChatTemplate {
    /// The template in `tokenizer_config.json` (`chat_template`: a source, or a list of named
    /// ones), or the content of `chat_template.jinja`, which wins. `None` when the model has
    /// neither.
    ///
    /// # Errors
    /// [`TextError::Config`] when `chat_template` has another form; [`TextError::TemplateSyntax`].
    pub fn from_config(
        tokenizer_config: &Value,
        jinja_file: Option<&str>,
    ) -> Result<Option<Self>, TextError> {
        let named: Vec<(&str, &str)> = match (jinja_file, tokenizer_config.get("chat_template")) {
            (Some(source), _) => vec![("default", source)],
            (None, None | Some(Value::Null)) => return Ok(None),
            (None, Some(Value::String(source))) => vec![("default", source)],
            (None, Some(Value::Array(list))) => list
                .iter()
                .map(|t| Some((t.get("name")?.as_str()?, t.get("template")?.as_str()?)))
                .collect::<Option<_>>()
                .ok_or_else(|| config_error("has an entry without `name` and `template`"))?,
            (None, Some(_)) => return Err(config_error("must be a string or a list")),
        };
        let templates = named
            .into_iter()
            .map(|(name, source)| Ok((name.to_owned(), Compiled::new(source, None)?)))
            .collect::<Result<_, TextError>>()?;
        Ok(Some(Self::assemble(templates, special_tokens(tokenizer_config))))
    }

    /// A single template. `special_tokens` are variables such as `bos_token`.
    ///
    /// # Errors
    /// [`TextError::TemplateSyntax`].
    pub fn new(source: &str, special_tokens: Map<String, Value>) -> Result<Self, TextError> {
        let templates = vec![("default".to_owned(), Compiled::new(source, None)?)];
        Ok(Self::assemble(templates, special_tokens))
    }

    fn assemble(templates: Vec<(String, Compiled)>, special_tokens: Map<String, Value>) -> Self {
        Self { templates, special_tokens, clock: None }
    }

    /// Fixes the time that `strftime_now` sees, so that a prompt does not change from day to day.
    ///
    /// # Errors
    /// [`TextError::TemplateSyntax`]: none that construction did not give.
    pub fn with_clock(mut self, now: NaiveDateTime) -> Result<Self, TextError> {
        self.clock = Some(now);
        for (_, template) in &mut self.templates {
            *template = Compiled::new(&template.source, self.clock)?;
        }
        Ok(self)
    }

    /// Whether a request's `chat_template` names one of the model's own templates; any other text is a
    /// source. Only a list of templates has names.
    pub fn has_named(&self, name: &str) -> bool {
        self.templates.len() > 1 && self.by_name(name).is_some()
    }

    fn by_name(&self, name: &str) -> Option<&Compiled> {
        self.templates.iter().find(|(n, _)| n == name).map(|(_, template)| template)
    }

    /// Renders `messages` without tools or further arguments.
    pub fn render_chat(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        self.render(&TemplateRequest {
            messages,
            tools: None,
            add_generation_prompt,
            continue_final_message: false,
            kwargs: &Map::new(),
        })
    }

    /// Renders the prompt with one of the model's own templates.
    ///
    /// # Errors
    /// [`TextError::TemplateRaised`] when the template refuses the messages, the other `Template*`
    /// variants when it fails or passes a limit, [`TextError::RequestTemplate`] when `kwargs` hold the
    /// source of another template, [`TextError::InvalidKwarg`], [`TextError::NoTemplate`],
    /// [`TextError::InvalidMessages`], [`TextError::ContinueFinal`].
    pub fn render(&self, req: &TemplateRequest) -> Result<String, TextError> {
        self.render_with(req, false)
    }

    /// Like [`Self::render`], also with a template source in `kwargs`.
    ///
    /// For requests of trusted clients alone: fuel bounds a template's instructions, and its output is
    /// bounded, but neither bounds the values it builds on the way. A dozen lines can double a string
    /// until memory runs out, or nest lists until dropping them overflows the stack; both end the process.
    ///
    /// # Errors
    /// Those of [`Self::render`] but [`TextError::RequestTemplate`].
    pub fn render_trusted(&self, req: &TemplateRequest) -> Result<String, TextError> {
        self.render_with(req, true)
    }

    fn render_with(&self, req: &TemplateRequest, trusted: bool) -> Result<String, TextError> {
        let resolved = resolve(req)?;
        let own;
        let template = match self.pick(&resolved)? {
            Picked::Ours(template) => template,
            Picked::Given(_) if !trusted => return Err(TextError::RequestTemplate),
            Picked::Given(source) => {
                own = Compiled::new(source, self.clock)?;
                &own
            }
        };
        let mut messages = plain_messages(req.messages)?;
        let final_text = match resolved.continue_field {
            Some(field) => Some(tag_final_message(&mut messages, field, &template.source)?),
            None => None,
        };
        let mut context: Vec<(&str, Var)> = Vec::new();
        context.extend(self.special_tokens.iter().map(|(k, v)| (k.as_str(), to_value(v))));
        context.extend(resolved.variables.iter().map(|(k, v)| (*k, to_value(v))));
        let optional = |v: Option<&Value>| v.map_or_else(|| Var::from(()), to_value);
        context.push((
            "messages",
            messages.into_iter().map(|m| to_value(&Value::Object(m))).collect(),
        ));
        context.push(("tools", optional(resolved.tools)));
        context.push(("documents", optional(resolved.documents)));
        context.push(("add_generation_prompt", Var::from(resolved.add_generation_prompt)));
        let text = template.render(Var::from_pairs(context))?;
        match final_text {
            Some(final_text) => cut_after_tag(text, &final_text),
            None => Ok(text),
        }
    }

    fn pick<'a>(&'a self, resolved: &Resolved<'a>) -> Result<Picked<'a>, TextError> {
        if let Some(source) = resolved.source {
            let named = if self.has_named(source) { self.by_name(source) } else { None };
            return Ok(named.map_or(Picked::Given(source), Picked::Ours));
        }
        let tool_use = resolved.tools.and_then(|_| self.by_name("tool_use"));
        tool_use.or_else(|| self.by_name("default")).map(Picked::Ours).ok_or_else(|| {
            TextError::NoTemplate {
                name: "default".to_owned(),
                known: self.templates.iter().map(|(n, _)| n.clone()).collect(),
            }
        })
    }
}

enum Picked<'a> {
    Ours(&'a Compiled),
    Given(&'a str),
}

fn config_error(reason: &str) -> TextError {
    TextError::Config { field: "chat_template".to_owned(), reason: reason.to_owned() }
}

/// Every `*_token` of the configuration (a string, or an object with `content`), and the named
/// extras.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let text = |v: &Value| v.as_str().or_else(|| v.get("content")?.as_str()).map(Value::from);
    let mut tokens = Map::new();
    for (key, value) in config.as_object().into_iter().flatten() {
        if key == "extra_special_tokens" {
            for (name, token) in value.as_object().into_iter().flatten() {
                tokens.extend(text(token).map(|t| (name.clone(), t)));
            }
        } else if key.ends_with("_token") {
            tokens.extend(text(value).map(|t| (key.clone(), t)));
        }
    }
    tokens
}

fn resolve<'a>(req: &TemplateRequest<'a>) -> Result<Resolved<'a>, TextError> {
    let invalid = |name: &str, reason: &str| TextError::InvalidKwarg {
        name: name.to_owned(),
        reason: reason.to_owned(),
    };
    let mut r = Resolved {
        source: None,
        tools: req.tools.filter(|t| !t.is_null()),
        documents: None,
        add_generation_prompt: req.add_generation_prompt,
        continue_field: req.continue_final_message.then_some("content"),
        variables: Vec::new(),
    };
    for (name, value) in req.kwargs {
        match (name.as_str(), value) {
            ("messages", _) => return Err(invalid(name, "is reserved; send `messages` instead")),
            ("tools", Value::Null) => r.tools = None,
            ("tools", Value::Array(_)) => r.tools = Some(value),
            ("documents", Value::Null) => r.documents = None,
            ("documents", Value::Array(_)) => r.documents = Some(value),
            ("tools" | "documents", _) => return Err(invalid(name, "must be a list")),
            ("chat_template" | "add_generation_prompt" | "continue_final_message", Value::Null) => {
            }
            ("chat_template", Value::String(source)) => r.source = Some(source),
            ("chat_template", _) => return Err(invalid(name, "must be a string")),
            ("add_generation_prompt", Value::Bool(on)) => r.add_generation_prompt = *on,
            ("add_generation_prompt", _) => return Err(invalid(name, "must be true or false")),
            ("continue_final_message", Value::Bool(on)) => {
                r.continue_field = on.then_some("content");
            }
            ("continue_final_message", Value::String(field)) => r.continue_field = Some(field),
            ("continue_final_message", _) => {
                return Err(invalid(name, "must be true, false or the name of a message field"));
            }
            (name, value) => r.variables.push((name, value)),
        }
    }
    if !matches!(r.tools, None | Some(Value::Array(_))) {
        return Err(invalid("tools", "must be a list"));
    }
    r.add_generation_prompt &= r.continue_field.is_none();
    Ok(r)
}

/// The messages as templates see them: no null fields, reasoning under every name it is read by.
fn plain_messages(messages: &[Value]) -> Result<Vec<Map<String, Value>>, TextError> {
    let invalid = |reason: String| TextError::InvalidMessages { reason };
    if messages.is_empty() {
        return Err(invalid("the list is empty; send at least one message".to_owned()));
    }
    let mut plain = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        let fields = message.as_object();
        let fields = fields.ok_or_else(|| invalid(format!("message {index} is not an object")))?;
        let kept = fields.iter().filter(|(_, v)| !v.is_null());
        let mut kept: Map<String, Value> = kept.map(|(k, v)| (k.clone(), v.clone())).collect();
        if let Some(reasoning) = REASONING_FIELDS.iter().find_map(|f| kept.get(*f)).cloned() {
            if !kept.contains_key("thinking") {
                // First, as in transformers: the order shows when a template prints the message.
                kept.shift_insert(0, "thinking".to_owned(), reasoning.clone());
            }
            kept.insert("reasoning_content".to_owned(), reasoning);
        }
        plain.push(kept);
    }
    Ok(plain)
}

/// Appends the tag to the text of the last message that is to be continued, and returns that text.
fn tag_final_message(
    messages: &mut [Map<String, Value>],
    field: &str,
    source: &str,
) -> Result<String, TextError> {
    let fail = |reason: String| TextError::ContinueFinal { reason };
    let missing = || fail(format!("the final message has no `{field}` to continue"));
    let last = messages.last_mut().ok_or_else(missing)?;
    let original = last.get(field).ok_or_else(missing)?.clone();
    // Reasoning stands under several names: whichever the template reads must carry the tag.
    let fields: Vec<&str> = if REASONING_FIELDS.contains(&field) {
        REASONING_FIELDS.into_iter().filter(|f| last.get(*f) == Some(&original)).collect()
    } else {
        vec![field]
    };
    if !fields.iter().any(|f| source.contains(f)) {
        return Err(fail(format!("the chat template does not read `{field}`")));
    }
    match &original {
        Value::String(text) => {
            for f in fields {
                last.insert(f.to_owned(), Value::from(format!("{text}{CONTINUE_TAG}")));
            }
            Ok(text.clone())
        }
        Value::Array(_) => {
            let parts = last.get_mut(field).and_then(Value::as_array_mut).ok_or_else(missing)?;
            let part = parts.iter_mut().rev().find_map(|p| p.get_mut("text"));
            let no_text = || fail("the final message has no text part to continue".to_owned());
            let part = part.ok_or_else(no_text)?;
            let text = part.as_str().ok_or_else(no_text)?.to_owned();
            *part = Value::from(format!("{text}{CONTINUE_TAG}"));
            Ok(text)
        }
        _ => Err(fail(format!("`{field}` of the final message is not text"))),
    }
}

/// Cuts the rendered text where the final message's text ends.
fn cut_after_tag(mut text: String, final_text: &str) -> Result<String, TextError> {
    let tag = CONTINUE_TAG.trim_end();
    let at = text.rfind(tag).filter(|_| text.contains(final_text.trim_matches(is_space)));
    let Some(at) = at else {
        let reason = "the final message does not appear in the rendered prompt as it was sent \
                      (the chat template changes or drops it)";
        return Err(TextError::ContinueFinal { reason: reason.to_owned() });
    };
    let trimmed = !text[at..].starts_with(CONTINUE_TAG);
    text.truncate(at);
    if trimmed {
        // The template strips contents, so the space before the tag would have gone too.
        text.truncate(text.trim_end_matches(is_space).len());
    }
    Ok(text)
}
