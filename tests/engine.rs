//! The engine as callers see it: continuations, log-probabilities, batches, cancellation, refusals.

mod common;
mod engine_support;

use candle_core::{Device, Tensor};
use cartouche::cartridge::{Cartridge, LayerKv, Lease, Provenance};
use cartouche::engine::{
    EngineError, EngineHandle, EngineOptions, Event, FinishReason, GenerateRequest, LogprobOptions,
    SampledToken,
};
use common::ModelFixture;
use engine_support::{Outcome, collect, greedy, kv_bytes, start_engine, wait_until};

/// Small steps and few sequences, so that prompts are cut and requests queue.
fn engine(fixture: &ModelFixture, max_running: usize, prefill: usize) -> EngineHandle {
    engine_with_kv(fixture, 1 << 20, max_running, prefill)
}

fn engine_with_kv(
    fixture: &ModelFixture,
    kv_bytes: u64,
    max_running: usize,
    prefill: usize,
) -> EngineHandle {
    let options = EngineOptions {
        kv_bytes,
        max_running_sequences: max_running,
        prefill_tokens_per_step: prefill,
        max_queued_sequences: 64,
        ..EngineOptions::default()
    };
    start_engine(fixture, &options)
}

#[test]
fn continuations_match_transformers_in_one_mixed_batch() {
    for fixture in common::model_fixtures(|name| !name.starts_with("gguf")) {
        let engine = engine(&fixture, 5, 7);
        let mut running = Vec::new();
        for case in fixture.cases() {
            for (prompt, want) in fixture.prompts().iter().zip(fixture.greedy(&case)) {
                let mut request = greedy(prompt, want.len());
                request.cartridges = fixture.cartridges(&case);
                running.push((case.clone(), want, engine.submit(request).unwrap()));
            }
        }
        for (case, want, stream) in running {
            let got = collect(stream, 1).unwrap();
            assert_eq!(got.ids(0), want, "{} {case}", fixture.name);
            assert_eq!(got.reasons[0], Some(FinishReason::Length));
        }
        assert_eq!(engine.stats().total_blocks, engine.info().kv_tokens / 16);
    }
}

/// Scoring a prompt and the first generated token gives every row of the logits through the paged path.
#[test]
fn logprobs_match_the_log_softmax_of_transformers_logits() {
    for fixture in common::model_fixtures(|name| ["llama3", "qwen3"].contains(&name)) {
        let engine = engine(&fixture, 4, 9);
        let vocab = engine.info().vocab_size;
        for case in fixture.cases() {
            for (i, prompt) in fixture.prompts().iter().enumerate() {
                let mut request = greedy(prompt, 1);
                request.cartridges = fixture.cartridges(&case);
                request.logprobs =
                    LogprobOptions { top: vocab, prompt_top: Some(vocab), ..Default::default() };
                let got = collect(engine.submit(request).unwrap(), 1).unwrap();
                assert_eq!(got.prompt.len(), prompt.len());
                assert_eq!(got.prompt[0], None);
                let rows = got.prompt.iter().skip(1).flatten().chain(&got.tokens[0]);
                let rows: Vec<&SampledToken> = rows.collect();
                let expected = fixture.logits(&case, i);
                for (row, logits) in rows[rows.len() - expected.len()..].iter().zip(expected) {
                    let max = logits.iter().copied().fold(f32::MIN, f32::max);
                    let lse = max + logits.iter().map(|l| (l - max).exp()).sum::<f32>().ln();
                    assert_eq!(row.top.len(), vocab);
                    for (id, logprob) in &row.top {
                        let difference = (logprob - (logits[*id as usize] - lse)).abs();
                        assert!(difference <= 2e-4, "{} {case}: {difference}", fixture.name);
                    }
                }
            }
        }
    }
}

