//! One row of a dataset: a conversation and, where a teacher wrote it, what else the teacher would have said.

use serde_json::Value;

use super::{RowError, TopLogprobs};

/// One training row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// Never empty in a row that was read.
    pub messages: Vec<Message>,
    /// What the teacher saw and the cartridge stands for: kept for reference, never a part of the tokens.
    pub system_prompt: Option<String>,
    /// The column `type`.
    pub kind: Option<String>,
    /// An object, or null.
    pub metadata: Value,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Message {
    pub role: String,
    pub content: String,
    /// The tokens of the content as they were generated, the end token included when the model came to it.
    pub token_ids: Option<Vec<u32>>,
    /// Positions are indices into `token_ids`.
    pub top_logprobs: Option<TopLogprobs>,
}

/// A message as files have it: everything may be missing.
#[derive(Debug, Default)]
pub(super) struct RawMessage {
    pub role: Option<String>,
    pub content: Option<String>,
    pub token_ids: Option<Vec<i64>>,
    /// The reason it cannot be used, without the message it belongs to.
    pub top_logprobs: Option<Result<TopLogprobs, String>>,
}

impl Conversation {
    /// # Errors
    /// [`RowError`] when there is no message, or one without role, without content and tokens, with negative
    /// token ids or with log-probabilities that contradict themselves; when `metadata` is no object.
    pub(super) fn from_raw(
        messages: Vec<RawMessage>,
        system_prompt: Option<String>,
        kind: Option<String>,
        metadata: Value,
    ) -> Result<Self, RowError> {
        if messages.is_empty() {
            return Err(RowError::NoMessages);
        }
        if !metadata.is_object() && !metadata.is_null() {
            return Err(RowError::Type {
                field: "`metadata`",
                found: "another value",
                wanted: "an object or null",
            });
        }
        let messages = messages
            .into_iter()
            .enumerate()
            .map(|(index, raw)| raw.check(index))
            .collect::<Result<_, _>>()?;
        Ok(Self { messages, system_prompt, kind, metadata })
    }
}

impl RawMessage {
    fn check(self, message: usize) -> Result<Message, RowError> {
        let role = self.role.filter(|r| !r.is_empty()).ok_or(RowError::NoRole { message })?;
        if self.content.is_none() && self.token_ids.is_none() {
            return Err(RowError::NoContent { message });
        }
        let token_ids = self.token_ids.map(|ids| {
            // A model's vocabulary is smaller than u32 by far; how large it is, only the builder knows.
            let id = |id| u32::try_from(id).map_err(|_| RowError::TokenId { message, id });
            ids.into_iter().map(id).collect::<Result<Vec<_>, _>>()
        });
        let top_logprobs = self.top_logprobs.transpose();
        Ok(Message {
            role,
            content: self.content.unwrap_or_default(),
            token_ids: token_ids.transpose()?,
            top_logprobs: top_logprobs
                .map_err(|reason| RowError::TopLogprobs { message, reason })?,
        })
    }
}
