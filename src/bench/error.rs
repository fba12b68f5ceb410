//! What can go wrong: before a measurement (`BenchError`, ends the command) and within it (`Failure`,
//! counted).

use std::path::PathBuf;
use std::time::Duration;

/// Why nothing, or not everything, could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("`{0}` is not a URL of the form http://host:port (https is not supported)")]
    Url(String),
    #[error("{label} ({url}): {failure}")]
    Target { label: String, url: String, failure: Failure },
    #[error("{label}: {reason}")]
    Setup { label: String, reason: String },
    #[error("{0}")]
    Plan(String),
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}, line {line}: {reason}", path = path.display())]
    PromptFile { path: PathBuf, line: usize, reason: String },
    #[error("no request succeeded at {0}; the errors are in the table")]
    NothingSucceeded(String),
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
    #[error("interrupted; what was measured until then is shown and written")]
    Interrupted,
}

/// Why one request failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Failure {
    #[error("cannot connect: {0}; is the server running?")]
    Connect(String),
    #[error("the server is busy (429): {message}")]
    Busy { retry_after: Option<Duration>, message: String },
    #[error("the server answered {code}: {message}")]
    Status { code: u16, message: String },
    #[error("the connection broke: {0}")]
    Disconnected(String),
    #[error("the stream ended without [DONE]")]
    NoDone,
    #[error("the stream held no tokens")]
    Empty,
    #[error("the stream reported an error: {0}")]
    ErrorEvent(String),
    #[error("the reply is not a stream of chunks: {0}")]
    Protocol(String),
    #[error("no complete answer after {0:?}")]
    Timeout(Duration),
}

impl Failure {
    /// A short name to count by.
    pub fn kind(&self) -> String {
        match self {
            Self::Connect(_) => "connect".to_owned(),
            Self::Busy { .. } => "http_429".to_owned(),
            Self::Status { code, .. } => format!("http_{code}"),
            Self::Disconnected(_) => "disconnected".to_owned(),
            Self::NoDone => "no_done".to_owned(),
            Self::Empty => "empty".to_owned(),
            Self::ErrorEvent(_) => "error_event".to_owned(),
            Self::Protocol(_) => "protocol".to_owned(),
            Self::Timeout(_) => "timeout".to_owned(),
        }
    }
}
