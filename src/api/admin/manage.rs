//! Actions on cartridges that are there: load, unload, pin, unpin, delete.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::HeaderMap,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{about_id, audit, id_of, precondition::Precondition, reply};
use crate::{
    api::{
        AppState,
        access::Caller,
        error::ApiError,
        extract::{Body, parse},
    },
    cartridge::{CartridgeRef, Lease, Source},
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LoadFields {
    id: String,
    source: Option<Source>,
    force_redownload: Option<bool>,
    pin: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UnloadFields {
    id: String,
}

/// `POST /v1/cartridges/{action}`, see the folder's purpose.
pub async fn act(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    path: Result<Path<String>, PathRejection>,
    body: Body,
) -> Result<Response, ApiError> {
    let path = id_of(path)?;
    state.check_ready()?;
    let work = async {
        match path.as_str() {
            "load" => load(&state, &caller, body.read(parse).await?).await,
            "unload" => unload(&state, &caller, body.read(parse).await?).await,
            path => match (path.strip_suffix("/pin"), path.strip_suffix("/unpin")) {
                (Some(id), _) => pin(&state, &caller, id, true),
                (_, Some(id)) => pin(&state, &caller, id, false),
                _ => Err(ApiError::not_found(
                    "there is no such action: POST to load, unload, {id}/pin or {id}/unpin",
                )),
            },
        }
    };
    state.in_flight.unless_stopped(work).await
}

/// Brings a cartridge into memory. It goes on if the client leaves.
async fn load(state: &AppState, caller: &Caller, fields: LoadFields) -> Result<Response, ApiError> {
    let LoadFields { id, source, force_redownload, pin } = fields;
    let reference = CartridgeRef {
        id: id.clone(),
        source: source.unwrap_or(Source::Local),
        force_redownload: force_redownload.unwrap_or(false),
    };
    let work = async {
        let lease = state.registry.acquire(&reference).await?;
        if let Some(pinned) = pin {
            state.registry.pin(&id, pinned)?;
        }
        Ok(lease)
    };
    let loaded: Result<Lease, ApiError> = work.await.map_err(about_id);
    let generation = loaded.as_ref().ok().map(|lease| lease.generation());
    audit(state, caller, "load", &id, &loaded, generation);
    Ok(reply(&id, loaded?.generation()))
}

async fn unload(
    state: &AppState,
    caller: &Caller,
    UnloadFields { id }: UnloadFields,
) -> Result<Response, ApiError> {
    let unloaded = state.registry.unload(&id).await.map_err(about_id);
    audit(state, caller, "unload", &id, &unloaded, None);
    let was_resident = unloaded?;
    Ok(done(&id, json!({"was_resident": was_resident})))
}

fn pin(state: &AppState, caller: &Caller, id: &str, pinned: bool) -> Result<Response, ApiError> {
    let done_so = state.registry.pin(id, pinned).map_err(about_id);
    audit(state, caller, if pinned { "pin" } else { "unpin" }, id, &done_so, None);
    done_so?;
    Ok(done(id, json!({"pinned": pinned})))
}

/// `DELETE /v1/cartridges/{id}`: its local files and what is in memory. Running requests keep theirs.
pub async fn delete(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id = id_of(path)?;
    state.check_ready()?;
    let precondition = Precondition::of_headers(&headers)?;
    let deleted = state.registry.delete(&id, precondition.expect).await;
    let deleted = deleted.map_err(|error| precondition.failed(error));
    audit(&state, &caller, "delete", &id, &deleted, None);
    deleted?;
    Ok(done(&id, json!({"deleted": true})))
}

fn done(id: &str, more: Value) -> Response {
    let mut body = json!({"object": "cartridge", "id": id});
    if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
        body.extend(more);
    }
    Json(body).into_response()
}
