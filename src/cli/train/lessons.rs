//! From a document and conversations to packs: prompts with and without the document, the teacher's
//! answers, the student's sequences.

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::conversations::{Asked, Conversations};
use super::data_options::DataFlags;
use super::document::Document;
use super::options::{TargetsArg, TrainFlags, usage};
use super::study;
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::train::dataset::{
    ChatFormat, Conversation, DatasetError, Element, ElementBuilder, ElementOptions, Message,
    TargetMode, write_jsonl,
};
use crate::train::{Answered, Journal, Lesson, Pack, PackFile, PackPlan, Packing, Targets, teach};

/// A conversation to learn from, complete.
pub struct Row {
    /// In the file it is from, or of its question in self-study; from 1.
    number: usize,
    pub conversation: Conversation,
    /// Of rows that the teacher answered or scored here.
    taught: Option<(Lesson, Answered)>,
}

/// The packs of `conversations`: made once and kept in `file`, together with the questions of self-study.
pub fn packs(
    runtime: &Runtime,
    document: &Document,
    conversations: &Conversations<'_>,
    (data, flags): (&DataFlags, &TrainFlags),
    file: &PackFile,
) -> Result<Vec<Pack>, CliError> {
    let data_source = source(runtime, document, conversations, data)?;
    let of_packs = (flags.targets, flags.packed_seq_length, flags.packing_mode);
    let source = format!("{data_source} {of_packs:?}");
    if file.exists() {
        file.check_source(&source)?;
        return Ok(file.read()?);
    }
    let mut journal = Journal::open(&file.path().with_extension("journal.jsonl"), &data_source)?;
    let rows = rows(runtime, document, conversations, data, &mut journal)?;
    if conversations.is_self_study() {
        let conversations: Vec<_> = rows.iter().map(|row| row.conversation.clone()).collect();
        write_jsonl(&file.path().with_file_name("dataset.jsonl"), &conversations)?;
    }
    let elements = elements(runtime, data, flags, conversations.from(), &rows)?;
    let packs = packed(&elements, data, flags)?;
    file.write(&packs, &source)?;
    journal.remove()?;
    Ok(packs)
}

fn packed(
    elements: &[Element],
    data: &DataFlags,
    flags: &TrainFlags,
) -> Result<Vec<Pack>, CliError> {
    let packing = Packing {
        packed_seq_length: flags.packed_seq_length.unwrap_or(2048),
        mode: flags.packing_mode.unwrap_or_default(),
        seed: data.seed(),
    };
    let plan = PackPlan::new(elements, &packing)?;
    if plan.dropped + plan.cut > 0 {
        println!(
            "{} rows are cut at {} tokens, {} have nothing to learn and are left out",
            plan.cut, packing.packed_seq_length, plan.dropped
        );
    }
    Ok((0..plan.len()).filter_map(|index| plan.pack(index, elements)).collect())
}

