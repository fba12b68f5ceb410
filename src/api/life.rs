//! One generation request from its first check to its end: its place among those in flight, its times, its
//! span in the log. Dropping a [`Life`] is the end, whatever led to it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{FromRequestParts, MatchedPath},
    http::request::Parts,
};
use tracing::{Span, field};

use super::{
    AppState, access::Caller, error::ApiError, in_flight::Ticket, metrics::Metrics,
    openai::params::Settings, request_id::RequestId,
};
use crate::{
    cartridge::Lease,
    engine::{EngineError, Priority},
    limits,
};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Not yet, or because nobody waits for the reply any more.
    Cancelled,
    Finished,
    Failed(Option<&'static str>),
}

/// See the module.
pub struct Life {
    pub metrics: Arc<Metrics>,
    ticket: Ticket,
    span: Span,
    started: Instant,
    /// Whether the engine has taken it.
    submitted: bool,
    first_token: Option<Duration>,
    tokens: usize,
    cached_tokens: usize,
    outcome: Outcome,
}

/// Where a request came in, for its span.
pub struct Origin {
    route: String,
    id: RequestId,
}

impl<S: Send + Sync> FromRequestParts<S> for Origin {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let route = parts.extensions.get::<MatchedPath>().map(|path| path.as_str().to_owned());
        let id = parts.extensions.get::<RequestId>().cloned();
        Ok(Self { route: route.unwrap_or_default(), id: id.unwrap_or_default() })
    }
}

impl Life {
    /// Begins. Refuses at once, before anything of the body is looked at, when the server takes no requests
    /// or its queue is full.
    pub fn begin(state: &AppState, origin: &Origin, caller: &Caller) -> Result<Self, ApiError> {
        // In this order: a drain that starts in between waits for this request.
        let ticket = state.in_flight.enter();
        state.check_ready()?;
        check_queue(state)?;
        let span = tracing::info_span!(
            "request",
            id = origin.id.as_str(),
            route = origin.route.as_str(),
            key = caller.name.as_str(),
            model = field::Empty,
            cartridges = field::Empty,
            prompt_tokens = field::Empty,
            n = field::Empty,
            priority = field::Empty,
            stream = field::Empty,
        );
        Ok(Self {
            metrics: Arc::clone(&state.metrics),
            ticket,
            span,
            started: Instant::now(),
            submitted: false,
            first_token: None,
            tokens: 0,
            cached_tokens: 0,
            outcome: Outcome::Cancelled,
        })
    }

    /// Of a request that no server knows.
    #[cfg(test)]
    pub fn detached() -> Self {
        Self {
            metrics: Arc::default(),
            ticket: Arc::<super::in_flight::InFlight>::default().enter(),
            span: Span::none(),
            started: Instant::now(),
            submitted: true,
            first_token: None,
            tokens: 0,
            cached_tokens: 0,
            outcome: Outcome::Cancelled,
        }
    }

    /// The span that work for this request belongs to.
    pub fn span(&self) -> Span {
        self.span.clone()
    }

    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// The engine is about to take it.
    pub fn submitting(
        &mut self,
        model: &str,
        settings: &Settings,
        lengths: &[usize],
        leases: &[Lease],
    ) {
        let prompt_tokens: usize = lengths.iter().sum();
        self.submitted = true;
        self.metrics.accepted(prompt_tokens);
        self.ticket.holds(leases.iter().map(|lease| lease.id().to_owned()).collect());
        if self.span.is_disabled() {
            return;
        }
        // What a client wrote is quoted, so that it cannot pass for lines of the log.
        self.span.record("model", field::debug(model));
        let ids: Vec<&str> = leases.iter().map(Lease::id).collect();
        self.span.record("cartridges", field::debug(&ids));
        self.span.record("prompt_tokens", prompt_tokens);
        self.span.record("n", settings.n);
        self.span.record("priority", priority_name(settings.priority));
        self.span.record("stream", settings.stream);
        self.span.in_scope(|| tracing::debug!("submitted"));
    }

