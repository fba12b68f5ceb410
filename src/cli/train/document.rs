//! The text a cartridge is to stand for.

use std::path::Path;

use serde_json::json;

use super::options::usage;
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::demo;

/// A text, and what it is in a chat.
pub struct Document {
    pub name: String,
    pub text: String,
    /// All tokens of a chat's system message with the text.
    pub tokens: Vec<u32>,
    /// The last of them, those after the text.
    pub closing: usize,
}

impl Document {
    /// Reads a file, or `demo:NAME`.
    pub fn read(runtime: &Runtime, from: &str) -> Result<Self, CliError> {
        let (name, text) = match from.strip_prefix("demo:") {
            Some(name) => (name.to_owned(), demo_document(name)?.text.to_owned()),
            None => (stem(from), read(from)?),
        };
        let text = text.trim_end().to_owned();
        if text.is_empty() {
            return Err(usage(format!("{from} is empty")));
        }
        let system = json!({"role": "system", "content": text});
        let rendered = runtime.render(std::slice::from_ref(&system), false)?;
        let after = rendered.rfind(&text).map(|at| &rendered[at + text.len()..]);
        let closing = runtime.model.tokenizer.encode(after.unwrap_or_default(), false)?.len();
        let tokens = runtime.model.tokenizer.encode(&rendered, false)?;
        Ok(Self { name, text, tokens, closing })
    }
}

pub fn demo_document(name: &str) -> Result<&'static demo::Document, CliError> {
    demo::DOCUMENTS.iter().find(|document| document.name == name).ok_or_else(|| {
        let names: Vec<&str> = demo::DOCUMENTS.iter().map(|document| document.name).collect();
        usage(format!("there is no demo document {name}; there are {}", names.join(", ")))
    })
}

fn read(path: &str) -> Result<String, CliError> {
    std::fs::read_to_string(path).map_err(|source| CliError::Io { path: path.into(), source })
}

/// The name of a file without its folder and ending.
pub fn stem(path: &str) -> String {
    Path::new(path).file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
