//! Self-study on the command line: conversations that the model begins itself.

use serde_json::json;

use super::conversations::Asked;
use super::data_options::{DataFlags, TeacherContext};
use super::document::Document;
use super::lessons::bar;
use super::options::usage;
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::model::ModelSource;
use crate::train::Journal;
use crate::train::dataset::{Conversation, Message};
use crate::train::self_study::{Asker, Question, SelfStudyError, SelfStudyOptions, ask};

/// Stands for all that decides what is asked.
pub fn source(
    runtime: &Runtime,
    document: &Document,
    data: &DataFlags,
) -> Result<String, CliError> {
    let options = data.self_study()?;
    let context = context(runtime, document, data, &options)?;
    Ok(format!("{options:?} {context:?}"))
}

/// Has the model ask, and says how that went.
pub fn conversations<'a>(
    runtime: &Runtime,
    document: &'a Document,
    data: &DataFlags,
    journal: &mut Journal,
) -> Result<Vec<Asked<'a>>, CliError> {
    let options = data.self_study()?;
    let context = context(runtime, document, data, &options)?;
    let template = runtime.model.chat_template.as_ref();
    let asker = Asker {
        engine: &runtime.engine,
        tokenizer: &runtime.model.tokenizer,
        template: template
            .ok_or_else(|| usage(format!("model {} has no chat template", runtime.model.name)))?,
        stop_token_ids: &runtime.model.eos_token_ids,
    };
    let bar = bar(options.samples, "the model asks");
    let questions = ask(asker, &document.text, &options, journal, || {
        // Second tries come on top.
        if bar.length() == Some(bar.position()) {
            bar.inc_length(1);
        }
        bar.inc(1);
    });
    bar.finish_and_clear();
    let questions = questions.map_err(|error| match error {
        SelfStudyError::TooFew { .. } if runtime.source == ModelSource::Demo => usage(format!(
            "{error}. The demo model only answers: give it the built-in questions, --conversations demo:NAME"
        )),
        error => error.into(),
    })?;
    println!(
        "self-study: {} questions of {} tries can be used; the teacher reads {}",
        questions.len(),
        options.samples,
        match context {
            TeacherContext::Document => "the whole document",
            TeacherContext::Chunk => "the part of the document that a question was asked about",
        }
    );
    let asked = |(index, question): (usize, Question)| {
        let chunk = document.text[question.chunk.clone()].trim();
        Asked {
            number: index + 1,
            context: match context {
                TeacherContext::Document => &document.text,
                TeacherContext::Chunk => chunk,
            },
            conversation: Conversation {
                messages: vec![Message {
                    role: "user".to_owned(),
                    content: question.text,
                    ..Message::default()
                }],
                system_prompt: Some(chunk.to_owned()).filter(|_| context == TeacherContext::Chunk),
                kind: Some("self_study".to_owned()),
                metadata: json!({
                    "seed_prompt": question.seed_prompt,
                    "seed_kind": question.kind,
                    "chunk_begin": question.chunk.start,
                    "chunk_end": question.chunk.end,
                }),
            },
        }
    };
    Ok(questions.into_iter().enumerate().map(asked).collect())
}

/// Tokens one request may use.
pub fn context_limit(runtime: &Runtime) -> usize {
    runtime.engine.info().max_context.min(runtime.engine.info().kv_tokens)
}

/// What the teacher reads: the same for all questions, so that none depends on its own length.
fn context(
    runtime: &Runtime,
    document: &Document,
    data: &DataFlags,
    options: &SelfStudyOptions,
) -> Result<TeacherContext, CliError> {
    let empty = |role: &str| json!({"role": role, "content": ""});
    let around = runtime.chat_prompt(&[empty("system"), empty("user")], false)?.len();
    let (answer, limit) = (data.answer_tokens()?, context_limit(runtime));
    let total = |text: usize| text + around + options.max_tokens + answer;
    let exceeds = |what: &str, text: usize, advice: &str| {
        usage(format!(
            "{what} of {text} tokens with {} for a question and {answer} for the answer exceeds the {limit} \
             tokens a request may use; lower {advice}",
            options.max_tokens
        ))
    };
    let fits = total(document.tokens.len()) <= limit;
    let largest = options.chunk.max.min(document.tokens.len());
    match data.teacher_context {
        Some(TeacherContext::Document) if !fits => {
            let advice = "question_tokens and answer_tokens, or leave out teacher_context";
            Err(exceeds("the document", document.tokens.len(), advice))
        }
        None | Some(TeacherContext::Document) if fits => Ok(TeacherContext::Document),
        _ if total(largest) > limit => {
            let advice = "max_tokens_per_chunk, question_tokens or answer_tokens";
            Err(exceeds("a chunk", largest, advice))
        }
        _ => Ok(TeacherContext::Chunk),
    }
}