/// Invariant 9: what else is in the batch changes nothing.
#[test]
fn a_seeded_request_gives_the_same_tokens_alone_and_in_a_batch() {
    for fixture in common::model_fixtures(|name| ["qwen2", "mistral"].contains(&name)) {
        let requests: Vec<GenerateRequest> = (0..12)
            .map(|i| {
                let prompts = fixture.prompts();
                let mut request = greedy(&prompts[i % prompts.len()], 10 + i);
                request.sampling.temperature = 0.8 + i as f32 / 10.0;
                request.sampling.top_p = if i % 2 == 0 { 0.9 } else { 1.0 };
                request.sampling.seed = Some(i as u64);
                request.n = 1 + i % 3;
                request.cartridges = match i % 2 {
                    0 => vec![],
                    _ => fixture.cartridges("prefix24"),
                };
                request.logprobs.top = 3;
                request
            })
            .collect();
        let alone: Vec<Outcome> = requests
            .iter()
            .map(|r| collect(engine(&fixture, 1, 64).submit(r.clone()).unwrap(), r.n).unwrap())
            .collect();
        let together = engine(&fixture, 9, 5);
        let streams: Vec<_> =
            requests.iter().map(|r| (together.submit(r.clone()).unwrap(), r.n)).collect();
        for ((stream, n), alone) in streams.into_iter().zip(alone) {
            let batched = collect(stream, n).unwrap();
            for choice in 0..n {
                assert_eq!(batched.ids(choice), alone.ids(choice), "{}", fixture.name);
            }
        }
    }
}

#[test]
fn stop_tokens_end_a_choice_but_not_before_min_tokens() {
    let fixture = &common::model_fixtures(|name| name == "qwen2")[0];
    let engine = engine(fixture, 4, 64);
    let prompt = &fixture.prompts()[1];
    let free = fixture.greedy("base")[1].clone();
    let stop = free[3];
    let first = free.iter().position(|id| *id == stop).unwrap();
    let mut request = greedy(prompt, 24);
    request.stop_token_ids = vec![stop];
    let got = collect(engine.submit(request.clone()).unwrap(), 1).unwrap();
    assert_eq!(got.ids(0), free[..=first]);
    assert_eq!(got.reasons[0], Some(FinishReason::Stop));

    request.sampling.min_tokens = 10;
    let got = collect(engine.submit(request.clone()).unwrap(), 1).unwrap();
    assert!(!got.ids(0)[..10].contains(&stop));

    // At the limit the reason is the limit, even when the last token is a stop token.
    request.sampling.min_tokens = 0;
    request.sampling.max_tokens = first + 1;
    let got = collect(engine.submit(request).unwrap(), 1).unwrap();
    assert_eq!(got.reasons[0], Some(FinishReason::Length));
}

#[test]
fn dropping_a_stream_frees_its_blocks_and_others_go_on() {
    let fixture = &common::model_fixtures(|name| name == "llama")[0];
    let engine = engine(fixture, 3, 16);
    let prompt = &fixture.prompts()[1];
    let mut dropped = engine.submit(greedy(prompt, 60)).unwrap();
    let kept = engine.submit(greedy(prompt, 24)).unwrap();
    let waiting: Vec<_> = (0..4).map(|_| engine.submit(greedy(prompt, 60)).unwrap()).collect();
    assert!(matches!(dropped.blocking_next(), Some(Event::PromptDone { .. })));
    drop(dropped);
    drop(waiting);
    assert_eq!(collect(kept, 1).unwrap().ids(0), fixture.greedy("base")[1]);
    wait_until(&engine, |stats| (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0));
}

#[test]
fn one_choice_can_be_cancelled_while_the_others_finish() {
    let fixture = &common::model_fixtures(|name| name == "llama")[0];
    let engine = engine(fixture, 4, 16);
    let mut request = greedy(&fixture.prompts()[1], 30);
    request.n = 2;
    let stream = engine.submit(request).unwrap();
    stream.cancel_choice(1);
    let got = collect(stream, 2).unwrap();
    assert_eq!((got.tokens[0].len(), got.reasons[0]), (30, Some(FinishReason::Length)));
    assert!(got.tokens[1].len() < 30 && got.reasons[1].is_none());
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let fixture = &common::model_fixtures(|name| name == "llama")[0];
    let engine = engine(fixture, 2, 16);
    let limit = engine.info().max_context;
    let refused = |change: &dyn Fn(&mut GenerateRequest)| {
        let mut request = greedy(&[1, 2, 3], 4);
        change(&mut request);
        engine.submit(request).unwrap_err()
    };
    let field = |error: EngineError| match error {
        EngineError::InvalidRequest { field, .. } => field,
        other => panic!("{other}"),
    };
    assert_eq!(field(refused(&|r| r.prompt.clear())), "prompt");
    assert_eq!(field(refused(&|r| r.prompt[1] = 1 << 20)), "prompt");
    assert_eq!(field(refused(&|r| r.n = 0)), "n");
    assert_eq!(field(refused(&|r| r.sampling.max_tokens = 0)), "max_tokens");
    let too_long = |error| matches!(error, EngineError::TooLong { .. });
    assert!(too_long(refused(&|r| r.sampling.max_tokens = limit)));
    assert!(too_long(refused(&|r| r.sampling.max_tokens = usize::MAX)));
    // Cartridge tokens count: what fits exactly without one does not with one.
    let exact = engine.info().max_context.min(engine.info().kv_tokens) - 3;
    let mut request = greedy(&[1, 2, 3], exact);
    drop(engine.submit(request.clone()).unwrap());
    assert!(engine.info().max_context <= engine.info().kv_tokens);
    request.cartridges = fixture.cartridges("prefix5");
    let error = engine.submit(request).unwrap_err();
    assert!(matches!(error, EngineError::TooLong { cartridge: 5, .. }));
    let other = &common::model_fixtures(|name| name == "qwen2")[0];
    assert_eq!(field(refused(&|r| r.cartridges = other.cartridges("prefix5"))), "cartridges");
}

