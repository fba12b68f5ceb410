//! Room in the cache: the least recently used files leave, and what crashes left behind.

use std::{
    collections::HashMap,
    fs::{self, DirEntry},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{Record, SOURCES, Store, is_record};
use crate::{cartridge::CartridgeError, limits};

/// Who uses a file: the newest note of a use, and the records.
pub(super) struct Use {
    last: SystemTime,
    records: Vec<PathBuf>,
}

impl Store {
    /// Makes room for a file of `bytes` that is going to be fetched.
    ///
    /// # Errors
    /// [`CartridgeError::TooLarge`] if it can never fit; [`CartridgeError::Io`].
    pub fn make_room(&self, bytes: u64) -> Result<(), CartridgeError> {
        if bytes > self.byte_budget {
            return Err(self.too_large(bytes));
        }
        let _lock = self.lock()?;
        self.remove_leftovers();
        self.make_room_for(bytes, None)
    }

    /// The same, under the lock of the store; the file `keep` is the one that room is made for.
    pub(super) fn make_room_for(
        &self,
        bytes: u64,
        keep: Option<&str>,
    ) -> Result<(), CartridgeError> {
        if bytes > self.byte_budget {
            return Err(self.too_large(bytes));
        }
        let uses = self.uses();
        let mut blobs = Vec::new();
        for entry in entries(&self.root.join("blobs")) {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let Ok(metadata) = entry.metadata() else { continue };
            if keep != Some(&name) && metadata.is_file() {
                // What no record leads to was left by a crash: it goes first.
                let last = uses.get(&name).map_or(SystemTime::UNIX_EPOCH, |found| found.last);
                blobs.push((last, metadata.len(), name));
            }
        }
        let mut total: u64 = blobs.iter().map(|(_, len, _)| len).sum();
        blobs.sort();
        for (_, len, name) in blobs {
            if total.saturating_add(bytes) <= self.byte_budget {
                break;
            }
            // Where a file in use cannot be removed (not on Unix), the next one goes.
            if fs::remove_file(self.blob_path(&name)).is_ok() {
                total -= len;
                tracing::info!(digest = &name[..12.min(name.len())], bytes = len, "cache: evicted");
                for record in uses.get(&name).into_iter().flat_map(|found| &found.records) {
                    let _ = fs::remove_file(record);
                }
            }
        }
        Ok(())
    }

    /// Files that records lead to, by digest.
    pub(super) fn uses(&self) -> HashMap<String, Use> {
        let mut uses = HashMap::new();
        for entry in SOURCES.iter().flat_map(|source| entries(&self.names(*source))) {
            let path = entry.path();
            let Some(record) = is_record(&path).then(|| Record::read(&path)).flatten() else {
                continue;
            };
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let at = modified.unwrap_or(SystemTime::UNIX_EPOCH);
            let found = uses.entry(record.digest).or_insert(Use { last: at, records: Vec::new() });
            found.last = found.last.max(at);
            found.records.push(path);
        }
        uses
    }

    /// Removes what was not touched for so long that nobody can be writing it.
    fn remove_leftovers(&self) {
        let age = Duration::from_secs(limits::CACHE_LEFTOVER_SECONDS);
        let is_old = |entry: &DirEntry| {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            modified.is_ok_and(|at| at.elapsed().is_ok_and(|elapsed| elapsed > age))
        };
        let is_temporary =
            |path: &Path| path.extension().is_some_and(|e| e == "tmp" || e == "lock");
        let partial = entries(&self.partials()).into_iter();
        let names = SOURCES.iter().flat_map(|source| entries(&self.names(*source)));
        let names = names.filter(|entry| is_temporary(&entry.path()));
        for entry in partial.chain(names).filter(is_old) {
            let _ = fs::remove_file(entry.path());
        }
    }

    fn too_large(&self, bytes: u64) -> CartridgeError {
        CartridgeError::too_large("bytes for the cartridge cache", bytes, self.byte_budget)
    }
}

fn entries(folder: &Path) -> Vec<DirEntry> {
    fs::read_dir(folder).map(|entries| entries.flatten().collect()).unwrap_or_default()
}
