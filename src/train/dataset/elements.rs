//! Conversations as token sequences, and what each of their rows should predict.

use std::ops::Range;
use std::path::Path;

use super::chat_format::{ChatFormat, Turn, template_parts_agree};
use super::{Conversation, DatasetError, DatasetReader, MassCut, Message, RowError, TopLogprobs};
use crate::limits::{MAX_DATASET_TARGETS, MAX_DATASET_TOKENS, MAX_ELEMENT_TOKENS};
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::Targets;

/// One conversation as the model reads it behind a cartridge.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Element {
    pub tokens: Vec<u32>,
    /// Row `r` predicts token `r + 1`. Empty until a teacher fills them in with [`TargetMode::Teacher`].
    pub targets: Targets,
    /// The rows that are trained, ascending and apart: those of `targets`, or those a teacher has to fill.
    pub supervised: Vec<Range<u32>>,
    /// The row of the dataset, for messages about it.
    pub row: usize,
}

impl Element {
    /// The rows that are trained, one by one.
    pub fn supervised_rows(&self) -> impl Iterator<Item = u32> {
        self.supervised.iter().cloned().flatten()
    }

    /// Whether something is left to learn in the first `tokens` tokens.
    pub fn is_supervised_within(&self, tokens: usize) -> bool {
        self.supervised.first().is_some_and(|rows| rows.start as usize + 1 < tokens)
    }

    /// Marks rows `rows`, which come after those marked before.
    fn supervise(&mut self, rows: Range<u32>) {
        match self.supervised.last_mut() {
            Some(last) if last.end == rows.start => last.end = rows.end,
            _ if rows.is_empty() => {}
            _ => self.supervised.push(rows),
        }
    }
}

/// What the rows are trained towards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetMode {
    /// The teacher's log-probabilities that the dataset holds, wherever it holds them.
    Logits,
    /// The assistant's own tokens with probability 1, tokenised anew, ends of messages included.
    Tokens,
    /// What a teacher says while training: the assistant's tokens are marked, their targets left empty.
    Teacher,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ElementOptions {
    pub mode: TargetMode,
    /// Of the entries at each position; only with [`TargetMode::Logits`].
    pub cut: MassCut,
    /// Width of the model's logits: ids from here on are errors.
    pub vocab: usize,
}

/// Turns conversations into [`Element`]s.
#[derive(Debug, Clone, Copy)]
pub struct ElementBuilder<'a> {
    tokenizer: &'a Tokenizer,
    format: ChatFormat<'a>,
    options: ElementOptions,
}

impl<'a> ElementBuilder<'a> {
    /// # Errors
    /// [`RowError::Template`] when the format is a template whose parts cannot be tokenised apart, or one that
    /// refuses a question and its answer.
    pub fn new(
        tokenizer: &'a Tokenizer,
        format: ChatFormat<'a>,
        options: ElementOptions,
    ) -> Result<Self, RowError> {
        if let ChatFormat::Template(template) = format {
            Self::check_template(template, tokenizer)?;
        }
        Ok(Self { tokenizer, format, options })
    }

