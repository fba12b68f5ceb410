//! Learning a cartridge: distillation of a teacher's log-probabilities into keys and values, through the
//! frozen weights of the model that serves it.
//!
//! [`dataset`](self) rows become token sequences with sparse targets, those become packs, and each pack one
//! gradient of every cartridge tensor. This is a library: a command or a server thread drives it step by step.

mod checkpoint;
mod error;
mod initialize;
mod optimizer;
mod pack;
mod parameters;
mod schedule;
mod step;
mod teacher;
mod trainer;

pub use checkpoint::RunDir;
pub use error::TrainError;
pub use initialize::{from_text, random};
pub use optimizer::{Adam, AdamOptions};
pub use pack::{Pack, Targets};
pub use parameters::Parameters;
pub use schedule::{Decay, Schedule};
pub use step::{Normalizer, StepOptions};
pub use teacher::{Lesson, Taught, TeacherOptions, teach};
pub use trainer::{Position, StepReport, Trainer, TrainerOptions};

fn epoch_order(_: u64, _: u64, n: usize) -> Vec<usize> {
    (0..n).collect()
}
