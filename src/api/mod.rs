//! HTTP only: router, wire types, handlers, error bodies, server-sent events.
//!
//! A generation request passes `extract` and `openai::fields` (what was sent), `openai::params` (what is
//! meant), `cartridges` and `openai::prompt` (what it is about), the engine, `generate` (tokens to text)
//! and ends in `chat` or `completions` as a whole reply or through `stream`.

mod blocking;
pub mod cartridge_blocks;
pub mod cartridges;
mod chat;
mod choice;
mod completions;
mod error;
pub mod extract;
mod generate;
mod health;
mod in_flight;
mod life;
mod listen;
mod logprobs;
mod metrics;
mod models;
pub mod openai;
mod request;
mod request_id;
mod router_metrics;
mod state;
mod stream;
mod tally;
mod tokenize;
mod updates;

use std::{any::Any, sync::Arc};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tower_http::catch_panic::CatchPanicLayer;

pub use error::ApiError;
pub use in_flight::InFlight;
pub use listen::{ListenOptions, Shutdown, serve};
pub use metrics::Metrics;
pub use state::{ApiOptions, AppState, Readiness, ServedModel};

use crate::limits;

/// All routes. The cartridge prefixes are those of successive Tokasaurus versions; every generation route
/// takes `cartridges`, so they are names for the same handlers.
pub fn router(state: Arc<AppState>) -> Router {
    let mut router = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/cartridges", get(cartridges::list))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/ping", get(health::ping))
        .route("/health", get(health::ready))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/metrics", get(metrics::render));
    for prefix in ["/v1", "/v1/cartridge", "/custom/cartridge"] {
        router = router
            .route(&format!("{prefix}/chat/completions"), post(chat::completions))
            .route(&format!("{prefix}/completions"), post(completions::completions));
    }
    router
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .fallback(async || ApiError::not_found("there is no such route"))
        .layer(DefaultBodyLimit::max(limits::MAX_BODY_BYTES))
        .layer(CatchPanicLayer::custom(on_panic))
        .layer(middleware::from_fn_with_state(Arc::clone(&state), metrics::count))
        .layer(middleware::from_fn(request_id::attach))
        .with_state(state)
}

/// A bug must not look like a broken connection. The panic itself is logged by the panic hook.
fn on_panic(_: Box<dyn Any + Send>) -> Response {
    ApiError::internal("the server failed on this request").into_response()
}
