//! Where cartridge files come from. Everything here blocks and is called on threads that may.

mod cached;
mod choose;
mod http;
mod huggingface;
mod local;
mod options;
mod push;
pub mod transfer;
mod wandb;

use std::{fs::Metadata, time::SystemTime};

use super::{CartridgeError, Intake, Source, sanitize::folder_name};

pub use cached::{Cached, Fetch, Remote};
pub use http::HttpFiles;
pub use huggingface::{HubId, HuggingFace};
pub use local::LocalFolder;
pub(super) use local::not_found;
pub use options::{Sources, SourcesOptions};
pub use push::Piece;
pub use wandb::{RunId, Wandb};

/// Tells one state of a file from another: replacing or rewriting a file changes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stamp {
    pub len: u64,
    pub modified: Option<SystemTime>,
    /// Device, inode and time of the last change of the inode; zero where the system has none.
    pub inode: [i128; 3],
}

impl From<&Metadata> for Stamp {
    fn from(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let inode = {
            use std::os::unix::fs::MetadataExt;
            let changed =
                i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec());
            [i128::from(metadata.dev()), i128::from(metadata.ino()), changed]
        };
        #[cfg(not(unix))]
        let inode = [0; 3];
        Self { len: metadata.len(), modified: metadata.modified().ok(), inode }
    }
}

/// Files that are at hand. The registry asks for the stamp at every use and reads when it changed.
pub trait FileSource: Send + Sync + 'static {
    /// The present state of the file of `id`; `None` where there is none.
    fn stamp(&self, id: &str) -> Result<Option<Stamp>, CartridgeError>;
    /// Reads the file into `intake`; its stamp at that time. Nothing is read of a larger file than
    /// [`Intake::max_bytes`].
    fn read(&self, id: &str, intake: &mut Intake<'_>) -> Result<Stamp, CartridgeError>;
    /// The ids that have a file.
    fn list(&self) -> Vec<String>;
}

/// A place that has to be asked over the network; what it delivers is put into the local folder.
pub trait RemoteSource: Send + Sync + 'static {
    /// Whether asking makes sense; if not, `force_redownload` only reads the local file again.
    fn can_fetch(&self, from: Source) -> bool;
    /// Makes a local file of `id`, replacing an older one.
    fn fetch(&self, id: &str, from: Source) -> Result<(), CartridgeError>;
}

/// The remote source of a build without downloads: says where to put the file by hand.
pub(super) struct NoDownload;

impl RemoteSource for NoDownload {
    fn can_fetch(&self, _: Source) -> bool {
        false
    }

    fn fetch(&self, id: &str, from: Source) -> Result<(), CartridgeError> {
        let folder = folder_name(id)?;
        Err(CartridgeError::SourceUnavailable {
            id: id.to_owned(),
            from,
            reason: format!(
                "it is not in the cartridge directory, and this build cannot download yet; put the \
                 file there as `{folder}/cartridge.pt`"
            ),
        })
    }
}