/// Digest of all that decides what the rows are: what was begun goes on only with the same.
pub fn source(
    runtime: &Runtime,
    document: &Document,
    conversations: &Conversations<'_>,
    data: &DataFlags,
) -> Result<String, CliError> {
    let mut digest = Sha256::new();
    let content = conversations.source(runtime, document, data)?;
    let teacher = data.teacher(&runtime.model.eos_token_ids)?;
    let options = format!("{:?} {teacher:?}", (&runtime.model.name, runtime.weight_bytes));
    for part in [document.text.as_bytes(), &content, options.as_bytes()] {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// All conversations, with the teacher's distributions where a row has none of its own.
pub fn rows(
    runtime: &Runtime,
    document: &Document,
    conversations: &Conversations<'_>,
    data: &DataFlags,
    journal: &mut Journal,
) -> Result<Vec<Row>, CliError> {
    let from = conversations.from();
    let asked = conversations.asked(runtime, document, data, journal)?;
    let mut lessons = Vec::new();
    for asked in asked.iter().filter(|asked| !has_logprobs(&asked.conversation)) {
        lessons.push(lesson(runtime, asked, from, data)?);
    }
    let bar = bar(lessons.len(), "the teacher answers");
    let teacher = data.teacher(&runtime.model.eos_token_ids)?;
    let answers = teach(&runtime.engine, &lessons, &teacher, journal, || bar.inc(1))?;
    bar.finish_and_clear();
    let mut taught = lessons.into_iter().zip(answers);
    let row = |asked: Asked<'_>| {
        let Asked { number, mut conversation, .. } = asked;
        let taught = if has_logprobs(&conversation) { None } else { taught.next() };
        if let Some((lesson, answer)) = &taught {
            let mut message = match lesson.answer {
                Some(_) => conversation.messages.pop().unwrap_or_default(),
                None => Message {
                    role: "assistant".to_owned(),
                    content: runtime.model.tokenizer.decode(&answer.token_ids, true)?,
                    ..Message::default()
                },
            };
            message.token_ids = Some(answer.token_ids.clone());
            message.top_logprobs = Some(answer.top_logprobs.clone());
            conversation.messages.push(message);
        }
        Ok(Row { number, conversation, taught })
    };
    asked.into_iter().map(row).collect()
}

fn has_logprobs(conversation: &Conversation) -> bool {
    conversation.messages.iter().any(|message| message.top_logprobs.is_some())
}

/// What the teacher is to answer or score for a row without log-probabilities.
fn lesson(
    runtime: &Runtime,
    asked: &Asked<'_>,
    from: &str,
    data: &DataFlags,
) -> Result<Lesson, CliError> {
    let bad = |reason: &str| usage(format!("{from}: row {}: {reason}", asked.number));
    let messages: Vec<Value> = asked
        .conversation
        .messages
        .iter()
        .map(|message| json!({"role": message.role, "content": message.content}))
        .collect();
    let (question, answered) = match messages.split_last() {
        Some((last, question)) if last["role"] == "assistant" => (question, true),
        _ => (&messages[..], false),
    };
    if question.last().is_none_or(|message| message["role"] != "user") {
        return Err(bad("there is no user's message to answer"));
    }
    let mut with_document = vec![json!({"role": "system", "content": asked.context})];
    with_document.extend_from_slice(question);
    let student_prompt = runtime.chat_prompt(question, true)?;
    let answer = match answered {
        false => None,
        true => {
            let whole =
                runtime.model.tokenizer.encode(&runtime.render(&messages, false)?, false)?;
            let plain = runtime.chat_prompt(question, false)?;
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
    let answer_tokens = answer.as_ref().map_or(data.answer_tokens()?, Vec::len);
    let limit = study::context_limit(runtime);
    if teacher_prompt.len() + answer_tokens > limit {
        return Err(bad(&format!(
            "with the document the teacher's prompt has {} tokens; with {answer_tokens} for the answer that \
             exceeds the {limit} tokens a request may use; leave out --conversations, then self-study \
             teaches from parts of the document",
            teacher_prompt.len()
        )));
    }
    Ok(Lesson { teacher_prompt, student_prompt, answer })
}

fn elements(
    runtime: &Runtime,
    data: &DataFlags,
    flags: &TrainFlags,
    from: &str,
    rows: &[Row],
) -> Result<Vec<Element>, CliError> {
    let targets = flags.targets.unwrap_or_default();
    let mut builder = None;
    let mut elements = Vec::with_capacity(rows.len());
    for Row { number, conversation, taught } in rows {
        elements.push(match taught {
            Some((lesson, answer)) => {
                let mut element = lesson.element(answer, *number);
                if targets == TargetsArg::Tokens {
                    element.targets = Targets::default();
                    for row in element.supervised.iter().cloned().flatten() {
                        element.targets.push(row, element.tokens[row as usize + 1], 1.0);
                    }
                }
                element
            }
            None => {
                let builder = match &mut builder {
                    Some(builder) => builder,
                    none => none.insert(element_builder(runtime, data, targets)?),
                };
                builder.element(*number, conversation).map_err(|error| DatasetError::Row {
                    path: from.into(),
                    row: *number,
                    error,
                })?
            }
        });
    }
    Ok(elements)
}

/// Turns rows that hold log-probabilities into tokens and targets.
fn element_builder<'a>(
    runtime: &'a Runtime,
    data: &DataFlags,
    targets: TargetsArg,
) -> Result<ElementBuilder<'a>, CliError> {
    let mode = match targets {
        TargetsArg::Logits => TargetMode::Logits,
        TargetsArg::Tokens => TargetMode::Tokens,
    };
    let options =
        ElementOptions { mode, cut: data.cut()?, vocab: runtime.engine.info().vocab_size };
    let (tokenizer, template) = (&runtime.model.tokenizer, runtime.model.chat_template.as_ref());
    let format = ChatFormat::detect(tokenizer, template)
        .ok_or_else(|| usage(format!("model {} has no chat template", runtime.model.name)))?;
    Ok(ElementBuilder::new(tokenizer, format, options)?)
}

pub fn bar(count: usize, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(count as u64).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar
}
