//! From a document and conversations to packs: prompts with and without the document, the teacher's
//! answers, the student's sequences.

use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::options::{TargetsArg, TrainFlags, usage};
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::demo;
use crate::train::{
    Conversation, Element, Lesson, Pack, Targets, pack_elements, read_conversations, read_jsonl, teach,
};

/// The text a cartridge is to stand for.
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

/// Packs of all conversations, with the teacher's distributions where a row has none of its own.
pub fn packs(
    runtime: &Runtime,
    document: &Document,
    flags: &TrainFlags,
) -> Result<Vec<Pack>, CliError> {
    let from = flags.conversations.as_deref().ok_or_else(|| {
        usage("--conversations: which questions or conversations to learn from?".to_owned())
    })?;
    let conversations = match from.strip_prefix("demo:") {
        Some(name) => read_jsonl(demo_document(name)?.training_questions.as_bytes(), from)?,
        None => read_conversations(Path::new(from))?,
    };
    let options = flags.element_options()?;
    let mut elements = Vec::with_capacity(conversations.len());
    let mut lessons = Vec::new();
    for (row, conversation) in conversations.iter().enumerate() {
        if conversation.messages.iter().any(|message| message.top_logprobs.is_some()) {
            elements.push(runtime.model.element(conversation, row, &options)?);
        } else {
            lessons.push((row, lesson(runtime, document, conversation, from, row)?));
        }
    }
    elements.extend(taught(runtime, &lessons, flags)?);
    let packed = pack_elements(&elements, flags.packed_seq_length()?, flags.packing_mode(), flags.seed());
    Ok(packed)
}

/// What the teacher is to answer or score for a row without log-probabilities.
fn lesson(
    runtime: &Runtime,
    document: &Document,
    conversation: &Conversation,
    from: &str,
    row: usize,
) -> Result<Lesson, CliError> {
    let bad = |reason: &str| usage(format!("{from}, row {}: {reason}", row + 1));
    let messages: Vec<Value> = conversation
        .messages
        .iter()
        .map(|message| json!({"role": message.role, "content": message.content}))
        .collect();
    let (asked, answered) = match messages.split_last() {
        Some((last, asked)) if last["role"] == "assistant" => (asked, true),
        _ => (&messages[..], false),
    };
    if asked.last().is_none_or(|message| message["role"] != "user") {
        return Err(bad("there is no user's message to answer"));
    }
    let mut with_document = vec![json!({"role": "system", "content": document.text})];
    with_document.extend_from_slice(asked);
    let student_prompt = runtime.chat_prompt(asked, true)?;
    let answer = match answered {
        false => None,
        true => {
            let whole = runtime.model.tokenizer.encode(&runtime.render(&messages, false)?, false)?;
            let plain = runtime.chat_prompt(asked, false)?;
            let answer = whole.strip_prefix(&plain[..]).ok_or_else(|| {
                bad("the chat template writes an answer differently than it is asked for")
            })?;
            let stop = &runtime.model.eos_token_ids;
            let end = answer.iter().position(|id| stop.contains(id)).map_or(answer.len(), |i| i + 1);
            Some(answer[..end].to_vec())
        }
    };
    let teacher_prompt = runtime.chat_prompt(&with_document, false)?;
    Ok(Lesson { teacher_prompt, student_prompt, answer })
}

fn taught(
    runtime: &Runtime,
    lessons: &[(usize, Lesson)],
    flags: &TrainFlags,
) -> Result<Vec<Element>, CliError> {
    let (rows, lessons): (Vec<usize>, Vec<Lesson>) = lessons.iter().cloned().unzip();
    let bar = ProgressBar::new(lessons.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("the teacher answers {wide_bar} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    let teacher = flags.teacher(&runtime.model.eos_token_ids)?;
    let taught = teach(&runtime.engine, &lessons, &teacher, flags.min_prob_mass()?, || bar.inc(1))?;
    bar.finish_and_clear();
    let by_tokens = flags.targets.unwrap_or_default() == TargetsArg::Tokens;
    let elements = rows.into_iter().zip(taught).map(|(row, taught)| {
        let supervised = taught.prompt_tokens as u32..taught.tokens.len() as u32;
        let targets = match by_tokens {
            true => Targets::of_tokens(&taught.tokens, supervised.clone()),
            false => taught.targets,
        };
        Element { tokens: taught.tokens, targets, row, supervised: vec![supervised] }
    });
    Ok(elements.collect())
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

fn stem(path: &str) -> String {
    Path::new(path).file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
