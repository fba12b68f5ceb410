//! Drawing tokens and log-probabilities: the kernels, run on the CPU, against the engine's sampler and naive twins.

mod kernels_support;
#[path = "kernels_sampling/logprobs.rs"]
mod logprobs;

use std::collections::BTreeMap;

use cartouche::engine::{Sampler, SamplingParams};
use kernels_support::{Buffer, Library, Random, Side};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const IN_PROMPT: i32 = 1 << 30;

/// What the kernel does to the logits of one token.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    uses: i32,
    bias: f32,
}

/// One draw.
#[derive(Debug, Clone)]
struct Row {
    logits: Vec<f32>,
    uniform: f64,
    options: [f32; 6],
    top_k: i32,
    entries: BTreeMap<i32, Entry>,
}

impl Row {
    fn new(logits: Vec<f32>, params: &SamplingParams, uniform: f64) -> Self {
        let options = [
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        ];
        let top_k = params.top_k.min(logits.len()) as i32;
        Self { logits, uniform, options, top_k, entries: BTreeMap::new() }
    }

    /// The twin's token, and how far it was from being another.
    fn twin(&self) -> (i32, f64) {
        let ids: Vec<i32> = self.entries.keys().copied().collect();
        let uses: Vec<i32> = self.entries.values().map(|entry| entry.uses).collect();
        let biases: Vec<f32> = self.entries.values().map(|entry| entry.bias).collect();
        type Twin = extern "C" fn(
            *const f32,
            i32,
            f64,
            *const f32,
            i32,
            i32,
            *const i32,
            *const i32,
            *const f32,
            *mut f64,
        ) -> i32;
        let symbol = Library::of("kernels/reference/sampling.cpp").symbol("reference_sample");
        // SAFETY: declared so in the reference.
        let twin: Twin = unsafe { std::mem::transmute(symbol) };
        let mut margin = f64::NAN;
        let token = twin(
            self.logits.as_ptr(),
            self.logits.len() as i32,
            self.uniform,
            self.options.as_ptr(),
            self.top_k,
            ids.len() as i32,
            ids.as_ptr(),
            uses.as_ptr(),
            biases.as_ptr(),
            &mut margin,
        );
        (token, margin)
    }
}

/// Rows of one width `stride` apart, with NaN between them.
fn laid_out(rows: &[&[f32]], stride: usize, side: Side) -> Buffer<f32> {
    let mut all = Vec::new();
    for row in rows {
        all.resize(all.len().next_multiple_of(stride), f32::NAN);
        all.extend_from_slice(row);
    }
    Buffer::of(&all, side)
}

/// Tokens and flags.
fn sample(rows: &[Row], stride: usize, random: &mut Random) -> (Vec<i32>, Vec<i32>) {
    let side = random.side();
    let vocab = rows[0].logits.len();
    let logits: Vec<&[f32]> = rows.iter().map(|row| &row.logits[..]).collect();
    let logits = laid_out(&logits, stride, side);
    let before: Vec<u32> = logits.read().iter().map(|x| x.to_bits()).collect();
    let mut starts = vec![0i32];
    let entries: Vec<(i32, Entry)> = rows
        .iter()
        .flat_map(|row| {
            starts.push(starts.last().unwrap() + row.entries.len() as i32);
            row.entries.iter().map(|(id, entry)| (*id, *entry))
        })
        .collect();
    let ids: Vec<i32> = entries.iter().map(|(id, _)| *id).collect();
    let uses: Vec<i32> = entries.iter().map(|(_, entry)| entry.uses).collect();
    let biases: Vec<f32> = entries.iter().map(|(_, entry)| entry.bias).collect();
    let starts = (!entries.is_empty()).then(|| Buffer::of(&starts, side));
    let uniforms: Vec<f64> = rows.iter().map(|row| row.uniform).collect();
    let options: Vec<f32> = rows.iter().flat_map(|row| row.options).collect();
    let top_ks: Vec<i32> = rows.iter().map(|row| row.top_k).collect();
    let tokens = Buffer::<i32>::poisoned(rows.len(), random.side());
    let flags = Buffer::<i32>::poisoned(rows.len(), random.side());
    Library::of("kernels/sample.cu").launch(
        "sample_f32",
        [rows.len(), 1, 1],
        random.seed(),
        args![
            &logits,
            &Buffer::of(&uniforms, side),
            &Buffer::of(&options, side),
            &Buffer::of(&top_ks, side),
            starts.as_ref(),
            &Buffer::of(&ids, side),
            &Buffer::of(&uses, side),
            &Buffer::of(&biases, side),
            &Buffer::<f32>::poisoned(ids.len(), side),
            &tokens,
            &flags,
            vocab as i32,
            stride as i64
        ],
    );
    let after: Vec<u32> = logits.read().iter().map(|x| x.to_bits()).collect();
    assert_eq!(before, after, "logits are as before");
    (tokens.read(), flags.read())
}

/// Logits as models have them and as they do not.
fn logits(rng: &mut ChaCha8Rng, vocab: usize) -> Vec<f32> {
    let scale = [0.1f32, 1.0, 4.0, 12.0][rng.random_range(0..4)];
    // Rounded, so that many are equal; or not.
    let step = [0.0f32, 0.0, 0.0, 0.5, 4.0][rng.random_range(0..5)];
    (0..vocab)
        .map(|_| {
            let x: f32 = (0..3).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * scale;
            if step > 0.0 { (x / step).round() * step } else { x }
        })
        .collect()
}

