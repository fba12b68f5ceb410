//! The prompt of a cartridge request to a Llama 3 model.
//!
//! A cartridge begins with the key and value of the one `<|begin_of_text|>` it was trained with, so
//! the prompt behind it must not have another, nor the family's default "knowledge date" system
//! block. This is the template Tokasaurus applies and the published cartridges were trained for.

use serde_json::Value;

use super::TextError;
use super::pystr::is_space;

/// Renders `messages` for a prompt that follows a cartridge.
///
/// Each message is its header, two newlines, its content without surrounding white space and
/// `<|eot_id|>`. `continue_final` leaves the last message open (no `<|eot_id|>`) and wins over
/// `add_generation_prompt`, which appends an assistant header. Content is a string or a list of
/// text parts (joined without separator).
///
/// # Errors
/// [`TextError::InvalidMessages`] for a message without role or text; [`TextError::ContinueFinal`]
/// when there is no message to continue.
pub fn llama3_cartridge_prompt(
    messages: &[Value],
    add_generation_prompt: bool,
    continue_final: bool,
) -> Result<String, TextError> {
    let mut prompt = String::new();
    for (index, message) in messages.iter().enumerate() {
        let role = message.get("role").and_then(Value::as_str);
        let role = role.ok_or_else(|| invalid(index, "has no `role` string"))?;
        let content = text_of(message.get("content")).map_err(|what| invalid(index, what))?;
        header(&mut prompt, role);
        prompt.push_str(content.trim_matches(is_space));
        if !(continue_final && index + 1 == messages.len()) {
            prompt.push_str("<|eot_id|>");
        }
    }
    if continue_final {
        if messages.is_empty() {
            return Err(TextError::ContinueFinal { reason: "there are no messages".to_owned() });
        }
    } else if add_generation_prompt {
        header(&mut prompt, "assistant");
    }
    Ok(prompt)
}

fn header(prompt: &mut String, role: &str) {
    prompt.push_str("<|start_header_id|>");
    prompt.push_str(role);
    prompt.push_str("<|end_header_id|>\n\n");
}

fn text_of(content: Option<&Value>) -> Result<String, &'static str> {
    match content {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => parts
            .iter()
            .map(|part| part.get("text").and_then(Value::as_str))
            .collect::<Option<String>>()
            .ok_or("has a content part that is not text, which a cartridge prompt cannot hold"),
        _ => Err("has no text `content`, which a cartridge prompt needs"),
    }
}

fn invalid(index: usize, what: &str) -> TextError {
    TextError::InvalidMessages { reason: format!("message {index} {what}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_form_of_the_fact_sheet() {
        let messages = [
            json!({"role": "system", "content": " Be brief.\n"}),
            json!({"role": "user", "content": [{"type": "text", "text": "Hi "}, {"text": "you"}]}),
        ];
        let body = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\
                    <|start_header_id|>user<|end_header_id|>\n\nHi you";
        let prompt = llama3_cartridge_prompt(&messages, true, false).unwrap();
        let assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n";
        assert_eq!(prompt, format!("{body}<|eot_id|>{assistant}"));
        assert_eq!(
            llama3_cartridge_prompt(&messages, false, false).unwrap(),
            format!("{body}<|eot_id|>")
        );
        assert_eq!(llama3_cartridge_prompt(&messages, true, true).unwrap(), body);
        assert_eq!(llama3_cartridge_prompt(&[], true, false).unwrap(), assistant);
    }

    #[test]
    fn what_it_cannot_hold_is_refused() {
        let image = json!({"role": "user", "content": [{"type": "image_url"}]});
        for (message, says) in [
            (json!({"content": "x"}), "message 0 has no `role`"),
            (json!({"role": "user"}), "no text `content`"),
            (json!({"role": "user", "content": null}), "no text `content`"),
            (image, "not text"),
        ] {
            let e = llama3_cartridge_prompt(&[message], true, false).unwrap_err();
            assert!(e.to_string().contains(says), "{e}");
        }
        let e = llama3_cartridge_prompt(&[], true, true).unwrap_err();
        assert!(matches!(e, TextError::ContinueFinal { .. }));
    }
}
