//! Chooses the next token of one sequence.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::SamplingParams;
use crate::gpu::SampleRow;
use crate::ops;

/// What bias and penalties need to know of a token.
#[derive(Debug, Clone, Copy, Default)]
pub struct Adjustment {
    pub bias: f32,
    /// Occurrences among the generated tokens; counted only where a penalty needs them.
    pub count: u32,
    /// Whether the prompt has it; likewise.
    pub in_prompt: bool,
}

/// Sampling state of one sequence: its random stream and what it has generated.
///
/// The result depends on the sequence alone, never on what else is in the batch. Tokens are drawn either
/// here, by [`Self::sample`], or on a GPU, from [`Self::row`]; both take the same numbers of the stream.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// Of the tokens that bias or penalties may reach.
    adjustments: HashMap<u32, Adjustment>,
    /// The row being worked on, reused from step to step.
    logits: Vec<f32>,
}

impl Sampler {
    /// `choice` selects the random stream, so that the choices of one seeded request differ.
    pub fn new(params: &SamplingParams, choice: usize, prompt: &[u32]) -> Self {
        let mut rng = match params.seed {
            Some(seed) => ChaCha8Rng::seed_from_u64(seed),
            None => ChaCha8Rng::from_seed(random_seed()),
        };
        rng.set_stream(choice as u64);
        let mut adjustments: HashMap<u32, Adjustment> = HashMap::new();
        for (id, bias) in &params.logit_bias {
            adjustments.entry(*id).or_default().bias += bias;
        }
        if params.repetition_penalty != 1.0 {
            for id in prompt {
                adjustments.entry(*id).or_default().in_prompt = true;
            }
        }
        Self { params: params.clone(), rng, adjustments, logits: Vec::new() }
    }

    /// Draws a token from a row of logits; `forbidden` ids are never drawn. The row must be finite.
    pub fn sample(&mut self, logits: &[f32], forbidden: &[u32]) -> u32 {
        // Moved out while it is borrowed beside the rest.
        let mut row = std::mem::take(&mut self.logits);
        let logits = match self.adjustments.is_empty() && forbidden.is_empty() {
            true => logits,
            false => {
                row.clear();
                row.extend_from_slice(logits);
                self.adjust(&mut row, forbidden);
                &row
            }
        };
        let token = match self.params.temperature {
            0.0 => ops::argmax(logits) as u32,
            temperature => self.draw(logits, temperature),
        };
        self.logits = row;
        self.drew(token);
        token
    }

    /// What a GPU draws the next token from. [`Self::drew`] must follow with that token.
    pub fn row<'a>(&'a mut self, forbidden: &'a [u32]) -> SampleRow<'a> {
        let uniform = match self.params.temperature {
            0.0 => 0.0,
            _ => self.uniform(),
        };
        SampleRow { params: &self.params, uniform, adjustments: &self.adjustments, forbidden }
    }

    /// Notes a token that was drawn.
    pub fn drew(&mut self, token: u32) {
        let params = &self.params;
        let penalties =
            (params.presence_penalty, params.frequency_penalty, params.repetition_penalty);
        if penalties != (0.0, 0.0, 1.0) {
            self.adjustments.entry(token).or_default().count += 1;
        }
    }