#[test]
fn a_full_queue_refuses_and_recovers() {
    let fixture = &common::model_fixtures(|name| name == "llama")[0];
    let options = EngineOptions {
        kv_bytes: 1 << 20,
        max_running_sequences: 1,
        prefill_tokens_per_step: 16,
        max_queued_sequences: 3,
        ..EngineOptions::default()
    };
    let engine = start_engine(fixture, &options);
    let mut accepted = Vec::new();
    let refused = loop {
        match engine.submit(greedy(&[1, 2, 3], 40)) {
            Ok(stream) => accepted.push(stream),
            Err(error) => break error,
        }
        assert!(accepted.len() < 50);
    };
    assert!(matches!(refused, EngineError::QueueFull { limit: 3, .. }), "{refused}");
    for stream in accepted {
        assert_eq!(collect(stream, 1).unwrap().tokens[0].len(), 40);
    }
    assert!(engine.submit(greedy(&[1, 2, 3], 4)).is_ok());
}

#[test]
fn preempted_sequences_go_on_with_the_same_tokens() {
    let fixture = &common::model_fixtures(|name| name == "llama3")[0];
    // The longest request alone needs four blocks; seven of them are far from fitting together.
    let engine = engine_with_kv(fixture, kv_bytes(fixture, 6), 8, 11);
    assert_eq!(engine.info().kv_tokens, 6 * 16);
    let mut streams = Vec::new();
    for round in 0..3 {
        for (prompt, want) in fixture.prompts().iter().zip(fixture.greedy("prefix5")) {
            let mut request = greedy(prompt, want.len());
            request.cartridges = fixture.cartridges("prefix5");
            request.logprobs.prompt_top = (round == 1).then_some(2);
            streams.push((prompt.len(), want, engine.submit(request).unwrap()));
        }
    }
    for (prompt_len, want, stream) in streams {
        let got = collect(stream, 1).unwrap();
        assert_eq!(got.ids(0), want);
        assert!(got.prompt.is_empty() || got.prompt.len() == prompt_len);
    }
    wait_until(&engine, |stats| stats.used_blocks == 0 && stats.running == 0);
}

/// Clients that set no limit may fill the context; that must not make them run one after the other.
#[test]
fn requests_that_may_fill_the_cache_run_together() {
    let fixture = &common::model_fixtures(|name| name == "llama")[0];
    let engine = engine_with_kv(fixture, kv_bytes(fixture, 8), 4, 64);
    let all = engine.info().kv_tokens.min(engine.info().max_context) - 8;
    let streams: Vec<_> = (0..2).map(|_| engine.submit(greedy(&[1, 2, 3], all)).unwrap()).collect();
    let mut streams = streams.into_iter();
    let (mut first, mut second) = (streams.next().unwrap(), streams.next().unwrap());
    // Both have begun before either has ended.
    for stream in [&mut first, &mut second] {
        assert!(matches!(stream.blocking_next(), Some(Event::PromptDone { .. })));
    }
    assert_eq!(engine.stats().waiting, 0);
    let (first, second) = (collect(first, 1).unwrap(), collect(second, 1).unwrap());
    assert_eq!((first.ids(0).len(), first.ids(0)), (all, second.ids(0)));
}

