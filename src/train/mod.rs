//! Learning a cartridge: distillation of a teacher's log-probabilities into keys and values, through the
//! frozen weights of the model that serves it.
//!
//! [`dataset`] rows become token sequences with sparse targets, those become packs, and each pack one
//! gradient of every cartridge tensor. This is a library: a command or a server thread drives it step by step.

pub mod dataset;
mod pack;
mod packing;

pub use pack::{Pack, Targets};
pub use packing::{PackPlan, Packing, PackingError, PackingMode, Piece, epoch_order};
