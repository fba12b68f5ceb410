//! New content for an id: `POST /v1/cartridges` as a form, `PUT /v1/cartridges/{id}` as the bytes of the file.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{
        FromRequest, Multipart, Path, Request, State,
        multipart::{Field, MultipartError},
        rejection::PathRejection,
    },
    http::{StatusCode, header::CONTENT_TYPE},
    response::Response,
};
use tokio_stream::StreamExt;

use super::{
    about_id, audit, id_of,
    precondition::Precondition,
    reply,
    upload::{Clock, Guarded, Unread, Writer},
};
use crate::{
    api::{AppState, access::Caller, blocking, error::ApiError},
    cartridge::{Generation, Upload, folder_name},
    limits,
};

/// What a form holds.
#[derive(Default)]
struct Form {
    id: Option<String>,
    expected_generation: Option<String>,
    if_absent: Option<String>,
    config: Option<String>,
    cartridge: Option<Upload>,
}

/// `POST /v1/cartridges`: a form with the file `cartridge`, the field `id`, and optionally the file `config`
/// and the fields `expected_generation` or `if_absent`, in any order.
pub async fn upload(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    request: Request,
) -> Result<Response, ApiError> {
    state.check_ready()?;
    let precondition = Precondition::of_headers(request.headers())?;
    let work = async {
        let form = read_form(&state, request).await?;
        let missing = |name: &str| ApiError::invalid(name, format!("the part `{name}` is missing"));
        let id = form.id.ok_or_else(|| missing("id"))?;
        let mut upload = form.cartridge.ok_or_else(|| missing("cartridge"))?;
        if let Some(config) = form.config {
            upload.set_config_yaml(config).map_err(|error| ApiError {
                param: Some("config".to_owned()),
                ..error.named(&id).into()
            })?;
        }
        let (generation, if_absent) = (form.expected_generation, form.if_absent);
        let precondition = precondition.and_fields(generation.as_deref(), if_absent.as_deref())?;
        publish(&state, &caller, &id, upload, precondition).await
    };
    state.in_flight.unless_stopped(work).await
}

/// `PUT /v1/cartridges/{id}`: the body is the file.
pub async fn put(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Response, ApiError> {
    let id = id_of(path)?;
    state.check_ready()?;
    folder_name(&id).map_err(about_id)?;
    let precondition = Precondition::of_headers(request.headers())?;
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if kind.is_some_and(|kind| kind.to_ascii_lowercase().starts_with("multipart/")) {
        let message = "PUT takes the bytes of the file; POST a form to /v1/cartridges";
        return Err(ApiError::bad_request(message));
    }
    let work = async {
        let clock = Clock::start();
        let mut body = request.into_body().into_data_stream();
        let mut writer = Writer::new(start(&state).await?);
        while let Some(bytes) = clock.wait(body.next()).await? {
            let bytes =
                bytes.map_err(|e| ApiError::bad_request(format!("the body ended early: {e}")))?;
            writer = writer.write(&bytes).await?;
        }
        publish(&state, &caller, &id, writer.finish().await?, precondition).await
    };
    state.in_flight.unless_stopped(work).await
}

async fn start(state: &AppState) -> Result<Upload, ApiError> {
    let registry = Arc::clone(&state.registry);
    blocking::run(move || registry.upload().map_err(about_id)).await
}

async fn publish(
    state: &AppState,
    caller: &Caller,
    id: &str,
    upload: Upload,
    precondition: Precondition,
) -> Result<Response, ApiError> {
    let published: Result<Generation, _> =
        state.registry.publish(id, upload, precondition.expect).await;
    let published = published.map_err(|error| precondition.failed(error));
    audit(state, caller, "publish", id, &published, published.as_ref().ok().copied());
    Ok(reply(id, published?))
}

async fn read_form(state: &AppState, request: Request) -> Result<Form, ApiError> {
    let (parts, body) = request.into_parts();
    let (guarded, unread) = Guarded::new(body);
    let request = Request::from_parts(parts, Body::from_stream(guarded));
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|e| ApiError::bad_request(format!("the body is no form: {}", e.body_text())))?;
    let reader = Reader { clock: Clock::start(), unread };
    let mut read = Form::default();
    while let Some(field) = reader.clock.wait(form.next_field()).await?.map_err(broken)? {
        reader.unread.none();
        let name = field.name().unwrap_or_default().to_owned();
        let slot = match name.as_str() {
            "cartridge" if read.cartridge.is_none() => {
                read.cartridge = Some(reader.file(state, field).await?);
                continue;
            }
            "config" if read.config.is_none() => &mut read.config,
            "id" if read.id.is_none() => &mut read.id,
            "expected_generation" if read.expected_generation.is_none() => {
                &mut read.expected_generation
            }
            "if_absent" if read.if_absent.is_none() => &mut read.if_absent,
            // Its bytes would be taken in for nothing.
            _ => {
                let message = format!("the part `{name}` is unknown or was there before");
                return Err(ApiError::invalid(name, message));
            }
        };
        let limit = match name.as_str() {
            "config" => limits::MAX_CONFIG_YAML_BYTES as usize,
            _ => limits::MAX_UPLOAD_FIELD_BYTES,
        };
        let text = reader.text(field, &name, limit).await?;
        if name == "id" {
            // Before the file is sent, if it comes after.
            folder_name(&text).map_err(about_id)?;
        }
        *slot = Some(text);
    }
    Ok(read)
}

struct Reader {
    clock: Clock,
    unread: Unread,
}

impl Reader {
    async fn file(&self, state: &AppState, mut field: Field<'_>) -> Result<Upload, ApiError> {
        let mut writer = Writer::new(start(state).await?);
        while let Some(bytes) = self.clock.wait(field.chunk()).await?.map_err(broken)? {
            self.unread.none();
            writer = writer.write(&bytes).await?;
        }
        writer.finish().await
    }

    async fn text(
        &self,
        mut field: Field<'_>,
        name: &str,
        limit: usize,
    ) -> Result<String, ApiError> {
        let mut text = Vec::new();
        while let Some(bytes) = self.clock.wait(field.chunk()).await?.map_err(broken)? {
            self.unread.none();
            if text.len() + bytes.len() > limit {
                let message = format!("the part `{name}` is larger than {limit} bytes");
                return Err(ApiError::invalid(name, message));
            }
            text.extend_from_slice(&bytes);
        }
        let message = || format!("the part `{name}` is not UTF-8");
        String::from_utf8(text).map_err(|_| ApiError::invalid(name, message()))
    }
}

fn broken(error: MultipartError) -> ApiError {
    let message = format!("the form cannot be read: {}", error.body_text());
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::body_too_large(limits::MAX_BODY_BYTES),
        _ => ApiError::bad_request(message),
    }
}
