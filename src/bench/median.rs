//! Medians over repeats.

use super::stats::median;
use super::{Distribution, LevelSummary};

/// One summary per target and load, in the order of their first appearance: counts are summed, all other
/// numbers are medians over the repeats, `repeat` is how many there were.
pub fn medians(levels: &[LevelSummary]) -> Vec<LevelSummary> {
    let key = |l: &LevelSummary| (l.target.clone(), l.r#loop.clone(), l.load.to_bits());
    let mut groups: Vec<Vec<&LevelSummary>> = Vec::new();
    for level in levels {
        match groups.iter_mut().find(|group| key(group[0]) == key(level)) {
            Some(group) => group.push(level),
            None => groups.push(vec![level]),
        }
    }
    groups.iter().map(|group| merge(group)).collect()
}

fn merge(group: &[&LevelSummary]) -> LevelSummary {
    let some =
        |of: &dyn Fn(&LevelSummary) -> Option<f64>| median(group.iter().filter_map(|l| of(l)));
    let number = |of: &dyn Fn(&LevelSummary) -> f64| some(&|l| Some(of(l))).unwrap_or(0.0);
    let spread = |of: &dyn Fn(&LevelSummary) -> Option<Distribution>| {
        let one = |part: &dyn Fn(Distribution) -> f64| some(&|l| of(l).map(part));
        Some(Distribution {
            mean: one(&|d| d.mean)?,
            min: one(&|d| d.min)?,
            p50: one(&|d| d.p50)?,
            p90: one(&|d| d.p90)?,
            p95: one(&|d| d.p95)?,
            p99: one(&|d| d.p99)?,
            max: one(&|d| d.max)?,
        })
    };
    let mut merged = LevelSummary {
        repeat: group.len(),
        wall_s: number(&|l| l.wall_s),
        window_s: number(&|l| l.window_s),
        steady: group.iter().all(|l| l.steady),
        output_tokens_per_s: number(&|l| l.output_tokens_per_s),
        requests_per_s: number(&|l| l.requests_per_s),
        prompt_tokens_per_s: number(&|l| l.prompt_tokens_per_s),
        middle_rounds_tokens_per_s: some(&|l| l.middle_rounds_tokens_per_s),
        client_cpu: some(&|l| l.client_cpu),
        prompt_tokens: some(&|l| l.prompt_tokens),
        cached_tokens: some(&|l| l.cached_tokens),
        output_tokens: some(&|l| l.output_tokens),
        chunks_per_token: some(&|l| l.chunks_per_token),
        ttft_ms: spread(&|l| l.ttft_ms),
        itl_ms: spread(&|l| l.itl_ms),
        tpot_ms: spread(&|l| l.tpot_ms),
        latency_ms: spread(&|l| l.latency_ms),
        decode_tokens_per_s: spread(&|l| l.decode_tokens_per_s),
        ..group[0].clone()
    };
    for level in &group[1..] {
        merged.counts.ok += level.counts.ok;
        merged.counts.failed += level.counts.failed;
        merged.counts.rejected_429 += level.counts.rejected_429;
        merged.counts.retried_429 += level.counts.retried_429;
        merged.counts.without_usage += level.counts.without_usage;
        for (kind, count) in &level.errors {
            *merged.errors.entry(kind.clone()).or_default() += count;
        }
        for (kind, message) in &level.error_messages {
            merged.error_messages.entry(kind.clone()).or_insert_with(|| message.clone());
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::super::load::Outcome;
    use super::super::{Load, Record, summarize};
    use super::*;

    #[test]
    fn repeats_become_medians_and_counts_add_up() {
        let level = |target: &str, clients: usize, latency: f64| {
            let mut record = Record::new(0, 0, 0.0);
            (record.chunks_s, record.ended_s, record.output_tokens) = (vec![latency], latency, 1);
            let outcome = Outcome { records: vec![record], wall_s: latency, ..Outcome::default() };
            summarize(target, Load::Closed { clients }, 1, &outcome)
        };
        let levels =
            [level("b", 1, 9.0), level("a", 1, 1.0), level("b", 2, 5.0), level("b", 1, 2.0)];
        let merged = medians(&[&levels[..], &[level("b", 1, 3.0)]].concat());
        let names: Vec<(&str, f64)> = merged.iter().map(|l| (&l.target[..], l.load)).collect();
        assert_eq!(names, [("b", 1.0), ("a", 1.0), ("b", 2.0)]);
        assert_eq!((merged[0].repeat, merged[0].counts.ok), (3, 3));
        assert_eq!(merged[0].latency_ms.map(|d| d.p50), Some(3000.0));
        assert_eq!(merged[0].wall_s, 3.0);
        assert_eq!(merged[0].prompt_tokens, None);
    }
}
