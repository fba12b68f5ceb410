//! JSON lines: one conversation per line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error};
use serde_json::Value;

use super::conversation::RawMessage;
use super::{Conversation, DatasetError, RowError, TopLogprobs};
use crate::limits::MAX_DATASET_LINE_BYTES;

/// Reads the lines of a file. Blank lines hold no row.
pub(super) struct JsonLines {
    path: PathBuf,
    lines: BufReader<File>,
    line: usize,
    text: Vec<u8>,
}

impl JsonLines {
    pub fn new(path: &Path, file: File) -> Self {
        Self { path: path.to_owned(), lines: BufReader::new(file), line: 0, text: Vec::new() }
    }

    /// The next line in `self.text`, without its end; `false` after the last.
    fn next_line(&mut self) -> std::io::Result<bool> {
        self.text.clear();
        let limit = MAX_DATASET_LINE_BYTES as u64 + 1;
        let read = self.lines.by_ref().take(limit).read_until(b'\n', &mut self.text)?;
        self.line += 1;
        if self.text.len() > MAX_DATASET_LINE_BYTES && !self.text.ends_with(b"\n") {
            self.lines.skip_until(b'\n')?;
        }
        Ok(read > 0)
    }

    fn row(&self) -> Result<Conversation, RowError> {
        // Files of Windows editors begin with a byte-order mark.
        let text = self.text.strip_prefix(b"\xEF\xBB\xBF").filter(|_| self.line == 1);
        let text = text.unwrap_or(&self.text);
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        if text.len() > MAX_DATASET_LINE_BYTES {
            return Err(RowError::LineTooLong);
        }
        let mut json = serde_json::Deserializer::from_slice(text);
        let row: Row = serde_path_to_error::deserialize(&mut json).map_err(|e| {
            // The parser sees one line, so that its "line 1" would mislead.
            let (inner, path) = (e.inner(), e.path().to_string());
            let text = inner.to_string();
            let what = text.split(" at line ").next().unwrap_or(&text);
            let at = if path == "." { String::new() } else { format!("{path}: ") };
            RowError::Json { reason: format!("{at}{what} (column {})", inner.column()) }
        })?;
        let rest = json.end().map_err(|_| "more than one value on the line".to_owned());
        rest.map_err(|reason| RowError::Json { reason })?;
        let messages = row.messages.into_iter().map(Message::into_raw).collect();
        Conversation::from_raw(messages, row.system_prompt, row.kind, row.metadata)
    }
}

impl Iterator for JsonLines {
    type Item = Result<(usize, Conversation), DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.next_line() {
                Err(source) => {
                    return Some(Err(DatasetError::Io { path: self.path.clone(), source }));
                }
                Ok(false) => return None,
                Ok(true) if self.text.trim_ascii().is_empty() => {}
                Ok(true) => {
                    let (path, row) = (&self.path, self.line);
                    let error = |error| DatasetError::Row { path: path.clone(), row, error };
                    return Some(self.row().map(|c| (row, c)).map_err(error));
                }
            }
        }
    }
}

#[derive(Deserialize)]
struct Row {
    messages: Vec<Message>,
    #[serde(default)]
    system_prompt: Option<String>,
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    metadata: Value,
}

/// Members that are not listed are ignored.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    role: Option<String>,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    token_ids: Option<Vec<i64>>,
    #[serde(default)]
    top_logprobs: Option<Top>,
    #[serde(default)]
    top_logprob_ids: Option<Vec<Vec<i64>>>,
    #[serde(default)]
    top_logprob_logprobs: Option<Vec<Vec<Option<f32>>>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of text parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    text: String,
}

/// Flat (with `token_idx`) or dense, under the names of both generations.
#[derive(Deserialize)]
struct Top {
    #[serde(default)]
    token_idx: Option<Vec<i64>>,
    #[serde(alias = "token_ids", alias = "top_logprob_ids")]
    token_id: Grid<i64>,
    #[serde(alias = "top_logprob_logprobs")]
    logprobs: Grid<Option<f32>>,
    #[serde(default)]
    shape: Option<Vec<i64>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a list of numbers or a list of lists of numbers")]
enum Grid<T> {
    Flat(Vec<T>),
    Dense(Vec<Vec<T>>),
}

impl Message {
    fn into_raw(self) -> RawMessage {
        let outside = self.top_logprob_ids.zip(self.top_logprob_logprobs);
        let outside = outside.map(|(ids, logprobs)| dense(&ids, &logprobs));
        RawMessage {
            role: self.role,
            content: self.content.map(|content| match content {
                Content::Text(text) => text,
                Content::Parts(parts) => parts.into_iter().map(|part| part.text).collect(),
            }),
            token_ids: self.token_ids,
            top_logprobs: self.top_logprobs.map(Top::read).or(outside),
        }
    }
}

/// In any of the forms a file may have.
impl<'de> Deserialize<'de> for TopLogprobs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Top::deserialize(deserializer)?.read().map_err(D::Error::custom)
    }
}

impl Top {
    fn read(self) -> Result<TopLogprobs, String> {
        match (self.token_idx, self.token_id, self.logprobs) {
            (Some(positions), Grid::Flat(ids), Grid::Flat(logprobs)) => {
                let logprobs: Vec<f32> = logprobs.into_iter().map(filled).collect();
                TopLogprobs::flat(&positions, &ids, &logprobs, self.shape.as_deref())
            }
            (None, Grid::Dense(ids), Grid::Dense(logprobs)) => dense(&ids, &logprobs),
            // An empty list reads as flat.
            (None, Grid::Flat(ids), Grid::Flat(logprobs))
                if ids.is_empty() && logprobs.is_empty() =>
            {
                dense(&[], &[])
            }
            _ => Err("must have either token_idx, token_id and logprobs as flat lists, or token_ids and \
                      logprobs as lists [token][k]"
                .to_owned()),
        }
    }
}

fn dense(ids: &[Vec<i64>], logprobs: &[Vec<Option<f32>>]) -> Result<TopLogprobs, String> {
    let logprobs: Vec<Vec<f32>> =
        logprobs.iter().map(|row| row.iter().copied().map(filled).collect()).collect();
    TopLogprobs::dense(ids, &logprobs)
}

/// JSON has no minus infinity: null stands for it.
fn filled(logprob: Option<f32>) -> f32 {
    logprob.unwrap_or(f32::NEG_INFINITY)
}
