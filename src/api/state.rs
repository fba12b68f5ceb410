//! What every handler shares.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use super::{
    Origin, access::Access, error::ApiError, in_flight::InFlight, lend::ImplicitLoad,
    metrics::Metrics,
};
use crate::{
    cartridge::Registry,
    engine::{EngineError, EngineHandle},
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
    /// Web pages that may use the API beside those of the same origin.
    pub cors_origins: Vec<Origin>,
    /// What requests of users may load or fetch.
    pub implicit_load: ImplicitLoad,
    /// Have the route with ready-made requests about the demo documents.
    pub demo_requests: bool,
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
            cors_origins: Vec::new(),
            implicit_load: ImplicitLoad::default(),
            demo_requests: false,
        }
    }
}

/// Whether the server takes new generation requests: not at first, and never again once it drains. Clones
/// share one state.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicU8>);

const STARTING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;

impl Readiness {
    /// The model answers.
    pub fn set_ready(&self) {
        let _ = self.0.compare_exchange(STARTING, READY, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// The server is going away.
    pub fn drain(&self) {
        self.0.store(DRAINING, Ordering::SeqCst);
    }
}

/// Shared by all handlers; build one and pass it to [`super::router`].
pub struct AppState {
    pub engine: EngineHandle,
    pub registry: Arc<Registry>,
    pub model: Arc<ServedModel>,
    pub options: ApiOptions,
    /// Who may use it.
    pub access: Arc<Access>,
    /// While it says no, `/health/ready` and the generation routes answer 503.
    pub ready: Readiness,
    pub metrics: Arc<Metrics>,
    pub in_flight: Arc<InFlight>,
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
    pub fn check_ready(&self) -> Result<(), ApiError> {
        match self.ready.0.load(Ordering::SeqCst) {
            READY => Ok(()),
            DRAINING => Err(EngineError::ShuttingDown.into()),
            _ => {
                let message = "the server is starting";
                Err(ApiError { code: Some("not_ready"), ..ApiError::unavailable(message) })
            }
        }
    }
}
