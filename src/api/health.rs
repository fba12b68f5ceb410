//! Whether the process is alive, and whether it should be sent requests.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::{AppState, error::ApiError};

/// `GET /ping`, in Tokasaurus's words.
pub async fn ping() -> Json<Value> {
    Json(json!({"message": "pong"}))
}

/// `GET /health/live`: the process answers; restarting it helps nothing.
pub async fn live() -> Json<Value> {
    Json(json!({"status": "alive"}))
}

/// `GET /health/ready` and `GET /health`: 503 while starting or draining.
pub async fn ready(State(state): State<Arc<AppState>>) -> Result<Json<Value>, ApiError> {
    state.check_ready()?;
    Ok(Json(json!({"status": "ready"})))
}