    /// Bias and penalties in the order vLLM applies them, and bans.
    fn adjust(&self, logits: &mut [f32], forbidden: &[u32]) {
        let params = &self.params;
        for (id, Adjustment { bias, count, in_prompt }) in &self.adjustments {
            let Some(logit) = logits.get_mut(*id as usize) else { continue };
            *logit += bias;
            if *in_prompt || *count > 0 {
                *logit = match *logit > 0.0 {
                    true => *logit / params.repetition_penalty,
                    false => *logit * params.repetition_penalty,
                };
            }
            if *count > 0 {
                *logit -= params.frequency_penalty * *count as f32 + params.presence_penalty;
            }
        }
        for id in forbidden {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// The next number of the random stream, in [0, 1).
    fn uniform(&mut self) -> f64 {
        (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn draw(&mut self, logits: &[f32], temperature: f32) -> u32 {
        let max = ops::max(logits);
        let weight = |logit: f32| ((logit - max) / temperature).exp();
        let mut candidates: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .map(|(id, logit)| (id as u32, weight(*logit)))
            // The likeliest token has weight 1.
            .filter(|(_, weight)| *weight >= self.params.min_p && *weight > 0.0)
            .collect();
        if self.params.top_k > 0 && self.params.top_k < candidates.len() {
            candidates.select_nth_unstable_by(self.params.top_k - 1, by_weight);
            candidates.truncate(self.params.top_k);
        }
        if self.params.top_p < 1.0 {
            keep_nucleus(&mut candidates, self.params.top_p);
        }
        // Selection leaves no defined order; the draw below needs one.
        candidates.sort_unstable_by_key(|(id, _)| *id);
        let total: f64 = candidates.iter().map(|(_, w)| f64::from(*w)).sum();
        let mut left = self.uniform() * total;
        for (id, weight) in &candidates {
            left -= f64::from(*weight);
            if left < 0.0 {
                return *id;
            }
        }
        // Rounding can leave a sliver above the last weight.
        candidates.last().map_or_else(|| ops::argmax(logits) as u32, |(id, _)| *id)
    }
}

/// Heavier first, then the smaller id.
fn by_weight(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps the smallest set of heaviest candidates that reaches `top_p` of the total weight, sorting only
/// as many as that takes.
fn keep_nucleus(candidates: &mut Vec<(u32, f32)>, top_p: f32) {
    let total: f64 = candidates.iter().map(|(_, w)| f64::from(*w)).sum();
    let target = total * f64::from(top_p);
    let mut head = 64;
    loop {
        let head_len = head.min(candidates.len());
        if head_len < candidates.len() {
            candidates.select_nth_unstable_by(head_len - 1, by_weight);
        }
        candidates[..head_len].sort_unstable_by(by_weight);
        let mut sum = 0.0;
        for (i, (_, weight)) in candidates[..head_len].iter().enumerate() {
            sum += f64::from(*weight);
            if sum >= target {
                candidates.truncate(i + 1);
                return;
            }
        }
        if head_len == candidates.len() {
            return;
        }
        head *= 8;
    }
}

/// Unpredictable enough for sampling: the standard library seeds its hash maps from the system.
fn random_seed() -> [u8; 32] {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let mut seed = [0; 32];
    for chunk in seed.chunks_exact_mut(8) {
        chunk.copy_from_slice(&RandomState::new().build_hasher().finish().to_le_bytes());
    }
    seed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl FnOnce(&mut SamplingParams)) -> Sampler {
        let mut params = SamplingParams { seed: Some(1), ..SamplingParams::default() };
        change(&mut params);
        Sampler::new(&params, 0, &[0])
    }

    fn frequencies(sampler: &mut Sampler, logits: &[f32], draws: usize) -> Vec<f64> {
        let mut counts = vec![0f64; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits, &[]) as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn frequencies_follow_the_softmax_at_the_temperature() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        let mut s = sampler(|p| p.temperature = 2.0);
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 2.0).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (got, want) in frequencies(&mut s, &logits, 40_000).iter().zip(weights) {
            assert!((got - want / total).abs() < 0.01, "{got} for {}", want / total);
        }
    }

    #[test]
    fn truncations_keep_exactly_the_right_tokens() {
        // Probabilities 0.5, 0.25, 0.125, 0.125 in shuffled places.
        let logits: Vec<f32> = [0.125f32, 0.5, 0.125, 0.25].iter().map(|p| p.ln()).collect();
        type Change = fn(&mut SamplingParams);
        let cases: [(Change, &[usize]); 5] = [
            (|p| p.top_k = 2, &[1, 3]),
            (|p| p.top_p = 0.7, &[1, 3]),
            (|p| p.top_p = 0.5, &[1]),
            (|p| p.min_p = 0.3, &[1, 3]),
            (|p| p.top_k = 3, &[0, 1, 3]),
        ];
        for (change, kept) in cases {
            let seen = frequencies(&mut sampler(change), &logits, 500);
            let seen: Vec<usize> = (0..4).filter(|i| seen[*i] > 0.0).collect();
            assert_eq!(seen, kept);
        }
    }

    #[test]
    fn nucleus_over_a_large_vocabulary_equals_a_full_sort() {
        let weights: Vec<(u32, f32)> =
            (0..5000u32).map(|i| (i, 1.0 / (1.0 + ((i * 7919) % 5000) as f32))).collect();
        for top_p in [0.1, 0.6, 0.95, 0.9999] {
            let mut full = weights.clone();
            full.sort_by(by_weight);
            let target = full.iter().map(|(_, w)| f64::from(*w)).sum::<f64>() * f64::from(top_p);
            let mut sum = 0.0;
            full.retain(|(_, w)| {
                let keep = sum < target;
                sum += f64::from(*w);
                keep
            });
            let mut ours = weights.clone();
            keep_nucleus(&mut ours, top_p);
            assert_eq!(ours, full, "top_p {top_p}");
        }
    }

    #[test]
    fn penalties_and_bias_change_the_greedy_choice() {
        let greedy = |p: &mut SamplingParams| p.temperature = 0.0;
        let mut s = sampler(|p| {
            greedy(p);
            p.presence_penalty = 0.6;
        });
        assert_eq!([s.sample(&[0.0, 1.0, 0.5], &[]), s.sample(&[0.0, 1.0, 0.5], &[])], [1, 2]);
        let mut s = sampler(|p| {
            greedy(p);
            p.repetition_penalty = 2.0; // token 0 is in the prompt
        });
        assert_eq!(s.sample(&[1.9, 1.0, 0.5], &[]), 1);
        let mut s = sampler(|p| {
            greedy(p);
            p.logit_bias = vec![(2, 5.0), (99, 1.0)];
        });
        assert_eq!(s.sample(&[0.0, 1.0, 0.5], &[]), 2);
        assert_eq!(sampler(greedy).sample(&[0.0, 1.0, 0.5], &[1]), 2);
    }

    #[test]
    fn one_seed_gives_one_sequence_and_choices_differ() {
        let logits = vec![0.0; 1000];
        let params = SamplingParams { seed: Some(42), ..SamplingParams::default() };
        let run = |choice| {
            let mut s = Sampler::new(&params, choice, &[]);
            (0..20).map(|_| s.sample(&logits, &[])).collect::<Vec<_>>()
        };
        assert_eq!(run(0), run(0));
        assert_ne!(run(0), run(1));
    }
}
