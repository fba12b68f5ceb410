//! What failures of the engine, the registry and the text layer mean to a client.

use axum::http::StatusCode;

use super::error::ApiError;
use crate::{cartridge::CartridgeError, engine::EngineError, text::TextError};

/// Seconds a client is told to wait when the queue is full, unless it is known better.
const RETRY_QUEUE_SECONDS: u64 = 1;

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
    use axum::{http::header::RETRY_AFTER, response::IntoResponse};

    use super::*;

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
