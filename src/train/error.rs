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
        "the loss at token {row} of the pack is not finite: lower the learning rate, or look for a teacher \
         probability or a cartridge that is not finite"
    )]
    NonFiniteLoss { row: usize },
    /// The update after `step` others failed. What was saved before is kept.
    #[error("update {step}, pack {pack}{}: {source}", of_dataset(dataset_rows))]
    AtStep {
        step: u64,
        /// Its place in the file of packs, from 0.
        pack: usize,
        /// The rows of the dataset it was made of, or the one that is to blame. Empty when not known.
        dataset_rows: Vec<u32>,
        #[source]
        source: Box<TrainError>,
    },
    /// A held-out sequence could not be measured.
    #[error("held-out conversations{}: {source}", of_dataset(dataset_rows))]
    HeldOut {
        dataset_rows: Vec<u32>,
        #[source]
        source: Box<TrainError>,
    },
    /// A checkpoint could not be written; `kept` is the newest step that can be gone on from.
    #[error("update {step} cannot be saved in {}: {source}; {}", path.display(), of_kept(*kept))]
    Save {
        step: u64,
        path: PathBuf,
        kept: Option<u64>,
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

/// Rows named in a message; a pack of short conversations has hundreds.
const ROWS_NAMED: usize = 10;

fn of_dataset(rows: &[u32]) -> String {
    let named: Vec<String> = rows.iter().take(ROWS_NAMED).map(u32::to_string).collect();
    let more = rows.len().saturating_sub(ROWS_NAMED);
    match (rows.len(), more) {
        (0, _) => String::new(),
        (1, _) => format!(", row {} of the dataset", named[0]),
        (_, 0) => format!(", rows {} of the dataset", named.join(", ")),
        (_, more) => format!(", rows {} and {more} more of the dataset", named.join(", ")),
    }
}

fn of_kept(step: Option<u64>) -> String {
    match step {
        Some(step) => format!(
            "what was saved after update {step} is as it was, and the same command goes on from there"
        ),
        None => "nothing was saved before; the same command begins anew".to_owned(),
    }
}
