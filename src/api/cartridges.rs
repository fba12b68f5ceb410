//! Which cartridges a request names, in which order, and the routes that list them.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderValue, header::ETAG},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{
    AppState,
    access::Caller,
    blocking,
    error::{ApiError, etag},
    openai::reply::CartridgeUsed,
};
use crate::{
    cartridge::{CartridgeError, CartridgeInfo, CartridgeRef, Source},
    limits,
};

/// What the `model` of a request means on a server of one model.
#[derive(Debug, PartialEq)]
pub enum ModelName<'a> {
    /// The served model, or none named.
    Served,
    /// `<model>:<cartridge>`, or `:<cartridge>`.
    WithCartridge(&'a str),
    Other(&'a str),
}

impl<'a> ModelName<'a> {
    /// Splits at a `:` only after the served model's own name (which may hold one) or at the very start.
    pub fn parse(requested: Option<&'a str>, served: &str) -> Self {
        let Some(name) = requested else { return Self::Served };
        if name.eq_ignore_ascii_case(served) {
            return Self::Served;
        }
        let suffix = match name.strip_prefix(':') {
            Some(rest) => Some(rest),
            None => name
                .split_at_checked(served.len())
                .filter(|(start, _)| start.eq_ignore_ascii_case(served))
                .and_then(|(_, rest)| rest.strip_prefix(':')),
        };
        match suffix {
            Some(id) if !id.is_empty() => Self::WithCartridge(id),
            _ => Self::Other(name),
        }
    }
}

/// The cartridges of a request in the order they are attended to: the one in `model`, then those of
/// `<cartridge>` blocks or else the `cartridges` list. One named twice is attached once.
pub fn collect(
    suffix: Option<&str>,
    blocks: Vec<CartridgeRef>,
    list: Vec<CartridgeRef>,
    sort: bool,
) -> Result<Vec<CartridgeRef>, ApiError> {
    let suffix = suffix.map(|id| CartridgeRef {
        id: id.to_owned(),
        source: Source::Local,
        force_redownload: false,
    });
    let named = if blocks.is_empty() { list } else { blocks };
    let mut all: Vec<CartridgeRef> = Vec::new();
    for reference in suffix.into_iter().chain(named) {
        let same = |r: &CartridgeRef| r.id == reference.id && r.source == reference.source;
        match all.iter().position(same) {
            Some(seen) => all[seen].force_redownload |= reference.force_redownload,
            None if all.len() == limits::MAX_CARTRIDGES_PER_REQUEST => {
                let limit = limits::MAX_CARTRIDGES_PER_REQUEST;
                let message = format!("a request attaches at most {limit} cartridges");
                return Err(ApiError::invalid("cartridges", message));
            }
            None => all.push(reference),
        }
    }
    for (i, reference) in all.iter().enumerate() {
        if reference.id.is_empty() || reference.id.len() > limits::MAX_CARTRIDGE_ID_BYTES {
            let limit = limits::MAX_CARTRIDGE_ID_BYTES;
            let message = format!("a cartridge id has 1 to {limit} bytes");
            return Err(ApiError::invalid(format!("cartridges[{i}].id"), message));
        }
    }
    if sort {
        all.sort_by(|a, b| a.id.cmp(&b.id));
    }
    Ok(all)
}

/// `x-cartouche-cartridges`: `id@generation`, comma separated; bytes that a header cannot hold, and the
/// separators, are percent-encoded. What does not fit is left out and the list ends in `...`; the body has
/// them all.
pub fn header(used: &[CartridgeUsed]) -> Option<HeaderValue> {
    let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b',' | b'@' | b'%');
    let encode = |text: &str| {
        let byte = |b: u8| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") };
        text.bytes().map(byte).collect::<String>()
    };
    let mut value = String::new();
    for cartridge in used {
        let item = format!("{}@{}", encode(&cartridge.id), cartridge.generation);
        let separator = if value.is_empty() { "" } else { "," };
        if value.len() + separator.len() + item.len() > limits::MAX_ECHO_HEADER_BYTES {
            value += separator;
            value += "...";
            break;
        }
        value += separator;
        value += &item;
    }
    if value.is_empty() { None } else { HeaderValue::try_from(value).ok() }
}

