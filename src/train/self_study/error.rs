//! Why a model cannot study a document by itself.

use std::path::PathBuf;

use crate::engine::EngineError;
use crate::limits::{MAX_SEED_PROMPTS_BYTES, MAX_SELF_STUDY_SAMPLES};
use crate::text::TextError;
use crate::train::TrainError;

/// Errors of self-study.
#[derive(Debug, thiserror::Error)]
pub enum SelfStudyError {
    #[error(
        "chunks of {min} to {max} tokens: there must be at least 1, and no fewer at most than at least"
    )]
    ChunkSizes { min: usize, max: usize },
    #[error("{0} conversations of self-study; it must be from 1 to {MAX_SELF_STUDY_SAMPLES}")]
    Samples(usize),
    #[error("conversations_per_chunk must be at least 1")]
    PerChunk,
    #[error("there are no seed prompts to ask with; choose a kind, or give a file of your own")]
    NoSeeds,
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: has more than {MAX_SEED_PROMPTS_BYTES} bytes of seed prompts", path.display())]
    SeedsTooLarge { path: PathBuf },
    #[error("{}: has no seed prompts; write one on each line", path.display())]
    SeedsEmpty { path: PathBuf },
    /// Chunk, seed prompt and what is to be generated.
    #[error(
        "a chunk with its seed prompt has {prompt} tokens; with {max_tokens} for the question that exceeds \
         the {limit} tokens a request may use; lower max_tokens_per_chunk or question_tokens"
    )]
    TooLong { prompt: usize, max_tokens: usize, limit: usize },
    #[error(
        "the model cannot ask: of {samples} messages {kept} could be used, at least half must ({tally}){}; \
         use an instruct model, seed prompts that suit it (--seed-prompts), or questions of your own \
         (--conversations)",
        example(wrote)
    )]
    TooFew {
        samples: usize,
        kept: usize,
        /// Why the others could not.
        tally: Tally,
        /// Something it wrote.
        wrote: Option<String>,
    },
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Train(#[from] TrainError),
}

impl From<EngineError> for SelfStudyError {
    fn from(error: EngineError) -> Self {
        Self::Train(error.into())
    }
}

/// How many messages were left out, over all tries, and why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub short: usize,
    pub unfinished: usize,
    pub repeated: usize,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { short, unfinished, repeated } = self;
        write!(
            f,
            "over all tries {repeated} said the same as another, {short} were empty or too short, "
        )?;
        write!(f, "{unfinished} had no end")
    }
}

fn example(wrote: &Option<String>) -> String {
    wrote.as_ref().map_or_else(String::new, |text| format!("; it wrote {text:?}"))
}
