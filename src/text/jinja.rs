//! The template engine set up as transformers sets up Jinja2, and one compiled template.
//!
//! Known differences from Jinja2, found by rendering the same snippets with both: `none` can be
//! iterated (nothing comes), values of different types can be compared (Python raises), `%` between
//! a string and values is not supported (the `format` filter is), floats inside printed lists keep
//! Rust's exponent form, and the filters and methods for layout (`truncate`, `wordcount`,
//! `striptags`, `zfill`, `ljust`, ...) do not exist: an error names them.

use std::fmt;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use chrono::format::{Item, StrftimeItems};
use chrono::{Local, NaiveDateTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, escape_formatter};
use serde_json::Value as Json;

use super::{TextError, json, pystr};
use crate::limits::{CHAT_TEMPLATE_DEPTH, CHAT_TEMPLATE_FUEL, MAX_RENDERED_PROMPT_BYTES};

const NAME: &str = "chat_template";

/// A parsed template with everything it may call.
#[derive(Debug)]
pub(super) struct Compiled {
    environment: Environment<'static>,
    /// The text as given: transformers looks for field names in it.
    pub(super) source: String,
}

/// What `raise_exception` was given; travels as the source of the engine's error.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl Compiled {
    /// Parses `source`. `clock` replaces the local time for `strftime_now`.
    pub(super) fn new(source: &str, clock: Option<NaiveDateTime>) -> Result<Self, TextError> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| syntax_error(&e))?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_fuel(Some(CHAT_TEMPLATE_FUEL));
        env.set_recursion_limit(CHAT_TEMPLATE_DEPTH);
        env.set_debug(false);
        env.set_unknown_method_callback(pystr::call_method);
        env.remove_global("debug");
        env.add_filter("tojson", json::tojson);
        env.add_filter("length", length);
        env.add_filter("count", length);
        env.add_filter("trim", trim);
        env.add_filter("replace", replace);
        env.add_function("joiner", minijinja_contrib::globals::joiner);
        env.set_formatter(|out, state, value| {
            if value.kind() == ValueKind::Number && !value.is_integer() {
                return Ok(out.write_str(&json::float(f64::try_from(value.clone())?))?);
            }
            escape_formatter(out, state, value)
        });
        env.add_test("sequence", is_sequence);
        env.add_test("iterable", is_sequence);
        env.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
            let raised = Raised(message.to_string());
            Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(raised))
        });
        env.add_function("strftime_now", move |format: &str| {
            strftime(clock.unwrap_or_else(|| Local::now().naive_local()), format)
        });
        // The engine panics on assignments to what cannot be assigned to, such as `{% import 'x' as -y %}`.
        let compiled = catch_unwind(AssertUnwindSafe(|| {
            env.add_template_owned(NAME, transparent_generation(source))
        }));
        match compiled {
            Ok(Ok(())) => Ok(Self { environment: env, source: source.to_owned() }),
            Ok(Err(error)) => Err(syntax_error(&error)),
            Err(_) => Err(TextError::TemplateSyntax {
                line: None,
                reason: "the template engine failed on a construct that it does not support"
                    .to_owned(),
            }),
        }
    }

    /// Renders with the given variables.
    pub(super) fn render(&self, context: Value) -> Result<String, TextError> {
        let template = self.environment.get_template(NAME).map_err(|e| syntax_error(&e))?;
        let mut out = Bounded { bytes: Vec::new(), full: false };
        // The engine's slices with a negative step index out of bounds on an empty list. A template
        // can come with a request, so that is an error of the request and must not end the thread.
        let result = catch_unwind(AssertUnwindSafe(|| {
            template.render_captured_to(context, &mut out).map(|_| ())
        }));
        if out.full {
            return Err(TextError::TemplateTooLarge { limit: MAX_RENDERED_PROMPT_BYTES });
        }
        match result {
            Ok(Ok(())) => String::from_utf8(out.bytes)
                .map_err(|e| TextError::TemplateRender { line: None, reason: e.to_string() }),
            Ok(Err(e)) => Err(render_error(&e)),
            Err(_) => Err(TextError::TemplateRender {
                line: None,
                reason: "the template engine failed on an operation it does not support \
                         (a reversed slice of an empty list?)"
                    .to_owned(),
            }),
        }
    }
}

