//! What must hold after a step has failed; the failure is injected between the model and the sampling.

use std::path::PathBuf;

use super::startup::start_with;
use super::{
    EngineError, EngineHandle, EngineOptions, Event, GenerateRequest, LogprobOptions, Priority,
    SamplingParams, TokenStream,
};
use crate::model::{ModelSource, load_decoder};

/// A step that computes this token panics.
const POISON: u32 = 77;

fn engine() -> EngineHandle {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/llama");
    let decoder = load_decoder(&ModelSource::Folder(folder), None).unwrap();
    let options = EngineOptions { kv_bytes: 1 << 20, ..EngineOptions::default() };
    let poisoned = |tokens: &[u32]| assert!(!tokens.contains(&POISON), "injected");
    start_with(decoder, &options, move |core| core.fault = Some(poisoned)).unwrap().0
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
    for _ in 0..400 {
        let stats = engine.stats();
        if (stats.waiting, stats.waiting_tokens, stats.running, stats.used_blocks) == (0, 0, 0, 0) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("still held: {:?}", engine.stats());
}
