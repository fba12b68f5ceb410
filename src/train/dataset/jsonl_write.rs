//! Writes conversations as JSON lines.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde::{Serialize, Serializer};
use serde_json::Value;

use super::{Conversation, DatasetError, Message, TopLogprobs};

/// Writes a file that [`super::DatasetReader`] reads back: a line for each conversation, with the members of
/// the Parquet columns. The file appears under its name when it is complete.
///
/// # Errors
/// [`DatasetError::Io`]; [`DatasetError::Empty`] without conversations.
pub fn write_jsonl(path: &Path, conversations: &[Conversation]) -> Result<(), DatasetError> {
    if conversations.is_empty() {
        return Err(DatasetError::Empty { path: path.to_owned() });
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let written = write(partial, conversations).and_then(|()| std::fs::rename(partial, path));
    written.map_err(|source| {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(partial);
        DatasetError::Io { path: path.to_owned(), source }
    })
}

fn write(path: &Path, conversations: &[Conversation]) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for conversation in conversations {
        serde_json::to_writer(&mut file, &Row::from(conversation))?;
        file.write_all(b"\n")?;
    }
    file.into_inner()?.sync_all()
}

#[derive(Serialize)]
struct Row<'a> {
    messages: Vec<RowMessage<'a>>,
    system_prompt: Option<&'a str>,
    metadata: &'a Value,
    #[serde(rename = "type")]
    kind: Option<&'a str>,
}

#[derive(Serialize)]
struct RowMessage<'a> {
    role: &'a str,
    content: &'a str,
    token_ids: Option<&'a [u32]>,
    top_logprobs: Option<&'a TopLogprobs>,
}

impl<'a> From<&'a Conversation> for Row<'a> {
    fn from(conversation: &'a Conversation) -> Self {
        let message = |message: &'a Message| RowMessage {
            role: &message.role,
            content: &message.content,
            token_ids: message.token_ids.as_deref(),
            top_logprobs: message.top_logprobs.as_ref(),
        };
        Self {
            messages: conversation.messages.iter().map(message).collect(),
            system_prompt: conversation.system_prompt.as_deref(),
            metadata: &conversation.metadata,
            kind: conversation.kind.as_deref(),
        }
    }
}

/// As `FlatTopLogprobs` has it.
impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Flat<'a> {
            token_idx: &'a [u32],
            token_id: &'a [u32],
            logprobs: &'a [f32],
            shape: [u32; 2],
        }
        let flat = Flat {
            token_idx: self.positions(),
            token_id: self.ids(),
            logprobs: self.logprobs(),
            shape: [self.tokens(), self.width()],
        };
        flat.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::dataset::DatasetReader;

    #[test]
    fn what_is_written_is_read_back() {
        let logprobs = [-0.1, -f32::MIN_POSITIVE, -17.123_457];
        let top = TopLogprobs::flat(&[0, 0, 2], &[7, 8, 9], &logprobs, Some(&[3, 20])).unwrap();
        let answer = Message {
            role: "assistant".to_owned(),
            content: "Grüße\n\u{2028}".to_owned(),
            token_ids: Some(vec![7, 1, 9]),
            top_logprobs: Some(top),
        };
        let question = Message { role: "user".to_owned(), ..Message::default() };
        let rows = [
            Conversation {
                messages: vec![question.clone(), answer],
                system_prompt: Some("A text".to_owned()),
                kind: Some("self_study".to_owned()),
                metadata: serde_json::json!({"seed_prompt": "Ask.", "n": 3}),
            },
            Conversation { messages: vec![question], ..Conversation::default() },
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        write_jsonl(&path, &rows).unwrap();
        let read: Vec<_> = DatasetReader::open(&path).unwrap().map(|row| row.unwrap().1).collect();
        assert_eq!(read, rows);
        assert!(matches!(write_jsonl(&path, &[]), Err(DatasetError::Empty { .. })));
        let nowhere = dir.path().join("missing/rows.jsonl");
        assert!(matches!(write_jsonl(&nowhere, &rows), Err(DatasetError::Io { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
