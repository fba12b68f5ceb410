//! What every handler shares.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use metrics_exporter_prometheus::PrometheusHandle;

use super::error::ApiError;
use crate::{
    cartridge::Registry,
    engine::EngineHandle,
    limits,
    text::{ChatTemplate, Tokenizer},
};

/// The one model this process serves, as the API sees it.
pub struct ServedModel {
    /// The id that `/v1/models` lists and that replies carry when a request names no model.
    pub name: String,
    pub tokenizer: Tokenizer,
    pub chat_template: Option<ChatTemplate>,
    /// Any of these ends a completion, unless `ignore_eos`.
    pub eos_token_ids: Vec<u32>,
    /// Chat prompts with cartridges take the form that Llama-3 cartridges are trained with.
    pub is_llama3: bool,
}

/// What an operator can choose about the API.
#[derive(Debug, Clone)]
pub struct ApiOptions {
    /// Answer 404 to a `model` that is not the served one, instead of serving it with a warning.
    pub strict_model: bool,
    /// Largest `top_logprobs`, `logprobs` (completions) and `prompt_logprobs`.
    pub max_top_logprobs: usize,
    /// `max_tokens` of chat requests that set none; `None` fills the context.
    pub default_max_tokens: Option<usize>,
    /// Attach several cartridges in the order of their ids, as Tokasaurus does, instead of request order.
    pub sort_cartridges: bool,
    /// Show vocabulary pieces (`Ġthe`) as token strings, as Tokasaurus does, instead of their text.
    pub raw_token_strings: bool,
    /// Render chat templates that requests bring. Only for clients that are all trusted: a template can
    /// exhaust the memory or the stack of the process.
    pub allow_request_templates: bool,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self {
            strict_model: false,
            max_top_logprobs: limits::DEFAULT_MAX_TOP_LOGPROBS,
            default_max_tokens: None,
            sort_cartridges: false,
            raw_token_strings: false,
            allow_request_templates: false,
        }
    }
}

/// Whether the server takes new generation requests. Clones share one flag, which is false at first.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }

    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Shared by all handlers; build one and pass it to [`super::router`].
pub struct AppState {
    pub engine: EngineHandle,
    pub registry: Arc<Registry>,
    pub model: Arc<ServedModel>,
    pub options: ApiOptions,
    /// Set once the model answers, cleared when the server drains; while it is not set `/health/ready` and
    /// the generation routes answer 503.
    pub ready: Readiness,
    /// Renders `/metrics`; `None` answers 404 there.
    pub metrics: Option<PrometheusHandle>,
    /// Unix seconds of the start, shown as the model's `created`.
    pub started: u64,
}

impl AppState {
    /// Tokens of prompt and output that a request without cartridges can have.
    pub(super) fn max_model_len(&self) -> usize {
        let info = self.engine.info();
        info.max_context.min(info.kv_tokens)
    }

    /// 503 while starting or draining.
    pub(super) fn check_ready(&self) -> Result<(), ApiError> {
        if self.ready.get() {
            return Ok(());
        }
        let message = "the server is starting or shutting down";
        Err(ApiError { code: Some("not_ready"), ..ApiError::unavailable(message) })
    }
}
