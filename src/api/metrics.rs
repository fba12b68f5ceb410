//! What the API counts, and `/metrics` in the Prometheus text format. `docs/metrics.md` lists the names.
//!
//! Counters of the hot path are handles made once: looking a metric up by its name for every token would
//! cost more than counting it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::header::CONTENT_TYPE,
    middleware::Next,
    response::{IntoResponse, Response},
};
use metrics::{
    Counter, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram, with_local_recorder,
};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use super::{AppState, access::Caller, router_metrics};
use crate::{cartridge::RegistryStats, engine::EngineStats};

const REQUESTS: &str = "cartouche_http_requests_total";
const HTTP_SECONDS: &str = "cartouche_http_response_start_seconds";
const FIRST_TOKEN_SECONDS: &str = "cartouche_time_to_first_token_seconds";
const INTER_TOKEN_SECONDS: &str = "cartouche_inter_token_latency_seconds";
const PROMPT_SECONDS: &str = "cartouche_time_to_prompt_done_seconds";
const GENERATION_SECONDS: &str = "cartouche_generation_seconds";
const PROMPT_TOKENS: &str = "cartouche_prompt_tokens_total";
const CACHED_TOKENS: &str = "cartouche_cached_prompt_tokens_total";
const COMPLETION_TOKENS: &str = "cartouche_completion_tokens_total";
const CHOICES: &str = "cartouche_choices_finished_total";
const ADMIN_ACTIONS: &str = "cartouche_admin_actions_total";
const IN_FLIGHT: &str = "cartouche_requests_in_flight";

/// Upper bounds of the time histograms, in seconds.
const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0,
];
/// The same for the time between two tokens, which a small model makes in well under a millisecond.
const TOKEN_SECONDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    10.0,
];
/// The span over which finished choices are counted to say how fast the queue moves.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// Values are handed from the histograms' buffers to their buckets this often, scraped or not.
const UPKEEP: Duration = Duration::from_secs(5);

/// The metrics of one server.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    first_token: Histogram,
    inter_token: Histogram,
    prompt_done: Histogram,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    completion_tokens: Counter,
    rate: Mutex<Rate>,
}

/// Choices finished in this window and how many a second it were in the last.
struct Rate {
    since: Instant,
    finished: u64,
    per_second: f64,
}

impl Default for Metrics {
    fn default() -> Self {
        let buckets = |builder: PrometheusBuilder, matcher, values: &[f64]| {
            // The only error is an empty list.
            builder.set_buckets_for_metric(matcher, values).unwrap_or_default()
        };
        let builder = PrometheusBuilder::new();
        let builder = buckets(builder, Matcher::Suffix("_seconds".to_owned()), SECONDS);
        let builder =
            buckets(builder, Matcher::Full(INTER_TOKEN_SECONDS.to_owned()), TOKEN_SECONDS);
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        with_local_recorder(&recorder, describe);
        let histogram = |name| with_local_recorder(&recorder, || histogram!(name));
        let counter = |name| with_local_recorder(&recorder, || counter!(name));
        Self {
            handle,
            first_token: histogram(FIRST_TOKEN_SECONDS),
            inter_token: histogram(INTER_TOKEN_SECONDS),
            prompt_done: histogram(PROMPT_SECONDS),
            prompt_tokens: counter(PROMPT_TOKENS),
            cached_tokens: counter(CACHED_TOKENS),
            completion_tokens: counter(COMPLETION_TOKENS),
            rate: Mutex::new(Rate { since: Instant::now(), finished: 0, per_second: 0.0 }),
            recorder,
        }
    }
}

