//! One error body for every route: the OpenAI `error` object and Tokasaurus's `detail` side by side, so
//! that clients of either read what they expect.

use axum::{
    Json,
    http::{
        HeaderValue, StatusCode,
        header::{CONNECTION, ETAG, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::limits;

/// Seconds a client is told to wait when this process is going away (another one may take over).
const RETRY_SHUTDOWN_SECONDS: u64 = 5;

/// What a client is told when its request is not answered.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// `error.type`.
    pub kind: &'static str,
    /// `error.code`, stable, for programs.
    pub code: Option<&'static str>,
    /// `error.param`: the field (or JSON path) at fault.
    pub param: Option<String>,
    /// `Retry-After`, in seconds.
    pub retry_after: Option<u64>,
    /// `error.found`: the generation that is there instead of the expected one; `none` where there is none.
    pub found: Option<Box<str>>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        let (code, param, retry_after, found) = (None, None, None, None);
        Self { status, message, kind, code, param, retry_after, found }
    }

    /// 400 without a field to blame.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400 that names the field at fault.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::bad_request(message) }
    }

    /// 400 for a field that is known and cannot be honoured.
    pub fn unsupported(param: &str, why: &str) -> Self {
        Self {
            code: Some("unsupported_parameter"),
            ..Self::invalid(param, format!("{param} not supported: {why}"))
        }
    }

    /// 401 for a request that brings no key.
    pub fn missing_key() -> Self {
        let message = "you did not provide an API key; send it in the header \
                       `Authorization: Bearer YOUR_KEY`";
        Self {
            code: Some("missing_api_key"),
            ..Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message)
        }
    }

    /// 401 for a request whose key is none of ours. What was sent is not repeated.
    pub fn wrong_key(message: &str) -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message)
        }
    }

    /// 403 for a caller who may not.
    pub fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self { code: Some(code), ..Self::new(StatusCode::FORBIDDEN, "permission_error", message) }
    }

    /// 403 for a route that needs an admin.
    pub fn admin_needed(message: impl Into<String>) -> Self {
        Self::forbidden("admin_key_required", message)
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self {
            code: Some("not_found"),
            ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
        }
    }

    /// 404 for a model that is not the served one.
    pub fn model_not_found(model: &str) -> Self {
        Self {
            code: Some("model_not_found"),
            param: Some("model".to_owned()),
            ..Self::not_found(format!("The model `{model}` does not exist"))
        }
    }

    /// 413.
    pub fn body_too_large(limit: usize) -> Self {
        Self {
            code: Some("body_too_large"),
            ..Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request_error",
                format!("the request body is larger than {limit} bytes"),
            )
        }
    }

    /// 408 for a body that does not come.
    pub fn body_timeout(seconds: u64) -> Self {
        Self {
            code: Some("body_timeout"),
            ..Self::new(
                StatusCode::REQUEST_TIMEOUT,
                "invalid_request_error",
                format!("the request body did not arrive within {seconds} seconds"),
            )
        }
    }

    /// 408 for an upload that does not come.
    pub fn upload_timeout(seconds: u64, unit: &str) -> Self {
        let message = format!("the upload took more than {seconds} seconds {unit}");
        Self { message, ..Self::body_timeout(seconds) }
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        Self {
            code: Some("method_not_allowed"),
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "invalid_request_error",
                "this route does not answer this method",
            )
        }
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self {
            code: Some("internal_error"),
            ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
        }
    }

    /// 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self {
            code: Some("unavailable"),
            retry_after: Some(RETRY_SHUTDOWN_SECONDS),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
        }
    }

    /// 400 with the code clients truncate on, and the message stem of Tokasaurus.
    pub fn too_long(prompt: usize, cartridge: usize, max_tokens: usize, limit: usize) -> Self {
        let cartridge = match cartridge {
            0 => String::new(),
            tokens => format!(" ({tokens} of them are taken by cartridges)"),
        };
        Self {
            code: Some("context_length_exceeded"),
            ..Self::bad_request(format!(
                "Request has prompt length = {prompt} and max_tokens = {max_tokens}, which is larger \
                 than the maximum number of tokens per request = {limit}{cartridge}"
            ))
        }
    }

    /// 400 for a text that cannot fit into the context, found before it is tokenised.
    pub fn text_too_long(bytes: usize, limit: usize) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::bad_request(format!(
                "Request has prompt length = {bytes} bytes, which is larger than the maximum number \
                 of tokens per request = {limit} can hold"
            ))
        }
    }

    /// 500 for a chat template of the model that does not work.
    pub fn template(message: impl Into<String>) -> Self {
        Self { code: Some("template_error"), ..Self::internal(message) }
    }

    /// The JSON body; streams send it as their last event. Messages and paths may repeat what the client
    /// sent, which has no bound but the body's: they are cut.
    pub fn body(&self) -> Value {
        let message = limits::clip(&self.message);
        let mut body = json!({
            "error": {
                "message": message,
                "type": self.kind,
                "param": self.param.as_deref().map(limits::clip),
                "code": self.code,
            },
            "detail": message,
        });
        if let Some(found) = &self.found {
            body["error"]["found"] = json!(found);
        }
        body
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        // A drain is no fault; every request that comes meanwhile would be a line.
        if self.status.is_server_error() && self.status != StatusCode::SERVICE_UNAVAILABLE {
            tracing::error!(
                status = self.status.as_u16(),
                code = self.code,
                "{}",
                limits::clip(&self.message)
            );
        }
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let how = HeaderValue::from_static("Bearer realm=\"cartouche\"");
            response.headers_mut().insert(WWW_AUTHENTICATE, how);
        }
        if let Some(tag) = self.found.as_deref().and_then(etag) {
            response.headers_mut().insert(ETAG, tag);
        }
        if self.code == Some("shutting_down") {
            // The next request of this client should find another server.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// A generation as an entity tag; none for what is not one.
pub fn etag(generation: &str) -> Option<HeaderValue> {
    let is_one = generation.len() == 64 && generation.bytes().all(|b| b.is_ascii_hexdigit());
    if is_one { HeaderValue::try_from(format!("\"{generation}\"")).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn body_has_both_shapes() {
        let error = ApiError::invalid("top_p", "top_p must be between 0 and 1");
        assert_eq!(
            error.body(),
            json!({
                "error": {
                    "message": "top_p must be between 0 and 1",
                    "type": "invalid_request_error",
                    "param": "top_p",
                    "code": null,
                },
                "detail": "top_p must be between 0 and 1",
            })
        );
    }

    #[test]
    fn what_a_client_sent_is_cut_in_messages_and_paths() {
        let long = "é".repeat(500_000);
        let body = ApiError::invalid(long.clone(), format!("{long} is odd")).body();
        for text in [&body["error"]["message"], &body["error"]["param"], &body["detail"]] {
            let text = text.as_str().unwrap();
            assert!(text.len() <= limits::MAX_ERROR_TEXT_BYTES, "{} bytes", text.len());
            assert!(text.starts_with("éé") && text.ends_with("é…"));
        }
    }
}
