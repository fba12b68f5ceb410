//! Ready-made requests about the demo documents, so that they need not be pasted.

use axum::{Json, extract::Path};
use serde_json::{Value, json};

use super::error::ApiError;
use crate::demo;

/// `GET /demo/{document}/request`: a chat request with the whole document as its system message and the first
/// question.
pub async fn request(Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let document = demo::DOCUMENTS.iter().find(|document| document.name == name);
    let request = document.and_then(|document| {
        let questions = document.questions().ok()?;
        let question = &questions.first()?.question;
        let system = json!({"role": "system", "content": document.text.trim_end()});
        let user = json!({"role": "user", "content": question});
        Some(json!({"messages": [system, user], "temperature": 0}))
    });
    request.map(Json).ok_or_else(|| ApiError::not_found("there is no such demo document"))
}
