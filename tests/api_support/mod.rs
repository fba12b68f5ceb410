//! A server on the demo model, without a socket: shared by the API tests.
#![allow(dead_code)] // each test binary uses its own part

pub mod admin;
pub mod log;
pub mod wire;

use std::sync::{Arc, OnceLock};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Request, StatusCode},
};
use candle_core::{DType, Device, Tensor};
use cartouche::{
    api::{Access, ApiOptions, AppState, InFlight, Metrics, Readiness, ServedModel, router},
    cartridge::{Cartridge, LayerKv, Provenance, Registry, RegistryOptions},
    engine::{EngineOptions, start},
    limits,
    model::{LoadOptions, ModelSource, load},
};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

pub const MODEL: &str = "cartouche-demo";

/// A reply, read to its end.
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The JSON of a 200; panics with the error otherwise.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        self.json()
    }

    /// Status, `error.param` and message of an error; checks that both error shapes are there.
    pub fn error(&self) -> (u16, String, String) {
        let body = self.json();
        let message = body["error"]["message"].as_str().unwrap().to_owned();
        assert_eq!(body["detail"], message.as_str());
        assert!(body["error"]["type"].is_string());
        let param = body["error"]["param"].as_str().unwrap_or_default().to_owned();
        (self.status.as_u16(), param, message)
    }

    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    /// The `data:` events of a stream, without the `[DONE]` that must end it.
    pub fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> =
            self.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        data.into_iter().map(|json| serde_json::from_str(json).unwrap()).collect()
    }
}

#[derive(Clone)]
pub struct Server {
    pub state: Arc<AppState>,
    pub router: Router,
}

impl Server {
    /// The one that most tests of a binary share.
    pub fn shared() -> Self {
        static SHARED: OnceLock<Server> = OnceLock::new();
        SHARED.get_or_init(|| Self::new(ApiOptions::default(), EngineOptions::default())).clone()
    }

    pub fn new(options: ApiOptions, engine: EngineOptions) -> Self {
        Self::with_cartridge_dir(options, engine, None)
    }

    pub fn with_cartridge_dir(
        options: ApiOptions,
        engine: EngineOptions,
        dir: Option<std::path::PathBuf>,
    ) -> Self {
        Self::with_access(options, engine, dir, Access::open(true))
    }

    /// Each key is sent as `Authorization: Bearer`, see [`Self::ask`].
    pub fn with_access(
        options: ApiOptions,
        mut engine: EngineOptions,
        dir: Option<std::path::PathBuf>,
        access: Access,
    ) -> Self {
        let loaded = load(&ModelSource::Demo, &LoadOptions::default()).unwrap();
        engine.kv_bytes = engine.kv_bytes.min(64 << 20);
        let (handle, _thread) = start(loaded.decoder, &engine).unwrap();
        let info = handle.info();
        let registry = Registry::new(RegistryOptions {
            dir,
            shape: info.kv_shape,
            model: MODEL.to_owned(),
            rope_theta: None,
            rope_scaling: None,
            max_positions: info.max_context,
            device: Device::Cpu,
            dtype: DType::F32,
            byte_budget: limits::DEFAULT_CARTRIDGE_BUDGET_BYTES,
            host_budget: 0,
            revalidate: std::time::Duration::ZERO,
            max_file_bytes: limits::DEFAULT_MAX_CARTRIDGE_FILE_BYTES,
        });
        let ready = Readiness::default();
        ready.set_ready();
        let state = Arc::new(AppState {
            engine: handle,
            registry,
            model: Arc::new(ServedModel {
                name: MODEL.to_owned(),
                tokenizer: loaded.tokenizer,
                chat_template: loaded.chat_template,
                eos_token_ids: loaded.eos_token_ids,
                is_llama3: loaded.is_llama3,
            }),
            options,
            access: Arc::new(access),
            ready,
            metrics: Arc::new(Metrics::default()),
            in_flight: Arc::new(InFlight::default()),
            started: 0,
        });
        let server = Self { router: router(Arc::clone(&state)), state };
        server.insert("alpha", 7, 1);
        server.insert("beta", 5, 2);
        server
    }

    /// Publishes a cartridge of random content under `id`; returns its generation.
    pub fn insert(&self, id: &str, tokens: usize, seed: u64) -> String {
        self.state.registry.insert(id, self.cartridge(tokens, seed)).unwrap().to_hex()
    }

    /// A cartridge of random content.
    pub fn cartridge(&self, tokens: usize, seed: u64) -> Cartridge {
        let shape = self.state.engine.info().kv_shape;
        let tensor = |salt: u64| {
            // A small generator of our own: the test only needs values that differ and repeat.
            let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt;
            let count = shape.kv_heads * tokens * shape.head_dim;
            let values: Vec<f32> = (0..count)
                .map(|_| {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    ((x >> 40) as f32 / (1 << 24) as f32 - 0.5) * 4.0
                })
                .collect();
            Tensor::from_vec(values, (shape.kv_heads, tokens, shape.head_dim), &Device::Cpu)
                .unwrap()
        };
        let layers = (0..shape.layers as u64)
            .map(|i| LayerKv { keys: tensor(2 * i), values: tensor(2 * i + 1), bias: None })
            .collect();
        Cartridge::new(layers, 1, Provenance::default()).unwrap()
    }

    pub async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Reply {
            status: parts.status,
            headers: parts.headers,
            text: String::from_utf8(bytes.to_vec()).unwrap(),
        }
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.post_text(path, &body.to_string()).await
    }

    pub async fn post_text(&self, path: &str, body: &str) -> Reply {
        let request = Request::post(path)
            .header("content-type", "application/json")
            .body(Body::from(body.to_owned()))
            .unwrap();
        self.send(request).await
    }

    /// A request with a key.
    pub async fn ask(&self, key: &str, method: &str, path: &str, body: Value) -> Reply {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("authorization", format!("Bearer {key}"))
            .body(Body::from(if body.is_null() { String::new() } else { body.to_string() }))
            .unwrap();
        self.send(request).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    /// A chat request with one user message, and the members of `extra`.
    pub async fn chat(&self, extra: Value) -> Reply {
        let body = serde_json::json!({
            "model": MODEL,
            "messages": [{"role": "user", "content": "Hello, who are you?"}],
            "max_tokens": 8,
            "temperature": 0,
        });
        self.post("/v1/chat/completions", merge(body, extra)).await
    }

    /// A text completion, and the members of `extra`.
    pub async fn complete(&self, extra: Value) -> Reply {
        let body = serde_json::json!({
            "model": MODEL, "prompt": "The harbour log says", "max_tokens": 6, "temperature": 0,
        });
        self.post("/v1/completions", merge(body, extra)).await
    }
}

/// `extra` over `body`; null removes a member.
pub fn merge(mut body: Value, extra: Value) -> Value {
    let object = body.as_object_mut().unwrap();
    for (key, value) in extra.as_object().unwrap() {
        match value {
            Value::Null => object.remove(key),
            value => object.insert(key.clone(), value.clone()),
        };
    }
    body
}
