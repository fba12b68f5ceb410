//! The loss on held-out conversations, with targets of the same teacher.

use std::path::Path;

use serde_json::{Value, json};

use super::lessons::{Document, demo_document, packs_of, source_of, stem};
use super::options::{TrainFlags, usage};
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::train::dataset::{Conversation, DatasetReader, Message};
use crate::train::{HeldOut, Pack, RunDir};

/// Held-out conversations, packed.
pub struct HeldOutPacks {
    /// In the names of the metrics.
    name: String,
    pub packs: Vec<Pack>,
}

impl HeldOutPacks {
    /// Those of `--eval-conversations`: made once, then read from the run's folder.
    pub fn prepare(
        runtime: &Runtime,
        document: &Document,
        flags: &TrainFlags,
        run_dir: &RunDir,
    ) -> Result<Option<Self>, CliError> {
        let Some(from) = flags.eval_conversations.as_deref() else { return Ok(None) };
        let limit = flags.eval_limit.unwrap_or(usize::MAX);
        let demo = from.strip_prefix("demo:");
        let asked = demo.map(demo_questions).transpose()?;
        let content = match &asked {
            Some(asked) => asked.join("\n").into_bytes(),
            None => {
                std::fs::read(from).map_err(|source| CliError::Io { path: from.into(), source })?
            }
        };
        let source = source_of(document, &content, flags.eval_limit, flags);
        let file = run_dir.eval_packs();
        let packs = if file.exists() {
            file.check_source(&source)?;
            file.read()?
        } else {
            let conversations: Vec<_> = match asked {
                Some(asked) => asked.into_iter().map(question).enumerate().take(limit).collect(),
                None => {
                    DatasetReader::open(Path::new(from))?.take(limit).collect::<Result<_, _>>()?
                }
            };
            let packs = packs_of(runtime, document, from, &conversations, flags)?;
            file.write(&packs, &source)?;
            packs
        };
        let name = demo.map_or_else(|| stem(from), str::to_owned);
        Ok(Some(Self { name, packs }))
    }

    /// The line of metrics after `step` updates. Token counts are means per conversation, as in the original
    /// trainers.
    pub fn metrics(&self, step: u64, measured: &HeldOut) -> Value {
        let HeldOut { loss, macro_loss, kl, sequences, input_tokens, target_tokens } = *measured;
        let mean = |tokens: usize| tokens as f64 / sequences as f64;
        let names = [
            ("loss", json!(loss)),
            ("perplexity", json!(loss.exp())),
            ("macro_loss", json!(macro_loss)),
            ("macro_perplexity", json!(macro_loss.exp())),
            ("kl", json!(kl)),
            ("num_system_and_user_tokens", json!(mean(input_tokens - target_tokens))),
            ("num_assistant_tokens", json!(mean(target_tokens))),
            ("num_elements", json!(sequences)),
        ];
        let mut line = json!({ "train/optimizer_step": step });
        for (name, value) in names {
            line[format!("eval_{}/{name}", self.name)] = value;
        }
        line
    }
}

fn demo_questions(name: &str) -> Result<Vec<String>, CliError> {
    let questions = demo_document(name)?
        .questions()
        .map_err(|e| usage(format!("the built-in questions of {name}: {e}")))?;
    Ok(questions.questions.into_iter().map(|question| question.question).collect())
}

/// A conversation that only asks.
fn question(content: String) -> Conversation {
    let message = Message { role: "user".to_owned(), content, ..Message::default() };
    Conversation { messages: vec![message], ..Conversation::default() }
}
