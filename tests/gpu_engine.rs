//! The engine as it runs on a GPU, with the kernels on the emulation: bf16 weights, keys and values there,
//! held to the engine on the CPU in f32.

mod common;
mod engine_support;
#[path = "kernels_support/mod.rs"]
mod kernels_support;

use candle_core::{DType, Device};
use cartouche::cartridge::{Cartridge, Lease, read_cartridge_bytes};
use cartouche::demo;
use cartouche::engine::{EngineHandle, EngineOptions, GenerateRequest, SampledToken, start};
use cartouche::model::{Decoder, LoadOptions, ModelSource, Placement, load};
use engine_support::{Outcome, collect, greedy};
use kernels_support::{launches, placement};

fn engine(decoder: Decoder) -> EngineHandle {
    let options = EngineOptions {
        kv_bytes: 8 << 20,
        prefill_tokens_per_step: 24,
        ..EngineOptions::default()
    };
    start(decoder, &options).unwrap().0
}

fn lease(cartridge: &Cartridge, placement: &Placement) -> Lease {
    let placed = cartridge.to(&placement.device, placement.dtype).unwrap();
    Lease::detached("c", &placed).unwrap()
}

/// Submits all at once, then waits for each.
fn run(engine: &EngineHandle, requests: Vec<GenerateRequest>) -> Vec<Outcome> {
    let streams: Vec<_> = requests.into_iter().map(|r| engine.submit(r).unwrap()).collect();
    streams.into_iter().map(|stream| collect(stream, 1).unwrap()).collect()
}

/// Holds every token's log-probability, of the prompt and of the reply as long as both agree, to `most`, and
/// their mean difference to a sixth of it. A reply may only part where the two likeliest tokens are nearly
/// as likely.
#[track_caller]
fn assert_alike(gpu: &Outcome, cpu: &Outcome, most: f32, what: &str) {
    assert_eq!(gpu.prompt.len(), cpu.prompt.len());
    let mut differences = Vec::new();
    let mut compare = |gpu: &SampledToken, cpu: &SampledToken| {
        let off = (gpu.logprob - cpu.logprob).abs();
        assert!(off <= most, "{what}: {} instead of {}", gpu.logprob, cpu.logprob);
        differences.push(off);
    };
    for (gpu, cpu) in gpu.prompt.iter().zip(&cpu.prompt) {
        if let (Some(gpu), Some(cpu)) = (gpu, cpu) {
            compare(gpu, cpu);
        }
    }
    for (gpu, cpu) in gpu.tokens[0].iter().zip(&cpu.tokens[0]) {
        if gpu.id != cpu.id {
            let gap = cpu.top[0].1 - cpu.top[1].1;
            assert!(gap <= most, "{what}: token {} instead of {}", gpu.id, cpu.id);
            break;
        }
        compare(gpu, cpu);
    }
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;
    assert!(mean <= most / 6.0, "{what}: a mean difference of {mean}");
}

#[test]
fn models_of_every_family_match_the_cpu() {
    let placement = placement(DType::BF16);
    let mut seen = 0;
    // Quantised weights are dequantised there, and multiplied in eight bits on the CPU.
    let exact = |name: &str| !name.starts_with("gguf") || name.ends_with("f16");
    for fixture in common::model_fixtures(exact) {
        let decoder = fixture.decoder_on(placement.clone());
        if decoder.config().head_dim < 16 {
            continue; // there is no kernel for it
        }
        seen += 1;
        let (on_gpu, on_cpu) = (engine(decoder), engine(fixture.decoder()));
        for case in fixture.cases() {
            let leases = fixture.cartridges(&case);
            let requests = |leases: &[Lease]| {
                let request = |prompt: &Vec<u32>| {
                    let mut request = greedy(prompt, 6);
                    request.cartridges = leases.to_vec();
                    request.logprobs.top = 2;
                    request.logprobs.prompt_top = Some(0);
                    request
                };
                fixture.prompts().iter().map(request).collect()
            };
            let placed: Vec<Lease> = leases.iter().map(|l| lease(l, &placement)).collect();
            let gpu = run(&on_gpu, requests(&placed));
            // Logits of up to 12 are rounded to 8 bits, and so is everything on their way.
            for (gpu, cpu) in gpu.iter().zip(run(&on_cpu, requests(&leases))) {
                assert_alike(gpu, &cpu, 0.4, &format!("{} {case}", fixture.name));
            }
        }
    }
    assert!(seen >= 3, "{seen} fixtures have heads that the kernels know");
}

#[test]
fn the_demo_answers_with_its_cartridge_as_on_the_cpu() {
    // The demo's heads are the one size there is in f16, which rounds eight times less.
    let placement = placement(DType::F16);
    let document = &demo::DOCUMENTS[0];
    let cartridge = read_cartridge_bytes(document.trained, "demo").unwrap();
    let questions = document.questions().unwrap();
    let questions: Vec<_> = questions.questions.iter().filter(|q| q.in_document).take(3).collect();
    let mut replies = Vec::new();
    for placement in [placement.clone(), Placement::default()] {
        let options = LoadOptions { placement: placement.clone(), ..LoadOptions::default() };
        let model = load(&ModelSource::Demo, &options).unwrap();
        let lease = lease(&cartridge, &placement);
        let requests = questions.iter().map(|question| {
            let mut request =
                greedy(&model.tokenizer.encode(&question.question, false).unwrap(), 12);
            request.cartridges = vec![lease.clone()];
            request.logprobs.top = 2;
            request
        });
        let requests = requests.collect();
        replies.push(run(&engine(model.decoder), requests));
    }
    if matches!(placement.device, Device::Cpu) {
        // Tokens and their log-probabilities were found there.
        assert!(launches("sample_f32") >= 12 && launches("logprobs_f32") >= 12);
    }
    for ((gpu, cpu), question) in replies[0].iter().zip(&replies[1]).zip(questions) {
        assert_alike(gpu, cpu, 0.06, &question.question);
    }
}
