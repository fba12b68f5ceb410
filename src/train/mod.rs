//! Learning a cartridge: distillation of a teacher's log-probabilities into keys and values, through the
//! frozen weights of the model that serves it.
//!
//! [`dataset`] rows, or questions the model asks itself ([`self_study`]), become token sequences with sparse targets, those become packs, and each pack one
//! gradient of every cartridge tensor. This is a library: a command or a server thread drives it step by step.

mod attention;
mod check;
mod checkpoint;
pub mod dataset;
mod error;
mod held_out;
mod in_flight;
mod initialize;
mod journal;
mod loss;
mod memory;
mod optimizer;
mod pack;
mod pack_file;
mod packing;
mod parameters;
mod schedule;
pub mod self_study;
mod step;
mod teacher;
mod trainer;

pub use checkpoint::RunDir;
pub use error::TrainError;
pub use held_out::HeldOut;
pub use initialize::{from_text, random};
pub use journal::Journal;
pub use loss::{LossOnly, Normalizer, row_loss};
pub use memory::keep_freed_memory;
pub use optimizer::{Adam, AdamOptions};
pub use pack::{Pack, Targets};
pub use pack_file::PackFile;
pub use packing::{PackPlan, Packing, PackingError, PackingMode, epoch_order};
pub use parameters::Parameters;
pub use schedule::{Decay, Schedule};
pub use step::{PrefixLayer, StepOptions, StepOutput, evaluate, gradients};
pub use teacher::{Answered, Lesson, TeacherOptions, teach};
pub use trainer::{Position, StepReport, Trainer, TrainerOptions};