/// Output that stops growing at the limit.
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl Write for Bounded {
    fn write(&mut self, chunk: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + chunk.len() > MAX_RENDERED_PROMPT_BYTES {
            self.full = true;
            return Err(io::Error::other("the rendered prompt is too large"));
        }
        self.bytes.extend_from_slice(chunk);
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn reason(e: &Error) -> String {
    match e.detail() {
        Some(detail) => format!("{}: {detail}", e.kind()),
        None => e.kind().to_string(),
    }
}

fn syntax_error(e: &Error) -> TextError {
    TextError::TemplateSyntax { line: e.line(), reason: reason(e) }
}

fn render_error(e: &Error) -> TextError {
    if e.kind() == ErrorKind::OutOfFuel {
        return TextError::TemplateFuel { limit: CHAT_TEMPLATE_FUEL };
    }
    let mut source = std::error::Error::source(e);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return TextError::TemplateRaised { message: message.clone() };
        }
        if let Some(inner) = cause.downcast_ref::<Error>()
            && inner.kind() == ErrorKind::OutOfFuel
        {
            return TextError::TemplateFuel { limit: CHAT_TEMPLATE_FUEL };
        }
        if cause.is::<json::TooLong>() {
            return TextError::TemplateTooLarge { limit: MAX_RENDERED_PROMPT_BYTES };
        }
        source = cause.source();
    }
    TextError::TemplateRender { line: e.line(), reason: reason(e) }
}

/// A value of the template engine from JSON, keys in their order.
pub(super) fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), to_value(v)))),
    }
}

/// `length` of what Jinja2 counts: an undefined value has none, and slices are lists.
fn length(value: &Value) -> Result<usize, Error> {
    match value.len() {
        _ if value.is_undefined() => Ok(0),
        Some(n) => Ok(n),
        None if value.kind() == ValueKind::Iterable => Ok(value.try_iter()?.count()),
        None => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("a value of type {} has no length", value.kind()),
        )),
    }
}

/// `trim` is `str.strip` of the value as text.
fn trim(value: &Value, chars: Option<&str>) -> String {
    let text = value.to_string();
    match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        None => text.trim_matches(pystr::is_space).to_owned(),
    }
}

/// `replace` with Jinja2's optional count.
fn replace(value: &Value, old: &str, new: &str, count: Option<i64>) -> String {
    let count = count.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    value.to_string().replacen(old, new, count)
}

