//! Chat messages: checked, and brought to the one form that chat templates read (string contents).

use serde_json::{Map, Value};

use super::super::error::ApiError;
use crate::limits;

/// Checks the messages and normalises them: contents become strings (text parts are joined by a newline,
/// null becomes the empty string), `developer` becomes `system`, and the arguments of earlier tool calls
/// become objects, which is what templates expect.
pub fn normalise(messages: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages must hold at least one message"));
    }
    if messages.len() > limits::MAX_MESSAGES {
        let message = format!("messages holds more than {} messages", limits::MAX_MESSAGES);
        return Err(ApiError {
            code: Some("too_many_messages"),
            ..ApiError::invalid("messages", message)
        });
    }
    messages.into_iter().enumerate().map(|(i, m)| one(i, m)).collect()
}

fn one(index: usize, message: Value) -> Result<Value, ApiError> {
    let at = |field: &str| format!("messages[{index}]{field}");
    let bad = |path: String, what: &str| {
        let message = format!("{path}: {what}");
        Err(ApiError::invalid(path, message))
    };
    let Value::Object(mut message) = message else {
        return bad(at(""), "a message must be an object with role and content");
    };
    match message.get("role") {
        Some(Value::String(role)) if role.is_empty() => return bad(at(".role"), "is empty"),
        Some(Value::String(role)) if role == "developer" => {
            message.insert("role".to_owned(), "system".into());
        }
        Some(Value::String(_)) => {}
        Some(_) => return bad(at(".role"), "must be a string"),
        None => return bad(at(".role"), "is missing"),
    }
    let content = match message.remove("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => join(&at(".content"), parts)?,
        Some(_) => return bad(at(".content"), "must be a string, null or a list of text parts"),
    };
    let mut out = Map::new();
    out.insert("role".to_owned(), message.remove("role").unwrap_or_default());
    out.insert("content".to_owned(), content.into());
    message.retain(|_, value| !value.is_null());
    if let Some(Value::Array(calls)) = message.get_mut("tool_calls") {
        calls.iter_mut().for_each(open_arguments);
    }
    out.append(&mut message);
    Ok(Value::Object(out))
}

fn join(path: &str, parts: Vec<Value>) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("");
        match (kind, part.get("text")) {
            ("text", Some(Value::String(text))) => texts.push(text.clone()),
            ("text", _) => {
                let path = format!("{path}[{i}].text");
                return Err(ApiError::invalid(path.clone(), format!("{path}: must be a string")));
            }
            _ => {
                let path = format!("{path}[{i}].type");
                let message = format!("{path}: only `text` parts are supported, not `{kind}`");
                return Err(ApiError::invalid(path, message));
            }
        }
    }
    Ok(texts.join("\n"))
}

/// OpenAI sends the arguments of a call as a JSON string; templates index into them.
fn open_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    let parsed = arguments.as_str().map(serde_json::from_str::<Map<String, Value>>);
    if let Some(Ok(object)) = parsed {
        *arguments = Value::Object(object);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn path(messages: Value) -> String {
        let Value::Array(messages) = messages else { panic!() };
        normalise(messages).unwrap_err().param.unwrap()
    }

    #[test]
    fn contents_become_strings() {
        let out = normalise(vec![
            json!({"role": "developer", "content": [{"type": "text", "text": "a"},
                                                    {"type": "text", "text": "b"}]}),
            json!({"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}}]}),
            json!({"role": "tool", "tool_call_id": "1", "content": "3", "name": null}),
        ])
        .unwrap();
        assert_eq!(out[0], json!({"role": "system", "content": "a\nb"}));
        assert_eq!(out[1]["content"], "");
        assert_eq!(out[1]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert_eq!(out[2], json!({"role": "tool", "content": "3", "tool_call_id": "1"}));
    }

    #[test]
    fn errors_name_the_path() {
        assert_eq!(path(json!([])), "messages");
        assert_eq!(path(json!(["hi"])), "messages[0]");
        assert_eq!(path(json!([{"content": "x"}])), "messages[0].role");
        assert_eq!(path(json!([{"role": "user", "content": 3}])), "messages[0].content");
        let image = json!([{"role": "user", "content": "x"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]);
        assert_eq!(path(image), "messages[1].content[0].type");
        let text = json!([{"role": "user", "content": [{"type": "text"}]}]);
        assert_eq!(path(text), "messages[0].content[0].text");
        let many = vec![json!({"role": "user", "content": "x"}); limits::MAX_MESSAGES + 1];
        assert_eq!(normalise(many).unwrap_err().code, Some("too_many_messages"));
    }
}
