//! Training data: files of conversations, and conversations as token sequences with targets.
//!
//! A file ([`DatasetReader`]: JSON lines or Parquet) gives [`Conversation`]s, an [`ElementBuilder`] writes each
//! in the model's chat format and marks what it should predict ([`Element`]). `docs/training-data.md` says
//! which files are accepted. All of it blocks and can take memory in the order of the file: call it on a
//! thread of its own.

mod chat_format;
mod conversation;
mod elements;
mod error;
mod jsonl;
mod jsonl_write;
mod parquet_check;
mod parquet_fields;
mod parquet_read;
mod parquet_write;
mod reader;
mod top_logprobs;

pub use chat_format::ChatFormat;
pub use conversation::{Conversation, Message};
pub use elements::{Element, ElementBuilder, ElementOptions, TargetMode, load_elements};
pub use error::{DatasetError, RowError};
pub use jsonl_write::write_jsonl;
pub use parquet_write::write_parquet;
pub use reader::DatasetReader;
pub use top_logprobs::{MassCut, TopLogprobs};
