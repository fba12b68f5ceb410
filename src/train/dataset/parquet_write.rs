//! Writes conversations as the Parquet files of Gen-2's self-study: same columns, same types, snappy.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, LogicalType, Repetition, Type as Physical};
use parquet::data_type::{
    BoolType, ByteArray, ByteArrayType, DataType, DoubleType, FloatType, Int32Type, Int64Type,
};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::{Type, TypePtr};
use serde_json::Value;

use super::{Conversation, DatasetError, Message};

/// Rows of a row group: what is in memory twice while it is written.
const GROUP_ROWS: usize = 1000;
/// Different keys of metadata, each of which becomes a column.
const MAX_METADATA_KEYS: usize = 128;

const SCHEMA: &str = "message schema {
  optional group messages (LIST) { repeated group list { optional group element {
    optional binary content (STRING);
    optional binary role (STRING);
    optional group token_ids (LIST) { repeated group list { optional int64 element; } }
    optional group top_logprobs {
      optional group token_idx (LIST) { repeated group list { optional int64 element; } }
      optional group token_id (LIST) { repeated group list { optional int32 element; } }
      optional group logprobs (LIST) { repeated group list { optional float element; } }
      optional group shape (LIST) { repeated group list { optional int64 element; } }
    }
  } } }
  optional binary system_prompt (STRING);
  optional binary type (STRING);
}";

/// Definition levels of the schema: how much of a path is there.
const NO_MESSAGE: i16 = 1;
const SCALAR: i16 = 4;
/// Of the lists `token_ids`, and those inside of `top_logprobs`.
const TOKEN_IDS: ListLevels = ListLevels { missing: 3, empty: 4, item: 6 };
const TOP_LOGPROBS: ListLevels = ListLevels { missing: 3, empty: 5, item: 7 };

/// Writes a file that [`super::DatasetReader`] reads back, and so does Gen-2.
///
/// The members of `metadata` become columns of one struct: strings, bools, integers and floats as they are,
/// everything else, and members whose type changes between rows, as JSON text.
///
/// The file appears under its name when it is complete.
///
/// # Errors
/// [`DatasetError::Io`]; [`DatasetError::Empty`] without conversations; [`DatasetError::TooLarge`] for too
/// many different metadata keys; [`DatasetError::Parquet`] for what the format cannot hold.
pub fn write_parquet(path: &Path, conversations: &[Conversation]) -> Result<(), DatasetError> {
    if conversations.is_empty() {
        return Err(DatasetError::Empty { path: path.to_owned() });
    }
    let metadata = metadata_columns(conversations);
    if metadata.len() > MAX_METADATA_KEYS {
        let (what, limit) = ("different keys in `metadata`", MAX_METADATA_KEYS as u64);
        return Err(DatasetError::TooLarge { path: path.to_owned(), what, limit });
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let io = |source| DatasetError::Io { path: path.to_owned(), source };
    let file = File::create(partial).map_err(io)?;
    let written = write(file, conversations, &metadata);
    let renamed = match written {
        Ok(()) => std::fs::rename(partial, path).map_err(io),
        Err(e) => Err(DatasetError::Parquet {
            path: path.to_owned(),
            reason: format!("cannot be written: {e}"),
        }),
    };
    if renamed.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(partial);
    }
    renamed
}

fn write(
    file: File,
    conversations: &[Conversation],
    metadata: &BTreeMap<&str, Kind>,
) -> Result<(), ParquetError> {
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let mut writer = SerializedFileWriter::new(file, schema(metadata)?, Arc::new(properties))?;
    for rows in conversations.chunks(GROUP_ROWS) {
        let mut group = writer.next_row_group()?;
        write_rows(&mut Group { group: &mut group, rows }, metadata)?;
        group.close()?;
    }
    writer.into_inner()?.sync_all()?;
    Ok(())
}

