//! Server-sent events of a streamed completion, read without parsing every chunk.
//!
//! The client shares its machine with the server it measures, so a chunk costs a scan for a few keys;
//! only the chunk with the usage, and errors, are parsed as JSON. A quote inside a JSON string is
//! escaped, so `"content":` in the bytes is always a key.

use memchr::{memchr, memmem};
use serde_json::Value;

use super::Failure;
use crate::limits;

/// Splits bytes into events, however they are cut.
#[derive(Debug, Default)]
pub struct SseParser {
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    /// Data of the event so far, its lines joined by newlines.
    data: Vec<u8>,
    has_data: bool,
}

impl SseParser {
    /// Takes the next bytes and hands the data of each completed event to `on_event`.
    ///
    /// Fails with [`Failure::Protocol`] on an event past `limits::MAX_SSE_EVENT_BYTES`.
    pub fn feed(
        &mut self,
        mut bytes: &[u8],
        mut on_event: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        while let Some(end) = memchr(b'\n', bytes) {
            let (head, rest) = (&bytes[..end], &bytes[end + 1..]);
            bytes = rest;
            if self.line.is_empty() {
                self.take_line(head, &mut on_event)?;
            } else {
                self.line.extend_from_slice(head);
                let line = std::mem::take(&mut self.line);
                self.take_line(&line, &mut on_event)?;
                self.line = line;
                self.line.clear();
            }
        }
        self.line.extend_from_slice(bytes);
        self.check_size()
    }

    fn take_line(
        &mut self,
        line: &[u8],
        on_event: &mut impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            if self.has_data {
                on_event(&self.data)?;
                self.data.clear();
                self.has_data = false;
            }
        } else if let Some(value) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            self.has_data = true;
            self.check_size()?;
        }
        // Comments (keep-alives), event names and ids say nothing here.
        Ok(())
    }

    fn check_size(&self) -> Result<(), Failure> {
        if self.line.len() + self.data.len() > limits::MAX_SSE_EVENT_BYTES {
            let limit = limits::MAX_SSE_EVENT_BYTES >> 20;
            return Err(Failure::Protocol(format!("an event is larger than {limit} MiB")));
        }
        Ok(())
    }
}

/// Tokens of a request as the server counted them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Prompt tokens that the server did not compute again.
    pub cached_tokens: Option<u64>,
}

impl Usage {
    /// From the `usage` member of a reply or chunk.
    pub fn of(reply: &Value) -> Option<Self> {
        let usage = reply.get("usage")?;
        let count = |key: &str| usage.get(key).and_then(Value::as_u64);
        Some(Self {
            prompt_tokens: count("prompt_tokens")?,
            completion_tokens: count("completion_tokens")?,
            cached_tokens: usage
                .pointer("/prompt_tokens_details/cached_tokens")
                .and_then(Value::as_u64),
        })
    }
}

/// What one event says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// It holds generated text.
    pub content: bool,
    pub usage: Option<Usage>,
    pub done: bool,
}

/// Reads one event's data. An error event is the failure it reports.
pub fn read_event(data: &[u8]) -> Result<Event, Failure> {
    if data == b"[DONE]" {
        return Ok(Event { done: true, ..Event::default() });
    }
    if data.first() != Some(&b'{') {
        let text = String::from_utf8_lossy(&data[..data.len().min(80)]);
        return Err(Failure::Protocol(format!("`{text}`")));
    }
    if after_key(data, b"\"error\":").any(|c| c == b'{' || c == b'"')
        && let Ok(reply) = serde_json::from_slice::<Value>(data)
        && let Some(error) = reply.get("error").filter(|error| !error.is_null())
    {
        let message = error.get("message").unwrap_or(error);
        let text = message.as_str().map_or_else(|| message.to_string(), str::to_owned);
        return Err(Failure::ErrorEvent(text));
    }
    let usage = if after_key(data, b"\"usage\":").any(|c| c == b'{') {
        let reply: Value =
            serde_json::from_slice(data).map_err(|e| Failure::Protocol(format!("a chunk: {e}")))?;
        Usage::of(&reply)
    } else {
        None
    };
    // `content":` is also the end of `reasoning_content":`.
    let content = [&b"content\":"[..], b"\"text\":", b"\"reasoning\":"]
        .into_iter()
        .any(|key| holds_text(data, key));
    Ok(Event { content, usage, done: false })
}

