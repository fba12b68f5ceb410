//! The engine with its sampling on the GPU.
//!
//! All log-probabilities of a row say what its logits were, up to a number that drawing does not depend on:
//! from them the host's sampler must draw the same tokens.

use candle_core::DType;
use cartouche::cartridge::{Cartridge, LayerKv, Lease, Provenance};
use cartouche::engine::{
    EngineError, EngineHandle, EngineOptions, FinishReason, GenerateRequest, Sampler,
    SamplingParams, start, token_logprobs,
};
use cartouche::gpu::sampling::MAX_TOP;
use cartouche::model::{Decoder, LoadOptions, ModelSource, Placement, load_decoder};

use crate::assert_same;
use crate::common::{ModelFixture, model_fixtures};
use crate::engine_support::{Outcome, collect, greedy};
use crate::kernels_support::placement;

/// Tokens of the fixtures' vocabulary.
const VOCAB: usize = 128;

fn fixture() -> ModelFixture {
    model_fixtures(|name| name == "mistral").remove(0)
}

fn engine(decoder: Decoder) -> EngineHandle {
    let options = EngineOptions {
        kv_bytes: 8 << 20,
        prefill_tokens_per_step: 192,
        prefix_cache: false,
        ..EngineOptions::default()
    };
    start(decoder, &options).unwrap().0
}

fn demo(placement: Placement) -> EngineHandle {
    let options = LoadOptions { placement, ..LoadOptions::default() };
    engine(load_decoder(&ModelSource::Demo, &options).unwrap())
}

fn request(prompt: &[u32], change: impl FnOnce(&mut GenerateRequest)) -> GenerateRequest {
    let mut request = greedy(prompt, 7);
    request.sampling.temperature = 1.0;
    request.sampling.seed = Some(11);
    request.logprobs.top = VOCAB;
    change(&mut request);
    request
}

fn run(engine: &EngineHandle, request: &GenerateRequest) -> Outcome {
    collect(engine.submit(request.clone()).unwrap(), request.n).unwrap()
}

/// Draws on the host what `outcome` was drawn from.
#[track_caller]
fn replay(request: &GenerateRequest, outcome: &Outcome) {
    let SamplingParams { temperature, min_tokens, max_tokens, .. } = request.sampling;
    let scale = match temperature > 0.0 && !request.logprobs.ignore_temperature {
        true => temperature,
        false => 1.0,
    };
    for (choice, tokens) in outcome.tokens.iter().enumerate() {
        let mut sampler = Sampler::new(&request.sampling, choice, &request.prompt);
        for (i, token) in tokens.iter().enumerate() {
            assert_eq!(token.top.len(), request.logprobs.top.min(VOCAB));
            let mut row = [f32::NAN; VOCAB];
            token.top.iter().for_each(|(id, logprob)| row[*id as usize] = logprob * scale);
            let forbidden = if i < min_tokens { &request.stop_token_ids[..] } else { &[] };
            let id = sampler.sample(&row, forbidden);
            let mut want = token_logprobs(&row, id, temperature, VOCAB);
            if request.logprobs.ignore_temperature {
                want = token_logprobs(&row, id, 1.0, VOCAB);
            }
            let what = format!("choice {choice}, token {i} of {request:?}");
            assert_eq!(token.id, id, "{what}");
            assert!((token.logprob - want.logprob).abs() < 1e-4, "{what}: {want:?}");
            let stops = i >= min_tokens && request.stop_token_ids.contains(&id);
            let last = stops || i + 1 == max_tokens;
            assert_eq!(last, i + 1 == tokens.len(), "{what}");
        }
        let reason = match tokens.len() == max_tokens {
            true => FinishReason::Length,
            false => FinishReason::Stop,
        };
        assert_eq!(outcome.reasons[choice], Some(reason));
    }
}

#[test]
fn requests_of_all_kinds_in_one_step_draw_what_the_host_draws() {
    let fixture = fixture();
    let engine = engine(fixture.decoder_on(placement(DType::BF16)));
    type Change = fn(&mut GenerateRequest);
    let changes: [Change; 13] = [
        |r| r.sampling.temperature = 0.0,
        |_| {},
        |r| r.sampling.temperature = 0.6,
        |r| (r.sampling.temperature, r.logprobs.ignore_temperature) = (1.8, true),
        |r| (r.sampling.top_k, r.sampling.temperature) = (4, 1.5),
        |r| r.sampling.top_p = 0.6,
        |r| r.sampling.min_p = 0.2,
        |r| (r.sampling.presence_penalty, r.sampling.frequency_penalty) = (1.5, -0.7),
        |r| (r.sampling.temperature, r.sampling.frequency_penalty) = (0.0, 2.0),
        |r| r.sampling.logit_bias = vec![(7, 6.0), (9, 5.0), (127, 7.0)],
        |r| r.n = 3,
        |r| {
            // Often, but not before the fourth.
            (r.sampling.min_tokens, r.sampling.temperature) = (3, 2.0);
            r.stop_token_ids = (0..90).chain(5..9).collect();
        },
        |r| (r.n, r.stop_token_ids) = (2, (0..40).collect()),
    ];
    let prompts = fixture.prompts();
    let requests: Vec<GenerateRequest> = changes
        .iter()
        .enumerate()
        .map(|(i, change)| request(&prompts[i % prompts.len()], change))
        .collect();
    let streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    let mut ends = Vec::new();
    for (request, stream) in requests.iter().zip(streams) {
        let outcome = collect(stream, request.n).unwrap();
        replay(request, &outcome);
        ends.extend(outcome.reasons.iter().map(|reason| reason.unwrap()));
        if request.n == 3 {
            assert_ne!(outcome.ids(0), outcome.ids(1), "each choice has a stream of its own");
        }
    }
    assert!(ends.contains(&FinishReason::Stop) && ends.contains(&FinishReason::Length));
}

