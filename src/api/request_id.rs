//! `X-Request-Id`: the client's or a proxy's, else one made here; in the log and in the reply.

use std::sync::Arc;

use axum::{
    extract::Request,
    http::{HeaderName, HeaderValue},
    middleware::Next,
    response::Response,
};

use crate::limits;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Visible ASCII, bounded.
#[derive(Debug, Clone)]
pub struct RequestId(Arc<str>);

impl RequestId {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What a client sent, if it can be kept.
    fn accept(value: &HeaderValue) -> Option<Self> {
        let text = value.to_str().ok()?;
        let fits = (1..=limits::MAX_REQUEST_ID_BYTES).contains(&text.len());
        (fits && text.bytes().all(|b| b.is_ascii_graphic())).then(|| Self(text.into()))
    }
}

impl Default for RequestId {
    fn default() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string().into())
    }
}

/// Gives every request its id and every response the id of its request.
pub async fn attach(mut request: Request, next: Next) -> Response {
    let sent = request.headers().get(REQUEST_ID).and_then(RequestId::accept);
    let id = sent.unwrap_or_default();
    let header = HeaderValue::from_str(id.as_str());
    request.extensions_mut().insert(id);
    let mut response = next.run(request).await;
    if let Ok(header) = header {
        response.headers_mut().insert(REQUEST_ID, header);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_ids_are_replaced() {
        let accept =
            |text: &str| RequestId::accept(&HeaderValue::from_bytes(text.as_bytes()).unwrap());
        assert_eq!(accept("a-1/Z").unwrap().as_str(), "a-1/Z");
        let long = "x".repeat(limits::MAX_REQUEST_ID_BYTES + 1);
        for text in ["", "two words", "é", "tab\there", &long] {
            assert!(accept(text).is_none(), "{text}");
        }
        assert_ne!(RequestId::default().as_str(), RequestId::default().as_str());
    }
}
