//! Which web pages of other origins may use the API: none, unless the operator names them.

use std::str::FromStr;

use axum::http::{
    HeaderName, HeaderValue, Method, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, ETAG, IF_MATCH, IF_NONE_MATCH, RETRY_AFTER},
};
use tower_http::cors::{Any, CorsLayer};

/// An origin as browsers send it, or `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(HeaderValue);

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("`{text}` is not an origin: give scheme://host[:port], or *");
        let value = HeaderValue::from_str(text).map_err(|_| form())?;
        let uri = text.parse::<Uri>().map_err(|_| form())?;
        // A browser sends exactly this, so anything more would never match.
        let scheme_and_authority = uri.scheme_str().zip(uri.authority());
        let is_whole = scheme_and_authority
            .is_some_and(|(scheme, authority)| format!("{scheme}://{authority}") == text);
        if text == "*" || is_whole { Ok(Self(value)) } else { Err(form()) }
    }
}

/// Answers preflight requests, which bring no key, before the gate; none without origins. Cookies are never
/// allowed: a page has to bring its key itself.
pub(super) fn layer(origins: &[Origin]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let exposed = [
        "x-request-id",
        "x-cartouche-cartridges",
        "x-cartouche-ignored-fields",
        "x-cartouche-warnings",
    ];
    let exposed = exposed.map(HeaderName::from_static).into_iter().chain([ETAG, RETRY_AFTER]);
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::DELETE])
        .allow_headers([
            AUTHORIZATION,
            CONTENT_TYPE,
            IF_MATCH,
            IF_NONE_MATCH,
            HeaderName::from_static("x-request-id"),
        ])
        .expose_headers(exposed.collect::<Vec<_>>())
        .max_age(std::time::Duration::from_secs(600));
    Some(match origins.iter().any(|Origin(origin)| origin == "*") {
        true => layer.allow_origin(Any),
        false => layer.allow_origin(origins.iter().map(|o| o.0.clone()).collect::<Vec<_>>()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_what_browsers_send() {
        for good in ["https://a.example", "http://localhost:3000", "*"] {
            assert!(good.parse::<Origin>().is_ok(), "{good}");
        }
        for bad in ["", "a.example", "https://a.example/", "https://a.example/x", "https://", "* "]
        {
            assert!(bad.parse::<Origin>().is_err(), "{bad}");
        }
    }
}
