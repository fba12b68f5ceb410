//! What the API counts, and `/metrics` in the Prometheus text format.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::header::CONTENT_TYPE,
    middleware::Next,
    response::{IntoResponse, Response},
};
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

use super::{AppState, error::ApiError};

const REQUESTS: &str = "cartouche_http_requests_total";
const HTTP_SECONDS: &str = "cartouche_http_response_start_seconds";
const FIRST_TOKEN_SECONDS: &str = "cartouche_time_to_first_token_seconds";
const GENERATION_SECONDS: &str = "cartouche_generation_seconds";
const PROMPT_TOKENS: &str = "cartouche_prompt_tokens_total";
const CACHED_TOKENS: &str = "cartouche_cached_prompt_tokens_total";
const COMPLETION_TOKENS: &str = "cartouche_completion_tokens_total";
const CHOICES: &str = "cartouche_choices_finished_total";

/// Upper bounds of the time histograms, in seconds.
const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0,
];

/// A recorder builder with this crate's buckets; the caller installs it and keeps the handle.
pub fn recorder_builder() -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)
}

/// Help texts; call once after the recorder is installed.
pub fn describe() {
    describe_counter!(REQUESTS, "HTTP requests by route, method and status");
    describe_histogram!(HTTP_SECONDS, "Time from request to response headers, by route");
    describe_histogram!(FIRST_TOKEN_SECONDS, "Time from request to first generated token");
    describe_histogram!(GENERATION_SECONDS, "Time from request to its end, by outcome");
    describe_counter!(PROMPT_TOKENS, "Prompt tokens of accepted requests");
    describe_counter!(CACHED_TOKENS, "Prompt tokens whose keys and values were reused");
    describe_counter!(COMPLETION_TOKENS, "Generated tokens");
    describe_counter!(CHOICES, "Finished choices by reason");
    describe_gauge!("cartouche_sequences_waiting", "Sequences in the queue");
    describe_gauge!("cartouche_sequences_running", "Sequences being decoded");
    describe_gauge!("cartouche_kv_blocks_used", "KV cache blocks in use");
    describe_gauge!("cartouche_kv_blocks", "KV cache blocks in all");
}

pub(super) fn time_to_first_token(elapsed: Duration) {
    histogram!(FIRST_TOKEN_SECONDS).record(elapsed);
}

pub(super) fn generation_ended(outcome: &'static str, elapsed: Duration) {
    histogram!(GENERATION_SECONDS, "outcome" => outcome).record(elapsed);
}

pub(super) fn prompt_tokens(count: usize) {
    counter!(PROMPT_TOKENS).increment(count as u64);
}

pub(super) fn cached_tokens(count: usize) {
    counter!(CACHED_TOKENS).increment(count as u64);
}

pub(super) fn completion_token() {
    counter!(COMPLETION_TOKENS).increment(1);
}

pub(super) fn choice_finished(reason: &'static str) {
    counter!(CHOICES, "reason" => reason).increment(1);
}

/// Counts every response. Labels hold route patterns, never paths, so clients cannot make them grow.
pub(super) async fn count(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "unmatched".to_owned(), |path| path.as_str().to_owned());
    let method = match request.method().as_str() {
        "GET" => "GET",
        "POST" => "POST",
        _ => "other",
    };
    let response = next.run(request).await;
    let status = response.status().as_u16().to_string();
    counter!(REQUESTS, "route" => route.clone(), "method" => method, "status" => status)
        .increment(1);
    histogram!(HTTP_SECONDS, "route" => route).record(started.elapsed());
    response
}

/// `GET /metrics`.
pub(super) async fn render(State(state): State<Arc<AppState>>) -> Result<Response, ApiError> {
    let Some(handle) = &state.metrics else {
        return Err(ApiError::not_found("metrics are switched off on this server"));
    };
    let stats = state.engine.stats();
    gauge!("cartouche_sequences_waiting").set(stats.waiting as f64);
    gauge!("cartouche_sequences_running").set(stats.running as f64);
    gauge!("cartouche_kv_blocks_used").set(stats.used_blocks as f64);
    gauge!("cartouche_kv_blocks").set(stats.total_blocks as f64);
    handle.run_upkeep();
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], handle.render())
        .into_response())
}
