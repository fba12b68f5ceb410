//! Self-study: the model asks itself questions about a document, as in arXiv 2506.06266, section 4.
//!
//! For each conversation a chunk of the document and a seed prompt are drawn. The model sees the chunk as its
//! system message, the seed prompt as the user's, and writes what a user could ask. What it wrote is cleaned,
//! and asked for again where nothing usable came. The teacher ([`super::teach`]) answers.
//!
//! All of it is a function of document, model, options and seed: the order in which requests finish decides
//! nothing.

mod ask;
mod chunk;
mod clean;
mod error;
mod seeds;

pub use ask::{Asker, Draft, Question, SelfStudyOptions, ask};
pub use chunk::{Chunk, ChunkSizes, Chunks};
pub use error::SelfStudyError;
pub use seeds::{Seed, SeedKind, own_seeds};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What random numbers are drawn for.
#[derive(Clone, Copy)]
enum Purpose {
    Chunk,
    Seed,
    Sampling,
}

/// The generator of draw `index` in its `attempt`-th try.
fn random(seed: u64, purpose: Purpose, index: usize, attempt: u32) -> ChaCha8Rng {
    // Other parts of training use the first streams of the same seed.
    let mut random = ChaCha8Rng::seed_from_u64(seed ^ 0x5e1f_57ad);
    random.set_stream(((index as u64) << 8) | (u64::from(attempt) << 2) | purpose as u64);
    random
}