/// Help texts of the recorder's metrics.
fn describe() {
    describe_counter!(REQUESTS, "HTTP requests by route, method and status");
    describe_histogram!(HTTP_SECONDS, "Time from request to response headers, by route");
    describe_histogram!(FIRST_TOKEN_SECONDS, "Time from request to first generated token");
    describe_histogram!(INTER_TOKEN_SECONDS, "Time between tokens of a choice");
    describe_histogram!(
        PROMPT_SECONDS,
        "Time from request until its prompt is computed: waiting and prefill"
    );
    describe_histogram!(GENERATION_SECONDS, "Time from request to its end, by outcome");
    describe_counter!(PROMPT_TOKENS, "Prompt tokens of accepted requests");
    describe_counter!(CACHED_TOKENS, "Prompt tokens whose keys and values were reused");
    describe_counter!(COMPLETION_TOKENS, "Generated tokens");
    describe_counter!(CHOICES, "Finished choices by reason");
    describe_counter!(ADMIN_ACTIONS, "What admins did to cartridges, or tried to");
    describe_gauge!(IN_FLIGHT, "Generation requests being answered");
    describe_gauge!("cartouche_sequences_waiting", "Sequences in the queue");
    describe_gauge!("cartouche_sequences_running", "Sequences being decoded");
    describe_gauge!("cartouche_waiting_tokens", "Prompt tokens of the sequences in the queue");
    describe_gauge!("cartouche_kv_blocks_used", "KV cache blocks in use");
    describe_gauge!("cartouche_kv_blocks_cached", "KV cache blocks only the prefix cache holds");
    describe_gauge!("cartouche_kv_blocks", "KV cache blocks in all");
    describe_counter!("cartouche_preemptions_total", "Sequences that gave their blocks up");
    describe_counter!("cartouche_engine_steps_total", "Steps of the model");
    describe_counter!(
        "cartouche_prefix_cache_queried_tokens_total",
        "Prompt tokens looked up in the prefix cache"
    );
    describe_counter!(
        "cartouche_prefix_cache_hit_tokens_total",
        "Prompt tokens found in the prefix cache"
    );
    describe_gauge!("cartouche_cartridges_resident", "Cartridges in memory");
    describe_gauge!("cartouche_cartridge_bytes", "Bytes of cartridges in memory");
    describe_gauge!("cartouche_cartridge_budget_bytes", "Bytes cartridges may take in memory");
    describe_gauge!("cartouche_cartridge_leases", "Uses of cartridges by requests");
    describe_counter!("cartouche_cartridge_loads_total", "Cartridges read from their files");
    describe_counter!("cartouche_cartridge_load_failures_total", "Loads that failed");
    describe_counter!(
        "cartouche_cartridge_evictions_total",
        "Cartridges that left memory for others"
    );
    describe_gauge!("cartouche_cartridge_host_bytes", "Bytes of cartridges kept beside a GPU");
    describe_counter!("cartouche_cartridge_restores_total", "Cartridges copied back to the GPU");
    describe_counter!("cartouche_cartridge_fetches_total", "Fetches from remote sources");
    describe_counter!("cartouche_cartridge_fetch_failures_total", "Fetches that failed");
}

impl Metrics {
    pub(super) fn first_token(&self, elapsed: Duration) {
        self.first_token.record(elapsed);
    }

    pub(super) fn inter_token(&self, elapsed: Duration) {
        self.inter_token.record(elapsed);
    }

    pub(super) fn prompt_done(&self, elapsed: Duration, cached_tokens: usize) {
        self.prompt_done.record(elapsed);
        self.cached_tokens.increment(cached_tokens as u64);
    }

    pub(super) fn accepted(&self, prompt_tokens: usize) {
        self.prompt_tokens.increment(prompt_tokens as u64);
    }

    pub(super) fn completion_token(&self) {
        self.completion_tokens.increment(1);
    }

    pub(super) fn generation_ended(&self, outcome: &'static str, elapsed: Duration) {
        with_local_recorder(&self.recorder, || {
            histogram!(GENERATION_SECONDS, "outcome" => outcome).record(elapsed);
        });
    }

    pub(super) fn admin_action(&self, action: &'static str, outcome: &'static str) {
        with_local_recorder(&self.recorder, || {
            counter!(ADMIN_ACTIONS, "action" => action, "outcome" => outcome).increment(1);
        });
    }

    pub(super) fn choice_finished(&self, reason: &'static str) {
        with_local_recorder(&self.recorder, || {
            counter!(CHOICES, "reason" => reason).increment(1);
        });
        self.rate(Instant::now(), 1);
    }

