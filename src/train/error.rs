//! What can go wrong while a cartridge is learned.

use std::path::PathBuf;

use crate::cartridge::CartridgeError;
use crate::engine::EngineError;

/// Errors of training.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Options or a start that cannot be trained with.
    #[error("{0}")]
    Invalid(String),
    /// A pack that the decoder cannot compute; nothing was computed.
    #[error("the pack cannot be trained on: {reason}")]
    Pack { reason: String },
    /// Keys or values of a shape the model does not have.
    #[error("the cartridge does not fit the model: {reason}")]
    Prefix { reason: String },
    /// A temperature that is no positive number.
    #[error("the temperature must be a positive number, not {temperature}")]
    Temperature { temperature: f32 },
    /// `row` is the first such row of the pack, an index into its tokens.
    #[error(
        "the loss of row {row} is not finite: lower the learning rate, or look for a teacher \
         probability or a cartridge that is not finite"
    )]
    NonFiniteLoss { row: usize },
    /// The update after `step` others failed. What was saved before is kept.
    #[error("update {step}, pack {pack}: {source}")]
    AtStep {
        step: u64,
        /// Its place in the file of packs, from 0.
        pack: usize,
        #[source]
        source: Box<TrainError>,
    },
    #[error("cannot {action} {}: {source}; what was saved before is kept", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} cannot be resumed from: {reason}; give another run_dir to start anew", path.display())]
    Resume { path: PathBuf, reason: String },
    #[error("the frozen weights changed during training; nothing more is written")]
    WeightsChanged,
    #[error("the teacher: {0}")]
    Teacher(#[from] EngineError),
    #[error(transparent)]
    Cartridge(#[from] CartridgeError),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
