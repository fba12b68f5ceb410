//! What an admin does to cartridges while the server runs: load, unload, pin, publish, delete.
//!
//! An id may hold slashes, so it is all that follows `/v1/cartridges/` in a GET, PUT or DELETE. POST names an
//! action instead: `load` and `unload`, whose bodies name the id, or `{id}/pin` and `{id}/unpin`. No id can be
//! taken for an action, nor the other way round.

mod manage;
mod precondition;
mod publish;
mod upload;

use axum::{
    Json,
    extract::{Path, rejection::PathRejection},
    response::{IntoResponse, Response},
};
use serde_json::json;

pub use manage::{act, delete};
pub use publish::{put, upload};

use super::{
    AppState,
    access::Caller,
    error::{ApiError, etag},
};
use crate::cartridge::{CartridgeError, Generation};

/// The id of a path.
fn id_of(path: Result<Path<String>, PathRejection>) -> Result<String, ApiError> {
    let Path(id) = path.map_err(|e| ApiError::invalid("id", e.body_text()))?;
    Ok(id)
}

/// The reply that says which generation an id now stands for.
fn reply(id: &str, generation: Generation) -> Response {
    let hex = generation.to_hex();
    let tag = etag(&hex);
    let body = json!({"object": "cartridge", "id": id, "generation": hex});
    let mut response = Json(body).into_response();
    response.headers_mut().extend(tag.map(|tag| (axum::http::header::ETAG, tag)));
    response
}

/// Counts and logs what an admin did, or tried to. Ids are quoted: a client wrote them.
fn audit<T>(
    state: &AppState,
    caller: &Caller,
    action: &'static str,
    id: &str,
    result: &Result<T, ApiError>,
    generation: Option<Generation>,
) {
    let outcome = if result.is_ok() { "done" } else { "refused" };
    state.metrics.admin_action(action, outcome);
    let generation = generation.map(|generation| generation.to_hex());
    let code = result.as_ref().err().and_then(|error| error.code);
    tracing::info!(key = caller.name, action, id = ?id, generation, outcome, code, "admin action");
}

/// Of an error about the one cartridge that a request is about.
fn about_id(error: CartridgeError) -> ApiError {
    ApiError { param: Some("id".to_owned()), ..error.into() }
}
