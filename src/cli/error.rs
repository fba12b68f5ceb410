//! Every error a command can end with; each prints as one line that says what to do.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("{path}: {reason}", path = path.display())]
    Config { path: PathBuf, reason: String },
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("cannot listen on {address}: {source}; choose another --host or --port")]
    Listen { address: String, source: std::io::Error },
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Keys(#[from] crate::api::access::KeyError),
    #[error(transparent)]
    Bench(#[from] crate::bench::BenchError),
    #[error(transparent)]
    Train(#[from] crate::train::TrainError),
    #[error(transparent)]
    SelfStudy(#[from] crate::train::self_study::SelfStudyError),
    #[error(transparent)]
    Dataset(#[from] crate::train::dataset::DatasetError),
    #[error(transparent)]
    Row(#[from] crate::train::dataset::RowError),
    #[error(transparent)]
    Packing(#[from] crate::train::PackingError),
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    #[error(transparent)]
    Cartridge(#[from] crate::cartridge::CartridgeError),
    #[error(transparent)]
    Text(#[from] crate::text::TextError),
    #[error("the model could not be run: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A signal ended the command after its work was saved. Not printed as an error.
    #[error("{said}")]
    Stopped { code: u8, said: String },
    #[error("{what}: {source}")]
    System { what: &'static str, source: std::io::Error },
}