/// The first byte of the value after each occurrence of `key`.
fn after_key<'a>(data: &'a [u8], key: &'a [u8]) -> impl Iterator<Item = u8> + 'a {
    values(data, key).filter_map(|value| value.first().copied())
}

fn values<'a>(data: &'a [u8], key: &'a [u8]) -> impl Iterator<Item = &'a [u8]> + 'a {
    memmem::find_iter(data, key).map(move |at| data[at + key.len()..].trim_ascii_start())
}

/// Whether a value of `key` is a string that is not empty.
fn holds_text(data: &[u8], key: &[u8]) -> bool {
    values(data, key).any(|value| value.first() == Some(&b'"') && value.get(1) != Some(&b'"'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events(parts: &[&[u8]]) -> Vec<Vec<u8>> {
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        for part in parts {
            let keep = |data: &[u8]| {
                events.push(data.to_vec());
                Ok(())
            };
            parser.feed(part, keep).unwrap();
        }
        events
    }

    proptest! {
        #[test]
        fn events_do_not_depend_on_where_the_bytes_are_cut(
            datas in prop::collection::vec("[a-z{\":,é]{0,12}(\n[a-z]{0,5})?", 0..8),
            ending in prop::sample::select(vec!["\n", "\r\n"]),
            noise in prop::sample::select(vec!["", ": keep-alive", "event: x", "id:1"]),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..10),
        ) {
            let mut text = String::new();
            for data in &datas {
                if !noise.is_empty() {
                    text += &format!("{noise}{ending}");
                }
                for line in data.split('\n') {
                    text += &format!("data: {line}{ending}");
                }
                text += ending;
            }
            let bytes = text.as_bytes();
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let parts: Vec<&[u8]> = at.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            let want: Vec<Vec<u8>> = datas.iter().map(|d| d.clone().into_bytes()).collect();
            prop_assert_eq!(events(&parts), want);
        }

        // The scan against a full parse, on texts that try to look like keys.
        #[test]
        fn content_is_what_a_full_parse_finds(
            text in "(\"content\":\"|\"text\": \"x|\"usage\":\\{|\"error\":\\{|\\\\|\"|[a-zé ])*",
            key in prop::sample::select(vec!["content", "reasoning_content", "reasoning", "role"]),
            spaced in any::<bool>(),
        ) {
            let mut chunk = serde_json::json!({
                "id": text, "usage": null, "error": null, "choices": [{"index": 0, "delta": {}}],
            });
            chunk["choices"][0]["delta"][key] = text.clone().into();
            let bytes = if spaced { format!("{chunk:#}") } else { chunk.to_string() };
            let event = read_event(bytes.as_bytes()).unwrap();
            prop_assert_eq!(event.content, key != "role" && !text.is_empty());
            prop_assert_eq!(event.usage, None);
        }
    }

    #[test]
    fn an_unfinished_event_is_no_event() {
        assert!(events(&[b"data: {\"choices\":[]}\n"]).is_empty());
        assert_eq!(events(&[b"\n\n: hello\n\ndata: a\n", b"\n"]), [b"a"]);
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut parser = SseParser::default();
        let part = vec![b'x'; 1 << 20];
        let fed = (0..=limits::MAX_SSE_EVENT_BYTES >> 20).map(|_| parser.feed(&part, |_| Ok(())));
        assert!(matches!(fed.last(), Some(Err(Failure::Protocol(_)))));
    }

    #[test]
    fn chunks_of_real_servers() {
        let llama_cpp = br#"{"choices":[],"usage":{"completion_tokens":4,"prompt_tokens":9,"total_tokens":13},"timings":{"cache_n":0}}"#;
        let usage = Usage { prompt_tokens: 9, completion_tokens: 4, cached_tokens: None };
        assert_eq!(read_event(llama_cpp).unwrap().usage, Some(usage));
        let vllm = br#"{"choices":[{"index":0,"text":" a","logprobs":null,"finish_reason":"length"}],"usage":null}"#;
        assert_eq!(read_event(vllm).unwrap(), Event { content: true, ..Event::default() });
        let role = br#"{"choices":[{"delta":{"role":"assistant","content":null}}]}"#;
        assert_eq!(read_event(role).unwrap(), Event::default());
        let error = br#"{"error": {"message": "out of memory", "code": 500}}"#;
        assert_eq!(read_event(error), Err(Failure::ErrorEvent("out of memory".to_owned())));
        assert!(matches!(read_event(b"<html>"), Err(Failure::Protocol(_))));
    }
}
