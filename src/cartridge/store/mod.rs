//! The disk cache of what remote sources delivered.
//!
//! | below its folder | holds |
//! |---|---|
//! | `blobs/{SHA-256}` | the files, named by their content |
//! | `names/{source}/{id, written as a file name}.json` | which file an id stands for, and where it is from |
//! | `partial/` | downloads under way or cut off |
//! | `lock` | held while files appear or leave |
//!
//! Everything appears by rename after it was synchronised, so a crash leaves the old state or the new one
//! (and leftovers, which are resumed or removed by age). Processes may share a folder: a lock per name keeps
//! two from fetching the same, and the lock of the store keeps eviction and arrival apart. Readers take no
//! lock; a file they have open stays readable when it is removed.

mod evict;
mod lock;
mod partial;
mod record;

use std::{
    fs::{self, File, Metadata},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use sha2::{Digest, Sha256};

use super::{CartridgeError, Source};
use crate::limits;

pub use lock::FileLock;
pub use partial::{Finished, Partial};
pub use record::Record;

/// Sources whose files are cached.
const SOURCES: [Source; 3] = [Source::Wandb, Source::Huggingface, Source::Http];

/// The cache in one folder. Nothing is written before something is fetched.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    byte_budget: u64,
}

impl Store {
    /// `byte_budget` is for all files together; the least recently used leave first.
    pub fn new(root: PathBuf, byte_budget: u64) -> Self {
        Self { root, byte_budget }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What `id` stands for; `None` if it was never fetched, or its record cannot be read.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`].
    pub fn record(&self, source: Source, id: &str) -> Result<Option<Record>, CartridgeError> {
        let path = self.record_path(source, id)?;
        Ok(Record::read(&path).filter(|record| record.id == id))
    }

    /// Everything that was fetched and is still there, by source and id.
    pub fn records(&self) -> Vec<(Source, Record)> {
        let mut records = Vec::new();
        for source in SOURCES {
            let Ok(entries) = fs::read_dir(self.names(source)) else { continue };
            let paths = entries.flatten().map(|entry| entry.path()).filter(|path| is_record(path));
            let mut here: Vec<_> = paths.filter_map(|path| Record::read(&path)).collect();
            here.retain(|record| self.blob(record).is_some());
            here.sort_by(|a, b| a.id.cmp(&b.id));
            records.extend(here.into_iter().map(|record| (source, record)));
        }
        records
    }

    /// The file of a record, if it is there in its full length.
    pub fn blob(&self, record: &Record) -> Option<Metadata> {
        let metadata = fs::symlink_metadata(self.blob_path(&record.digest)).ok()?;
        (metadata.is_file() && metadata.len() == record.size).then_some(metadata)
    }

    /// Opens the file of a record; `None` if it is not there in its full length.
    ///
    /// # Errors
    /// [`CartridgeError::Io`].
    pub fn open(&self, record: &Record) -> Result<Option<File>, CartridgeError> {
        if self.blob(record).is_none() {
            return Ok(None);
        }
        match File::open(self.blob_path(&record.digest)) {
            Ok(file) => Ok(Some(file)),
            // Evicted at this very moment.
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(CartridgeError::io("open the file in the cartridge cache", &e)),
        }
    }

    /// Notes that `id` is in use. It is no reason to fail that this cannot be written down.
    pub fn touch(&self, source: Source, id: &str) {
        let Ok(path) = self.record_path(source, id) else { return };
        let modified = fs::symlink_metadata(&path).and_then(|metadata| metadata.modified());
        let is_recent = modified.is_ok_and(|at| {
            at.elapsed().is_ok_and(|age| age < Duration::from_secs(limits::CACHE_USE_SECONDS))
        });
        if !is_recent && let Ok(file) = File::options().write(true).open(&path) {
            let _ = file.set_modified(SystemTime::now());
        }
    }

    /// Whether the file of a record has the content it is named by. Reads all of it.
    ///
    /// # Errors
    /// [`CartridgeError::Io`] if it cannot be read.
    pub fn verify(&self, record: &Record) -> Result<bool, CartridgeError> {
        let Some(mut file) = self.open(record)? else { return Ok(false) };
        let failed = |e| CartridgeError::io("read the file in the cartridge cache", &e);
        let (mut digest, mut buffer) = (Sha256::new(), vec![0; 1 << 18]);
        loop {
            match file.read(&mut buffer).map_err(failed)? {
                0 => return Ok(hex(&digest.finalize()) == record.digest),
                n => digest.update(&buffer[..n]),
            }
        }
    }

    /// Removes a file that is not what its name says; its ids count as not fetched from then on.
    ///
    /// # Errors
    /// [`CartridgeError::Io`].
    pub fn discard(&self, record: &Record) -> Result<(), CartridgeError> {
        let _lock = self.lock()?;
        remove_file(&self.blob_path(&record.digest))
    }

    /// Forgets an id, and its file unless another id stands for the same one. False: it was not there.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`], [`CartridgeError::Io`].
    pub fn remove(&self, source: Source, id: &str) -> Result<bool, CartridgeError> {
        let Some(record) = self.record(source, id)? else { return Ok(false) };
        let _lock = self.lock()?;
        remove_file(&self.record_path(source, id)?)?;
        if !self.uses().contains_key(&record.digest) {
            remove_file(&self.blob_path(&record.digest))?;
        }
        Ok(true)
    }