    /// Choices finished a second, lately; 0 when none did.
    pub(super) fn finish_rate(&self) -> f64 {
        self.rate(Instant::now(), 0)
    }

    fn rate(&self, now: Instant, finished: u64) -> f64 {
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = now.saturating_duration_since(rate.since);
        let here = rate.finished as f64 / elapsed.as_secs_f64().max(1.0);
        if elapsed >= RATE_WINDOW {
            *rate = Rate { since: now, finished: 0, per_second: here };
        }
        rate.finished += finished;
        // A window that has just begun says little.
        rate.per_second.max(here)
    }

    /// Hands recorded values on for ever; without it they would pile up between two scrapes.
    pub(super) async fn keep_up(&self) {
        loop {
            tokio::time::sleep(UPKEEP).await;
            self.handle.run_upkeep();
        }
    }

    fn render(&self, engine: EngineStats, registry: RegistryStats, in_flight: usize) -> String {
        with_local_recorder(&self.recorder, || {
            gauge!(IN_FLIGHT).set(in_flight as f64);
            gauge!("cartouche_sequences_waiting").set(engine.waiting as f64);
            gauge!("cartouche_sequences_running").set(engine.running as f64);
            gauge!("cartouche_waiting_tokens").set(engine.waiting_tokens as f64);
            gauge!("cartouche_kv_blocks_used").set(engine.used_blocks as f64);
            gauge!("cartouche_kv_blocks_cached").set(engine.cached_blocks as f64);
            gauge!("cartouche_kv_blocks").set(engine.total_blocks as f64);
            counter!("cartouche_preemptions_total").absolute(engine.preemptions);
            counter!("cartouche_engine_steps_total").absolute(engine.steps);
            counter!("cartouche_prefix_cache_queried_tokens_total")
                .absolute(engine.prefix_queried_tokens);
            counter!("cartouche_prefix_cache_hit_tokens_total").absolute(engine.prefix_hit_tokens);
            gauge!("cartouche_cartridges_resident").set(registry.resident as f64);
            gauge!("cartouche_cartridge_bytes").set(registry.bytes as f64);
            gauge!("cartouche_cartridge_budget_bytes").set(registry.budget as f64);
            gauge!("cartouche_cartridge_leases").set(registry.leases as f64);
            counter!("cartouche_cartridge_loads_total").absolute(registry.loads);
            counter!("cartouche_cartridge_load_failures_total").absolute(registry.load_failures);
            counter!("cartouche_cartridge_evictions_total").absolute(registry.evictions);
            gauge!("cartouche_cartridge_host_bytes").set(registry.host_bytes as f64);
            counter!("cartouche_cartridge_restores_total").absolute(registry.restores);
            counter!("cartouche_cartridge_fetches_total").absolute(registry.fetches);
            counter!("cartouche_cartridge_fetch_failures_total").absolute(registry.fetch_failures);
        });
        self.handle.run_upkeep();
        self.handle.render()
    }
}

/// Counts every response. Labels hold route patterns, never paths, so clients cannot make them grow.
pub(super) async fn count(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Response {
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
    with_local_recorder(&state.metrics.recorder, || {
        counter!(REQUESTS, "route" => route.clone(), "method" => method, "status" => status)
            .increment(1);
        histogram!(HTTP_SECONDS, "route" => route).record(started.elapsed());
    });
    response
}

/// `GET /metrics`. Ids that the caller may not name are left out.
pub(super) async fn render(State(state): State<Arc<AppState>>, caller: Caller) -> Response {
    let engine = state.engine.stats();
    let mut text = state.metrics.render(engine, state.registry.stats(), state.in_flight.count());
    router_metrics::append(&mut text, &state, engine, &caller.scope);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_window_and_forgets_older_ones() {
        let metrics = Metrics::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        for second in 0..=10 {
            metrics.rate(after(second), 20);
        }
        let rate = metrics.rate(after(11), 0);
        assert!((15.0..30.0).contains(&rate), "{rate}");
        metrics.rate(after(40), 0);
        assert_eq!(metrics.rate(after(60), 0), 0.0);
    }
}
