//! Bodies to the routes of a whole server with a tiny model: every one is answered as documented, and nothing
//! stays behind.

use std::sync::{Arc, OnceLock};

use axum::{
    Router,
    body::Body,
    http::{Request, StatusCode, header::CONTENT_TYPE},
};
use candle_core::{DType, Device, Tensor};
use cartouche::{
    api::{Access, ApiOptions, AppState, InFlight, Metrics, Readiness, ServedModel, router},
    cartridge::{Cartridge, LayerKv, Provenance, Registry, RegistryOptions},
    engine::{EngineOptions, start},
    limits,
    model::{LoadOptions, ModelSource, load_decoder},
    text::{ChatTemplate, Tokenizer},
};
use http_body_util::BodyExt;
use rand::RngExt;
use serde_json::{Map, Value, json};
use tower::ServiceExt;

use super::{
    Bounds, Linear, Outcome, Target, fixtures,
    requests::{CHAT_SEEDS, COMPLETION_SEEDS, KEYS},
};
use crate::mutate::{self, Random};

pub const TARGET: Target = Target {
    name: "routes",
    seeds,
    mutate,
    run,
    // The work is done on other threads, where nobody counts it; `requests` and `templates` do.
    bounds: Bounds {
        memory: Linear { base: 4 << 20, per_byte: 400 },
        work: Linear { base: 64 << 20, per_byte: 4000 },
    },
    needs_system: true,
};

const PATHS: [&str; 8] = [
    "/v1/chat/completions",
    "/v1/cartridge/chat/completions",
    "/custom/cartridge/chat/completions",
    "/v1/completions",
    "/v1/cartridge/completions",
    "/custom/cartridge/completions",
    "/tokenize",
    "/detokenize",
];

const MODEL: &str = "m";
/// Of the KV cache: what a request can generate at most.
const KV_TOKENS: u64 = 64;

struct Server {
    router: Router,
    state: Arc<AppState>,
}

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let folder = ModelSource::Folder(fixtures("models").join("llama"));
        let decoder = load_decoder(&folder, &LoadOptions::default()).expect("a model");
        let shape = decoder.config().kv_shape();
        let token_bytes = 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim;
        let options = EngineOptions {
            kv_bytes: KV_TOKENS * token_bytes as u64,
            max_running_sequences: 8,
            ..EngineOptions::default()
        };
        let (engine, _thread) = start(decoder, &options).expect("an engine");
        let registry = Registry::new(RegistryOptions {
            dir: None,
            shape,
            model: MODEL.to_owned(),
            rope_theta: None,
            rope_scaling: None,
            max_positions: engine.info().max_context,
            device: Device::Cpu,
            dtype: DType::F32,
            byte_budget: 1 << 20,
            max_file_bytes: 1 << 20,
            host_budget: 0,
            revalidate: std::time::Duration::ZERO,
        });
        let dims = (shape.kv_heads, 3, shape.head_dim);
        let tensor = || Tensor::ones(dims, DType::F32, &Device::Cpu).expect("a tensor");
        let layer = |_| LayerKv { keys: tensor(), values: tensor(), bias: None };
        let layers = (0..shape.layers).map(layer).collect();
        let cartridge = Cartridge::new(layers, 1, Provenance::default()).expect("a cartridge");
        registry.insert("alpha", cartridge).expect("a cartridge that fits");
        let ready = Readiness::default();
        ready.set_ready();
        let state = Arc::new(AppState {
            engine,
            registry,
            model: Arc::new(ServedModel {
                name: MODEL.to_owned(),
                tokenizer: tokenizer(),
                chat_template: Some(template()),
                eos_token_ids: vec![2],
                is_llama3: true,
            }),
            options: ApiOptions { default_max_tokens: Some(2), ..ApiOptions::default() },
            ready,
            metrics: Arc::new(Metrics::default()),
            in_flight: Arc::new(InFlight::default()),
            access: Arc::new(Access::open(true)),
            started: 0,
        });
        Server { router: router(Arc::clone(&state)), state }
    })
}

