//! Servers to measure: scripted ones that answer at once, late or badly.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, watch};

/// How a scripted server answers requests for completions.
#[derive(Debug, Clone)]
pub enum Script {
    /// So many chunks, usage and `[DONE]`.
    Good { tokens: usize },
    /// Good, without usage.
    NoUsage { tokens: usize },
    /// One chunk, then the end of the stream.
    Cut,
    /// One chunk, then an error event.
    ErrorEvent,
    /// 429 with `Retry-After: 0` to every other request, good otherwise.
    BusyByTurns,
    /// Good for so many streamed requests, then 503.
    Breaks(usize),
    /// Good, but one request at a time, and none before the gate opens.
    Gated { tokens: usize, gate: watch::Receiver<bool> },
    /// A page.
    Html,
}

/// A server on a free port; it ends with the runtime.
#[derive(Debug, Clone)]
pub struct Fake {
    pub address: SocketAddr,
    /// Bodies of streamed requests, in order.
    pub seen: Arc<Mutex<Vec<Value>>>,
}

impl Fake {
    pub async fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (count, turn) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(())));
        let kept = Arc::clone(&seen);
        let complete = move |body: Bytes| {
            let (script, seen) = (script.clone(), Arc::clone(&kept));
            let (count, turn) = (Arc::clone(&count), Arc::clone(&turn));
            async move {
                let body: Value = serde_json::from_slice(&body).unwrap();
                if body["stream"] != true {
                    // Two tokens a word, and five of the template.
                    let words = body["messages"].to_string().split(' ').count();
                    return usage(5 + 2 * words).to_string().into_response();
                }
                seen.lock().await.push(body);
                let index = count.fetch_add(1, Ordering::Relaxed);
                answer(script, index, &turn).await
            }
        };
        let models = async || json!({"data": [{"id": "fake", "owned_by": "tests"}]}).to_string();
        let router = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/chat/completions", post(complete));
        tokio::spawn(async { axum::serve(listener, router).await });
        Self { address, seen }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

fn usage(prompt_tokens: usize) -> Value {
    json!({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1}})
}

async fn answer(script: Script, index: usize, turn: &Mutex<()>) -> Response {
    match script {
        Script::Good { tokens } => stream(events(tokens, true)),
        Script::NoUsage { tokens } => stream(events(tokens, false)),
        Script::Cut => stream(chunk("a")),
        Script::ErrorEvent => stream(chunk("a") + "data: {\"error\":{\"message\":\"lost\"}}\n\n"),
        Script::BusyByTurns if index % 2 == 1 => {
            let error = json!({"error": {"message": "the queue is full"}}).to_string();
            (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "0")], error).into_response()
        }
        Script::Breaks(after) if index >= after => {
            (StatusCode::SERVICE_UNAVAILABLE, "gone").into_response()
        }
        Script::BusyByTurns | Script::Breaks(_) => stream(events(2, true)),
        Script::Gated { tokens, mut gate } => {
            let _turn = turn.lock().await;
            // The first streamed request is the check before the measurement.
            if index > 0 {
                let _ = gate.wait_for(|open| *open).await;
            }
            stream(events(tokens, true))
        }
        Script::Html => "<html></html>".into_response(),
    }
}

fn chunk(text: &str) -> String {
    format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": {"content": text}}]}))
}

fn events(tokens: usize, with_usage: bool) -> String {
    let mut text = format!("data: {}\n\n", json!({"choices": [{"delta": {"content": ""}}]}));
    text += &chunk(" word").repeat(tokens);
    if with_usage {
        let usage = json!({"choices": [], "usage": {
            "prompt_tokens": 9, "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": 4},
        }});
        text += &format!("data: {usage}\n\n");
    }
    text + "data: [DONE]\n\n"
}

fn stream(events: String) -> Response {
    // Each event is a frame of its own, as servers send them.
    let frames: Vec<String> = events.split_inclusive("\n\n").map(str::to_owned).collect();
    let frames = frames.into_iter().map(|frame| Ok::<_, Infallible>(Bytes::from(frame)));
    let body = Body::from_stream(tokio_stream::iter(frames));
    ([("content-type", "text/event-stream")], body).into_response()
}

/// Long enough for any test; only a bug waits for it.
pub const LIMIT: Duration = Duration::from_secs(60);