/// The columns in the order of the schema.
fn write_rows(group: &mut Group, metadata: &BTreeMap<&str, Kind>) -> Result<(), ParquetError> {
    let longs = |n: &[u32]| -> Vec<i64> { n.iter().map(|&n| n.into()).collect() };
    group.text(|m| &m.content)?;
    group.text(|m| &m.role)?;
    group.list::<Int64Type>(TOKEN_IDS, |m| m.token_ids.as_deref().map(longs))?;
    group.list::<Int64Type>(TOP_LOGPROBS, |m| {
        m.top_logprobs.as_ref().map(|top| longs(top.positions()))
    })?;
    group.list::<Int32Type>(TOP_LOGPROBS, |m| {
        // Vocabularies are far below 2^31; the column's type is Gen-2's.
        m.top_logprobs.as_ref().map(|top| top.ids().iter().map(|&id| id as i32).collect())
    })?;
    group.list::<FloatType>(TOP_LOGPROBS, |m| {
        m.top_logprobs.as_ref().map(|top| top.logprobs().to_vec())
    })?;
    group.list::<Int64Type>(TOP_LOGPROBS, |m| {
        m.top_logprobs.as_ref().map(|top| longs(&[top.tokens(), top.width()]))
    })?;
    group.row::<ByteArrayType>(1, |c| c.system_prompt.as_deref().map(ByteArray::from))?;
    group.row::<ByteArrayType>(1, |c| c.kind.as_deref().map(ByteArray::from))?;
    for (key, kind) in metadata {
        let value = |c: &Conversation| c.metadata.get(key).filter(|v| !v.is_null()).cloned();
        match kind {
            Kind::Bool => group.row::<BoolType>(2, |c| value(c)?.as_bool())?,
            Kind::Integer => group.row::<Int64Type>(2, |c| value(c)?.as_i64())?,
            Kind::Float => group.row::<DoubleType>(2, |c| value(c)?.as_f64())?,
            Kind::Text => group.row::<ByteArrayType>(2, |c| {
                Some(match value(c)? {
                    Value::String(text) => ByteArray::from(text.into_bytes()),
                    other => ByteArray::from(other.to_string().into_bytes()),
                })
            })?,
        }
    }
    Ok(())
}

/// A row group and the rows that go into it.
struct Group<'a, 'w> {
    group: &'a mut SerializedRowGroupWriter<'w, File>,
    rows: &'a [Conversation],
}

#[derive(Clone, Copy)]
struct ListLevels {
    missing: i16,
    empty: i16,
    item: i16,
}

/// The values of one column with their levels.
struct Column<T> {
    values: Vec<T>,
    definition: Vec<i16>,
    repetition: Vec<i16>,
}

impl<T> Column<T> {
    fn new() -> Self {
        Self { values: Vec::new(), definition: Vec::new(), repetition: Vec::new() }
    }

    fn push(&mut self, value: Option<T>, definition: i16, repetition: i16) {
        self.values.extend(value);
        self.definition.push(definition);
        self.repetition.push(repetition);
    }
}

impl Group<'_, '_> {
    /// A member of every message.
    fn text(&mut self, get: impl Fn(&Message) -> &str) -> Result<(), ParquetError> {
        let mut column = Column::new();
        for (message, repetition) in messages(self.rows) {
            match message {
                Some(m) => column.push(Some(ByteArray::from(get(m))), SCALAR, repetition),
                None => column.push(None, NO_MESSAGE, repetition),
            }
        }
        self.write::<ByteArrayType>(&column, true)
    }

    /// A list in every message, or none.
    fn list<T: DataType>(
        &mut self,
        levels: ListLevels,
        get: impl Fn(&Message) -> Option<Vec<T::T>>,
    ) -> Result<(), ParquetError> {
        let mut column = Column::new();
        for (message, repetition) in messages(self.rows) {
            let Some(message) = message else {
                column.push(None, NO_MESSAGE, repetition);
                continue;
            };
            match get(message) {
                None => column.push(None, levels.missing, repetition),
                Some(items) if items.is_empty() => column.push(None, levels.empty, repetition),
                Some(items) => {
                    for (index, item) in items.into_iter().enumerate() {
                        column.push(
                            Some(item),
                            levels.item,
                            if index == 0 { repetition } else { 2 },
                        );
                    }
                }
            }
        }
        self.write::<T>(&column, true)
    }

