//! Random rows with random options, several in one launch.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use cartouche::engine::{Sampler, SamplingParams, token_logprobs};
use cartouche::gpu::sampling::{MAX_TOP, MAX_VOCAB, SampleRow, Wanted, draw, score};
use cartouche::gpu::{Machine, machine};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::assert_same;
use crate::kernels_support::placement;

/// The GPU, and rows of one width as it has them.
fn on_gpu(rows: &[Vec<f32>]) -> (Machine, Tensor) {
    let placement = placement(DType::BF16);
    let gpu = machine(&placement.device, placement.dtype).unwrap().unwrap();
    (gpu, Tensor::new(rows.to_vec(), &placement.device).unwrap())
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let mostly = |off: f32, on: std::ops::Range<f32>| prop_oneof![2 => Just(off), 1 => on];
    let bias = prop::collection::vec((prop_oneof![0..9u32, 0..300u32], -9f32..9.0), 0..4);
    (
        prop::sample::select(vec![0.0f32, 0.4, 1.0, 1.7]),
        mostly(1.0, 0.05..1.0),
        prop_oneof![Just(0usize), 1usize..20, Just(usize::MAX)],
        mostly(0.0, 0.0..0.4),
        (mostly(0.0, -2.0..2.0), mostly(0.0, -2.0..2.0), mostly(1.0, 0.5..2.0)),
        prop_oneof![Just(Vec::new()), bias],
        any::<u64>(),
    )
        .prop_map(|(temperature, top_p, top_k, min_p, penalties, logit_bias, seed)| {
            SamplingParams {
                temperature,
                top_p,
                top_k,
                min_p,
                presence_penalty: penalties.0,
                frequency_penalty: penalties.1,
                repetition_penalty: penalties.2,
                logit_bias,
                seed: Some(seed),
                ..SamplingParams::default()
            }
        })
}

/// A sequence: its options, which choice of its request it is, and what is wanted of its rows.
#[derive(Debug, Clone)]
struct Case {
    params: SamplingParams,
    choice: usize,
    prompt: Vec<u32>,
    forbidden: Vec<u32>,
    wanted: Wanted,
}

fn case() -> impl Strategy<Value = Case> {
    // Some are no tokens, many are there twice.
    let ids = |most: usize| prop::collection::vec(prop_oneof![0..9u32, 0..320u32], 0..most);
    let wanted = (prop::sample::select(vec![0.0f32, 0.5, 1.0, 2.0]), 0usize..30);
    (params(), 0..3usize, ids(20), ids(6), wanted).prop_map(
        |(params, choice, prompt, forbidden, (temperature, top))| {
            let wanted = Wanted { temperature, top };
            Case { params, choice, prompt, forbidden, wanted }
        },
    )
}

fn logits(rng: &mut ChaCha8Rng, rows: usize, vocab: usize) -> Vec<Vec<f32>> {
    let row = |rng: &mut ChaCha8Rng| {
        let scale = [0.5f32, 3.0, 12.0][rng.random_range(0..3)];
        (0..vocab).map(|_| rng.random_range(-scale..scale)).collect()
    };
    (0..rows).map(|_| row(rng)).collect()
}

/// The same cases every time: one draw in some 100,000 lies nearer to another token than rounding allows to say.
fn config(cases: u32) -> ProptestConfig {
    let rng_seed = RngSeed::Fixed(17);
    ProptestConfig { failure_persistence: None, rng_seed, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(config(32))]

    /// Step by step, so that what was drawn before counts.
    #[test]
    fn sequences_with_options_of_their_own_draw_what_the_host_draws(
        cases in prop::collection::vec(case(), 1..7),
        vocab in prop::sample::select(vec![5usize, 128, 131, 300]),
        seed in any::<u64>(),
    ) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let sampler = |case: &Case| Sampler::new(&case.params, case.choice, &case.prompt);
        let mut host: Vec<Sampler> = cases.iter().map(sampler).collect();
        let mut device: Vec<Sampler> = cases.iter().map(sampler).collect();
        for step in 0..3 {
            let logits = logits(rng, cases.len(), vocab);
            let (gpu, tensor) = on_gpu(&logits);
            // Tokens are forbidden at the beginning, if at all.
            let forbidden = |case: &'_ Case| if step < 2 { case.forbidden.clone() } else { vec![] };
            let forbidden: Vec<Vec<u32>> = cases.iter().map(forbidden).collect();
            let rows: Vec<_> = device
                .iter_mut()
                .zip(&forbidden)
                .zip(&cases)
                .map(|((sampler, forbidden), case)| (sampler.row(forbidden), case.wanted))
                .collect();
            let drawn = draw(&*gpu, &tensor, &rows).unwrap();
            prop_assert_eq!(tensor.to_vec2::<f32>().unwrap(), logits.clone());
            for (i, case) in cases.iter().enumerate() {
                let Wanted { temperature, top } = case.wanted;
                let id = host[i].sample(&logits[i], &forbidden[i]);
                let want = token_logprobs(&logits[i], id, temperature, top);
                let got = drawn[i].as_ref().unwrap();
                assert_same(got, &want, &format!("step {step}, row {i}"));
                device[i].drew(got.id);
            }
        }
    }

    #[test]
    fn given_tokens_score_as_on_the_host(
        tokens in prop::collection::vec(0..400u32, 1..9),
        vocab in prop::sample::select(vec![1usize, 127, 128, 300]),
        temperature in prop::sample::select(vec![0.0f32, 0.5, 1.0, 2.0]),
        top in 0usize..40,
        seed in any::<u64>(),
    ) {
        let logits = logits(&mut ChaCha8Rng::seed_from_u64(seed), tokens.len(), vocab);
        let (gpu, tensor) = on_gpu(&logits);
        let scores = score(&*gpu, &tensor, &tokens, Wanted { temperature, top }).unwrap();
        prop_assert_eq!(scores.len(), tokens.len());
        for (i, (got, id)) in scores.iter().zip(&tokens).enumerate() {
            let want = token_logprobs(&logits[i], *id, temperature, top);
            let got = got.as_ref().unwrap();
            prop_assert_eq!(want.logprob.is_finite(), (*id as usize) < vocab);
            if want.logprob.is_finite() {
                assert_same(got, &want, &format!("row {i}"));
            } else {
                prop_assert_eq!((got.id, got.logprob), (want.id, want.logprob));
            }
        }
    }
}

