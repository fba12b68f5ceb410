//! Log-probabilities of a token and of its likeliest alternatives.

use super::SampledToken;
use crate::ops;

/// Natural-log probabilities over the whole row of `logits`, divided by `temperature` first.
///
/// `temperature` 0 counts as 1, as in Tokasaurus. Alternatives come in descending order, ties by id.
pub fn token_logprobs(logits: &[f32], id: u32, temperature: f32, top: usize) -> SampledToken {
    let scale = if temperature > 0.0 { 1.0 / temperature } else { 1.0 };
    let max = ops::max(logits);
    let log_sum = ops::exp_sum(logits, max, scale).ln() as f32;
    let logprob = |logit: f32| (logit - max) * scale - log_sum;
    SampledToken {
        id,
        logprob: logits.get(id as usize).map_or(f32::NEG_INFINITY, |l| logprob(*l)),
        top: top_k(logits, top).into_iter().map(|(id, logit)| (id, logprob(logit))).collect(),
    }
}

/// The `k` largest logits in descending order, ties by id, without sorting the row.
fn top_k(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let k = k.min(logits.len());
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
    if k == 0 {
        return best;
    }
    for (id, &logit) in logits.iter().enumerate() {
        if best.len() == k && best[k - 1].1 >= logit {
            continue;
        }
        let at = best.partition_point(|(_, other)| *other >= logit);
        best.insert(at, (id as u32, logit));
        best.truncate(k);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_sorted_log_softmax(
            logits in prop::collection::vec(-30f32..30.0, 1..200),
            k in 0usize..40,
            temperature in prop::sample::select(vec![0.0f32, 0.3, 1.0, 2.0]),
        ) {
            let t = if temperature == 0.0 { 1.0 } else { f64::from(temperature) };
            let scaled: Vec<f64> = logits.iter().map(|l| f64::from(*l) / t).collect();
            let max = scaled.iter().copied().fold(f64::MIN, f64::max);
            let lse = max + scaled.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
            let mut sorted: Vec<(usize, f64)> =
                scaled.iter().map(|l| l - lse).enumerate().collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let got = token_logprobs(&logits, 0, temperature, k);
            prop_assert!((f64::from(got.logprob) - (scaled[0] - lse)).abs() < 1e-4);
            prop_assert_eq!(got.top.len(), k.min(logits.len()));
            for ((id, logprob), (want_id, want)) in got.top.iter().zip(sorted) {
                prop_assert_eq!(*id as usize, want_id);
                prop_assert!((f64::from(*logprob) - want).abs() < 1e-4);
            }
        }
    }
}