    /// A value of every row, or null; `definition` is the level of a value.
    fn row<T: DataType>(
        &mut self,
        definition: i16,
        get: impl Fn(&Conversation) -> Option<T::T>,
    ) -> Result<(), ParquetError> {
        let mut column = Column::new();
        for conversation in self.rows {
            let value = get(conversation);
            let level = match &value {
                Some(_) => definition,
                // Of metadata, the struct is there whenever the row has any.
                None => i16::from(definition == 2 && conversation.metadata.is_object()),
            };
            column.push(value, level, 0);
        }
        self.write::<T>(&column, false)
    }

    fn write<T: DataType>(
        &mut self,
        column: &Column<T::T>,
        lists: bool,
    ) -> Result<(), ParquetError> {
        let next = self.group.next_column()?;
        let mut writer = next.ok_or_else(|| ParquetError::General("no column left".to_owned()))?;
        let repetition = lists.then_some(&column.repetition[..]);
        writer.typed::<T>().write_batch(&column.values, Some(&column.definition), repetition)?;
        writer.close()
    }
}

/// Every message with its repetition level: 0 begins a row. `None` for a row without messages.
fn messages(rows: &[Conversation]) -> impl Iterator<Item = (Option<&Message>, i16)> {
    rows.iter().flat_map(|row| {
        let none = row.messages.is_empty().then_some((None, 0));
        let some = row.messages.iter().enumerate();
        some.map(|(index, message)| (Some(message), i16::from(index > 0))).chain(none)
    })
}

/// The type of a metadata column.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Bool,
    Integer,
    Float,
    Text,
}

/// The members of all rows' metadata, with a type that holds all of their values.
fn metadata_columns(conversations: &[Conversation]) -> BTreeMap<&str, Kind> {
    let mut columns: BTreeMap<&str, Option<Kind>> = BTreeMap::new();
    for (key, value) in conversations.iter().filter_map(|c| c.metadata.as_object()).flatten() {
        let known = columns.entry(key).or_default();
        let kind = match value {
            Value::Null => continue,
            Value::Bool(_) => Kind::Bool,
            Value::Number(n) if n.is_i64() => Kind::Integer,
            Value::Number(n) if n.is_f64() => Kind::Float,
            _ => Kind::Text,
        };
        let both = |known| if known == kind { kind } else { Kind::Text };
        *known = Some(known.map_or(kind, both));
    }
    if columns.is_empty() {
        // A struct needs a member: the one that rows of self-study have.
        columns.insert("seed_prompt", None);
    }
    columns.into_iter().map(|(key, kind)| (key, kind.unwrap_or(Kind::Text))).collect()
}

fn schema(metadata: &BTreeMap<&str, Kind>) -> Result<TypePtr, ParquetError> {
    let column = |(key, kind): (&&str, &Kind)| {
        let (physical, logical) = match kind {
            Kind::Bool => (Physical::BOOLEAN, None),
            Kind::Integer => (Physical::INT64, None),
            Kind::Float => (Physical::DOUBLE, None),
            Kind::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
        };
        let column = Type::primitive_type_builder(key, physical);
        let column = column.with_repetition(Repetition::OPTIONAL).with_logical_type(logical);
        column.build().map(Arc::new)
    };
    let members = metadata.iter().map(column).collect::<Result<Vec<_>, _>>()?;
    let metadata = Type::group_type_builder("metadata")
        .with_repetition(Repetition::OPTIONAL)
        .with_fields(members)
        .build()?;
    let fixed = parse_message_type(SCHEMA)?;
    let fields = fixed.get_fields().iter().cloned().chain([Arc::new(metadata)]).collect();
    Ok(Arc::new(Type::group_type_builder("schema").with_fields(fields).build()?))
}
