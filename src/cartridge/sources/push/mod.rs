//! Publishing: files of a cartridge into a repository of the hub or a run of Weights & Biases.

mod hub;
mod wandb;

use std::{fs::File, io::Read, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};

use crate::cartridge::{CartridgeError, store::hex};

/// Bytes of a file's beginning that the hub looks at to decide where it goes.
const SAMPLE_BYTES: u64 = 512;

/// One file to publish.
#[derive(Debug)]
pub struct Piece {
    /// Name at the target.
    pub name: String,
    content: PieceContent,
    /// Bytes.
    size: u64,
    /// 64 hexadecimal digits.
    sha256: String,
}

#[derive(Debug)]
enum PieceContent {
    Text(Vec<u8>),
    File(File),
}

impl Piece {
    pub fn text(name: &str, text: String) -> Self {
        let (size, sha256) = (text.len() as u64, hex(&Sha256::digest(&text)));
        Self { name: name.to_owned(), content: PieceContent::Text(text.into_bytes()), size, sha256 }
    }

    /// Reads the file once, for its digest.
    ///
    /// # Errors
    /// [`CartridgeError::Io`].
    pub fn file(name: &str, path: &Path) -> Result<Self, CartridgeError> {
        let failed = |e| CartridgeError::io("read the file", &e).named(name);
        let mut file = File::open(path).map_err(failed)?;
        let (mut digest, mut size, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 18]);
        loop {
            match file.read(&mut buffer).map_err(failed)? {
                0 => break,
                n => digest.update(&buffer[..n]),
            }
            size = std::io::Seek::stream_position(&mut file).map_err(failed)?;
        }
        let sha256 = hex(&digest.finalize());
        Ok(Self { name: name.to_owned(), content: PieceContent::File(file), size, sha256 })
    }

    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The first bytes, in Base64.
    fn sample(&self) -> Result<String, CartridgeError> {
        self.base64(SAMPLE_BYTES)
    }

    fn base64(&self, most: u64) -> Result<String, CartridgeError> {
        let failed = |e| CartridgeError::io("read the file", &e).named(&self.name);
        Ok(match &self.content {
            PieceContent::Text(text) => STANDARD
                .encode(&text[..text.len().min(usize::try_from(most).unwrap_or(usize::MAX))]),
            PieceContent::File(file) => {
                let (mut file, mut bytes) = (file, Vec::new());
                std::io::Seek::rewind(&mut file).map_err(failed)?;
                file.take(most).read_to_end(&mut bytes).map_err(failed)?;
                STANDARD.encode(bytes)
            }
        })
    }

    /// A part of it, to be sent.
    fn part(&self, from: u64, bytes: u64) -> super::transfer::Content<'_> {
        match &self.content {
            PieceContent::Text(text) => {
                let at = |n: u64| usize::try_from(n).map_or(text.len(), |n| n.min(text.len()));
                super::transfer::Content::Bytes(&text[at(from)..at(from.saturating_add(bytes))])
            }
            PieceContent::File(file) => {
                let bytes = bytes.min(self.size.saturating_sub(from));
                super::transfer::Content::File(file, from, bytes)
            }
        }
    }
}