/// Python counts strings and mappings as sequences and iterables; templates are written for that.
fn is_sequence(value: &Value) -> bool {
    let kind = value.kind();
    value.is_undefined()
        || matches!(kind, ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

fn strftime(now: NaiveDateTime, format: &str) -> Result<String, Error> {
    let items: Vec<Item> = StrftimeItems::new(format).collect();
    let mut text = String::new();
    // Formatting fails, rather than panics, only when written with `write!`: the zone is unknown
    // here.
    let written =
        fmt::Write::write_fmt(&mut text, format_args!("{}", now.format_with_items(items.iter())));
    if written.is_err() || items.contains(&Item::Error) {
        let reason = format!("strftime_now: the format {format:?} is not understood");
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    Ok(text)
}

/// `{% generation %}` marks the assistant's words for training masks. Jinja2 gives its body a scope
/// of its own and keeps its white space control, which is what an empty `{% with %}` does.
fn transparent_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let inner = &tag[2..];
        let name_at = inner.len() - inner.trim_start_matches(['-', '+']).trim_start().len();
        let name = &inner[name_at..];
        let word =
            name.len() - name.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_').len();
        let closes = name[word..].trim_start().trim_start_matches(['-', '+']).starts_with("%}");
        let replacement = match &name[..word] {
            "generation" if closes => "with",
            "endgeneration" if closes => "endwith",
            other => other,
        };
        out.push_str("{%");
        out.push_str(&inner[..name_at]);
        out.push_str(replacement);
        rest = &name[word..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, TextError> {
        Compiled::new(source, None)?.render(Value::from_pairs([("none", Value::from(()))]))
    }

    #[test]
    fn generation_blocks_are_transparent() {
        let source = "a{%- generation -%} b {%- endgeneration %} {% generational %}{% if x %}";
        let expected = "a{%- with -%} b {%- endwith %} {% generational %}{% if x %}";
        assert_eq!(transparent_generation(source), expected);
        assert_eq!(transparent_generation("{%"), "{%");
        assert_eq!(render("{% generation %}\n{% set x = 1 %}x{% endgeneration %}").unwrap(), "x");
    }

    #[test]
    fn an_endless_template_runs_out_of_fuel() {
        let e = render(
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        );
        assert_eq!(e, Err(TextError::TemplateFuel { limit: CHAT_TEMPLATE_FUEL }));
        let in_macro = "{% macro m() %}{% for i in range(90000) %}{% for j in range(90000) %}\
                        {% endfor %}\
                        {% endfor %}{% endmacro %}{{ m() }}";
        assert_eq!(render(in_macro), Err(TextError::TemplateFuel { limit: CHAT_TEMPLATE_FUEL }));
    }

    /// Found by fuzzing: a block that shows itself overflowed the stack, which ends the process.
    #[test]
    fn what_calls_itself_is_stopped_before_the_stack_is_full() {
        for source in [
            "{% block b %}{{ self.b() }}{% endblock %}",
            "{% macro f(a) %}{{ f(a) }}{% endmacro %}{{ f(1) }}",
            "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        ] {
            let error = render(source).unwrap_err();
            assert!(error.to_string().contains("recursion"), "{source}: {error}");
        }
        let deep = 60;
        let nested = ["{% for i in [1] %}".repeat(deep), "x".into(), "{% endfor %}".repeat(deep)];
        assert_eq!(render(&nested.concat()).unwrap(), "x");
    }

    #[test]
    fn too_much_output_is_refused() {
        let e = render("{% set x = 'a' * 90000000 %}{{ x }}");
        assert_eq!(e, Err(TextError::TemplateTooLarge { limit: MAX_RENDERED_PROMPT_BYTES }));
    }

    #[test]
    fn an_engine_panic_is_an_error() {
        let error = render("{% import '' as -e %}").unwrap_err();
        assert!(matches!(error, TextError::TemplateSyntax { .. }), "{error}");
        // If this begins to render, the engine was fixed and `catch_unwind` can go.
        assert!(matches!(render("{{ [][::-1] }}"), Err(TextError::TemplateRender { .. })));
    }

    #[test]
    fn errors_say_what_and_where() {
        let e = render("a\n{{ raise_exception('no ' ~ 'way') }}").unwrap_err();
        assert_eq!(e, TextError::TemplateRaised { message: "no way".into() });
        let e = render("a\n\n{{ x.y }}").unwrap_err();
        assert!(matches!(e, TextError::TemplateRender { line: Some(3), .. }), "{e}");
        let e = render("a\n{% if %}").unwrap_err();
        assert!(matches!(e, TextError::TemplateSyntax { line: Some(2), .. }), "{e}");
        let e = render("{{ strftime_now('%Q') }}").unwrap_err();
        assert!(matches!(e, TextError::TemplateRender { .. }), "{e}");
        let e = render("{{ strftime_now('%z') }}").unwrap_err();
        assert!(matches!(e, TextError::TemplateRender { .. }), "{e}");
    }
}