    pub fn prompt_done(&mut self, cached_tokens: usize) {
        self.cached_tokens += cached_tokens;
        self.metrics.prompt_done(self.started.elapsed(), cached_tokens);
        self.ticket.runs();
        self.span.in_scope(|| tracing::debug!(cached_tokens, "prompt computed"));
    }

    pub fn token(&mut self, now: Instant) {
        self.tokens += 1;
        self.metrics.completion_token();
        if self.first_token.is_none() {
            let elapsed = now.saturating_duration_since(self.started);
            self.first_token = Some(elapsed);
            self.metrics.first_token(elapsed);
            self.span.in_scope(|| tracing::debug!(ms = milliseconds(elapsed), "first token"));
        }
    }

    /// Every choice has its finish.
    pub fn finished(&mut self) {
        if self.outcome == Outcome::Cancelled {
            self.outcome = Outcome::Finished;
        }
    }

    pub fn failed(&mut self, error: &ApiError) {
        self.outcome = Outcome::Failed(error.code);
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        if self.outcome == Outcome::Cancelled && self.ticket.all().is_stopped() {
            self.outcome = Outcome::Failed(Some("shutting_down"));
        }
        let (outcome, code) = match self.outcome {
            Outcome::Finished => ("finished", None),
            Outcome::Failed(code) => ("failed", code),
            Outcome::Cancelled => ("cancelled", None),
        };
        let _entered = self.span.enter();
        if !self.submitted {
            tracing::debug!(ms = milliseconds(elapsed), "ended before it was submitted");
            return;
        }
        self.metrics.generation_ended(outcome, elapsed);
        tracing::info!(
            outcome,
            code,
            first_token_ms = self.first_token.map(milliseconds),
            tokens = self.tokens,
            cached_tokens = self.cached_tokens,
            ms = milliseconds(elapsed),
            "request ended"
        );
    }
}

/// Refuses while the queue is known to be full. What the engine last published may be one step old, in which
/// time a queue only grows or is emptied by clients that leave: the last word is the engine's.
fn check_queue(state: &AppState) -> Result<(), ApiError> {
    let (stats, info) = (state.engine.stats(), state.engine.info());
    let (waiting, limit) = (stats.waiting, info.max_queued_sequences);
    if waiting >= limit {
        return Err(refused(state, EngineError::QueueFull { waiting, limit }));
    }
    let (waiting, limit) = (stats.waiting_tokens, info.max_queued_tokens);
    if waiting > 0 && waiting >= limit {
        return Err(refused(state, EngineError::QueueTokensFull { waiting, limit }));
    }
    Ok(())
}

/// The error of a refusal. One for a full queue says when it will have moved on, as far as the last seconds
/// tell.
pub fn refused(state: &AppState, error: EngineError) -> ApiError {
    let full = matches!(error, EngineError::QueueFull { .. } | EngineError::QueueTokensFull { .. });
    let mut error = ApiError::from(error);
    let waiting = state.engine.stats().waiting;
    if full && waiting > 0 {
        let rate = state.metrics.finish_rate();
        error.retry_after = Some(retry_seconds(waiting, rate));
    }
    error
}

/// Seconds until `waiting` sequences have had their turn at `rate` a second, within what is of use to a client.
fn retry_seconds(waiting: usize, rate: f64) -> u64 {
    let longest = limits::MAX_RETRY_AFTER_SECONDS;
    // No rate: nothing has finished lately, which is known to take long.
    if rate <= 0.0 { longest } else { ((waiting as f64 / rate).ceil() as u64).clamp(1, longest) }
}

/// To the microsecond: more digits are noise in a log.
fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}

fn priority_name(priority: Priority) -> &'static str {
    match priority {
        Priority::Interactive => "interactive",
        Priority::Batch => "batch",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_follows_queue_and_rate_within_bounds() {
        assert_eq!(retry_seconds(100, 20.0), 5);
        assert_eq!(retry_seconds(1, 1000.0), 1);
        assert_eq!(retry_seconds(1_000_000, 1.0), limits::MAX_RETRY_AFTER_SECONDS);
        assert_eq!(retry_seconds(3, 0.0), limits::MAX_RETRY_AFTER_SECONDS);
    }
}