fn settings(rng: &mut ChaCha8Rng, vocab: usize) -> SamplingParams {
    let mut params = SamplingParams {
        seed: Some(rng.next_u64()),
        temperature: [0.0, 0.3, 0.7, 1.0, 1.0, 2.0][rng.random_range(0..6)],
        top_k: [0, 0, 0, 1, 2, 20, 50, vocab, 1 << 40][rng.random_range(0..9)],
        top_p: [1.0, 1.0, 0.95, 0.8, 0.3, 1e-6][rng.random_range(0..6)],
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
        let (tokens, flags) = sample(&rows, stride, random);
        assert!(flags.iter().all(|flag| *flag == 0));
        for ((row, want), got) in rows.iter().zip(wants).zip(tokens) {
            let (twin, margin) = row.twin();
            tally.compare(row, got, &[want, twin], margin, &format!("vocab {vocab}, step {step}"));
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

/// Every option by itself, where exact weights leave no room for rounding.
#[test]
fn each_truncation_keeps_exactly_the_right_tokens() {
    // Weights of 2^-k: 1/2, 1/4, 1/8, 1/8 in shuffled places; logits are exact multiples of ln 2 to f32.
    let logits: Vec<f32> =
        [3f32, 1.0, 3.0, 2.0].iter().map(|k| -k * std::f32::consts::LN_2).collect();
    let draws = 64;
    let seen = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = SamplingParams::default();
        change(&mut params);
        let rows: Vec<Row> = (0..draws)
            .map(|i| Row::new(logits.clone(), &params, i as f64 / draws as f64))
            .collect();
        let (tokens, _) = sample(&rows, 4, &mut Random::new(1));
        let counts: Vec<usize> =
            (0..4).map(|id| tokens.iter().filter(|t| **t == id).count()).collect();
        assert!(tokens.is_sorted(), "ids ascend with the uniform number");
        counts
    };
    assert_eq!(seen(&|_| ()), [8, 32, 8, 16]);
    assert_eq!(seen(&|p| p.top_k = 2)[0] + seen(&|p| p.top_k = 2)[2], 0);
    // Of equals the lower id stays.
    assert_eq!(
        seen(&|p| p.top_k = 3).iter().map(|c| usize::from(*c > 0)).collect::<Vec<_>>(),
        [1, 1, 0, 1]
    );
    assert_eq!(
        seen(&|p| p.top_p = 0.7).iter().map(|c| usize::from(*c > 0)).collect::<Vec<_>>(),
        [0, 1, 0, 1]
    );
    assert_eq!(seen(&|p| p.top_p = 0.49), [0, 64, 0, 0]);
    assert_eq!(
        seen(&|p| p.min_p = 0.3).iter().map(|c| usize::from(*c > 0)).collect::<Vec<_>>(),
        [0, 1, 0, 1]
    );
    assert_eq!(seen(&|p| p.min_p = 2.0), [0, 64, 0, 0]); // keeps nothing: the likeliest
    assert_eq!(seen(&|p| p.temperature = 0.0), [0, 64, 0, 0]);
    assert_eq!(seen(&|p| p.temperature = 1e-40), [0, 64, 0, 0]);
}

#[test]
fn equal_logits_of_both_zeroes_and_the_ends_of_the_uniform_numbers() {
    for vocab in [1usize, 3, 130, 5000] {
        let mut logits = vec![0f32; vocab];
        logits[0] = -0.0;
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let rows = [
            Row::new(logits.clone(), &greedy, 0.5),
            Row::new(logits.clone(), &SamplingParams::default(), 0.0),
            Row::new(logits.clone(), &SamplingParams::default(), 1.0 - f64::EPSILON / 2.0),
            Row::new(
                logits.clone(),
                &SamplingParams { top_k: 1, ..SamplingParams::default() },
                0.9,
            ),
            // Half of them: by id, as all weigh the same.
            Row::new(
                logits.clone(),
                &SamplingParams { top_p: 0.5, ..SamplingParams::default() },
                0.999_999,
            ),
        ];
        let (tokens, _) = sample(&rows, vocab, &mut Random::new(vocab as u64));
        assert_eq!(tokens, [0, 0, vocab as i32 - 1, 0, vocab.div_ceil(2) as i32 - 1]);
    }
}

/// Of every row that is not finite, wherever the number stands, and if its token is banned or adjusted.
#[test]
fn rows_that_are_not_finite_are_reported_and_leave_the_others_alone() {
    let rng = &mut ChaCha8Rng::seed_from_u64(9);
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let vocab = 1031;
    let fine = Row::new(logits(rng, vocab), &SamplingParams::default(), 0.3);
    let mut rows = Vec::new();
    for (i, at) in [0, 5, 127, 512, 1030].into_iter().enumerate() {
        for (kind, bad) in bad.into_iter().enumerate() {
            let mut row = fine.clone();
            row.logits[at] = bad;
            row.options[0] = [1.0, 0.0][kind % 2];
            row.options[3] = 1.5;
            let uses = [-1, 3, 0, IN_PROMPT][i % 4];
            row.entries.insert(at as i32, Entry { uses, bias: 1.0 });
            rows.extend([row, fine.clone()]);
        }
    }
    let (tokens, flags) = sample(&rows, 1032, &mut Random::new(9));
    let want = fine.twin().0;
    for (tokens, flags) in tokens.chunks(2).zip(flags.chunks(2)) {
        assert_eq!((tokens, flags), (&[-1, want][..], &[1, 0][..]));
    }
}

#[test]
fn a_row_whose_every_token_is_banned_gives_the_first() {
    let mut row = Row::new(vec![1.0, 2.0], &SamplingParams::default(), 0.9);
    row.entries = (0..2).map(|id| (id, Entry { uses: -1, bias: 0.0 })).collect();
    assert_eq!(sample(&[row], 2, &mut Random::new(0)), (vec![0], vec![0]));
}
