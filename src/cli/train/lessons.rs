//! From a document and conversations to packs: prompts with and without the document, the teacher's
//! answers, the student's sequences.

use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::options::{TargetsArg, TrainFlags, usage};
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::demo;
use crate::train::dataset::{
    ChatFormat, Conversation, DatasetError, DatasetReader, Element, ElementBuilder, ElementOptions,
    MassCut, Message, TargetMode,
};
use crate::train::{Lesson, Pack, PackPlan, Packing, Targets, teach};

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
    let limit = flags.limit.unwrap_or(usize::MAX);
    let conversations: Vec<_> = match from.strip_prefix("demo:") {
        Some(name) => demo_questions(name)?.into_iter().take(limit).collect(),
        None => DatasetReader::open(Path::new(from))?.take(limit).collect::<Result<_, _>>()?,
    };
    packs_of(runtime, document, from, &conversations, flags)
}

/// Packs of `conversations`, which are `from` there, each with the number of its row.
pub fn packs_of(
    runtime: &Runtime,
    document: &Document,
    from: &str,
    conversations: &[(usize, Conversation)],
    flags: &TrainFlags,
) -> Result<Vec<Pack>, CliError> {
    let mut builder = None;
    let mut elements = Vec::with_capacity(conversations.len());
    let mut lessons = Vec::new();
    for (row, conversation) in conversations {
        let bad = |error| DatasetError::Row { path: from.into(), row: *row, error };
        if conversation.messages.iter().any(|message| message.top_logprobs.is_some()) {
            if builder.is_none() {
                builder = Some(element_builder(runtime, flags)?);
            }
            let element = builder.as_ref().map(|builder| builder.element(*row, conversation));
            elements.extend(element.transpose().map_err(bad)?);
        } else {
            lessons.push((*row, lesson(runtime, document, conversation, from, *row)?));
        }
    }
    elements.extend(taught(runtime, &lessons, flags)?);
    let packing = Packing {
        packed_seq_length: flags.packed_seq_length.unwrap_or(2048),
        mode: flags.packing_mode.unwrap_or_default(),
        seed: flags.seed(),
    };
    let plan = PackPlan::new(&elements, &packing)?;
    if plan.dropped + plan.cut > 0 {
        println!(
            "{} rows are cut at {} tokens, {} have nothing to learn and are left out",
            plan.cut, packing.packed_seq_length, plan.dropped
        );
    }
    Ok((0..plan.len()).filter_map(|index| plan.pack(index, &elements)).collect())
}

/// Digest of all that decides what the packs of a run are: a run goes on only with the same.
pub fn source(document: &Document, flags: &TrainFlags) -> Result<String, CliError> {
    let from = flags.conversations.as_deref().unwrap_or_default();
    let conversations = match from.strip_prefix("demo:") {
        Some(name) => demo_document(name)?.training_questions.as_bytes().to_vec(),
        None => std::fs::read(from).map_err(|source| CliError::Io { path: from.into(), source })?,
    };
    Ok(source_of(document, &conversations, flags.limit, flags))
}

/// [`source`] of other conversations, of which `limit` are taken.
pub fn source_of(
    document: &Document,
    conversations: &[u8],
    limit: Option<usize>,
    flags: &TrainFlags,
) -> String {
    let mut digest = Sha256::new();
    for part in [document.text.as_bytes(), conversations] {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    let f = flags;
    let of_data = (f.targets, limit, f.top_logprobs, f.answer_tokens, f.packed_seq_length);
    let more = (f.min_prob_mass, f.answer_temperature, f.packing_mode, f.seed());
    digest.update(format!("{of_data:?} {more:?}"));
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the teacher is to answer or score for a row without log-probabilities.
fn lesson(
    runtime: &Runtime,
    document: &Document,
    conversation: &Conversation,
    from: &str,
    row: usize,
) -> Result<Lesson, CliError> {
    let bad = |reason: &str| usage(format!("{from}: row {row}: {reason}"));
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
            let whole =
                runtime.model.tokenizer.encode(&runtime.render(&messages, false)?, false)?;
            let plain = runtime.chat_prompt(asked, false)?;
            let answer = whole.strip_prefix(&plain[..]).ok_or_else(|| {
                bad("the chat template writes an answer differently than it is asked for")
            })?;
            let stop = &runtime.model.eos_token_ids;
            let end =
                answer.iter().position(|id| stop.contains(id)).map_or(answer.len(), |i| i + 1);
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
    if let Ok(style) =
        ProgressStyle::with_template("the teacher answers {wide_bar} {pos}/{len} {eta}")
    {
        bar.set_style(style);
    }
    let teacher = flags.teacher(&runtime.model.eos_token_ids)?;
    let taught = teach(&runtime.engine, &lessons, &teacher, flags.min_prob_mass()?, || bar.inc(1))?;
    bar.finish_and_clear();
    let by_tokens = flags.targets.unwrap_or_default() == TargetsArg::Tokens;
    let elements = rows.into_iter().zip(taught).map(|(row, taught)| {
        // The row before a token predicts it.
        let supervised = taught.prompt_tokens as u32 - 1..taught.tokens.len() as u32 - 1;
        let mut targets = taught.targets;
        if by_tokens {
            targets = Targets::default();
            supervised.clone().for_each(|at| targets.push(at, taught.tokens[at as usize + 1], 1.0));
        }
        Element { tokens: taught.tokens, targets, row, supervised: vec![supervised] }
    });
    Ok(elements.collect())
}

/// Turns rows that hold log-probabilities into tokens and targets.
fn element_builder<'a>(
    runtime: &'a Runtime,
    flags: &TrainFlags,
) -> Result<ElementBuilder<'a>, CliError> {
    let mode = match flags.targets.unwrap_or_default() {
        TargetsArg::Logits => TargetMode::Logits,
        TargetsArg::Tokens => TargetMode::Tokens,
    };
    let cut = MassCut { min_prob_mass: f64::from(flags.min_prob_mass()?), ..MassCut::default() };
    let options = ElementOptions { mode, cut, vocab: runtime.engine.info().vocab_size };
    let (tokenizer, template) = (&runtime.model.tokenizer, runtime.model.chat_template.as_ref());
    let format = ChatFormat::detect(tokenizer, template)
        .ok_or_else(|| usage(format!("model {} has no chat template", runtime.model.name)))?;
    Ok(ElementBuilder::new(tokenizer, format, options)?)
}

fn demo_questions(name: &str) -> Result<Vec<(usize, Conversation)>, CliError> {
    #[derive(Deserialize)]
    struct Row {
        messages: Vec<Asked>,
    }
    #[derive(Deserialize)]
    struct Asked {
        role: String,
        content: String,
    }
    let lines = demo_document(name)?.training_questions.lines().enumerate();
    lines
        .map(|(i, line)| {
            let row: Row = serde_json::from_str(line)
                .map_err(|e| usage(format!("the built-in questions of {name}: {e}")))?;
            let message =
                |m: Asked| Message { role: m.role, content: m.content, ..Message::default() };
            let messages = row.messages.into_iter().map(message).collect();
            Ok((i + 1, Conversation { messages, ..Conversation::default() }))
        })
        .collect()
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

pub fn stem(path: &str) -> String {
    Path::new(path).file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