/// `GET /v1/cartridges`: those the caller may name. The folder is read, which can take its time.
pub async fn list(
    State(state): State<Arc<AppState>>,
    caller: Caller,
) -> Result<Json<Value>, ApiError> {
    let registry = Arc::clone(&state.registry);
    let data: Vec<Value> = blocking::run(move || {
        let list =
            registry.list().into_iter().filter(|info| caller.scope.shows(&info.id, info.source));
        Ok(list.map(entry).collect())
    })
    .await?;
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `GET /v1/cartridges/{id}`: what a request for it would get first, and in `others` all else of that id:
/// files of other sources, and generations that were replaced and are still in use.
pub async fn one(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(id) = id.map_err(|e| ApiError::invalid("id", e.body_text()))?;
    let registry = Arc::clone(&state.registry);
    let name = id.clone();
    let mut found = blocking::run(move || {
        let mut found = registry.info(&name);
        found.retain(|info| caller.scope.shows(&info.id, info.source));
        found.sort_by_key(|info| (info.retired, !info.resident));
        Ok(found)
    })
    .await?
    .into_iter();
    let Some(first) = found.next() else {
        return Err(ApiError { param: None, ..CartridgeError::not_found(&id).into() });
    };
    let tag = first.generation.and_then(|generation| etag(&generation.to_hex()));
    let mut body = entry(first);
    body["others"] = found.map(entry).collect();
    let mut response = Json(body).into_response();
    response.headers_mut().extend(tag.map(|tag| (ETAG, tag)));
    Ok(response)
}

fn entry(info: CartridgeInfo) -> Value {
    let mut entry = json!({"object": "cartridge"});
    if let (Value::Object(entry), Ok(Value::Object(info))) =
        (&mut entry, serde_json::to_value(info))
    {
        entry.extend(info);
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(id: &str) -> CartridgeRef {
        CartridgeRef { id: id.to_owned(), source: Source::Local, force_redownload: false }
    }

    #[test]
    fn model_names() {
        use ModelName::*;
        for (requested, served, expected) in [
            (None, "org/M", Served),
            (Some("ORG/m"), "org/M", Served),
            (Some("org/m:cart:1"), "org/M", WithCartridge("cart:1")),
            (Some(":cart"), "org/M", WithCartridge("cart")),
            (Some("qwen:7b"), "qwen:7b", Served),
            (Some("qwen:7b:c"), "qwen:7b", WithCartridge("c")),
            (Some("qwen:14b"), "qwen:7b", Other("qwen:14b")),
            (Some("other:cart"), "org/M", Other("other:cart")),
            (Some("org/M:"), "org/M", Other("org/M:")),
            (Some(":"), "org/M", Other(":")),
            (Some(""), "org/M", Other("")),
            (Some("örg/x"), "o", Other("örg/x")),
        ] {
            assert_eq!(ModelName::parse(requested, served), expected, "{requested:?}");
        }
    }

    #[test]
    fn order_duplicates_and_precedence() {
        let ids = |r: Result<Vec<CartridgeRef>, ApiError>| {
            r.unwrap().into_iter().map(|r| r.id).collect::<Vec<_>>()
        };
        let list = vec![local("b"), local("a"), local("b")];
        assert_eq!(ids(collect(None, vec![], list.clone(), false)), ["b", "a"]);
        assert_eq!(ids(collect(None, vec![], list.clone(), true)), ["a", "b"]);
        assert_eq!(ids(collect(Some("m"), vec![], list.clone(), false)), ["m", "b", "a"]);
        assert_eq!(ids(collect(None, vec![local("x")], list, false)), ["x"]);
        let again = CartridgeRef { force_redownload: true, ..local("a") };
        let merged = collect(None, vec![], vec![local("a"), again], false).unwrap();
        assert!(merged[0].force_redownload);
        let many = (0..17).map(|i| local(&i.to_string())).collect();
        assert!(collect(None, vec![], many, false).is_err());
        let error = collect(None, vec![], vec![local("a"), local("")], false).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("cartridges[1].id"));
    }

    #[test]
    fn header_values_are_ascii() {
        let used = |id: &str| CartridgeUsed {
            id: id.to_owned(),
            generation: "ab12".to_owned(),
            tokens: 3,
        };
        assert_eq!(header(&[]), None);
        let value = header(&[used("org/a"), used("é, @")]).unwrap();
        assert_eq!(value, "org/a@ab12,%C3%A9%2C%20%40@ab12");
        let long = vec![used(&"é".repeat(limits::MAX_CARTRIDGE_ID_BYTES / 2)); 16];
        let value = header(&long).unwrap();
        assert!(value.len() <= limits::MAX_ECHO_HEADER_BYTES + 4, "{} bytes", value.len());
        assert!(value.to_str().unwrap().ends_with("@ab12,..."));
    }
}
