//! What can be wrong with a cartridge, told so that the reader knows what to do next.

use super::Source;
use crate::limits;

/// Why a cartridge cannot be read, used or lent.
///
/// Errors are `Clone` because all requests that wait for one load get the same answer. None of them
/// shows a path of the server: `name` is the id of a request, or the file name given to a reader.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CartridgeError {
    /// The id itself can never name a cartridge.
    #[error("cartridge id `{id}` is not usable: {reason}")]
    InvalidId { id: String, reason: String },
    /// Nothing has this id.
    #[error("cartridge `{id}` was not found: {hint}")]
    NotFound { id: String, hint: String },
    /// The file is damaged, or is no cartridge.
    #[error("cartridge `{name}` cannot be read: {reason}")]
    Invalid { name: String, reason: String },
    /// The file asks for a Python object that no cartridge needs. Nothing was executed.
    #[error(
        "cartridge `{name}` was refused: its pickle names `{global}`, which is not on the list of \
         what a cartridge may hold (nothing was executed)"
    )]
    Forbidden { name: String, global: String },
    /// A sound cartridge for another model.
    #[error(
        "cartridge `{name}` does not fit the model: it has {have} {what}, the model needs {need}"
    )]
    Mismatch { name: String, what: &'static str, have: usize, need: usize },
    /// Larger than a limit of this server.
    #[error("cartridge `{name}` is too large: {size} {what}, the limit is {limit}")]
    TooLarge { name: String, what: &'static str, size: u64, limit: u64 },
    /// The place named by `source` cannot deliver it.
    #[error("cartridge `{id}` cannot be fetched from `source` = `{from}`: {reason}")]
    SourceUnavailable { id: String, from: Source, reason: String },
    /// All memory for cartridges is lent to running requests, too many loads wait, or the file is just being
    /// rewritten. Retry later.
    #[error("cartridge `{id}` cannot be loaded now: {reason}; retry later")]
    Busy { id: String, reason: String },
    /// A publication or deletion was to replace something else than what is there.
    #[error("cartridge `{id}` was left as it is: expected {expected}, found {found}")]
    Conflict { id: String, expected: String, found: String },
    /// The file could not be opened, read or written.
    #[error("cartridge `{name}`: {reason}")]
    Io { name: String, kind: std::io::ErrorKind, reason: String },
}

impl CartridgeError {
    /// Stable code for API error bodies.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidId { .. } => "cartridge_id_invalid",
            Self::NotFound { .. } => "cartridge_not_found",
            Self::Invalid { .. } | Self::Forbidden { .. } => "cartridge_invalid",
            Self::Mismatch { .. } => "cartridge_mismatch",
            Self::TooLarge { .. } => "cartridge_too_large",
            Self::SourceUnavailable { .. } => "cartridge_source_unavailable",
            Self::Busy { .. } => "cartridge_busy",
            Self::Conflict { .. } => "cartridge_conflict",
            Self::Io { .. } => "cartridge_io",
        }
    }

    /// Nothing has this id, as far as whoever asks is to know: what a look into the cartridge directory says
    /// that finds nothing.
    pub fn not_found(id: &str) -> Self {
        super::sources::not_found(id)
    }

    /// The same error about `name`: readers work on unnamed bytes, callers know what they are
    /// called.
    pub fn named(mut self, new: &str) -> Self {
        match &mut self {
            Self::InvalidId { id, .. }
            | Self::NotFound { id, .. }
            | Self::SourceUnavailable { id, .. }
            | Self::Conflict { id, .. }
            | Self::Busy { id, .. } => *id = new.to_owned(),
            Self::Invalid { name, .. }
            | Self::Forbidden { name, .. }
            | Self::Mismatch { name, .. }
            | Self::TooLarge { name, .. }
            | Self::Io { name, .. } => *name = new.to_owned(),
        }
        self
    }

    /// The same error with a remark at the end of its reason, where it has one.
    pub(super) fn with_note(mut self, note: &str) -> Self {
        match &mut self {
            Self::NotFound { hint: reason, .. }
            | Self::InvalidId { reason, .. }
            | Self::Invalid { reason, .. }
            | Self::SourceUnavailable { reason, .. }
            | Self::Busy { reason, .. }
            | Self::Io { reason, .. } => *reason += note,
            Self::Forbidden { .. }
            | Self::Mismatch { .. }
            | Self::TooLarge { .. }
            | Self::Conflict { .. } => {}
        }
        self
    }

    /// An [`Self::Invalid`] that is to be [`Self::named`] by the caller.
    /// What of a file's own words is in the reason is clipped.
    pub(super) fn invalid(reason: impl AsRef<str>) -> Self {
        let reason = limits::clip(reason.as_ref()).into_owned();
        Self::Invalid { name: UNNAMED.to_owned(), reason }
    }

    pub(super) fn too_large(what: &'static str, size: u64, limit: u64) -> Self {
        Self::TooLarge { name: UNNAMED.to_owned(), what, size, limit }
    }

    /// `doing` completes "failed to ...".
    pub(crate) fn io(doing: &str, error: &std::io::Error) -> Self {
        Self::Io {
            name: UNNAMED.to_owned(),
            kind: error.kind(),
            reason: format!("failed to {doing}: {error}"),
        }
    }

    /// A tensor operation failed (for instance: the device is out of memory).
    pub(super) fn tensor(error: &candle_core::Error) -> Self {
        Self::invalid(format!("tensor operation failed: {error}"))
    }
}

/// Stands for the name of a cartridge that was made in memory.
pub(super) const UNNAMED: &str = "(unnamed)";
