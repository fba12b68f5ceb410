//! Drawing tokens and log-probabilities: the kernels, run on the CPU, against the engine's sampler and naive twins.

#[path = "../kernels_support/mod.rs"]
mod kernels_support;

mod draws;
mod engine;
mod logprobs;

use std::collections::BTreeMap;

use cartouche::engine::SamplingParams;
use kernels_support::{Buffer, Library, Random, Side};
use rand::RngExt;
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

/// What came of some rows.
struct Drawn {
    tokens: Vec<i32>,
    flags: Vec<i32>,
    /// The twin's tokens, and how far each was from being another.
    twin: Vec<(i32, f64)>,
}

/// Draws with the kernel, and with the twin unless a row is not finite.
fn sample(rows: &[Row], stride: usize, random: &mut Random) -> Drawn {
    let side = random.side();
    let vocab = rows[0].logits.len();
    let logits: Vec<&[f32]> = rows.iter().map(|row| &row.logits[..]).collect();
    let logits = laid_out(&logits, stride, side);
    let before: Vec<u32> = logits.read().iter().map(|x| x.to_bits()).collect();
    let mut starts = vec![0i32];
    for row in rows {
        starts.push(starts.last().unwrap() + row.entries.len() as i32);
    }
    let entries: Vec<(i32, Entry)> =
        rows.iter().flat_map(|row| &row.entries).map(|(id, entry)| (*id, *entry)).collect();
    let ints = |values: Vec<i32>| Buffer::of(&values, side);
    let ids = ints(entries.iter().map(|(id, _)| *id).collect());
    let uses = ints(entries.iter().map(|(_, entry)| entry.uses).collect());
    let biases: Vec<f32> = entries.iter().map(|(_, entry)| entry.bias).collect();
    let (biases, starts) = (Buffer::of(&biases, side), ints(starts));
    let uniforms: Vec<f64> = rows.iter().map(|row| row.uniform).collect();
    let options: Vec<f32> = rows.iter().flat_map(|row| row.options).collect();
    let (uniforms, options) = (Buffer::of(&uniforms, side), Buffer::of(&options, side));
    let top_ks = ints(rows.iter().map(|row| row.top_k).collect());
    let tokens = Buffer::<i32>::poisoned(rows.len(), random.side());
    let flags = Buffer::<i32>::poisoned(rows.len(), random.side());
    Library::of("kernels/sample.cu").launch(
        "sample_f32",
        [rows.len(), 1, 1],
        random.seed(),
        args![
            &logits,
            &uniforms,
            &options,
            &top_ks,
            (!entries.is_empty()).then_some(&starts),
            &ids,
            &uses,
            &biases,
            &Buffer::<f32>::poisoned(entries.len(), side),
            &tokens,
            &flags,
            vocab as i32,
            stride as i64
        ],
    );
    let after: Vec<u32> = logits.read().iter().map(|x| x.to_bits()).collect();
    assert_eq!(before, after, "logits are as before");

    let twin = Buffer::<i32>::poisoned(rows.len(), side);
    let margins = Buffer::<f64>::poisoned(rows.len(), side);
    if rows.iter().all(|row| row.logits.iter().all(|x| x.is_finite())) {
        Library::of("kernels/reference/sampling.cpp").call(
            "reference_sample",
            args![
                &logits,
                &uniforms,
                &options,
                &top_ks,
                &starts,
                &ids,
                &uses,
                &biases,
                &twin,
                &margins,
                rows.len() as i32,
                vocab as i32,
                stride as i64
            ],
        );
    }
    let twin = twin.read().into_iter().zip(margins.read()).collect();
    Drawn { tokens: tokens.read(), flags: flags.read(), twin }
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
