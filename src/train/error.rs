//! What can go wrong while a cartridge is learned.

use std::path::PathBuf;

use crate::cartridge::CartridgeError;
use crate::engine::EngineError;

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("{0}")]
    Invalid(String),
    #[error(
        "the loss is not finite from row {row} of its pack on; the last checkpoint is kept. A lower \
         learning rate or max_grad_norm may help"
    )]
    NonFiniteLoss { row: usize },
    #[error("update {step}: {source}")]
    AtStep {
        step: u64,
        #[source]
        source: Box<TrainError>,
    },
    #[error("cannot {action} {path}: {source}; what was saved before is kept")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} cannot be resumed from: {reason}; give another run_dir to start anew")]
    Resume { path: PathBuf, reason: String },
    #[error("the frozen weights changed during training; nothing more is written")]
    WeightsChanged,
    #[error("the teacher: {0}")]
    Teacher(#[from] EngineError),
    #[error(transparent)]
    Cartridge(#[from] CartridgeError),
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
