//! Learning a cartridge: distillation of a teacher's log-probabilities into keys and values, through the
//! frozen weights of the model that serves it.
//!
//! [`dataset`](self) rows become token sequences with sparse targets, those become packs, and each pack one
//! gradient of every cartridge tensor. This is a library: a command or a server thread drives it step by step.

mod attention;
mod check;
mod error;
mod loss;
mod memory;
mod pack;
mod step;

pub use error::TrainError;
pub use loss::{LossOnly, Normalizer};
pub use memory::keep_freed_memory;
pub use pack::{Pack, Targets};
pub use step::{PrefixLayer, StepOptions, StepOutput, evaluate, gradients};