    fn check_template(template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<(), RowError> {
        if template_parts_agree(template, tokenizer)? {
            return Ok(());
        }
        let reason = "gives other tokens when its parts are tokenised one by one (the tokenizer joins them, \
                      or begins each with a space); this model cannot be trained with it";
        Err(RowError::Template { message: 1, reason })
    }

    /// The element of a conversation. The system prompt is not in it: it is what the cartridge replaces.
    ///
    /// # Errors
    /// [`RowError`] when there is nothing to learn in it, when its numbers do not fit the model or each other,
    /// or when it cannot be written in the chat format.
    pub fn element(&self, row: usize, conversation: &Conversation) -> Result<Element, RowError> {
        if conversation.messages.is_empty() {
            return Err(RowError::NoMessages);
        }
        let mut element = Element { row, ..Element::default() };
        let stored = |m: &Message| self.options.mode != TargetMode::Tokens && m.token_ids.is_some();
        let turns = self.format.turns(self.tokenizer, &conversation.messages, stored)?;
        let last = turns.len() - 1;
        for (index, (message, turn)) in conversation.messages.iter().zip(turns).enumerate() {
            self.append(&mut element, index, message, turn, index == last)?;
        }
        if element.supervised.is_empty() {
            return Err(match self.options.mode {
                TargetMode::Logits => RowError::NoLogprobs,
                TargetMode::Tokens | TargetMode::Teacher => RowError::NoAssistant,
            });
        }
        Ok(element)
    }

    fn append(
        &self,
        element: &mut Element,
        index: usize,
        message: &Message,
        turn: Turn,
        is_last: bool,
    ) -> Result<(), RowError> {
        let mode = self.options.mode;
        let stored = message.token_ids.as_ref().filter(|_| mode != TargetMode::Tokens);
        let body = stored.unwrap_or(&turn.body);
        let start = element.tokens.len();
        element.tokens.extend(&turn.start);
        let begin = element.tokens.len();
        element.tokens.extend(body);

        // An answer that was cut at the token limit has no end. Between messages it gets one; at the end of
        // the conversation it stays open. A text without tokens of its own is an answer as a whole.
        let is_whole = match mode {
            TargetMode::Logits => !is_last,
            TargetMode::Tokens => true,
            TargetMode::Teacher => !is_last || stored.is_none(),
        };
        let has_end = stored.is_some() && !turn.end.is_empty() && body.ends_with(&turn.end);
        if is_whole && !has_end {
            element.tokens.extend(&turn.end);
        }
        let answer_end = element.tokens.len();
        if is_whole {
            element.tokens.extend(&turn.extra);
        }
        self.check_tokens(index, &element.tokens[start..], element.tokens.len())?;

        match mode {
            TargetMode::Logits => {
                if let Some(top) = &message.top_logprobs {
                    self.push_logits(element, index, begin, body.len(), stored.is_some(), top)?;
                }
            }
            _ if message.role != "assistant" => {}
            TargetMode::Tokens => {
                let rows = rows_before(begin, element.tokens.len());
                for row in rows.clone() {
                    element.targets.push(row, element.tokens[row as usize + 1], 1.0);
                }
                element.supervise(rows);
            }
            TargetMode::Teacher => element.supervise(rows_before(begin, answer_end)),
        }
        Ok(())
    }

    fn push_logits(
        &self,
        element: &mut Element,
        message: usize,
        begin: usize,
        tokens: usize,
        is_stored: bool,
        top: &TopLogprobs,
    ) -> Result<(), RowError> {
        let found = top.tokens();
        // Tokens made of the text again are the teacher's only if there are as many of them.
        if found as usize > tokens || (!is_stored && found as usize != tokens) {
            return Err(RowError::TokenCount { message, found, tokens });
        }
        for (position, id, logprob) in top.cut(self.options.cut).entries() {
            self.check_id(message, id)?;
            // The first token of all has no row before it.
            let Some(row) = (begin + position as usize).checked_sub(1) else { continue };
            let row = row as u32;
            element.targets.push(row, id, logprob.exp());
            if element.supervised.last().is_none_or(|rows| rows.end <= row) {
                element.supervise(row..row + 1);
            }
        }
        Ok(())
    }

    fn check_tokens(&self, message: usize, ids: &[u32], total: usize) -> Result<(), RowError> {
        if total > MAX_ELEMENT_TOKENS {
            return Err(RowError::TooLong);
        }
        ids.iter().try_for_each(|&id| self.check_id(message, id))
    }

    fn check_id(&self, message: usize, id: u32) -> Result<(), RowError> {
        let vocab = self.options.vocab;
        if (id as usize) < vocab {
            return Ok(());
        }
        Err(RowError::Vocabulary { message, id, vocab })
    }
}

/// The rows that predict the tokens `begin..end`.
fn rows_before(begin: usize, end: usize) -> Range<u32> {
    // Element lengths are checked against MAX_ELEMENT_TOKENS.
    begin.saturating_sub(1) as u32..end.saturating_sub(1) as u32
}

/// The first `limit` rows of a dataset file, or all of them.
///
/// # Errors
/// The first wrong row, [`DatasetReader`]'s errors, or a limit on what is held in memory.
pub fn load_elements(
    path: &Path,
    builder: &ElementBuilder,
    limit: Option<usize>,
) -> Result<Vec<Element>, DatasetError> {
    let mut elements = Vec::new();
    let (mut tokens, mut targets) = (0, 0);
    for item in DatasetReader::open(path)?.take(limit.unwrap_or(usize::MAX)) {
        let (row, conversation) = item?;
        let element = builder.element(row, &conversation).map_err(|error| DatasetError::Row {
            path: path.to_owned(),
            row,
            error,
        })?;
        tokens += element.tokens.len();
        targets += element.targets.len();
        for (count, what, limit) in [
            (tokens, "tokens", MAX_DATASET_TOKENS),
            (targets, "target entries", MAX_DATASET_TARGETS),
        ] {
            if count > limit {
                let limit = limit as u64;
                return Err(DatasetError::TooLarge { path: path.to_owned(), what, limit });
            }
        }
        elements.push(element);
    }
    Ok(elements)
}

#[cfg(test)]
#[path = "elements_tests.rs"]
mod tests;
