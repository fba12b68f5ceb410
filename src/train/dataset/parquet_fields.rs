//! From the Parquet crate's values to a conversation.

use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use super::conversation::RawMessage;
use super::{Conversation, RowError, TopLogprobs};

/// A row with the columns of Gen-2; all of them may be null or missing but `messages`.
pub(super) fn conversation(row: &Row) -> Result<Conversation, RowError> {
    let messages = list(get(row, "messages"), "messages")?.unwrap_or_default();
    let messages = messages.iter().map(message).collect::<Result<Vec<_>, _>>()?;
    Conversation::from_raw(
        messages,
        text(get(row, "system_prompt"), "system_prompt")?,
        text(get(row, "type"), "type")?,
        match get(row, "metadata") {
            None => Value::Null,
            Some(field) => json(field),
        },
    )
}

fn message(field: &Field) -> Result<RawMessage, RowError> {
    let Field::Group(row) = field else {
        return match field {
            Field::Null => Ok(RawMessage::default()),
            other => Err(wrong("messages", other, "a list of structs")),
        };
    };
    let ids = list(get(row, "token_ids"), "token_ids")?;
    Ok(RawMessage {
        role: text(get(row, "role"), "role")?,
        content: text(get(row, "content"), "content")?,
        token_ids: ids.map(|ids| integers(ids, "token_ids")).transpose()?,
        top_logprobs: match get(row, "top_logprobs") {
            None => None,
            Some(Field::Group(top)) => top_logprobs(top)?,
            Some(other) => {
                let wanted = "a struct of token_idx, token_id, logprobs and shape";
                return Err(wrong("top_logprobs", other, wanted));
            }
        },
    })
}

/// `None` when all of its members are null, as some writers have a struct that is not there.
fn top_logprobs(row: &Row) -> Result<Option<Result<TopLogprobs, String>>, RowError> {
    let part = |name| list(get(row, name), name);
    let parts = (part("token_idx")?, part("token_id")?, part("logprobs")?);
    let (Some(positions), Some(ids), Some(logprobs)) = parts else {
        let missing = "lacks token_idx, token_id or logprobs".to_owned();
        let none = parts.0.is_none() && parts.1.is_none() && parts.2.is_none();
        return Ok((!none).then_some(Err(missing)));
    };
    let shape = part("shape")?.map(|shape| integers(shape, "shape")).transpose()?;
    let logprobs = logprobs
        .iter()
        .map(|field| match field {
            Field::Float(x) => Ok(*x),
            Field::Double(x) => Ok(*x as f32),
            Field::Float16(x) => Ok(f32::from(*x)),
            Field::Null => Ok(f32::NEG_INFINITY),
            other => Err(wrong("logprobs", other, "a list of floats")),
        })
        .collect::<Result<Vec<f32>, _>>()?;
    let (positions, ids) = (integers(positions, "token_idx")?, integers(ids, "token_id")?);
    Ok(Some(TopLogprobs::flat(&positions, &ids, &logprobs, shape.as_deref())))
}

/// The column, unless it is null or missing.
fn get<'a>(row: &'a Row, name: &str) -> Option<&'a Field> {
    let (_, field) = row.get_column_iter().find(|(column, _)| *column == name)?;
    Some(field).filter(|field| !matches!(field, Field::Null))
}

fn list<'a>(field: Option<&'a Field>, name: &'static str) -> Result<Option<&'a [Field]>, RowError> {
    match field {
        None => Ok(None),
        Some(Field::ListInternal(list)) => Ok(Some(list.elements())),
        Some(other) => Err(wrong(name, other, "a list")),
    }
}

fn text(field: Option<&Field>, name: &'static str) -> Result<Option<String>, RowError> {
    match field {
        None => Ok(None),
        Some(Field::Str(text)) => Ok(Some(text.clone())),
        Some(other) => Err(wrong(name, other, "a string")),
    }
}

fn integers(fields: &[Field], name: &'static str) -> Result<Vec<i64>, RowError> {
    let number =
        |field: &Field| integer(field).ok_or_else(|| wrong(name, field, "a list of integers"));
    fields.iter().map(number).collect()
}

fn integer(field: &Field) -> Option<i64> {
    Some(match field {
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => *n,
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => i64::try_from(*n).ok()?,
        _ => return None,
    })
}

fn wrong(field: &'static str, found: &Field, wanted: &'static str) -> RowError {
    let found = match found {
        Field::Null => "null",
        Field::Bool(_) => "a bool",
        Field::Float(_) | Field::Double(_) | Field::Float16(_) => "a float",
        Field::Str(_) => "a string",
        Field::Bytes(_) => "binary",
        Field::Group(_) => "a struct",
        Field::ListInternal(_) => "a list",
        Field::MapInternal(_) => "a map",
        other if integer(other).is_some() => "an integer",
        _ => "of another type",
    };
    RowError::Type { field, found, wanted }
}

/// Any value. Null members are left out: in a struct column they stand for members of other rows.
fn json(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(x) => Value::Bool(*x),
        Field::Str(text) => Value::String(text.clone()),
        Field::Float(x) => Value::from(*x),
        Field::Double(x) => Value::from(*x),
        Field::ULong(x) => Value::from(*x),
        Field::Group(row) => {
            let members = row.get_column_iter().map(|(name, field)| (name.clone(), json(field)));
            Value::Object(members.filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>())
        }
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        Field::MapInternal(map) => {
            map.entries().iter().map(|(k, v)| (k.to_string(), json(v))).collect()
        }
        other => match integer(other) {
            Some(n) => Value::from(n),
            // Dates, decimals, bytes: as the crate prints them.
            None => Value::String(other.to_string()),
        },
    }
}