/// Printable ASCII, in the vocabulary of the fixture's model.
fn tokenizer() -> Tokenizer {
    let special = ["<unk>", "<s>", "</s>"];
    let chars = ['Ġ', 'Ċ'].into_iter().chain('!'..='~').map(String::from);
    let pieces = special.into_iter().map(str::to_owned).chain(chars);
    let vocab: Map<String, Value> = pieces.zip(0..).map(|(piece, id)| (piece, json!(id))).collect();
    let added: Vec<Value> = special
        .iter()
        .zip(0..)
        .map(|(content, id)| {
            json!({"id": id, "content": content, "special": true, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                            "use_regex": true});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
                  "byte_fallback": false, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(json.to_string().as_bytes()).expect("a tokenizer")
}

fn template() -> ChatTemplate {
    let source = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}\
                  {% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}>{% endif %}";
    ChatTemplate::new(source, Map::new()).expect("a template")
}

fn seeds() -> Vec<Vec<u8>> {
    let with = |path: usize, body: &str| [&[path as u8], body.as_bytes()].concat();
    let chat = CHAT_SEEDS.iter().zip([0, 1, 2].into_iter().cycle());
    let text = COMPLETION_SEEDS.iter().zip([3, 4, 5].into_iter().cycle());
    let mut seeds: Vec<_> = chat.chain(text).map(|(body, path)| with(path, body)).collect();
    seeds
        .push(with(6, r#"{"prompt":"Hello","add_special_tokens":false,"return_token_strs":true}"#));
    seeds.push(with(6, r#"{"messages":[{"role":"user","content":"Hi"}],"tools":[{}]}"#));
    seeds.push(with(7, r#"{"tokens":[5,6,7],"model":"m"}"#));
    seeds
}

fn mutate(data: &mut Vec<u8>, random: &mut Random) {
    let mut body = data.split_off(data.len().min(1));
    if data.is_empty() || random.random_range(0..10) == 0 {
        *data = vec![random.random_range(0..PATHS.len() as u8)];
    }
    mutate::json(&mut body, &KEYS, random);
    data.extend(body);
}

thread_local! {
    static RUNTIME: tokio::runtime::Runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
}

fn run(data: &[u8]) -> Outcome {
    let (&path, body) = data.split_first().unwrap_or((&0, &[]));
    let path = PATHS[usize::from(path) % PATHS.len()];
    let request = Request::post(path).header(CONTENT_TYPE, "application/json");
    let request = request.body(Body::from(body.to_vec())).expect("a request");
    let (status, text) = RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let response = server().router.clone().oneshot(request).await.expect("a response");
            let status = response.status();
            let body = response.into_body().collect().await.expect("a whole body").to_bytes();
            (status, String::from_utf8(body.to_vec()).expect("UTF-8"))
        })
    });
    match status {
        StatusCode::OK if text.starts_with("data: ") => stream(path, &text),
        StatusCode::OK => whole(path, &text),
        _ => error(path, status, &text),
    }
}

fn error(path: &str, status: StatusCode, text: &str) -> Outcome {
    let body: Value = serde_json::from_str(text).expect("errors are JSON");
    let message = body["error"]["message"].as_str().expect("a message");
    assert_eq!(body["detail"], message);
    assert!(message.len() <= limits::MAX_ERROR_TEXT_BYTES + 8 && !message.is_empty());
    let known = [400, 404, 413, 429, 502, 503].contains(&status.as_u16());
    assert!(known, "{path}: {status} {message}");
    Outcome::refused(format_args!("{} {message}", status.as_u16()))
}

fn whole(path: &str, text: &str) -> Outcome {
    let body: Value = serde_json::from_str(text).expect("replies are JSON");
    if let Some(choices) = body["choices"].as_array() {
        assert!((1..=limits::MAX_CHOICES_PER_REQUEST).contains(&choices.len()));
        for (i, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], i);
            assert!(["stop", "length"].contains(&choice["finish_reason"].as_str().unwrap_or("")));
        }
        let tokens = body["usage"]["completion_tokens"].as_u64().expect("usage");
        assert!(tokens <= KV_TOKENS * 2 * choices.len() as u64);
        return Outcome::accepted(format!("{path}, {} choices", choices.len().min(3)))
            .after(tokens);
    }
    assert!(body["tokens"].is_array() || body["prompt"].is_string(), "{text}");
    Outcome::accepted(path)
}

fn stream(path: &str, text: &str) -> Outcome {
    let mut events: Vec<_> = text.split("\n\n").filter(|event| !event.is_empty()).collect();
    let last = events.pop();
    let mut failed = false;
    for event in events.iter().chain(last.iter().filter(|event| **event != "data: [DONE]")) {
        let json = event.strip_prefix("data: ").expect("only data events");
        let json: Value = serde_json::from_str(json).expect("JSON, one line each");
        failed |= json.get("error").is_some();
    }
    assert_eq!(last == Some("data: [DONE]"), !failed, "a stream that ends in neither way: {text}");
    Outcome::accepted(format!("{path}, stream, failed {failed}")).after(events.len() as u64)
}

/// Nothing is left of all requests: no block, no lease.
pub fn check_nothing_left() {
    let server = server();
    // The engine publishes its load after each step, a little later than the last reply.
    for _ in 0..500 {
        let stats = server.state.engine.stats();
        let idle = (stats.waiting, stats.running, stats.used_blocks) == (0, 0, 0);
        if idle && server.state.registry.stats().leases == 0 {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("{:?} {:?}", server.state.engine.stats(), server.state.registry.stats());
}
