//! From the records of a level to its numbers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::load::Outcome;
use super::{Distribution, Load, Record};

/// One level on one target. Failed requests are in `counts` and `errors` and nowhere else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LevelSummary {
    pub target: String,
    /// `closed` or `open`.
    pub r#loop: String,
    /// Clients, or requests per second.
    pub load: f64,
    /// From 1.
    pub repeat: usize,
    pub counts: Counts,
    /// Seconds from the first request to the end of the last.
    pub wall_s: f64,
    /// Seconds of the window that rates are taken over. Closed loop: from the last client's first
    /// request to the first client's last end, so that all are busy. Open loop: first to last arrival.
    pub window_s: f64,
    /// False if there was no such window, and rates are over all of `wall_s`.
    pub steady: bool,
    /// Tokens that arrived in the window.
    pub output_tokens_per_s: f64,
    /// A request that lies in the window in part counts by that part.
    pub requests_per_s: f64,
    /// Prompt tokens, each request's spread from its start to its first text.
    pub prompt_tokens_per_s: f64,
    /// Clients times mean tokens over mean latency, of the middle 40 % of each client's requests (of
    /// ten: the fourth to the seventh).
    pub middle_rounds_tokens_per_s: Option<f64>,
    /// Share of one core this process used.
    pub client_cpu: Option<f64>,
    /// Means over successful requests.
    pub prompt_tokens: Option<f64>,
    pub cached_tokens: Option<f64>,
    pub output_tokens: Option<f64>,
    /// Chunks with text per output token; below 1, a gap between chunks can be that of several tokens.
    pub chunks_per_token: Option<f64>,
    pub ttft_ms: Option<Distribution>,
    /// Between chunks with text.
    pub itl_ms: Option<Distribution>,
    /// Time per output token after the first, one value per request.
    pub tpot_ms: Option<Distribution>,
    pub latency_ms: Option<Distribution>,
    /// Tokens per second of one request after its first, one value per request.
    pub decode_tokens_per_s: Option<Distribution>,
    /// Failures by kind.
    pub errors: BTreeMap<String, u64>,
    /// One message of each kind.
    pub error_messages: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub ok: u64,
    /// All failures but 429.
    pub failed: u64,
    pub rejected_429: u64,
    /// Times a 429 was waited out.
    pub retried_429: u64,
    /// Successful requests whose tokens are counted chunks: the server sent no usage.
    pub without_usage: u64,
}

