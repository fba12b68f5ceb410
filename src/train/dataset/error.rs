//! What can be wrong with training data: the file, or one of its rows.

use std::path::PathBuf;

use crate::limits;
use crate::text::TextError;

/// A dataset that cannot be used. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: is not a file; give the path of one .jsonl or .parquet file", path.display())]
    NotAFile { path: PathBuf },
    /// Not Parquet that can be read, or without the columns of a dataset.
    #[error("{}: {reason}", path.display())]
    Parquet { path: PathBuf, reason: String },
    #[error("{}: no conversations in it; a dataset needs at least one row", path.display())]
    Empty { path: PathBuf },
    /// A limit of [`crate::limits`].
    #[error("{}: has more than {limit} {what}; split the file or use fewer rows", path.display())]
    TooLarge { path: PathBuf, what: &'static str, limit: u64 },
    /// One row is wrong; the rows after it can still be read.
    #[error("{}: row {row}: {error}", path.display())]
    Row {
        path: PathBuf,
        /// From 1; of JSON lines the line, blank ones included.
        row: usize,
        error: RowError,
    },
}

/// What is wrong with one conversation. `message` counts from 0.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RowError {
    #[error("is no conversation: {reason}")]
    Json { reason: String },
    /// A Parquet value of another type than the column should have.
    #[error("{field} is {found}; it should be {wanted}")]
    Type { field: &'static str, found: &'static str, wanted: &'static str },
    #[error("has more than {} bytes; split the conversation", limits::MAX_DATASET_LINE_BYTES)]
    LineTooLong,
    #[error("`messages` is empty; a conversation needs at least one message")]
    NoMessages,
    #[error("message {message} has no `role`")]
    NoRole { message: usize },
    #[error("message {message} has neither `content` nor `token_ids`")]
    NoContent { message: usize },
    #[error("message {message}: `top_logprobs` {reason}")]
    TopLogprobs { message: usize, reason: String },
    #[error(
        "message {message} has log-probabilities of {found} tokens and {tokens} tokens; keep the `token_ids` \
         that the teacher generated in the row"
    )]
    TokenCount { message: usize, found: u32, tokens: usize },
    #[error("message {message}: `token_ids` has {id}, which no token has")]
    TokenId { message: usize, id: i64 },
    #[error(
        "message {message}: token id {id} is not in the model's vocabulary of {vocab}; the row was made \
         with another tokenizer, or the chat format is of another model"
    )]
    Vocabulary { message: usize, id: u32, vocab: usize },
    #[error(
        "no message has log-probabilities, which logits targets are made of; train on tokens, use an \
         online teacher, or synthesise the dataset again with top_logprobs"
    )]
    NoLogprobs,
    #[error("there is no assistant message to learn; add one or leave the row out")]
    NoAssistant,
    #[error(
        "message {message} has the role {role:?}, for which this chat format has no tokens; use system, user \
         or assistant, or the model's own chat template"
    )]
    Role { message: usize, role: String },
    /// The chat template cannot be cut into messages.
    #[error("message {message}: the model's chat template {reason}")]
    Template { message: usize, reason: &'static str },
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("has more than {} tokens; split the conversation", limits::MAX_ELEMENT_TOKENS)]
    TooLong,
}
