//! What chat and text completions have in common between parsing and replying: the model's name, the
//! cartridges, the prompt's tokens, the engine, the headers.

use std::sync::Arc;

use axum::{
    http::{HeaderName, HeaderValue},
    response::Response,
};

use super::{
    AppState,
    access::Caller,
    blocking,
    cartridges::{self, ModelName},
    error::ApiError,
    generate::{Assembly, TextOptions},
    lend,
    life::{self, Life},
    logprobs::{TokenStyle, TokenWriter},
    openai::{
        params::{Bounds, Settings, token_budget},
        prompt::{Prompt, Tokenising},
        reply::CartridgeUsed,
    },
    state::ServedModel,
    tally::Tally,
    updates::Updates,
};
use crate::{
    cartridge::{CartridgeRef, Lease},
    engine::{CacheSalt, GenerateRequest},
    limits,
};

const IGNORED_FIELDS: HeaderName = HeaderName::from_static("x-cartouche-ignored-fields");
const WARNINGS: HeaderName = HeaderName::from_static("x-cartouche-warnings");
const CARTRIDGES: HeaderName = HeaderName::from_static("x-cartouche-cartridges");

/// What is told beside the reply.
#[derive(Debug, Default)]
pub struct Notes {
    pub ignored: Vec<String>,
    pub warnings: Vec<String>,
}

/// A request whose model, cartridges and prompts are settled.
pub struct Prepared {
    /// Echoed in the reply, as the client wrote it.
    pub model_name: String,
    pub settings: Settings,
    pub prompts: Vec<Prompt>,
    /// The reply's text continues the prompt's instead of standing alone.
    pub text_goes_on: bool,
    pub leases: Vec<Lease>,
    pub cache_salt: Option<CacheSalt>,
    pub notes: Notes,
}

/// The bounds that requests are validated against.
pub fn bounds(state: &AppState) -> Bounds<'_> {
    Bounds {
        vocab_size: state.engine.info().vocab_size,
        max_top_logprobs: state.options.max_top_logprobs,
        eos_token_ids: &state.model.eos_token_ids,
    }
}

/// How the prompts of a request are tokenised.
pub fn tokenising(state: &AppState, has_cartridges: bool, add_special_tokens: bool) -> Tokenising {
    Tokenising {
        has_cartridges,
        add_special_tokens,
        request_templates: state.options.allow_request_templates,
        max_context: state.engine.info().max_context,
    }
}

/// Settles `model`: the cartridge it names, if any. Unknown names are served with a warning, or refused.
pub fn resolve_model<'a>(
    state: &AppState,
    requested: Option<&'a str>,
    warnings: &mut Vec<String>,
) -> Result<Option<&'a str>, ApiError> {
    if requested.is_some_and(|name| name.len() > limits::MAX_MODEL_NAME_BYTES) {
        let message = format!("model is longer than {} bytes", limits::MAX_MODEL_NAME_BYTES);
        return Err(ApiError::invalid("model", message));
    }
    match ModelName::parse(requested, &state.model.name) {
        ModelName::Served => Ok(None),
        ModelName::WithCartridge(id) => Ok(Some(id)),
        ModelName::Other(name) if state.options.strict_model => {
            Err(ApiError::model_not_found(name))
        }
        ModelName::Other(_) => {
            warnings
                .push(format!("the model named is not served here; {} answers", state.model.name));
            Ok(None)
        }
    }
}

/// Whose part of the prefix cache a request uses: its key's, further divided by what the request says.
pub fn cache_salt(caller: &Caller, requested: Option<&str>) -> Result<Option<CacheSalt>, ApiError> {
    let limit = limits::MAX_CACHE_SALT_BYTES;
    if requested.is_some_and(|salt| salt.is_empty() || salt.len() > limit) {
        let message = format!("cache_salt must be a string of 1 to {limit} bytes");
        return Err(ApiError::invalid("cache_salt", message));
    }
    Ok(CacheSalt::new(caller.cache_salt.as_deref(), requested))
}

/// Leases the cartridges while `tokenise` runs on a thread of its own (a long prompt takes a while).
pub async fn lease_and_tokenise<T: Send + 'static>(
    state: &AppState,
    caller: &Caller,
    references: &[CartridgeRef],
    tokenise: impl FnOnce(&ServedModel) -> Result<T, ApiError> + Send + 'static,
) -> Result<(Vec<Lease>, T), ApiError> {
    let leases = lend::acquire(state, caller, references);
    tokio::try_join!(leases, off_thread(state, tokenise))
}

/// Runs text work on a thread where it can take its time.
pub async fn off_thread<T: Send + 'static>(
    state: &AppState,
    work: impl FnOnce(&ServedModel) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let model = Arc::clone(&state.model);
    blocking::run(move || work(&model)).await
}

