//! JSON bodies: errors that say where, and the names of fields that nothing reads.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
    http::StatusCode,
};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny, Visitor, value::Error as ValueError},
};

use super::{blocking, error::ApiError};
use crate::limits;

/// The raw body, whatever its content type says (as the peers do; `curl -d` sends a form type).
pub struct Body(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let limit = limits::BODY_READ_SECONDS;
        let body = Bytes::from_request(request, state);
        let Ok(body) = tokio::time::timeout(Duration::from_secs(limit), body).await else {
            return Err(ApiError::body_timeout(limit));
        };
        match body {
            Ok(bytes) => Ok(Self(bytes)),
            Err(e) if e.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                Err(ApiError::body_too_large(limits::MAX_BODY_BYTES))
            }
            Err(e) => Err(ApiError::bad_request(format!("the body cannot be read: {e}"))),
        }
    }
}

impl Body {
    /// Parses the body, a large one off the async threads, and lets go of it.
    pub async fn read<T: Send + 'static>(
        self,
        parse: fn(&[u8]) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let Self(bytes) = self;
        let is_small = bytes.len() <= limits::MAX_INLINE_BODY_BYTES;
        let work = move || {
            check_values(&bytes)?;
            parse(&bytes)
        };
        if is_small { work() } else { blocking::run(work).await }
    }
}

/// Refuses a body of more values than memory should pay for, or of more levels than a stack, before any of them
/// is built, also where nothing reads them. Commas outside of strings and opening brackets are counted: every
/// value but the outermost comes after one of them.
pub fn check_values(json: &[u8]) -> Result<(), ApiError> {
    let (mut values, mut in_string, mut escaped) = (0usize, false, false);
    let (mut depth, mut deepest) = (0usize, 0);
    for &byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' if !in_string => values += 1,
            b'[' | b'{' if !in_string => {
                values += 1;
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    if deepest > limits::MAX_JSON_DEPTH {
        let limit = limits::MAX_JSON_DEPTH;
        return Err(ApiError::bad_request(format!("the body nests deeper than {limit} levels")));
    }
    if values > limits::MAX_JSON_VALUES {
        let limit = limits::MAX_JSON_VALUES;
        let message = format!("the body holds more than {limit} values (list items and members)");
        return Err(ApiError::bad_request(message));
    }
    Ok(())
}

/// Reads one struct from a JSON object. Keys that `T` does not have are skipped; see [`keys`].
pub fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, ApiError> {
    let mut de = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut de).map_err(|e| {
        let path = e.path().to_string();
        let inner = e.inner();
        if inner.is_syntax() || inner.is_eof() {
            ApiError::bad_request(format!("the body is not valid JSON: {inner}"))
        } else if path == "." {
            ApiError::bad_request(inner.to_string())
        } else {
            ApiError::invalid(path.clone(), format!("{path}: {inner}"))
        }
    })?;
    de.end().map_err(|e| ApiError::bad_request(format!("the body is not valid JSON: {e}")))?;
    Ok(value)
}

/// The keys of the top-level object that are in none of `known` and are not null, sorted.
pub fn unknown_keys(json: &[u8], known: &[&[&str]]) -> Result<Vec<String>, ApiError> {
    // `Option` tells null, which asks for nothing, from a value.
    let object: BTreeMap<String, Option<IgnoredAny>> = parse(json)?;
    let is_known = |key: &str| known.iter().any(|list| list.contains(&key));
    Ok(object.into_iter().filter(|(k, v)| v.is_some() && !is_known(k)).map(|(k, _)| k).collect())
}

/// The field names that `T`'s derived `Deserialize` knows, so that no second list can fall behind it.
pub fn field_names<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    struct Capture<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Capture<'_> {
        type Error = ValueError;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, ValueError> {
            Err(serde::de::Error::custom("only the field names are wanted"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, ValueError> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
            unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    // The capture always "fails"; what it leaves behind is the result.
    let _ = T::deserialize(Capture(&mut names));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[allow(dead_code)]
        id: String,
    }

    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    struct Sample {
        list: Option<Vec<Inner>>,
        #[serde(alias = "other")]
        number: Option<u32>,
    }

    #[test]
    fn names_come_from_the_struct() {
        let mut names = field_names::<Sample>().to_vec();
        names.sort();
        assert_eq!(names, ["list", "number", "other"]);
    }

    #[test]
    fn wrong_types_name_the_path() {
        let error = parse::<Sample>(br#"{"list":[{"id":"a"},{"id":3}]}"#).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("list[1].id"));
        assert!(error.message.contains("expected a string"), "{}", error.message);
        assert!(error.message.contains("line 1 column"), "{}", error.message);
    }

    #[test]
    fn syntax_errors_name_line_and_column() {
        for body in [&b"{\"number\": }"[..], b"{", b"", b"{} x", b"\xff"] {
            let error = parse::<Sample>(body).unwrap_err();
            assert!(error.message.contains("not valid JSON"), "{}", error.message);
            assert!(error.message.contains("line 1 column"), "{}", error.message);
        }
        let deep = "[".repeat(100_000);
        assert!(parse::<Sample>(format!("{{\"list\":{deep}").as_bytes()).is_err());
    }

    #[test]
    fn duplicate_fields_and_other_shapes_are_errors() {
        assert!(parse::<Sample>(br#"{"number":1,"number":2}"#).is_err());
        assert!(unknown_keys(b"[]", &[]).is_err());
        assert!(unknown_keys(b"3", &[]).is_err());
    }

    #[test]
    fn values_are_counted_outside_of_strings() {
        let many = |count: usize| format!("[{}0]", "0,".repeat(count));
        assert!(check_values(many(limits::MAX_JSON_VALUES - 1).as_bytes()).is_ok());
        assert!(check_values(many(limits::MAX_JSON_VALUES).as_bytes()).is_err());
        let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(check_values(nested(limits::MAX_JSON_DEPTH).as_bytes()).is_ok());
        assert!(check_values(nested(limits::MAX_JSON_DEPTH + 1).as_bytes()).is_err());
        let wide = format!("[{}0]", "[[]],".repeat(1000));
        assert!(check_values(wide.as_bytes()).is_ok());
        let text = format!(r#"{{"a":"{}"}}"#, r#",[{\\\","#.repeat(limits::MAX_JSON_VALUES));
        assert!(check_values(text.as_bytes()).is_ok());
    }

    #[test]
    fn unknown_keys_skip_nulls() {
        let json = br#"{"b":1,"number":2,"a":[1,{"x":2}],"c":null}"#;
        assert_eq!(unknown_keys(json, &[field_names::<Sample>()]).unwrap(), ["a", "b"]);
    }
}
