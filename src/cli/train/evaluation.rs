//! Held-out questions, answered with the document, without it and with the cartridge.

use serde_json::{Value, json};

use super::document::{Document, demo_document};
use super::options::usage;
use crate::cartridge::Cartridge;
use crate::cli::CliError;
use crate::cli::ask::ask;
use crate::cli::runtime::Runtime;
use crate::demo::Questions;

/// Questions answered side by side.
const IN_FLIGHT: usize = 32;

/// Questions with exact answers, ready to be asked.
pub struct Evaluation {
    prompts: Vec<Prompts>,
    max_tokens: usize,
}

struct Prompts {
    with_document: Vec<u32>,
    with_cartridge: Vec<u32>,
    alone: Vec<u32>,
    answer: String,
}

/// Who answers.
#[derive(Clone, Copy)]
pub enum Answerer<'a> {
    Teacher,
    NoCartridge,
    Student(&'a Cartridge),
}

impl Evaluation {
    pub fn read(
        runtime: &Runtime,
        document: &Document,
        from: &str,
        max_tokens: usize,
    ) -> Result<Self, CliError> {
        let questions: Questions = match from.strip_prefix("demo:") {
            Some(name) => demo_document(name)?.questions(),
            None => serde_json::from_str(
                &std::fs::read_to_string(from)
                    .map_err(|source| CliError::Io { path: from.into(), source })?,
            ),
        }
        .map_err(|e| usage(format!("{from} holds no questions: {e}")))?;
        let system = json!({"role": "system", "content": document.text});
        let prompts = questions.questions.into_iter().map(|question| {
            let user = json!({"role": "user", "content": question.question});
            Ok(Prompts {
                with_document: runtime.chat_prompt(&[system.clone(), user.clone()], false)?,
                with_cartridge: runtime.chat_prompt(std::slice::from_ref(&user), true)?,
                alone: runtime.chat_prompt(&[user], false)?,
                answer: question.answer,
            })
        });
        Ok(Self { prompts: prompts.collect::<Result<_, CliError>>()?, max_tokens })
    }

    /// The share of exact answers.
    pub fn score(&self, runtime: &Runtime, who: Answerer<'_>) -> Result<f64, CliError> {
        let lease = match who {
            Answerer::Student(cartridge) => Some(runtime.lease("training", cartridge)?),
            Answerer::Teacher | Answerer::NoCartridge => None,
        };
        let mut exact = 0;
        for some in self.prompts.chunks(IN_FLIGHT) {
            let asked = some.iter().map(|prompts| {
                let prompt = match who {
                    Answerer::Teacher => &prompts.with_document,
                    Answerer::NoCartridge => &prompts.alone,
                    Answerer::Student(_) => &prompts.with_cartridge,
                };
                ask(runtime, prompt.clone(), lease.iter().cloned().collect(), self.max_tokens)
            });
            let asked = asked.collect::<Result<Vec<_>, CliError>>()?;
            for (asked, prompts) in asked.into_iter().zip(some) {
                exact += usize::from(asked.answer(runtime)?.text == prompts.answer);
            }
        }
        Ok(exact as f64 / self.prompts.len().max(1) as f64)
    }

    /// The line of metrics for a score after `step` updates.
    pub fn metrics(step: u64, who: Answerer<'_>, score: f64) -> Value {
        let name = match who {
            Answerer::Teacher => "generate_teacher/score",
            Answerer::NoCartridge => "generate_no_cartridge/score",
            Answerer::Student(_) => "generate_cartridge/score",
        };
        json!({ "train/optimizer_step": step, name: score })
    }
}