impl Prepared {
    /// Submits every prompt; when one is refused the others are cancelled.
    ///
    /// `default_max_tokens` stands in when the request sets none.
    pub fn submit(
        &self,
        state: &AppState,
        mut life: Life,
        default_max_tokens: Option<usize>,
    ) -> Result<Updates, ApiError> {
        let s = &self.settings;
        let info = state.engine.info();
        let cartridge: usize = self.leases.iter().map(|l| l.tokens()).sum();
        // Cartridges take positions but no room of the KV cache.
        let limit = info.max_context.min(info.kv_tokens + cartridge);
        let lengths = self.prompt_lengths();
        let budgets = lengths
            .iter()
            .map(|&len| token_budget(s.max_tokens, default_max_tokens, len, cartridge, limit))
            .collect::<Result<Vec<_>, _>>()?;
        s.check_work(&lengths, budgets.iter().copied().max().unwrap_or(0))?;
        life.submitting(&self.model_name, s, &lengths, &self.leases);
        let text = TextOptions {
            n: s.n,
            stop: s.stop.clone(),
            include_stop: s.include_stop,
            skip_special_tokens: s.skip_special_tokens,
            eos_token_ids: s.eos_token_ids.clone(),
            stop_token_ids: s.stop_token_ids.clone(),
            min_tokens: s.sampling.min_tokens,
        };
        let mut streams = Vec::with_capacity(self.prompts.len());
        for (prompt, max_tokens) in self.prompts.iter().zip(budgets) {
            let mut sampling = s.sampling.clone();
            sampling.max_tokens = max_tokens;
            if sampling.min_tokens > max_tokens {
                let message =
                    format!("min_tokens is larger than max_tokens, which is {max_tokens}");
                return Err(ApiError::invalid("min_tokens", message));
            }
            let stream = state.engine.submit(GenerateRequest {
                prompt: prompt.ids.clone(),
                cartridges: self.leases.clone(),
                n: s.n,
                sampling,
                stop_token_ids: [&s.eos_token_ids[..], &s.stop_token_ids].concat(),
                logprobs: s.logprobs.options(),
                priority: s.priority,
                cache_salt: self.cache_salt,
            });
            let stream = stream.map_err(|error| {
                let error = life::refused(state, error);
                life.failed(&error);
                error
            })?;
            let context: &[u32] = if self.text_goes_on { &prompt.ids } else { &[] };
            streams.push((stream, Assembly::new(&state.model.tokenizer, &text, context)));
        }
        Ok(Updates::new(streams, life))
    }

    fn prompt_lengths(&self) -> Vec<usize> {
        self.prompts.iter().map(|p| p.ids.len()).collect()
    }

    /// The counters of the reply.
    pub fn tally(&self) -> Tally {
        let used: Vec<CartridgeUsed> = self.leases.iter().map(CartridgeUsed::from).collect();
        Tally::new(&self.prompt_lengths(), &self.settings, used)
    }

    /// The writer of the reply's log-probabilities.
    pub fn token_writer(&self, state: &AppState) -> TokenWriter {
        let style = match (self.settings.tokens_as_ids, state.options.raw_token_strings) {
            (true, _) => TokenStyle::Id,
            (false, true) => TokenStyle::Piece,
            (false, false) => TokenStyle::Text,
        };
        TokenWriter { tokenizer: state.model.tokenizer.clone(), style }
    }

    /// The headers that say what was ignored, what was odd, and which cartridges answered.
    pub fn headers(&self) -> Vec<(HeaderName, HeaderValue)> {
        let used: Vec<CartridgeUsed> = self.leases.iter().map(CartridgeUsed::from).collect();
        let mut headers = headers_of(&self.notes);
        headers.extend(cartridges::header(&used).map(|value| (CARTRIDGES, value)));
        headers
    }
}

/// The headers that say what was ignored and what was odd. Names of fields are the client's: what a header
/// cannot hold becomes `?`, and long lists are cut.
pub fn headers_of(notes: &Notes) -> Vec<(HeaderName, HeaderValue)> {
    let text = |list: &[String], separator: &str| {
        let clean = |c: char| if (' '..='~').contains(&c) { c } else { '?' };
        let joined: String =
            list.join(separator).chars().map(clean).take(limits::MAX_ECHO_HEADER_BYTES).collect();
        if joined.is_empty() { None } else { HeaderValue::try_from(joined).ok() }
    };
    [(IGNORED_FIELDS, text(&notes.ignored, ", ")), (WARNINGS, text(&notes.warnings, "; "))]
        .into_iter()
        .filter_map(|(name, value)| value.map(|value| (name, value)))
        .collect()
}

/// Adds headers to a response.
pub fn with_headers(mut response: Response, headers: Vec<(HeaderName, HeaderValue)>) -> Response {
    response.headers_mut().extend(headers);
    response
}

/// Unix seconds, for `created`.
pub fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}
