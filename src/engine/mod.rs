//! The engine: one thread that turns token requests into token streams.
//!
//! It knows token ids, cartridges and the model; it knows neither text nor HTTP. Callers submit a
//! [`GenerateRequest`] through an [`EngineHandle`] and read a [`TokenStream`].

mod blocks;
mod core;
#[cfg(test)]
mod core_tests;
mod draw;
mod handle;
mod kv_cache;
mod logprobs;
mod prefix_cache;
mod request;
mod sampler;
mod scheduler;
mod sequence;
#[cfg(test)]
mod simulator;
mod startup;

pub use blocks::BLOCK_TOKENS;
pub(crate) use blocks::{BlockPool, BlockTable, blocks_for};
pub use handle::{EngineHandle, EngineInfo, EngineStats, TokenStream};
pub(crate) use kv_cache::{BatchEntry, KvCache};
pub use logprobs::token_logprobs;
pub use prefix_cache::CacheSalt;
pub(crate) use prefix_cache::{ContextKey, Root};
pub use request::{
    Event, FinishReason, GenerateRequest, LogprobOptions, Priority, SampledToken, SamplingParams,
};
pub use sampler::{Adjustment, Sampler};
pub use startup::{EngineOptions, start};

/// Why the engine refused or gave up a request.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// The waiting queue is at its limit; try again later.
    #[error("the server is busy: {waiting} sequences are waiting (limit {limit}); retry later")]
    QueueFull { waiting: usize, limit: usize },
    /// The waiting queue holds as many prompt tokens as it may; try again later.
    #[error("the server is busy: {waiting} prompt tokens are waiting (limit {limit}); retry later")]
    QueueTokensFull { waiting: usize, limit: usize },
    /// The client does not read what it asked for.
    #[error("{limit} tokens were not read in time; the request is cancelled")]
    SlowReader { limit: usize },
    /// The request can never fit.
    #[error(
        "prompt of {prompt} tokens, {cartridge} cartridge tokens and {max_tokens} tokens to generate \
         exceed the {limit} tokens a request may use; shorten the prompt or lower max_tokens"
    )]
    TooLong { prompt: usize, cartridge: usize, max_tokens: usize, limit: usize },
    /// A parameter the engine cannot honour.
    #[error("{field}: {reason}")]
    InvalidRequest { field: &'static str, reason: String },
    /// The model produced NaN or infinity for this sequence.
    #[error("the model produced non-finite logits for this request")]
    NonFiniteLogits,
    /// The server is stopping.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// A bug or a device failure; the log has the cause.
    #[error("the engine failed: {0}")]
    Internal(String),
}