/// Their row is read by the host, which draws nothing.
#[test]
fn more_alternatives_than_the_kernel_gives_come_from_the_same_logits() {
    let engine = demo(placement(DType::F16));
    let prompt: Vec<u32> = (40..60).collect();
    let with = |top: usize| {
        let request = request(&prompt, |r| {
            (r.n, r.logprobs.top, r.logprobs.prompt_top) = (2, top, Some(top));
        });
        run(&engine, &request)
    };
    let (few, many) = (with(MAX_TOP), with(MAX_TOP + 1));
    let prompts = few.prompt.iter().zip(&many.prompt).skip(1);
    let prompts = prompts.map(|(few, many)| (few.as_ref().unwrap(), many.as_ref().unwrap()));
    let tokens = few.tokens.iter().flatten().zip(many.tokens.iter().flatten());
    let mut compared = 0;
    for (i, (few, many)) in prompts.chain(tokens).enumerate() {
        let mut many = many.clone();
        assert_eq!((few.top.len(), many.top.len()), (MAX_TOP, MAX_TOP + 1));
        many.top.truncate(MAX_TOP);
        assert_same(few, &many, &format!("token {i}"));
        compared += 1;
    }
    assert_eq!(compared, 19 + 2 * 7);
}

/// More rows than are scored at once, in a step and over steps.
#[test]
fn long_prompts_are_scored_as_on_the_cpu() {
    let prompt: Vec<u32> = (0..390).map(|i| 20 + (i * i) % 301).collect();
    let scored = |placement: Placement| {
        let mut request = request(&prompt, |r| r.logprobs.prompt_top = Some(2));
        request.sampling.max_tokens = 0;
        let outcome = run(&demo(placement), &request);
        assert_eq!(outcome.reasons, [Some(FinishReason::Length)]);
        assert!(outcome.tokens[0].is_empty());
        outcome.prompt
    };
    let (gpu, cpu) = (scored(placement(DType::F16)), scored(Placement::default()));
    assert_eq!((gpu.len(), cpu.len()), (prompt.len(), prompt.len()));
    assert!(gpu[0].is_none());
    let mut same_likeliest = 0;
    for (i, (gpu, cpu)) in gpu.iter().zip(&cpu).enumerate().skip(1) {
        let (gpu, cpu) = (gpu.as_ref().unwrap(), cpu.as_ref().unwrap());
        assert_eq!((gpu.id, gpu.top.len()), (prompt[i], 2));
        let off = (gpu.logprob - cpu.logprob).abs();
        assert!(off < 0.1, "token {i}: {} instead of {}", gpu.logprob, cpu.logprob);
        same_likeliest += usize::from(gpu.top[0].0 == cpu.top[0].0);
    }
    assert!(same_likeliest > 380, "{same_likeliest}");
}

#[test]
fn logits_that_are_not_finite_end_their_request_only() {
    let (fixture, placement) = (fixture(), placement(DType::BF16));
    let engine = engine(fixture.decoder_on(placement.clone()));
    let good = fixture.cartridge("prefix5");
    let huge = good.layers().iter().map(|layer| LayerKv {
        keys: layer.keys.clone(),
        values: layer.values.ones_like().unwrap().affine(3e38, 0.0).unwrap(),
        bias: None,
    });
    let huge = Cartridge::new(huge.collect(), 1, Provenance::default()).unwrap();
    let huge = huge.to(&placement.device, placement.dtype).unwrap();
    let prompt = &fixture.prompts()[1];
    let fine = [request(prompt, |_| {}), request(prompt, |r| r.sampling.temperature = 0.0)];
    let bad = request(prompt, |r| {
        r.cartridges = vec![Lease::detached("huge", &huge).unwrap()];
        r.n = 2;
    });
    let scored = {
        let mut bad = bad.clone();
        (bad.n, bad.sampling.max_tokens, bad.logprobs.prompt_top) = (1, 0, Some(1));
        bad
    };
    let submit = |request: &GenerateRequest| engine.submit(request.clone()).unwrap();
    let streams = [&fine[0], &bad, &fine[1], &scored].map(submit);
    let outcomes = streams.map(|stream| collect(stream, 2));
    let [first, bad, second, scored] = outcomes;
    for failed in [bad, scored] {
        assert!(matches!(failed, Err(EngineError::NonFiniteLogits)), "{failed:?}");
    }
    for (request, outcome) in fine.iter().zip([first, second]) {
        let mut outcome = outcome.unwrap();
        outcome.tokens.truncate(1);
        replay(request, &outcome);
    }
}