/// Sums a level up.
pub fn summarize(target: &str, load: Load, repeat: usize, outcome: &Outcome) -> LevelSummary {
    let good: Vec<&Record> = outcome.records.iter().filter(|r| r.failure.is_none()).collect();
    let mut counts = Counts { ok: good.len() as u64, ..Counts::default() };
    let (mut errors, mut error_messages) = (BTreeMap::new(), BTreeMap::new());
    for record in &outcome.records {
        counts.retried_429 += u64::from(record.retries);
        if let Some(failure) = &record.failure {
            let kind = failure.kind();
            match kind.as_str() {
                "http_429" => counts.rejected_429 += 1,
                _ => counts.failed += 1,
            }
            *errors.entry(kind.clone()).or_default() += 1;
            error_messages.entry(kind).or_insert_with(|| failure.to_string());
        } else if !record.tokens_from_usage {
            counts.without_usage += 1;
        }
    }
    let window = steady_window(load, &outcome.records);
    let (from, to) = window.unwrap_or((0.0, outcome.wall_s));
    let rate = |of: &dyn Fn(&Record) -> f64| {
        let sum: f64 = good.iter().map(|record| of(record)).sum();
        if to > from { sum / (to - from) } else { 0.0 }
    };
    let mean = |values: Vec<f64>| Distribution::of(values).map(|d| d.mean);
    let ms = |seconds: f64| seconds * 1e3;
    let tokens: u64 = good.iter().map(|r| r.output_tokens).sum();
    let chunks: usize = good.iter().map(|r| r.chunks_s.len()).sum();
    LevelSummary {
        target: target.to_owned(),
        r#loop: match load {
            Load::Closed { .. } => "closed",
            Load::Open { .. } => "open",
        }
        .to_owned(),
        load: load.size(),
        repeat,
        counts,
        wall_s: outcome.wall_s,
        window_s: to - from,
        steady: window.is_some(),
        output_tokens_per_s: rate(&|r| {
            let inside = r.chunks_s.iter().filter(|&&at| from <= at && at <= to).count();
            r.output_tokens as f64 * inside as f64 / r.chunks_s.len().max(1) as f64
        }),
        requests_per_s: rate(&|r| share((r.sent_s, r.ended_s), (from, to))),
        prompt_tokens_per_s: rate(&|r| {
            let first = r.chunks_s.first().copied().unwrap_or(r.ended_s);
            r.prompt_tokens.unwrap_or(0) as f64 * share((r.sent_s, first), (from, to))
        }),
        middle_rounds_tokens_per_s: middle_rounds(load, &good),
        client_cpu: outcome.cpu_s.filter(|_| outcome.wall_s > 0.0).map(|s| s / outcome.wall_s),
        prompt_tokens: mean(
            good.iter().filter_map(|r| r.prompt_tokens).map(|n| n as f64).collect(),
        ),
        cached_tokens: mean(
            good.iter().filter_map(|r| r.cached_tokens).map(|n| n as f64).collect(),
        ),
        output_tokens: mean(good.iter().map(|r| r.output_tokens as f64).collect()),
        chunks_per_token: (tokens > 0).then(|| chunks as f64 / tokens as f64),
        ttft_ms: Distribution::of(good.iter().filter_map(|r| r.ttft_s()).map(ms)),
        itl_ms: Distribution::of(good.iter().flat_map(|r| r.gaps_s()).map(ms)),
        tpot_ms: Distribution::of(
            good.iter().filter_map(|r| r.decode()).map(|(s, tokens)| ms(s / tokens as f64)),
        ),
        latency_ms: Distribution::of(good.iter().map(|r| ms(r.latency_s()))),
        decode_tokens_per_s: Distribution::of(
            good.iter().filter_map(|r| r.decode()).map(|(s, tokens)| tokens as f64 / s),
        ),
        errors,
        error_messages,
    }
}

/// The part of `span` that lies in `window`; a span without length counts whole if it is inside.
fn share(span: (f64, f64), window: (f64, f64)) -> f64 {
    let length = span.1 - span.0;
    if length <= 0.0 {
        return if window.0 <= span.0 && span.0 <= window.1 { 1.0 } else { 0.0 };
    }
    (span.1.min(window.1) - span.0.max(window.0)).max(0.0) / length
}

/// See [`LevelSummary::window_s`].
fn steady_window(load: Load, records: &[Record]) -> Option<(f64, f64)> {
    let (from, to) = match load {
        Load::Closed { clients } => {
            let mut spans: Vec<Option<(f64, f64)>> = vec![None; clients];
            for r in records {
                let span = spans.get_mut(r.client)?;
                let (from, to) = span.unwrap_or((r.sent_s, r.ended_s));
                *span = Some((from.min(r.sent_s), to.max(r.ended_s)));
            }
            let busy = |a: (f64, f64), b: (f64, f64)| (a.0.max(b.0), a.1.min(b.1));
            spans.into_iter().try_fold((0.0, f64::INFINITY), |a, b| Some(busy(a, b?)))?
        }
        Load::Open { .. } => (0.0, records.iter().map(|r| r.intended_s).fold(0.0, f64::max)),
    };
    (to > from && to.is_finite()).then_some((from, to))
}

