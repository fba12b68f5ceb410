//! Where cartridge files come from. Everything here blocks and is called on threads that may.

mod local;
mod local_write;

use std::{fs::Metadata, time::SystemTime};

use super::{CartridgeError, Intake};

pub use local::LocalFolder;
pub(super) use local::not_found;
pub(super) use local_write::NewFiles;

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

/// Files that are at hand. The registry asks for the stamp now and then, and reads when it changed.
pub trait FileSource: Send + Sync + 'static {
    /// The present state of the file of `id`; `None` where there is none.
    fn stamp(&self, id: &str) -> Result<Option<Stamp>, CartridgeError>;
    /// Reads the file into `intake`; its stamp at that time. Nothing is read of a larger file than
    /// [`Intake::max_bytes`].
    fn read(&self, id: &str, intake: &mut Intake<'_>) -> Result<Stamp, CartridgeError>;
    /// The ids that have a file.
    fn list(&self) -> Vec<String>;
}

/// A place that has to be asked over the network. As a [`FileSource`] it is what was fetched before and
/// lies on this machine; nothing but [`Self::fetch`] uses the network.
pub trait RemoteSource: FileSource {
    /// Brings the present content of `id` to this machine, in place of what was fetched before. Must end in
    /// bounded time.
    fn fetch(&self, id: &str) -> Result<(), CartridgeError>;
}
