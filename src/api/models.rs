//! `GET /v1/models`: exactly one entry. Cartridges have a list of their own, because clients of
//! Tokasaurus refuse a server that lists more than one model.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use serde_json::{Value, json};

use super::{AppState, error::ApiError};

/// The list.
pub async fn list(State(state): State<Arc<AppState>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [entry(&state)]}))
}

/// One model by id (which may hold slashes); letter case does not matter.
pub async fn one(
    State(state): State<Arc<AppState>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = id.map_err(|e| ApiError::invalid("model", e.body_text()))?;
    if id.eq_ignore_ascii_case(&state.model.name) {
        Ok(Json(entry(&state)))
    } else {
        Err(ApiError::model_not_found(&id))
    }
}

fn entry(state: &AppState) -> Value {
    json!({
        "id": state.model.name,
        "object": "model",
        "created": state.started,
        "owned_by": "cartouche",
        "root": state.model.name,
        "parent": null,
        "max_model_len": state.max_model_len(),
    })
}