#[test]
fn non_finite_logits_end_their_request_only() {
    let fixture = &common::model_fixtures(|name| name == "llama")[0];
    let engine = engine(fixture, 4, 64);
    let good = fixture.cartridge("prefix5");
    let huge = good.layers().iter().map(|layer| LayerKv {
        keys: layer.keys.clone(),
        values: layer.values.ones_like().unwrap().affine(3e38, 0.0).unwrap(),
        bias: None,
    });
    let huge = Cartridge::new(huge.collect(), 1, Provenance::default()).unwrap();
    let prompt = &fixture.prompts()[1];
    let mut bad = greedy(prompt, 24);
    bad.cartridges = vec![Lease::detached("huge", &huge).unwrap()];
    let mut scored = bad.clone();
    scored.sampling.max_tokens = 0;
    scored.logprobs.prompt_top = Some(1);
    let fine = engine.submit(greedy(prompt, 24)).unwrap();
    let bad = engine.submit(bad).unwrap();
    let scored = engine.submit(scored).unwrap();
    assert_eq!(collect(fine, 1).unwrap().ids(0), fixture.greedy("base")[1]);
    for stream in [bad, scored] {
        assert!(matches!(collect(stream, 1), Err(EngineError::NonFiniteLogits)));
    }
    wait_until(&engine, |stats| stats.used_blocks == 0);
}

#[test]
fn a_bias_per_key_reaches_attention() {
    let fixture = &common::model_fixtures(|name| name == "qwen3")[0];
    let engine = engine(fixture, 4, 64);
    let plain = fixture.cartridge("prefix19");
    let first_logprob = |bias: Option<f32>| {
        let layers = plain.layers().iter().map(|layer| {
            let (heads, tokens, _) = layer.keys.dims3().unwrap();
            let bias = bias.map(|bias| {
                // The first key keeps its score, the others are shifted.
                let values = (0..heads * tokens)
                    .map(|i| if i % tokens == 0 { 0.0 } else { bias })
                    .collect::<Vec<f32>>();
                Tensor::from_vec(values, (heads, tokens), &Device::Cpu).unwrap()
            });
            LayerKv { bias, ..layer.clone() }
        });
        let cartridge = Cartridge::new(layers.collect(), 1, Provenance::default()).unwrap();
        let mut request = greedy(&fixture.prompts()[1], 1);
        request.cartridges = vec![Lease::detached("biased", &cartridge).unwrap()];
        collect(engine.submit(request).unwrap(), 1).unwrap().tokens[0][0].logprob
    };
    let without = first_logprob(None);
    assert_eq!(first_logprob(Some(0.0)), without);
    assert!((first_logprob(Some(-3.0)) - without).abs() > 1e-3);
}

#[test]
fn cancelled_waiting_requests_leave_the_queue() {
    let fixture = &common::model_fixtures(|name| name == "llama")[0];
    let options = EngineOptions {
        kv_bytes: 1 << 20,
        max_running_sequences: 1,
        prefill_tokens_per_step: 16,
        max_queued_sequences: 4,
        ..EngineOptions::default()
    };
    let engine = start_engine(fixture, &options);
    for _ in 0..20 {
        let mut running = engine.submit(greedy(&[1, 2, 3], 100)).unwrap();
        assert!(matches!(running.blocking_next(), Some(Event::PromptDone { .. })));
        let mut pair = greedy(&[1, 2, 3], 100);
        pair.n = 2;
        drop([engine.submit(pair.clone()).unwrap(), engine.submit(pair.clone()).unwrap()]);
        drop(running);
        // Tokens count from submission on, sequences from when the engine has seen them.
        wait_until(&engine, |stats| stats.waiting_tokens + stats.waiting + stats.running == 0);
    }
}

/// A prompt that is only scored needs no room for an answer; it must not wait for blocks that never come.
#[test]
fn a_prompt_as_large_as_the_cache_is_scored() {
    let fixture = &common::model_fixtures(|name| name == "llama")[0];
    let engine = engine_with_kv(fixture, kv_bytes(fixture, 2), 4, 64);
    let prompt: Vec<u32> = (0..engine.info().kv_tokens as u32).map(|i| i % 100).collect();
    let mut request = greedy(&prompt, 0);
    request.logprobs.prompt_top = Some(0);
    let got = collect(engine.submit(request).unwrap(), 1).unwrap();
    assert_eq!((got.prompt.len(), got.reasons[0]), (prompt.len(), Some(FinishReason::Length)));
}
