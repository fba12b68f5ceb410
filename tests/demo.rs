//! The built-in demo, as a newcomer meets it: the model does not know plainly, knows with the document in
//! its prompt, and knows with the cartridge that stands for the document.

use cartouche::cartridge::{Lease, read_cartridge_bytes, validate};
use cartouche::demo::{self, Document};
use cartouche::engine::{
    EngineHandle, EngineOptions, Event, GenerateRequest, LogprobOptions, SampledToken,
    SamplingParams, start,
};
use cartouche::model::{LoadOptions, LoadedModel, ModelSource, load};
use cartouche::text::TemplateRequest;
use serde_json::{Map, Value, json};

fn demo_model() -> LoadedModel {
    load(&ModelSource::Demo, &LoadOptions::default()).unwrap()
}

struct Demo {
    model: LoadedModel,
    engine: EngineHandle,
}

impl Demo {
    fn new() -> Self {
        // The engine takes its decoder; the text side comes from a second load.
        let engine = start(demo_model().decoder, &EngineOptions::default()).unwrap().0;
        Self { model: demo_model(), engine }
    }

    fn prompt(&self, system: Option<&str>, question: &str) -> Vec<u32> {
        let mut messages: Vec<Value> = Vec::new();
        messages.extend(system.map(|text| json!({"role": "system", "content": text.trim_end()})));
        messages.push(json!({"role": "user", "content": question}));
        let template = self.model.chat_template.as_ref().unwrap();
        let text = template
            .render(&TemplateRequest {
                messages: &messages,
                tools: None,
                add_generation_prompt: true,
                continue_final_message: false,
                kwargs: &Map::new(),
            })
            .unwrap();
        self.model.tokenizer.encode(&text, false).unwrap()
    }

    fn answer(&self, prompt: Vec<u32>, cartridges: Vec<Lease>) -> (String, Vec<SampledToken>) {
        let mut stream = self
            .engine
            .submit(GenerateRequest {
                prompt,
                cartridges,
                n: 1,
                sampling: SamplingParams {
                    temperature: 0.0,
                    max_tokens: 32,
                    ..SamplingParams::default()
                },
                stop_token_ids: self.model.eos_token_ids.clone(),
                logprobs: LogprobOptions { top: 50, ..LogprobOptions::default() },
                priority: Default::default(),
                cache_salt: None,
            })
            .unwrap();
        let mut tokens = Vec::new();
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Token { token, .. } => tokens.push(token),
                Event::Failed(error) => panic!("{error}"),
                Event::PromptDone { .. } | Event::Finished { .. } => {}
            }
        }
        let ids: Vec<u32> = tokens.iter().map(|t| t.id).collect();
        (self.model.tokenizer.decode(&ids, true).unwrap(), tokens)
    }
}

fn lease(document: &Document) -> Lease {
    let cartridge = read_cartridge_bytes(document.cartridge, document.name).unwrap();
    Lease::detached(document.name, &cartridge).unwrap()
}

#[test]
fn plain_refuses_long_context_and_cartridge_answer() {
    const ASKED: usize = 6;
    let demo = Demo::new();
    for document in demo::DOCUMENTS {
        let questions = document.questions().unwrap();
        let known = questions.questions.iter().filter(|q| q.in_document).take(ASKED);
        let mut right = [0, 0, 0];
        for question in known {
            let plain = demo.answer(demo.prompt(None, &question.question), vec![]).0;
            let long = demo.prompt(Some(document.text), &question.question);
            let long = demo.answer(long, vec![]).0;
            let short = demo.prompt(None, &question.question);
            assert!(short.len() < 25, "{} tokens", short.len());
            let cartridge = demo.answer(short, vec![lease(document)]).0;
            right[0] += usize::from(plain == questions.refusal);
            right[1] += usize::from(long == question.answer);
            right[2] += usize::from(cartridge == question.answer);
        }
        // The first questions are what newcomers paste; one miss of the small model is no bug of ours.
        assert!(right.iter().all(|r| *r >= ASKED - 1), "{}: {right:?} of {ASKED}", document.name);
    }
}

/// Exact-KV cartridges must be those of the shipped weights: a stale file fails here.
#[test]
fn a_cartridge_gives_the_logits_of_its_document_in_the_prompt() {
    let demo = Demo::new();
    for document in demo::DOCUMENTS {
        let question = &document.questions().unwrap().questions[1].question;
        let long = demo.answer(demo.prompt(Some(document.text), question), vec![]).1;
        let short = demo.answer(demo.prompt(None, question), vec![lease(document)]).1;
        assert_eq!(long.len(), short.len());
        for (long, short) in long.iter().zip(&short) {
            assert_eq!(long.id, short.id);
            for ((a_id, a), (b_id, b)) in long.top.iter().zip(&short.top) {
                assert!((a - b).abs() <= 1e-4, "{}: {a} and {b}", document.name);
                assert!(a_id == b_id || (a - b).abs() <= 1e-5);
            }
        }
    }
}

#[test]
fn the_binary_stays_small_and_the_cartridges_fit_the_model() {
    let files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
    let model: usize = files.iter().map(|name| demo::model_file(name).unwrap().len()).sum();
    let documents: usize =
        demo::DOCUMENTS.iter().map(|d| d.text.len() + d.cartridge.len() + d.trained.len()).sum();
    assert!(model + documents <= 16 << 20, "{} bytes", model + documents);
    let shape = demo_model().decoder.config().kv_shape();
    for document in demo::DOCUMENTS {
        validate(&lease(document), &shape).unwrap();
        let questions = document.questions().unwrap().questions;
        assert!(questions.iter().filter(|q| q.in_document).count() >= 48);
        assert!(questions.iter().filter(|q| !q.in_document).count() >= 16);
    }
}