    /// Keeps other threads and processes from fetching `id`, for as long as the lock lives. Waits for one that
    /// does at most `patience`; `None` if it took longer, or `stopped` said so.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`]; [`CartridgeError::Io`] if the folder cannot be written.
    pub fn lock_name(
        &self,
        source: Source,
        id: &str,
        patience: Duration,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Option<FileLock>, CartridgeError> {
        let path = self.record_path(source, id)?.with_extension("lock");
        fs::create_dir_all(self.names(source)).map_err(|e| io("prepare", &e))?;
        FileLock::acquire_removed(&path, patience, stopped).map_err(|e| io("lock", &e))
    }

    /// The download of `id` that was cut off while it fetched the same (`origin`), or a new one. Whoever calls
    /// this holds the lock of the name.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`], [`CartridgeError::Io`].
    pub fn partial(
        &self,
        source: Source,
        id: &str,
        origin: &str,
    ) -> Result<Partial, CartridgeError> {
        let name = format!("{source}-{}", record::file_stem(id)?);
        Partial::open(&self.partials(), &name, origin)
    }

    /// Puts a finished download in its place, under its record, and makes room for it. Whoever calls this holds
    /// the lock of the name.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`], [`CartridgeError::Io`], [`CartridgeError::TooLarge`] for the budget. What
    /// the id stood for before is kept then.
    pub fn commit(
        &self,
        source: Source,
        finished: Finished,
        record: &Record,
    ) -> Result<(), CartridgeError> {
        let path = self.record_path(source, &record.id)?;
        let blobs = self.root.join("blobs");
        fs::create_dir_all(&blobs).map_err(|e| io("prepare", &e))?;
        let _lock = self.lock()?;
        self.make_room_for(record.size, Some(&record.digest))?;
        // Over an older file of the same content: if that one was damaged, this mends it.
        finished.move_to(&self.blob_path(&record.digest))?;
        record.write(&path)
    }

    /// Makes `record` what its id stands for, if its file is there already. False: it is not.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`], [`CartridgeError::Io`].
    pub fn adopt(&self, source: Source, record: &Record) -> Result<bool, CartridgeError> {
        let path = self.record_path(source, &record.id)?;
        let _lock = self.lock()?;
        if self.blob(record).is_none() {
            return Ok(false);
        }
        record.write(&path)?;
        Ok(true)
    }

    /// The record of any id with that file.
    pub fn with_digest(&self, digest: &str) -> Option<Record> {
        let mut records = self.records().into_iter().map(|(_, record)| record);
        records.find(|record| record.digest == digest)
    }

    fn lock(&self) -> Result<FileLock, CartridgeError> {
        fs::create_dir_all(&self.root).map_err(|e| io("prepare", &e))?;
        let patience = Duration::from_secs(limits::CACHE_LOCK_SECONDS);
        let lock = FileLock::acquire(&self.root.join("lock"), patience, &|| false);
        lock.map_err(|e| io("lock", &e))?.ok_or_else(|| CartridgeError::Busy {
            id: super::error::UNNAMED.to_owned(),
            reason: "another process holds the lock of the cartridge cache".to_owned(),
        })
    }

    fn names(&self, source: Source) -> PathBuf {
        self.root.join("names").join(source.to_string())
    }

    fn partials(&self) -> PathBuf {
        self.root.join("partial")
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.root.join("blobs").join(digest)
    }

    fn record_path(&self, source: Source, id: &str) -> Result<PathBuf, CartridgeError> {
        Ok(self.names(source).join(format!("{}.json", record::file_stem(id)?)))
    }
}

fn is_record(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}

fn remove_file(path: &Path) -> Result<(), CartridgeError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove a file from", &e)),
        _ => Ok(()),
    }
}

/// `doing` is followed by "the cartridge cache". What is there already is never lost by such an error.
pub(super) fn io(doing: &str, error: &std::io::Error) -> CartridgeError {
    let advice = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            "; free some space, lower --cartridge-cache-gb, or name another --cartridge-cache-dir"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem | ErrorKind::NotADirectory => {
            "; name a folder that can be written with --cartridge-cache-dir"
        }
        _ => "",
    };
    CartridgeError::Io {
        name: super::error::UNNAMED.to_owned(),
        kind: error.kind(),
        reason: format!("failed to {doing} the cartridge cache: {error}{advice}"),
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