/// Draws greedily, with two alternatives.
fn greedy(gpu: &Machine, logits: &Tensor, params: &SamplingParams) -> Vec<Option<u32>> {
    let adjustments = HashMap::new();
    let row = SampleRow { params, uniform: 0.5, adjustments: &adjustments, forbidden: &[] };
    let wanted = Wanted { temperature: 1.0, top: 2 };
    let drawn = draw(&**gpu, logits, &vec![(row, wanted); logits.dim(0).unwrap()]).unwrap();
    drawn.into_iter().map(|token| token.map(|token| token.id)).collect()
}

#[test]
fn rows_that_are_not_finite_are_reported_alone() {
    let mut logits = logits(&mut ChaCha8Rng::seed_from_u64(1), 5, 200);
    let (gpu, tensor) = on_gpu(&logits);
    let params = SamplingParams::default();
    let wanted = Wanted { temperature: 1.0, top: 3 };
    let tokens = [9, 8, 7, 6, 5];
    let drawn = greedy(&gpu, &tensor, &params);
    let scores = score(&*gpu, &tensor, &tokens, wanted).unwrap();
    assert!(drawn.iter().all(Option::is_some) && scores.iter().all(Option::is_some));

    let bad = [(0, f32::NAN), (2, f32::INFINITY), (3, f32::NEG_INFINITY)];
    bad.iter().for_each(|(row, value)| logits[*row][70 * row % 200] = *value);
    let (gpu, tensor) = on_gpu(&logits);
    let only_fine = |row: usize| !bad.iter().any(|(bad, _)| *bad == row);
    let again = greedy(&gpu, &tensor, &params);
    let scored = score(&*gpu, &tensor, &tokens, wanted).unwrap();
    for row in 0..5 {
        assert_eq!(again[row], drawn[row].filter(|_| only_fine(row)), "row {row}");
        assert_eq!(scored[row], scores[row].clone().filter(|_| only_fine(row)), "row {row}");
    }
}

/// The host takes such a token for one that is never, or certainly, drawn; only the model's own infinities
/// end a request.
#[test]
fn an_adjustment_that_overflows_is_not_taken_for_a_fault_of_the_model() {
    let logits = vec![vec![-10.0f32, 2.0, 1.0, -8.0, 3.0, 3.0]];
    let (gpu, tensor) = on_gpu(&logits);
    for temperature in [0.0, 1.0] {
        for repetition_penalty in [1e38, 1e-38, f32::MIN_POSITIVE / 8.0] {
            for bias in [0.0, f32::INFINITY, f32::NEG_INFINITY] {
                let params = SamplingParams {
                    temperature,
                    repetition_penalty,
                    logit_bias: vec![(0, bias), (2, bias)],
                    seed: Some(3),
                    ..SamplingParams::default()
                };
                let sampler = || Sampler::new(&params, 0, &[0, 4, 5]);
                let want = sampler().sample(&logits[0], &[]);
                let mut device = sampler();
                let row = (device.row(&[]), Wanted { temperature, top: 1 });
                let drawn = draw(&*gpu, &tensor, &[row]).unwrap();
                let id = drawn[0].as_ref().map(|token| token.id);
                assert_eq!(id, Some(want), "{params:?}");
            }
        }
    }
}

#[test]
fn what_the_kernels_cannot_do_is_refused() {
    let (gpu, logits) = on_gpu(&[vec![0.0; 300], vec![1.0; 300]]);
    let at = |logits: &Tensor, rows: usize, top: usize| {
        let wanted = Wanted { temperature: 1.0, top };
        score(&*gpu, logits, &vec![0; rows], wanted).map(|scores| scores.len())
    };
    assert_eq!(at(&logits, 2, MAX_TOP).unwrap(), 2);
    assert_eq!(at(&logits, 0, 1).unwrap(), 0);
    for (logits, rows, top) in [
        (logits.clone(), 1, 0),
        (logits.clone(), 3, 0),
        (logits.clone(), 2, MAX_TOP + 1),
        (logits.to_dtype(DType::BF16).unwrap(), 2, 0),
        (logits.t().unwrap(), 300, 0),
        (Tensor::zeros((1, MAX_VOCAB + 1), DType::F32, logits.device()).unwrap(), 1, 0),
    ] {
        assert!(at(&logits, rows, top).is_err(), "{logits:?} {rows} {top}");
    }
}
