//! What can go wrong while a model is found, read and built.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("cannot read {path}: {source}", path = path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{file}: {reason}")]
    Invalid { file: String, reason: String },
    #[error("{file}: {what} is not supported; {hint}")]
    Unsupported { file: String, what: String, hint: String },
    #[error("weight {name} is missing from the model files")]
    MissingWeight { name: String },
    #[error("weight {name} has shape {got:?}, the configuration asks for {want:?}")]
    WeightShape { name: String, got: Vec<usize>, want: Vec<usize> },
    #[error(
        "{name} is neither a folder, a .gguf file nor a reachable Hugging Face model: {reason}; \
         give --model a path, or check the name, HF_TOKEN and HF_ENDPOINT"
    )]
    NotFound { name: String, reason: String },
    #[error("the model's tokenizer or chat template cannot be used: {0}")]
    Text(#[from] crate::text::TextError),
    #[error("building the model failed: {0}")]
    Tensor(#[from] candle_core::Error),
}
