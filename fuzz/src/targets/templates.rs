//! Messages, tools and template arguments through the templates of real models, to tokens.

use std::cell::OnceCell;

use cartouche::{
    api::{
        ServedModel,
        openai::{
            fields::ChatFields,
            prompt::{ChatPrompt, Tokenising},
        },
    },
    limits,
    text::{ChatTemplate, Tokenizer},
};
use rand::RngExt;
use serde_json::{Value, json};

use super::{Bounds, Linear, Outcome, Target, fixtures, requests::KEYS};
use crate::mutate::{self, Random};

pub const TARGET: Target = Target {
    name: "template_messages",
    seeds,
    mutate,
    run,
    // A value of two bytes may be indented by four spaces for each of 127 levels.
    bounds: Bounds {
        memory: Linear { base: 1 << 20, per_byte: 1500 },
        work: Linear { base: 16 << 20, per_byte: 20_000 },
    },
    needs_system: false,
};

/// With which template an input is rendered: a member of it, so that it is mutated too.
const TEMPLATE: &str = "template";
const NAMES: [&str; 5] = ["chatml", "llama31", "mistral", "qwen3", "corners"];

fn fixture(name: &str) -> Value {
    let file = std::fs::read(fixtures("templates").join(format!("{name}.json"))).expect("fixture");
    serde_json::from_slice(&file).expect("fixture")
}

/// The template of a fixture, at a fixed time.
fn template(name: &str) -> ChatTemplate {
    let fixture = fixture(name);
    let special = fixture["special_tokens"].as_object().cloned().unwrap_or_default();
    let source = fixture["template"].as_str().expect("a template");
    let now = fixture["now"].as_str().and_then(|now| now.parse().ok()).expect("a time");
    ChatTemplate::new(source, special).and_then(|t| t.with_clock(now)).expect("a sound template")
}

pub fn tokenizer(name: &str) -> Tokenizer {
    let file = std::fs::read(fixtures("tokenizers").join(format!("{name}.json"))).expect("fixture");
    let fixture: Value = serde_json::from_slice(&file).expect("fixture");
    Tokenizer::from_bytes(fixture["tokenizer"].to_string().as_bytes()).expect("a tokenizer")
}

thread_local! {
    static MODELS: OnceCell<Vec<ServedModel>> = const { OnceCell::new() };
}

fn models() -> Vec<ServedModel> {
    let tokenizer = tokenizer("byte_level");
    let model = |name: &str| ServedModel {
        name: name.to_owned(),
        tokenizer: tokenizer.clone(),
        chat_template: Some(template(name)),
        eos_token_ids: Vec::new(),
        is_llama3: name == "llama31",
    };
    NAMES.into_iter().map(model).collect()
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (i, name) in NAMES.into_iter().enumerate() {
        for case in fixture(name)["cases"].as_array().into_iter().flatten().step_by(7) {
            let arguments = case["arguments"].as_object().cloned().unwrap_or_default();
            let mut body = json!({"messages": case["messages"], TEMPLATE: i});
            for (name, value) in arguments {
                let is_own = ["tools", "documents"].contains(&name.as_str());
                if is_own {
                    body[name] = value;
                } else {
                    body["chat_template_kwargs"][name] = value;
                }
            }
            seeds.push(body.to_string().into_bytes());
        }
    }
    seeds
}

fn mutate(body: &mut Vec<u8>, random: &mut Random) {
    mutate::json(body, &KEYS, random);
    if random.random_range(0..4) == 0
        && let Ok(mut value) = serde_json::from_slice::<Value>(body)
        && let Some(body_) = value.as_object_mut()
    {
        body_.insert(TEMPLATE.to_owned(), json!(random.random_range(0..2 * NAMES.len())));
        *body = value.to_string().into_bytes();
    }
}

fn run(body: &[u8]) -> Outcome {
    let value: Value = match serde_json::from_slice(body) {
        Ok(value) => value,
        Err(_) => return Outcome::refused("no JSON"),
    };
    let which = value.get(TEMPLATE).and_then(Value::as_u64).unwrap_or(0) as usize;
    let fields: ChatFields = match serde_json::from_value(value) {
        Ok(fields) => fields,
        Err(error) => return Outcome::refused(error),
    };
    let own_template = [
        fields.chat_template_kwargs.as_ref().and_then(|map| map.get("chat_template")),
        fields.apply_chat_template_overrides.as_ref().and_then(|map| map.get("chat_template")),
    ];
    let own_template = fields.chat_template.is_some()
        || own_template.into_iter().flatten().any(|template| !template.is_null());
    let prompt = match ChatPrompt::new(fields) {
        Ok(prompt) => prompt,
        Err(error) => return Outcome::refused(error.message),
    };
    MODELS.with(|cell| {
        let models = cell.get_or_init(models);
        let model = &models[which % models.len()];
        let how = Tokenising {
            has_cartridges: which >= NAMES.len(),
            add_special_tokens: false,
            request_templates: false,
            max_context: 1 << 20,
        };
        let mut ignored = Vec::new();
        match prompt.tokenise(model, how, &mut ignored) {
            Ok(prompt) => {
                assert!(!own_template, "a template of the request's own was used");
                let text = prompt.text.expect("the text of the prompt");
                assert!(text.len() <= limits::MAX_RENDERED_PROMPT_BYTES && !prompt.ids.is_empty());
                let again = model.tokenizer.decode(&prompt.ids, false).expect("byte-level ids");
                assert_eq!(again, text, "the model reads another text than was rendered");
                Outcome::accepted(format!("{} {}", model.name, how.has_cartridges))
            }
            Err(error) => {
                assert!(error.status.is_client_error(), "{}: {}", model.name, error.message);
                Outcome::refused(format_args!("{} {}", model.name, error.message))
            }
        }
    })
}
