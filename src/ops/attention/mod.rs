//! Attention of new tokens over segments: cartridges first, then the sequence's own earlier tokens.
//!
//! [`segment_attention`] serves, forward only. [`PackedAttention`] trains: one prefix, whole sequences, and
//! a backward.
//!
//! In serving, softmax is accumulated tile by tile with a running maximum and sum, which merges segments exactly (the
//! log-sum-exp merge of Hydragen / cascade attention). No segment needs a page alignment, and none is
//! copied next to another. Rows that share a cartridge are computed together, so that it is read once for
//! all of them; what a row gets does not depend on the company it is computed in.

mod cpu;
mod packed;
mod packed_cpu;
mod packed_plan;
mod packed_rows;
mod tile;

pub use cpu::{Heads, KvRun, SequenceQueries, segment_attention};
pub use packed::{LogSums, PackedAttention, PackedGradients, PackedKv};
pub use tile::KEY_LANES;

#[cfg(test)]
mod tests;
