//! Where conversations come from: a file, the demo, or the model itself.

use std::path::Path;

use serde::Deserialize;

use super::data_options::DataFlags;
use super::document::{Document, demo_document, stem};
use super::options::{TrainFlags, usage};
use super::study;
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::train::Journal;
use crate::train::dataset::{Conversation, DatasetReader, Message};

/// Conversations to learn from, or to be measured by.
#[derive(Debug, Clone, Copy)]
pub struct Conversations<'a> {
    origin: Origin<'a>,
    limit: Option<usize>,
}

#[derive(Debug, Clone, Copy)]
enum Origin<'a> {
    SelfStudy,
    File(&'a str),
    /// The demo's questions about a document: those to learn from, or those held out.
    Demo {
        name: &'a str,
        held_out: bool,
    },
}

/// A conversation as it is given, and what the teacher is to have in its prompt.
pub struct Asked<'a> {
    /// In the file it is from, or of its question in self-study; from 1.
    pub number: usize,
    pub conversation: Conversation,
    pub context: &'a str,
}

impl<'a> Conversations<'a> {
    /// Those of `--conversations`; without it the model asks itself.
    pub fn to_learn(data: &'a DataFlags) -> Self {
        let origin = data.conversations.as_deref().map(|from| Origin::of(from, false));
        Self { origin: origin.unwrap_or(Origin::SelfStudy), limit: data.limit }
    }

    /// Those of `--eval-conversations`.
    pub fn held_out(flags: &'a TrainFlags) -> Option<Self> {
        let from = flags.eval_conversations.as_deref()?;
        Some(Self { origin: Origin::of(from, true), limit: flags.eval_limit })
    }

    pub fn is_self_study(&self) -> bool {
        matches!(self.origin, Origin::SelfStudy)
    }

    /// A name for messages and metrics.
    pub fn name(&self) -> String {
        match self.origin {
            Origin::SelfStudy => "self-study".to_owned(),
            Origin::File(path) => stem(path),
            Origin::Demo { name, .. } => name.to_owned(),
        }
    }

    /// What was written to name them, for messages.
    pub fn from(&self) -> &'a str {
        match self.origin {
            Origin::SelfStudy => "self-study",
            Origin::File(path) => path,
            Origin::Demo { name, .. } => name,
        }
    }

    /// All that decides what they are.
    pub fn source(
        &self,
        runtime: &Runtime,
        document: &Document,
        data: &DataFlags,
    ) -> Result<Vec<u8>, CliError> {
        let mut bytes = match self.origin {
            Origin::SelfStudy => study::source(runtime, document, data)?.into_bytes(),
            Origin::File(path) => {
                std::fs::read(path).map_err(|source| CliError::Io { path: path.into(), source })?
            }
            Origin::Demo { name, held_out } => {
                let conversations = demo_conversations(name, held_out)?;
                let messages = conversations.iter().flat_map(|c| &c.messages);
                messages.map(|m| format!("{}: {}\n", m.role, m.content)).collect::<String>().into()
            }
        };
        bytes.extend_from_slice(format!("{:?}", self.limit).as_bytes());
        Ok(bytes)
    }

    /// The conversations. What is asked for by the model goes through the journal.
    pub fn asked(
        &self,
        runtime: &Runtime,
        document: &'a Document,
        data: &DataFlags,
        journal: &mut Journal,
    ) -> Result<Vec<Asked<'a>>, CliError> {
        let limit = self.limit.unwrap_or(usize::MAX);
        let conversations: Vec<(usize, Conversation)> = match self.origin {
            Origin::SelfStudy => return study::conversations(runtime, document, data, journal),
            Origin::File(path) => {
                DatasetReader::open(Path::new(path))?.take(limit).collect::<Result<_, _>>()?
            }
            Origin::Demo { name, held_out } => {
                (1..).zip(demo_conversations(name, held_out)?).take(limit).collect()
            }
        };
        let asked =
            |(number, conversation)| Asked { number, conversation, context: &document.text };
        Ok(conversations.into_iter().map(asked).collect())
    }
}

impl<'a> Origin<'a> {
    fn of(from: &'a str, held_out: bool) -> Self {
        match from.strip_prefix("demo:") {
            Some(name) => Self::Demo { name, held_out },
            None => Self::File(from),
        }
    }
}

/// Conversations about a document of the demo: those to learn from, or the questions that are held out.
fn demo_conversations(name: &str, held_out: bool) -> Result<Vec<Conversation>, CliError> {
    #[derive(Deserialize)]
    struct Line {
        messages: Vec<Spoken>,
    }
    #[derive(Deserialize)]
    struct Spoken {
        role: String,
        content: String,
    }
    let document = demo_document(name)?;
    let broken = |e| usage(format!("the built-in questions of {name}: {e}"));
    let message = |spoken: Spoken| Message {
        role: spoken.role,
        content: spoken.content,
        ..Message::default()
    };
    if held_out {
        let questions = document.questions().map_err(broken)?.questions.into_iter();
        let asked = questions.map(|q| Spoken { role: "user".to_owned(), content: q.question });
        return Ok(asked.map(|spoken| conversation(vec![message(spoken)])).collect());
    }
    let lines = document.training_questions.lines().map(|line| {
        let line: Line = serde_json::from_str(line).map_err(broken)?;
        Ok(conversation(line.messages.into_iter().map(message).collect()))
    });
    lines.collect()
}

fn conversation(messages: Vec<Message>) -> Conversation {
    Conversation { messages, ..Conversation::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_of_the_demos_conversations_stay_apart() {
        let conversations = demo_conversations("harbour-log", false).unwrap();
        let roles = |c: &Conversation| -> Vec<String> {
            c.messages.iter().map(|message| message.role.clone()).collect()
        };
        let turns: Vec<_> = conversations.iter().map(roles).collect();
        assert!(turns.iter().all(|roles| roles.last().unwrap() == "user"));
        assert!(turns.contains(&["user", "assistant", "user"].map(str::to_owned).to_vec()));
        assert!(turns.contains(&vec!["user".to_owned()]));
        let held_out = demo_conversations("harbour-log", true).unwrap();
        assert!(held_out.iter().all(|c| roles(c) == ["user"]));
    }
}
