//! Opens a dataset file and reads it row by row.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use super::jsonl::JsonLines;
use super::parquet_read::ParquetRows;
use super::{Conversation, DatasetError};
use crate::limits::{MAX_DATASET_FILE_BYTES, MAX_DATASET_ROWS};

/// The first bytes of every Parquet file.
pub(super) const PARQUET_MAGIC: &[u8; 4] = b"PAR1";

/// The conversations of a file with their row numbers, from 1.
///
/// [`DatasetError::Row`] is about one row: the iterator goes on behind it. After any other error it ends.
pub struct DatasetReader {
    path: PathBuf,
    rows: Option<Rows>,
    count: usize,
}

enum Rows {
    JsonLines(JsonLines),
    Parquet(Box<ParquetRows>),
}

impl DatasetReader {
    /// Parquet is told by its first bytes; everything else is read as JSON lines.
    ///
    /// # Errors
    /// [`DatasetError`] when the file cannot be opened, is too large, or is Parquet that cannot be read.
    pub fn open(path: &Path) -> Result<Self, DatasetError> {
        let io = |source| DatasetError::Io { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(io)?;
        if !metadata.is_file() {
            return Err(DatasetError::NotAFile { path: path.to_owned() });
        }
        if metadata.len() > MAX_DATASET_FILE_BYTES {
            let limit = MAX_DATASET_FILE_BYTES;
            return Err(DatasetError::TooLarge { path: path.to_owned(), what: "bytes", limit });
        }
        let mut file = File::open(path).map_err(io)?;
        let mut magic = Vec::new();
        file.by_ref().take(4).read_to_end(&mut magic).map_err(io)?;
        file.rewind().map_err(io)?;
        let rows = if magic == PARQUET_MAGIC {
            Rows::Parquet(Box::new(ParquetRows::open(path, file)?))
        } else {
            Rows::JsonLines(JsonLines::new(path, file))
        };
        Ok(Self { path: path.to_owned(), rows: Some(rows), count: 0 })
    }
}

impl Iterator for DatasetReader {
    type Item = Result<(usize, Conversation), DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = match self.rows.as_mut()? {
            Rows::JsonLines(rows) => rows.next(),
            Rows::Parquet(rows) => rows.next(),
        };
        let path = || self.path.clone();
        let item = match item {
            None if self.count == 0 => Some(Err(DatasetError::Empty { path: path() })),
            Some(_) if self.count == MAX_DATASET_ROWS => Some(Err(DatasetError::TooLarge {
                path: path(),
                what: "conversations",
                limit: MAX_DATASET_ROWS as u64,
            })),
            item => item,
        };
        self.count += 1;
        if !matches!(item, Some(Ok(_) | Err(DatasetError::Row { .. }))) {
            self.rows = None;
        }
        item
    }
}
