//! Tokens of whole requests, against the engine's own sampler.

use std::collections::BTreeMap;

use cartouche::engine::{Sampler, SamplingParams};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::kernels_support::Random;
use crate::{IN_PROMPT, Row, logits, sample};

fn settings(rng: &mut ChaCha8Rng, vocab: usize) -> SamplingParams {
    let mut params = SamplingParams {
        seed: Some(rng.next_u64()),
        temperature: [0.0, 0.3, 0.7, 1.0, 1.0, 2.0][rng.random_range(0..6)],
        top_k: [0, 0, 0, 1, 2, 20, 50, vocab, 1 << 40][rng.random_range(0..9)],
        top_p: [1.0, 1.0, 0.95, 0.8, 0.3, 1e-3][rng.random_range(0..6)],
        min_p: [0.0, 0.0, 0.0, 0.02, 0.3, 1.0][rng.random_range(0..6)],
        ..SamplingParams::default()
    };
    if rng.random_bool(0.3) {
        params.presence_penalty = rng.random_range(-2.0f32..2.0);
    }
    if rng.random_bool(0.3) {
        params.frequency_penalty = rng.random_range(-2.0f32..2.0);
    }
    if rng.random_bool(0.3) {
        params.repetition_penalty = rng.random_range(0.5f32..2.0);
    }
    if rng.random_bool(0.3) {
        let mut ids: Vec<u32> = (0..5).map(|_| rng.random_range(0..vocab as u32 + 2)).collect();
        ids.push(u32::MAX >> 1);
        ids.sort_unstable();
        ids.dedup();
        params.logit_bias =
            ids.into_iter().map(|id| (id, rng.random_range(-9.0f32..9.0))).collect();
    }
    params
}

/// A request as the engine has it, and what the host must keep to tell the kernel the same.
struct Sequence {
    params: SamplingParams,
    sampler: Sampler,
    stream: ChaCha8Rng,
    prompt: Vec<u32>,
    generated: BTreeMap<u32, i32>,
}

impl Sequence {
    fn new(rng: &mut ChaCha8Rng, vocab: usize) -> Self {
        let params = settings(rng, vocab);
        let choice = rng.random_range(0..3);
        let prompt: Vec<u32> = (0..12).map(|_| rng.random_range(0..vocab as u32 + 1)).collect();
        let mut stream = ChaCha8Rng::seed_from_u64(params.seed.unwrap());
        stream.set_stream(choice as u64);
        let sampler = Sampler::new(&params, choice, &prompt);
        Self { params, sampler, stream, prompt, generated: BTreeMap::new() }
    }

    /// The next row, and the token that the engine draws from it.
    fn step(&mut self, rng: &mut ChaCha8Rng, vocab: usize) -> (Row, i32) {
        let logits = logits(rng, vocab);
        let uniform = match self.params.temperature {
            0.0 => f64::NAN,
            _ => (self.stream.next_u64() >> 11) as f64 / (1u64 << 53) as f64,
        };
        let forbidden: Vec<u32> = match vocab > 2 && rng.random_bool(0.2) {
            true => vec![rng.random_range(0..vocab as u32), vocab as u32],
            false => Vec::new(),
        };
        let mut row = Row::new(logits, &self.params, uniform);
        for (id, bias) in &self.params.logit_bias {
            row.entries.entry(*id as i32).or_default().bias = *bias;
        }
        for (id, count) in &self.generated {
            row.entries.entry(*id as i32).or_default().uses = *count;
        }
        if self.params.repetition_penalty != 1.0 {
            for id in &self.prompt {
                row.entries.entry(*id as i32).or_default().uses |= IN_PROMPT;
            }
        }
        for id in &forbidden {
            row.entries.entry(*id as i32).or_default().uses = -1;
        }
        let token = self.sampler.sample(&row.logits, &forbidden);
        *self.generated.entry(token).or_default() += 1;
        (row, token as i32)
    }
}

/// Draws whose nearest decision is closer than rounding explains may differ; few are.
#[derive(Default)]
struct Tally {
    rows: usize,
    close: usize,
    differ: usize,
}

impl Tally {
    #[track_caller]
    fn compare(&mut self, row: &Row, got: i32, wants: &[i32], margin: f64, case: &str) {
        self.rows += 1;
        self.close += usize::from(margin < 1e-5);
        if wants.iter().all(|want| *want == got) {
            return;
        }
        self.differ += 1;
        let Row { uniform, options, top_k, .. } = row;
        assert!(
            margin < 1e-5,
            "{case}: {got}, not {wants:?}, with margin {margin:e}; uniform {uniform}, {options:?}, \
             top-k {top_k}, {} adjusted",
            row.entries.len()
        );
    }
}

fn compare_with_engine(seed: u64, vocab: usize, sequences: usize, steps: usize, tally: &mut Tally) {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let random = &mut Random::new(seed);
    let mut all: Vec<Sequence> = (0..sequences).map(|_| Sequence::new(rng, vocab)).collect();
    for step in 0..steps {
        let (rows, wants): (Vec<Row>, Vec<i32>) =
            all.iter_mut().map(|sequence| sequence.step(rng, vocab)).unzip();
        // Odd strides, and whole vectors with a gap.
        let stride = if step % 2 == 0 { vocab } else { vocab.next_multiple_of(4) + 4 };
        let drawn = sample(&rows, stride, random);
        assert!(drawn.flags.iter().all(|flag| *flag == 0));
        for (i, (row, want)) in rows.iter().zip(wants).enumerate() {
            let (twin, margin) = drawn.twin[i];
            let case = format!("vocab {vocab}, step {step}, row {i}");
            tally.compare(row, drawn.tokens[i], &[want, twin], margin, &case);
        }
    }
}

#[test]
fn tokens_are_those_the_engine_draws() {
    let mut tally = Tally::default();
    let vocabs = [1, 2, 5, 31, 64, 127, 128, 129, 500, 1000, 2047];
    for (i, vocab) in vocabs.into_iter().enumerate() {
        compare_with_engine(i as u64, vocab, 60, 5, &mut tally);
    }
    for (seed, vocab) in [(50, 4096), (51, 4097), (52, 9001)] {
        compare_with_engine(seed, vocab, 20, 3, &mut tally);
    }
    println!("{} rows, {} of them close, {} differ", tally.rows, tally.close, tally.differ);
    assert!(tally.differ * 200 <= tally.rows, "{} of {} rows", tally.differ, tally.rows);
}

/// Vocabularies of real models: several turns of every loop, more than one number per thread at the end.
#[test]
fn tokens_of_large_vocabularies() {
    let mut tally = Tally::default();
    for (seed, vocab) in [(60, 49_155), (61, 128_256), (62, 151_669), (63, 262_144)] {
        compare_with_engine(seed, vocab, 3, 2, &mut tally);
    }
    println!("{} rows, {} of them close, {} differ", tally.rows, tally.close, tally.differ);
}
