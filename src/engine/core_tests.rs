//! What must hold after the engine has failed, in a step (between the model and the sampling) or in the planner.

use std::path::PathBuf;

use super::core::Core;
use super::startup::start_with;
use super::{
    EngineError, EngineHandle, EngineOptions, Event, GenerateRequest, LogprobOptions, Priority,
    SamplingParams, TokenStream,
};
use crate::model::{LoadOptions, ModelSource, load_decoder};

/// A step that computes this token panics.
const POISON: u32 = 77;
/// Planning the admission of a prompt with this token panics.
const PLAN_POISON: u32 = 78;

fn engine() -> EngineHandle {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/llama");
    let decoder = load_decoder(&ModelSource::Folder(folder), &LoadOptions::default()).unwrap();
    let options = EngineOptions { kv_bytes: 1 << 20, ..EngineOptions::default() };
    let poisoned = |tokens: &[u32]| assert!(!tokens.contains(&POISON), "injected");
    let plan_poisoned = |prompt: &[u32]| assert!(!prompt.contains(&PLAN_POISON), "injected");
    let prepare = move |core: &mut Core| {
        core.fault = Some(poisoned);
        core.plan_fault = Some(plan_poisoned);
    };
    start_with(decoder, &options, prepare).unwrap().0
}

fn request(prompt: Vec<u32>) -> GenerateRequest {
    GenerateRequest {
        prompt,
        cartridges: vec![],
        n: 1,
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens: 20,
            logit_bias: vec![(POISON, -1e9)],
            ..SamplingParams::default()
        },
        stop_token_ids: vec![],
        logprobs: LogprobOptions::default(),
        priority: Priority::Interactive,
        cache_salt: None,
    }
}

/// Cached prompt tokens and generated ids.
fn collect(mut stream: TokenStream) -> Result<(usize, Vec<u32>), EngineError> {
    let (mut cached, mut ids) = (0, Vec::new());
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::PromptDone { cached_tokens, .. } => cached = cached_tokens,
            Event::Token { token, .. } => ids.push(token.id),
            Event::Finished { .. } => {}
            Event::Failed(error) => return Err(error),
        }
    }
    Ok((cached, ids))
}

#[test]
fn after_a_panic_the_engine_goes_on_and_keeps_nothing_of_the_failed_step() {
    let good: Vec<u32> = (0..40).map(|i| i % 7).collect();
    let (_, want) = collect(engine().submit(request(good.clone())).unwrap()).unwrap();

    let engine = engine();
    let mut poisoned = good.clone();
    poisoned.push(POISON);
    for round in 0..3 {
        let mut bad = request(poisoned.clone());
        bad.n = 1 + round;
        let error = collect(engine.submit(bad).unwrap()).unwrap_err();
        assert!(matches!(error, EngineError::Internal(_)), "{error}");
        assert_eq!(engine.stats().cached_blocks, 0);
    }
    assert_eq!(collect(engine.submit(request(good.clone())).unwrap()).unwrap(), (0, want.clone()));
    // What was computed before a failure stays, and is right.
    assert!(collect(engine.submit(request(poisoned)).unwrap()).is_err());
    assert_eq!(collect(engine.submit(request(good)).unwrap()).unwrap(), (32, want));
    comes_to_rest(&engine);
}

/// Nothing is held of any request, soon.
fn comes_to_rest(engine: &EngineHandle) {
    for _ in 0..400 {
        let stats = engine.stats();
        if (stats.waiting, stats.waiting_tokens, stats.running, stats.used_blocks) == (0, 0, 0, 0) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("still held: {:?}", engine.stats());
}

#[test]
fn after_a_panic_of_the_planner_all_requests_are_ended_and_the_engine_goes_on() {
    let engine = engine();
    let good: Vec<u32> = (0..40).map(|i| i % 7).collect();
    let want = collect(engine.submit(request(good.clone())).unwrap()).unwrap();
    assert!(engine.stats().cached_blocks > 0);
    for n in [1, 3] {
        let mut long = request(vec![1, 2, 3]);
        long.sampling.max_tokens = 60;
        let running = engine.submit(long).unwrap();
        let mut bad = request(vec![5, PLAN_POISON, 6]);
        bad.n = n;
        let error = collect(engine.submit(bad).unwrap()).unwrap_err();
        assert!(matches!(error, EngineError::Internal(_)), "{error}");
        // Ended with it, unless it was faster.
        if let Err(error) = collect(running) {
            assert!(matches!(error, EngineError::Internal(_)), "{error}");
        }
        comes_to_rest(&engine);
        assert_eq!(engine.stats().cached_blocks, 0, "the old blocks are not trusted");
        assert_eq!(collect(engine.submit(request(good.clone())).unwrap()).unwrap(), want);
    }
    comes_to_rest(&engine);
}
