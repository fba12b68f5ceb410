//! Parquet files of conversations, row by row.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::schema::types::{SchemaDescPtr, SchemaDescriptor, Type};

use super::parquet_check::{Budget, check_footer};
use super::{Conversation, DatasetError, parquet_fields};

/// The columns that are read; others cost nothing.
const COLUMNS: [&str; 4] = ["messages", "system_prompt", "metadata", "type"];
/// Rows whose values each column reader holds at once.
const BATCH_ROWS: usize = 8;

pub(super) struct ParquetRows {
    path: PathBuf,
    file: SerializedFileReader<File>,
    /// Of the columns that are read.
    schema: SchemaDescPtr,
    /// The next row group.
    group: usize,
    rows: Option<ReaderIter>,
    row: usize,
}

impl ParquetRows {
    /// # Errors
    /// [`DatasetError::Parquet`] when the file is damaged, lacks `messages`, or uses what is not read
    /// (a compression other than snappy, unusual encodings).
    pub fn open(path: &Path, file: File) -> Result<Self, DatasetError> {
        Self::check_and_open(path, file)
            .map_err(|reason| DatasetError::Parquet { path: path.to_owned(), reason })
    }

    fn check_and_open(path: &Path, file: File) -> Result<Self, String> {
        let io = |e: std::io::Error| e.to_string();
        let bytes = file.metadata().map_err(io)?.len();
        check_footer(&file, bytes)?;
        let raw = file.try_clone().map_err(io)?;
        let file = guarded(|| SerializedFileReader::new(file))?;
        let schema = guarded(|| project(file.metadata().file_metadata().schema()))?;
        if !schema.root_schema().get_fields().iter().any(|f| f.name() == "messages") {
            let found = file.metadata().file_metadata().schema().get_fields();
            let found: Vec<&str> = found.iter().take(16).map(|f| f.name()).collect();
            return Err(format!(
                "has no column `messages` (it has: {}); it is no dataset of conversations",
                found.join(", ")
            ));
        }
        let mut budget = Budget::new(bytes);
        for group in file.metadata().row_groups() {
            for column in group.columns() {
                let name = column.column_path().parts().first();
                if !name.is_some_and(|name| COLUMNS.contains(&name.as_str())) {
                    continue;
                }
                let codec = column.compression();
                if !matches!(codec, Compression::SNAPPY | Compression::UNCOMPRESSED) {
                    return Err(format!(
                        "is compressed with {codec}; write it with snappy or without compression"
                    ));
                }
                let (start, length) = guarded(|| Ok(column.byte_range()))?;
                budget.check_chunk(&raw, start, length)?;
            }
        }
        Ok(Self { path: path.to_owned(), file, schema, group: 0, rows: None, row: 0 })
    }

    fn next_row(&mut self) -> Result<Option<parquet::record::Row>, String> {
        loop {
            if let Some(rows) = &mut self.rows
                && let Some(row) = guarded(|| rows.next().transpose())?
            {
                return Ok(Some(row));
            }
            if self.group == self.file.num_row_groups() {
                return Ok(None);
            }
            let (file, schema, group) = (&self.file, &self.schema, self.group);
            self.rows = Some(guarded(|| {
                let group = file.get_row_group(group)?;
                TreeBuilder::new()
                    .with_batch_size(BATCH_ROWS)
                    .as_iter(schema.clone(), group.as_ref())
            })?);
            self.group += 1;
        }
    }
}

impl Iterator for ParquetRows {
    type Item = Result<(usize, Conversation), DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = match self.next_row() {
            Ok(row) => row?,
            Err(reason) => {
                return Some(Err(DatasetError::Parquet { path: self.path.clone(), reason }));
            }
        };
        self.row += 1;
        let conversation = parquet_fields::conversation(&row);
        let error = |error| DatasetError::Row { path: self.path.clone(), row: self.row, error };
        Some(conversation.map(|c| (self.row, c)).map_err(error))
    }
}

/// The schema without the columns that are not read.
fn project(schema: &Type) -> Result<SchemaDescPtr, ParquetError> {
    let fields = schema.get_fields().iter().filter(|f| COLUMNS.contains(&f.name()));
    let root = Type::group_type_builder(schema.name()).with_fields(fields.cloned().collect());
    Ok(Arc::new(SchemaDescriptor::new(Arc::new(root.build()?))))
}

/// Runs a part of the Parquet crate, which asserts what it expects of a file in many places.
fn guarded<T>(run: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    // What a panic leaves half done is not used again: the reader ends with this error.
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| format!("cannot be read as Parquet: {e}")),
        Err(_) => Err("contradicts itself, as a damaged Parquet file does".to_owned()),
    }
}
