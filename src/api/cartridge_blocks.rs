//! `<cartridge>{…}</cartridge>` in system messages: how a client that cannot add body fields names one.

use serde_json::Value;

use super::error::ApiError;
use crate::cartridge::CartridgeRef;

const OPEN: &str = "<cartridge>";
const CLOSE: &str = "</cartridge>";

/// Takes the blocks out of the system messages (contents must be strings) and returns what they name.
///
/// A block whose JSON is no cartridge is an error: Tokasaurus drops it and answers from the plain model,
/// which nobody who wrote a block wants.
pub fn take(messages: &mut [Value]) -> Result<Vec<CartridgeRef>, ApiError> {
    let mut found = Vec::new();
    for (i, message) in messages.iter_mut().enumerate() {
        if message.get("role").and_then(Value::as_str) != Some("system") {
            continue;
        }
        let Some(content) = message.get("content").and_then(Value::as_str) else { continue };
        let (rest, blocks) = split(content);
        if blocks.is_empty() {
            continue;
        }
        for block in blocks {
            let reference = serde_json::from_str(block).map_err(|e| {
                let path = format!("messages[{i}].content");
                let message = format!("{path}: a <cartridge> block is not usable: {e}");
                ApiError::invalid(path, message)
            })?;
            found.push(reference);
        }
        let rest = collapse_blank_lines(rest.trim());
        message["content"] = rest.into();
    }
    Ok(found)
}

/// The text without its blocks, and the JSON of each. A block is an opening tag, optional white space, and
/// an object up to the first `}` that only white space parts from a closing tag.
fn split(text: &str) -> (String, Vec<&str>) {
    // Ends of objects: (one past the brace, one past the closing tag), found once so that a text full of
    // opening tags costs no more than its length.
    let ends: Vec<(usize, usize)> = text
        .match_indices(CLOSE)
        .filter_map(|(at, _)| {
            let before = text[..at].trim_end();
            before.ends_with('}').then_some((before.len(), at + CLOSE.len()))
        })
        .collect();
    let (mut rest, mut blocks, mut position) = (String::new(), Vec::new(), 0);
    while let Some(found) = text[position..].find(OPEN) {
        let inside = position + found + OPEN.len();
        let start = text.len() - text[inside..].trim_start().len();
        let end = ends.partition_point(|&(brace, _)| brace <= start + 1);
        match ends.get(end) {
            Some(&(brace, after)) if text[start..].starts_with('{') => {
                rest.push_str(&text[position..position + found]);
                blocks.push(&text[start..brace]);
                position = after;
            }
            _ => {
                rest.push_str(&text[position..inside]);
                position = inside;
            }
        }
    }
    rest.push_str(&text[position..]);
    (rest, blocks)
}

/// Three or more line ends with nothing but white space between become two.
fn collapse_blank_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.find('\n') {
        let run = &rest[first..];
        let run = &run[..run.len() - run.trim_start().len()];
        let last = run.rfind('\n').map_or(0, |i| i + 1);
        out.push_str(&rest[..first]);
        let many = run.matches('\n').count() >= 3;
        out.push_str(if many { "\n\n" } else { &run[..last] });
        rest = &rest[first + last..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn take_one(content: &str) -> (String, Vec<String>) {
        let mut messages = vec![json!({"role": "system", "content": content})];
        let found = take(&mut messages).unwrap();
        let content = messages[0]["content"].as_str().unwrap().to_owned();
        (content, found.into_iter().map(|r| r.id).collect())
    }

    #[test]
    fn blocks_are_taken_out_of_system_messages_only() {
        let block = r#"<cartridge> {"id": "a", "source": "local"}
            </cartridge>"#;
        let mut messages = vec![
            json!({"role": "system", "content": format!("Be kind.\n\n{block}\n\nBe brief.")}),
            json!({"role": "user", "content": block}),
        ];
        let found = take(&mut messages).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].id.as_str(), found[0].source), ("a", crate::cartridge::Source::Local));
        assert_eq!(messages[0]["content"], "Be kind.\n\nBe brief.");
        assert_eq!(messages[1]["content"], block);
    }

    #[test]
    fn several_blocks_nested_objects_and_an_empty_rest() {
        let text = r#"<cartridge>{"id":"a","x":{"y":"}"}}</cartridge><cartridge>
            {"id":"b"} </cartridge>"#;
        assert_eq!(take_one(text), (String::new(), vec!["a".to_owned(), "b".to_owned()]));
    }

    #[test]
    fn text_that_only_looks_like_a_block_stays() {
        for text in ["<cartridge>a</cartridge>", "<cartridge>{\"id\":1", "</cartridge>\n\n\n\nx"] {
            assert_eq!(take_one(text), (text.to_owned(), vec![]));
        }
    }

    #[test]
    fn a_block_that_names_no_cartridge_is_an_error() {
        for block in ["{}", "{\"id\": 3}", "{\"id\":\"a\",\"source\":\"s3\"}", "{broken}"] {
            let content = format!("<cartridge>{block}</cartridge>");
            let error = take(&mut [json!({"role": "system", "content": content})]).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("messages[0].content"));
        }
    }

    #[test]
    fn blank_lines_collapse_as_in_the_original() {
        assert_eq!(collapse_blank_lines("a\n \n\t\n  b\n\nc\nd"), "a\n\n  b\n\nc\nd");
        assert_eq!(collapse_blank_lines("a\n\n\n\n\nb"), "a\n\nb");
        assert_eq!(collapse_blank_lines("a"), "a");
    }

    #[test]
    fn many_opening_tags_are_linear() {
        let text = format!("{}}}</cartridge>", "<cartridge>{".repeat(200_000));
        let started = std::time::Instant::now();
        let (_, blocks) = split(&text);
        assert_eq!(blocks.len(), 1);
        let text = "<cartridge>".repeat(500_000) + &"</cartridge>".repeat(100_000);
        assert!(split(&text).1.is_empty());
        assert!(started.elapsed().as_secs() < 20);
    }
}
