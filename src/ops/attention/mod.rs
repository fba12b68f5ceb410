//! Attention of new tokens over segments: cartridges first, then the sequence's own earlier tokens.
//!
//! Softmax is accumulated segment by segment with a running maximum and sum, which merges segments
//! exactly (the log-sum-exp merge of Hydragen / cascade attention). No segment needs a page alignment,
//! and none is copied next to another.

mod cpu;

pub use cpu::{KvRun, SequenceQueries, segment_attention};
