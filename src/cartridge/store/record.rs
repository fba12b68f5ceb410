//! What the cache knows of one id.

use std::{
    fs::File,
    io::{Read, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{hex, io};
use crate::{
    cartridge::{CartridgeError, folder_name, write_atomically},
    limits,
};

/// Bytes of an id's readable part in a file name. With hash and endings it stays below the 255 that common
/// file systems take.
const READABLE_BYTES: usize = 180;

/// Which file an id stands for, and where that came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    pub digest: String,
    /// Bytes.
    pub size: u64,
    /// Name of the file at its source.
    pub file: String,
    /// Its address, without query or credentials.
    pub from: String,
    /// Commit or state at the source, where it names one.
    pub revision: Option<String>,
    /// The source's name for this content.
    pub etag: Option<String>,
    /// Milliseconds since 1970.
    pub fetched_at: u64,
    /// Digest of the cartridge in the file ([`crate::cartridge::Generation`]): a file that rots is found out
    /// when it is read.
    pub generation: String,
    pub tokens: usize,
    /// Text of the `config.yaml` beside the file.
    pub config_yaml: Option<String>,
}

impl Record {
    /// `None` for what is no record: then the id counts as not fetched.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let mut text = String::new();
        let limit = limits::MAX_CACHE_RECORD_BYTES;
        let read = File::open(path).ok()?.take(limit + 1).read_to_string(&mut text);
        let record = match read {
            Ok(bytes) if bytes as u64 <= limit => serde_json::from_str::<Self>(&text).ok(),
            _ => None,
        };
        let is_digest =
            |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let record = record.filter(|r| is_digest(&r.digest) && is_digest(&r.generation));
        if record.is_none() {
            let name = path.file_name().unwrap_or_default();
            tracing::warn!(?name, "a record of the cartridge cache cannot be read and is ignored");
        }
        record
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), CartridgeError> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| io("write to", &std::io::Error::other(e)))?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| io("prepare", &e))?;
        }
        write_atomically(path, |file| file.write_all(&text).map_err(|e| io("write to", &e)))
    }
}

/// The name of an id's files. Ids that are written alike as folders differ in the hash.
pub(super) fn file_stem(id: &str) -> Result<String, CartridgeError> {
    let mut readable = folder_name(id)?;
    while readable.len() > READABLE_BYTES {
        readable.pop();
    }
    let hash = hex(&Sha256::digest(id.as_bytes())[..6]);
    Ok(format!("{readable}-{hash}"))
}