fn middle_rounds(load: Load, good: &[&Record]) -> Option<f64> {
    let Load::Closed { clients } = load else { return None };
    let rounds = good.iter().map(|r| r.index).max()? + 1;
    let (from, to) = (rounds * 3 / 10, (rounds * 7).div_ceil(10));
    let kept: Vec<&&Record> = good.iter().filter(|r| (from..to).contains(&r.index)).collect();
    let tokens: u64 = kept.iter().map(|r| r.output_tokens).sum();
    let seconds: f64 = kept.iter().map(|r| r.latency_s()).sum();
    (seconds > 0.0).then(|| clients as f64 * tokens as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::super::Failure;
    use super::*;

    /// A request of one prompt token per second of waiting and a token each half second.
    fn record(client: usize, index: usize, from: f64, first: f64, tokens: u64) -> Record {
        let mut record = Record::new(client, index, from);
        record.chunks_s = (0..tokens).map(|i| first + 0.5 * i as f64).collect();
        record.ended_s = record.chunks_s[record.chunks_s.len() - 1];
        (record.output_tokens, record.tokens_from_usage) = (tokens, true);
        record.prompt_tokens = Some((first - from) as u64);
        record
    }

    #[test]
    fn rates_are_taken_while_all_clients_are_busy() {
        // Client 0: 0..10 and 10..20; client 1: 2..30. All busy: 2..20.
        let records = vec![
            record(0, 0, 0.0, 8.0, 5),
            record(0, 1, 10.0, 18.0, 5),
            record(1, 0, 2.0, 25.5, 10),
        ];
        let outcome = Outcome { records, wall_s: 30.0, ..Outcome::default() };
        let level = summarize("a", Load::Closed { clients: 2 }, 1, &outcome);
        assert!(level.steady);
        assert_eq!(level.window_s, 18.0);
        assert_eq!(level.output_tokens_per_s, 10.0 / 18.0);
        let requests = 0.8 + 1.0 + 18.0 / 28.0;
        assert!((level.requests_per_s - requests / 18.0).abs() < 1e-12);
        let prompt = 8.0 * 6.0 / 8.0 + 8.0 + 23.0 * 18.0 / 23.5;
        assert!((level.prompt_tokens_per_s - prompt / 18.0).abs() < 1e-12);
        let ttft = level.ttft_ms.unwrap();
        assert_eq!((ttft.min, ttft.p50, ttft.max), (8000.0, 8000.0, 23500.0));
        assert_eq!(level.itl_ms.unwrap().mean, 500.0);
        assert_eq!(level.decode_tokens_per_s.unwrap().p50, 2.0);
    }

    #[test]
    fn of_ten_rounds_the_fourth_to_the_seventh_are_kept() {
        // Latency 1 s in the middle, 100 s elsewhere.
        let one = |index: usize| {
            let mut record = record(0, index, 0.0, 0.0, 4);
            record.ended_s = if (3..7).contains(&index) { 1.0 } else { 100.0 };
            record
        };
        let outcome =
            Outcome { records: (0..10).map(one).collect(), wall_s: 1.0, ..Outcome::default() };
        let level = summarize("a", Load::Closed { clients: 1 }, 1, &outcome);
        assert_eq!(level.middle_rounds_tokens_per_s, Some(4.0));
    }

    #[test]
    fn failures_are_counted_by_kind_and_enter_no_rate() {
        let mut busy = record(0, 0, 0.0, 1.0, 3);
        busy.failure = Some(Failure::Busy { retry_after: None, message: "full".to_owned() });
        let mut broken = record(0, 1, 1.0, 2.0, 3);
        broken.failure = Some(Failure::NoDone);
        let records = vec![busy, broken];
        let outcome = Outcome { records, wall_s: 3.0, ..Outcome::default() };
        let level = summarize("a", Load::Closed { clients: 1 }, 1, &outcome);
        let want = Counts { failed: 1, rejected_429: 1, ..Counts::default() };
        assert_eq!(level.counts, want);
        assert_eq!(level.errors["no_done"], 1);
        assert!(level.error_messages["http_429"].contains("full"));
        assert_eq!((level.output_tokens_per_s, level.ttft_ms), (0.0, None));
    }

    #[test]
    fn a_client_without_an_answer_leaves_no_steady_window() {
        let outcome =
            Outcome { records: vec![record(0, 0, 0.0, 1.0, 2)], wall_s: 4.0, ..Outcome::default() };
        let level = summarize("a", Load::Closed { clients: 2 }, 1, &outcome);
        assert!(!level.steady);
        assert_eq!(level.output_tokens_per_s, 0.5);
    }
}
