//! One error body for every route: the OpenAI `error` object and Tokasaurus's `detail` side by side, so
//! that clients of either read what they expect.

use axum::{
    Json,
    http::{
        HeaderValue, StatusCode,
        header::{CONNECTION, RETRY_AFTER},
    },
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{cartridge::CartridgeError, engine::EngineError, limits, text::TextError};

/// Seconds a client is told to wait when the queue is full, unless it is known better.
const RETRY_QUEUE_SECONDS: u64 = 1;
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
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, code: None, param: None, retry_after: None }
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
        json!({
            "error": {
                "message": message,
                "type": self.kind,
                "param": self.param.as_deref().map(limits::clip),
                "code": self.code,
            },
            "detail": message,
        })
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
        if self.code == Some("shutting_down") {
            // The next request of this client should find another server.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::QueueFull { .. } | EngineError::QueueTokensFull { .. } => Self {
                code: Some("queue_full"),
                retry_after: Some(RETRY_QUEUE_SECONDS),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            },
            EngineError::TooLong { prompt, cartridge, max_tokens, limit } => {
                Self::too_long(prompt, cartridge, max_tokens, limit)
            }
            EngineError::InvalidRequest { field, .. } => Self::invalid(field, message),
            EngineError::NonFiniteLogits => {
                Self { code: Some("non_finite_logits"), ..Self::internal(message) }
            }
            EngineError::SlowReader { .. } => Self {
                code: Some("slow_reader"),
                ..Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
            },
            EngineError::ShuttingDown => {
                Self { code: Some("shutting_down"), ..Self::unavailable(message) }
            }
            EngineError::Internal(_) => Self::internal(message),
        }
    }
}

impl From<CartridgeError> for ApiError {
    fn from(error: CartridgeError) -> Self {
        let (status, kind) = match &error {
            CartridgeError::NotFound { .. } => (StatusCode::NOT_FOUND, "invalid_request_error"),
            CartridgeError::InvalidId { .. }
            | CartridgeError::Invalid { .. }
            | CartridgeError::Forbidden { .. }
            | CartridgeError::Mismatch { .. }
            | CartridgeError::TooLarge { .. } => (StatusCode::BAD_REQUEST, "invalid_request_error"),
            CartridgeError::Conflict { .. } => (StatusCode::CONFLICT, "invalid_request_error"),
            CartridgeError::SourceUnavailable { .. } => (StatusCode::BAD_GATEWAY, "server_error"),
            CartridgeError::Busy { .. } => (StatusCode::SERVICE_UNAVAILABLE, "server_error"),
            CartridgeError::Io { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "server_error"),
        };
        Self {
            code: Some(error.code()),
            param: Some("cartridges".to_owned()),
            retry_after: matches!(error, CartridgeError::Busy { .. })
                .then_some(RETRY_QUEUE_SECONDS),
            ..Self::new(status, kind, error.to_string())
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        let message = error.to_string();
        match error {
            TextError::Tokenizer { .. } | TextError::Config { .. } => Self::internal(message),
            TextError::TemplateSyntax { .. } | TextError::TemplateFuel { .. } => {
                Self::template(message)
            }
            TextError::RequestTemplate => Self::unsupported("chat_template", &message),
            TextError::InvalidKwarg { name, .. } => Self::invalid(name, message),
            TextError::NoTemplate { .. } => Self::invalid("chat_template", message),
            TextError::ContinueFinal { .. } => Self::invalid("continue_final_message", message),
            TextError::InvalidMessages { .. }
            | TextError::TemplateRaised { .. }
            | TextError::TemplateRender { .. }
            | TextError::TemplateTooLarge { .. } => Self::invalid("messages", message),
            _ => Self::bad_request(message),
        }
    }
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

    #[test]
    fn a_full_queue_is_429_with_retry_after() {
        let response =
            ApiError::from(EngineError::QueueFull { waiting: 3, limit: 3 }).into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
    }

    #[test]
    fn engine_and_cartridge_failures_have_their_status() {
        let down = ApiError::from(EngineError::ShuttingDown);
        assert_eq!((down.status.as_u16(), down.code), (503, Some("shutting_down")));
        assert!(down.into_response().headers().contains_key(RETRY_AFTER));
        let broken = ApiError::from(EngineError::NonFiniteLogits);
        assert_eq!((broken.status.as_u16(), broken.code), (500, Some("non_finite_logits")));
        let field = EngineError::InvalidRequest { field: "n", reason: "is odd".to_owned() };
        assert_eq!(ApiError::from(field).param.as_deref(), Some("n"));
        let (id, reason) = (String::from("a"), String::from("why"));
        let cases = [
            (CartridgeError::NotFound { id: id.clone(), hint: reason.clone() }, 404),
            (CartridgeError::Invalid { name: id.clone(), reason: reason.clone() }, 400),
            (CartridgeError::Mismatch { name: id.clone(), what: "layers", have: 1, need: 2 }, 400),
            (
                CartridgeError::SourceUnavailable {
                    id: id.clone(),
                    from: crate::cartridge::Source::Wandb,
                    reason: reason.clone(),
                },
                502,
            ),
            (CartridgeError::Busy { id, reason }, 503),
        ];
        for (error, status) in cases {
            let code = error.code();
            let error = ApiError::from(error);
            assert_eq!((error.status.as_u16(), error.code), (status, Some(code)));
            assert_eq!(error.param.as_deref(), Some("cartridges"));
            assert_eq!(error.retry_after.is_some(), status == 503);
        }
    }

    #[test]
    fn length_errors_keep_the_stock_stem_and_the_openai_code() {
        let error = ApiError::from(EngineError::TooLong {
            prompt: 10,
            cartridge: 0,
            max_tokens: 90,
            limit: 64,
        });
        assert_eq!(
            error.message,
            "Request has prompt length = 10 and max_tokens = 90, which is larger than the maximum \
             number of tokens per request = 64"
        );
        assert_eq!(error.code, Some("context_length_exceeded"));
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
    }
}
