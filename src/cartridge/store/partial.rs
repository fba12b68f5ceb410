//! Downloads under way. One that is cut off stays, and goes on where it stopped.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use md5::Md5;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::io as failed;
use crate::cartridge::{CartridgeError, format::sync_folder, write_atomically};

/// What a partial file is part of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// Which content was asked for.
    origin: String,
    /// Its strong ETag: only the same content continues it.
    validator: Option<String>,
}

/// A file that is being downloaded, digested as it comes.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    note_path: PathBuf,
    note: Note,
    file: File,
    len: u64,
    sha256: Sha256,
    md5: Md5,
}

/// A complete download, synchronised to disk.
#[derive(Debug)]
pub struct Finished {
    path: PathBuf,
    note_path: PathBuf,
    /// Bytes.
    pub len: u64,
    pub sha256: [u8; 32],
    pub md5: [u8; 16],
}

impl Partial {
    pub(super) fn open(folder: &Path, name: &str, origin: &str) -> Result<Self, CartridgeError> {
        fs::create_dir_all(folder).map_err(|e| failed("prepare", &e))?;
        let path = folder.join(format!("{name}.part"));
        let note_path = folder.join(format!("{name}.json"));
        let old = fs::read(&note_path).ok();
        let old = old.and_then(|text| serde_json::from_slice::<Note>(&text).ok());
        let options = File::options().read(true).append(true).create(true).open(&path);
        let file = options.map_err(|e| failed("write to", &e))?;
        let note = Note { origin: origin.to_owned(), validator: None };
        let (sha256, md5) = (Sha256::new(), Md5::new());
        let mut partial = Self { path, note_path, note, file, len: 0, sha256, md5 };
        match old.filter(|old| old.origin == origin) {
            Some(old) => {
                partial.note = old;
                partial.digest_again().map_err(|e| failed("read", &e))?;
            }
            None => partial.restart(None)?,
        }
        Ok(partial)
    }

    /// What is there already counts into the digests.
    fn digest_again(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 18];
        let mut file = File::open(&self.path)?;
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                n => self.count(&buffer[..n]),
            }
        }
    }

    fn count(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        self.md5.update(bytes);
        self.len += bytes.len() as u64;
    }

    /// Bytes that are there.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// ETag of the content it is part of.
    pub fn validator(&self) -> Option<&str> {
        self.note.validator.as_deref()
    }

    /// Begins again, with content of that ETag.
    ///
    /// # Errors
    /// [`CartridgeError::Io`].
    pub fn restart(&mut self, validator: Option<&str>) -> Result<(), CartridgeError> {
        // First the bytes: after a crash in between, none are there that belong to another content.
        self.file.set_len(0).map_err(|e| failed("write to", &e))?;
        (self.sha256, self.md5, self.len) = (Sha256::new(), Md5::new(), 0);
        self.note.validator = validator.map(str::to_owned);
        let note =
            serde_json::to_vec(&self.note).map_err(|e| failed("write to", &io::Error::other(e)))?;
        write_atomically(&self.note_path, |file| {
            file.write_all(&note).map_err(|e| failed("write to", &e))
        })
    }

    /// Appends.
    ///
    /// # Errors
    /// [`CartridgeError::Io`]. On a full disk the download is given up, so that it does not stand in the way
    /// of others.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CartridgeError> {
        if let Err(error) = self.file.write_all(bytes) {
            let full = matches!(
                error.kind(),
                io::ErrorKind::StorageFull
                    | io::ErrorKind::QuotaExceeded
                    | io::ErrorKind::FileTooLarge
            );
            if full {
                self.remove();
            }
            return Err(failed("write to", &error));
        }
        self.count(bytes);
        Ok(())
    }

    /// Ends a complete download.
    ///
    /// # Errors
    /// [`CartridgeError::Io`].
    pub fn finish(self) -> Result<Finished, CartridgeError> {
        self.file.sync_all().map_err(|e| failed("write to", &e))?;
        Ok(Finished {
            path: self.path,
            note_path: self.note_path,
            len: self.len,
            sha256: self.sha256.finalize().into(),
            md5: self.md5.finalize().into(),
        })
    }

    /// Digests of what is there.
    pub fn digests(&self) -> ([u8; 32], [u8; 16]) {
        (self.sha256.clone().finalize().into(), self.md5.clone().finalize().into())
    }

    /// Removes it: nothing of it is of use.
    pub fn discard(self) {
        self.remove();
    }

    fn remove(&self) {
        // What cannot be removed now is removed by age.
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(&self.note_path);
    }
}

impl Finished {
    /// Opens it for reading.
    ///
    /// # Errors
    /// [`CartridgeError::Io`].
    pub fn open(&self) -> Result<File, CartridgeError> {
        File::open(&self.path).map_err(|e| failed("read", &e))
    }

    /// Removes it: it is no cartridge.
    pub fn discard(self) {
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(&self.note_path);
    }

    pub(super) fn move_to(self, path: &Path) -> Result<(), CartridgeError> {
        fs::rename(&self.path, path).map_err(|e| failed("write to", &e))?;
        sync_folder(path.parent().unwrap_or(path)).map_err(|e| failed("write to", &e))?;
        let _ = fs::remove_file(&self.note_path);
        Ok(())
    }
}
