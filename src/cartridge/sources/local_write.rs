//! Changes of the cartridge directory: files are replaced as a whole or not at all, and what was put there
//! counts.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use super::super::{
    CartridgeError,
    format::{sync_folder, write_atomically},
    sanitize::folder_name,
};
use super::{
    LocalFolder, Stamp,
    local::{ID_RECORD, check_id_record, not_found},
};
use crate::limits;

const UPLOAD_PREFIX: &str = ".upload-";
/// Locked by whoever changes files, so that processes that share the directory take turns.
const LOCK_FILE: &str = ".changes.lock";
const CONFIG: &str = "config.yaml";

/// What takes the place of a cartridge's files.
pub(in super::super) struct NewFiles<'a> {
    /// A whole file in the cartridge directory, already on disk.
    pub cartridge: &'a Path,
    pub is_zip: bool,
    pub config_yaml: &'a str,
}

impl LocalFolder {
    /// An empty file in the directory, which is made if there is none. Uploads that were abandoned long ago,
    /// by a process that ended, are removed.
    pub(in super::super) fn upload_file(&self) -> Result<(File, PathBuf), CartridgeError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let failed = |e| CartridgeError::io("make a file in the cartridge directory", &e);
        fs::create_dir_all(&self.dir).map_err(failed)?;
        self.remove_abandoned_uploads();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.join(format!("{UPLOAD_PREFIX}{}-{number}.tmp", std::process::id()));
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path).map_err(failed)?;
        Ok((file, path))
    }

    fn remove_abandoned_uploads(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        let old = Duration::from_secs(limits::ABANDONED_UPLOAD_SECONDS);
        for entry in entries.flatten() {
            let is_upload = entry.file_name().to_string_lossy().starts_with(UPLOAD_PREFIX);
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let age = modified.ok().and_then(|at| SystemTime::now().duration_since(at).ok());
            if is_upload && age.is_some_and(|age| age > old) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Keeps other processes from changing the directory until it is dropped. Blocks.
    pub(in super::super) fn lock(&self) -> Result<File, CartridgeError> {
        let mut options = fs::OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(self.dir.join(LOCK_FILE));
        let locked = file.and_then(|file| file.lock().map(|()| file));
        locked.map_err(|e| CartridgeError::io("lock the cartridge directory", &e))
    }

    /// Gives `id` other files. Until the last step readers find the old cartridge, then the new one, also
    /// after a crash. Checkpoints of a training run (`cache-step*.pt`) stay; they count for less.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`] for a folder that belongs to another id, or is a link.
    pub(in super::super) fn replace(
        &self,
        id: &str,
        files: &NewFiles<'_>,
    ) -> Result<Stamp, CartridgeError> {
        let failed = |e| CartridgeError::io("write the file", &e);
        let folder = self.own_folder(id)?;
        fs::create_dir_all(&folder).map_err(failed)?;
        let write = |name: &str, text: &str| {
            write_atomically(&folder.join(name), |file| {
                file.write_all(text.as_bytes()).map_err(failed)
            })
        };
        // The record first: from now on an id that is written alike gets an error, not this cartridge.
        write(ID_RECORD, id)?;
        write(CONFIG, files.config_yaml)?;
        let names = ["cartridge.pt", "cartridge.safetensors"];
        let (name, other) = if files.is_zip { (names[0], names[1]) } else { (names[1], names[0]) };
        let path = folder.join(name);
        let opened = File::open(files.cartridge).map_err(failed)?;
        fs::rename(files.cartridge, &path).map_err(failed)?;
        sync_folder(&folder).map_err(failed)?;
        if remove(&folder.join(other))? {
            sync_folder(&folder).map_err(failed)?;
        }
        // Of the very file, even if another one took its place in the meantime.
        opened.metadata().map(|metadata| Stamp::from(&metadata)).map_err(failed)
    }

    /// Removes what makes `id` a cartridge: every file that could be taken for one, each `.pt`, and its
    /// folder if nothing else is in it. Readers find what they found before until the last step, then nothing.
    pub(in super::super) fn remove(&self, id: &str) -> Result<(), CartridgeError> {
        let present = match self.locate(id) {
            Ok(Some((_, present))) => present,
            Ok(None) => return Err(not_found(id)),
            // Several files, none of which counts.
            Err(CartridgeError::Invalid { .. }) => PathBuf::new(),
            Err(error) => return Err(error),
        };
        let folder = self.dir.join(folder_name(id)?);
        check_id_record(&folder, id)?;
        if is_link(&folder) {
            // The name of another folder, not the folder.
            remove(&folder)?;
            return Ok(());
        }
        let failed = |e| CartridgeError::io("remove the file", &e);
        let mut last = None;
        for entry in fs::read_dir(&folder).map_err(failed)?.flatten() {
            let name = entry.file_name();
            let is_cartridge =
                |name: &str| name.ends_with(".pt") || name == "cartridge.safetensors";
            if !name.to_str().is_some_and(is_cartridge) {
                continue;
            }
            if entry.path().canonicalize().is_ok_and(|path| path == present) {
                last = Some(entry.path());
            } else {
                remove(&entry.path())?;
            }
        }
        for path in [last, Some(folder.join(CONFIG)), Some(folder.join(ID_RECORD))] {
            path.map_or(Ok(false), |path| remove(&path))?;
        }
        match fs::remove_dir(&folder) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => sync_folder(&folder),
            other => other.and_then(|()| sync_folder(&self.dir)),
        }
        .map_err(failed)
    }

    /// The folder that files of `id` go to.
    fn own_folder(&self, id: &str) -> Result<PathBuf, CartridgeError> {
        let folder = self.dir.join(folder_name(id)?);
        if is_link(&folder) {
            let reason = "its folder is a link; publish to the id of the folder it leads to";
            return Err(CartridgeError::InvalidId { id: id.to_owned(), reason: reason.to_owned() });
        }
        check_id_record(&folder, id)?;
        Ok(folder)
    }
}

fn is_link(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink())
}

/// Whether there was something to remove.
fn remove(path: &Path) -> Result<bool, CartridgeError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(CartridgeError::io("remove the file", &e)),
    }
}
