//! From request fields to what the engine and the text assembly need. Every error names its field.

use serde_json::Value;

use super::{super::error::ApiError, fields::CommonFields};
use crate::{
    engine::{LogprobOptions, Priority, SamplingParams},
    limits,
};

/// Below this a temperature means greedy: dividing logits by less overflows (the bound vLLM uses).
const GREEDY_TEMPERATURE: f64 = 1e-5;

/// What validation needs to know of the server.
#[derive(Debug, Clone, Copy)]
pub struct Bounds<'a> {
    pub vocab_size: usize,
    pub max_top_logprobs: usize,
    pub eos_token_ids: &'a [u32],
}

/// Which log-probabilities a request wants and how they are to be shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogprobRequest {
    /// Show them in `logprobs`.
    pub show: bool,
    /// Alternatives per generated token.
    pub top: usize,
    /// Compute the prompt's too (`echo`), to show them in `logprobs` or to generate nothing.
    pub echo: bool,
    /// vLLM's `prompt_logprobs`.
    pub prompt: Option<usize>,
    /// Pack them into `system_fingerprint` instead.
    pub in_fingerprint: bool,
    pub ignore_temperature: bool,
}

impl LogprobRequest {
    /// Whether a reply that holds them is large next to its text.
    pub fn is_heavy(&self) -> bool {
        self.show || self.in_fingerprint || self.prompt.is_some()
    }

    /// What the engine computes for it.
    pub fn options(&self) -> LogprobOptions {
        let echo = self.echo.then_some(if self.show { self.top } else { 0 });
        LogprobOptions {
            top: self.top,
            prompt_top: self.prompt.max(echo),
            ignore_temperature: self.ignore_temperature,
        }
    }
}

/// A validated request, but for the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub n: usize,
    /// Its `max_tokens` is set by [`token_budget`], which needs the length of the prompt.
    pub sampling: SamplingParams,
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    /// Of the request; generation ends at these.
    pub stop_token_ids: Vec<u32>,
    /// Of the model; empty with `ignore_eos`.
    pub eos_token_ids: Vec<u32>,
    pub include_stop: bool,
    pub skip_special_tokens: bool,
    /// `None`: what the route does by itself.
    pub add_special_tokens: Option<bool>,
    pub logprobs: LogprobRequest,
    pub return_token_ids: bool,
    /// Token strings read `token_id:17`.
    pub tokens_as_ids: bool,
    pub stream: bool,
    pub include_usage: bool,
    pub priority: Priority,
}

impl Settings {
    /// Validates the common fields. `allow_zero_tokens`: scoring a prompt needs no output.
    pub fn new(
        f: &CommonFields,
        logprobs: LogprobRequest,
        allow_zero_tokens: bool,
        bounds: Bounds<'_>,
    ) -> Result<Self, ApiError> {
        let n = in_range("n", f.n, 1, limits::MAX_CHOICES as i64)?.unwrap_or(1);
        let max_tokens = max_tokens(f, allow_zero_tokens)?;
        let min_tokens = in_range("min_tokens", f.min_tokens, 0, i64::MAX)?.unwrap_or(0);
        if max_tokens.is_some_and(|max| min_tokens > max) {
            return Err(ApiError::invalid("min_tokens", "min_tokens is larger than max_tokens"));
        }
        let mut sampling = sampling(f, bounds.vocab_size)?;
        sampling.min_tokens = min_tokens;
        let prompt = top_count("prompt_logprobs", f.prompt_logprobs, bounds)?;
        let stream = f.stream.unwrap_or(false);
        if stream && prompt.is_some() {
            return Err(ApiError::unsupported("prompt_logprobs", "not available in a stream"));
        }
        let stop_token_ids = f.stop_token_ids.clone().unwrap_or_default();
        if let Some(id) = stop_token_ids.iter().find(|&&id| id as usize >= bounds.vocab_size) {
            return Err(unknown_token("stop_token_ids", i64::from(*id), bounds.vocab_size));
        }
        if stop_token_ids.len() > limits::MAX_LOGIT_BIAS {
            let message = format!("stop_token_ids has more than {} ids", limits::MAX_LOGIT_BIAS);
            return Err(ApiError::invalid("stop_token_ids", message));
        }
        Ok(Self {
            n,
            sampling,
            max_tokens,
            stop: stop_strings(f.stop.as_ref())?,
            stop_token_ids,
            eos_token_ids: match f.ignore_eos {
                Some(true) => Vec::new(),
                _ => bounds.eos_token_ids.to_vec(),
            },
            include_stop: f.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: f.skip_special_tokens.unwrap_or(true),
            add_special_tokens: f.add_special_tokens,
            logprobs: LogprobRequest {
                // Without the flag, or something to score, its log-probabilities would go nowhere.
                echo: logprobs.echo && (logprobs.show || max_tokens == Some(0)),
                prompt,
                in_fingerprint: f.logprobs_in_fingerprint.unwrap_or(false),
                ignore_temperature: f.logprobs_ignore_temperature.unwrap_or(false),
                ..logprobs
            },
            return_token_ids: f.return_token_ids.unwrap_or(false),
            tokens_as_ids: f.return_tokens_as_token_ids.unwrap_or(false),
            stream,
            include_usage: include_usage(f)?,
            priority: priority(f.priority.as_ref())?,
        })
    }

    /// Bounds what one request can make the server hold: choices, and log-probabilities.
    ///
    /// `prompts` are the lengths of the prompts, `max_tokens` the output limit of each choice.
    pub fn check_work(&self, prompts: &[usize], max_tokens: usize) -> Result<(), ApiError> {
        let choices = self.n * prompts.len();
        if choices > limits::MAX_CHOICES_PER_REQUEST {
            let limit = limits::MAX_CHOICES_PER_REQUEST;
            let message = format!("n times prompts is {choices}; the limit is {limit}");
            return Err(ApiError::invalid("n", message));
        }
        let options = self.logprobs.options();
        let output = choices * max_tokens * if options.top > 0 { options.top + 1 } else { 0 };
        // Every choice shows those of its prompt.
        let input =
            self.n * prompts.iter().sum::<usize>() * options.prompt_top.map_or(0, |k| k + 1);
        if output.saturating_add(input) > limits::MAX_LOGPROBS_PER_REQUEST {
            return Err(ApiError::bad_request(format!(
                "the request asks for more than {} log-probabilities; lower top_logprobs (logprobs, \
                 prompt_logprobs), n or max_tokens",
                limits::MAX_LOGPROBS_PER_REQUEST
            )));
        }
        Ok(())
    }
}

/// Chat: `logprobs` is a flag, `top_logprobs` the number of alternatives.
pub fn chat_logprobs(
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    bounds: Bounds<'_>,
) -> Result<LogprobRequest, ApiError> {
    let show = logprobs.unwrap_or(false);
    let top = top_count("top_logprobs", top_logprobs, bounds)?.unwrap_or(0);
    if top > 0 && !show {
        let message = "logprobs must be True if top_logprobs is set";
        return Err(ApiError::invalid("top_logprobs", message));
    }
    Ok(LogprobRequest { show, top, ..LogprobRequest::default() })
}

/// Completions: `logprobs` is the number of alternatives; 0 shows the chosen tokens only.
pub fn completion_logprobs(
    logprobs: Option<i64>,
    echo: bool,
    bounds: Bounds<'_>,
) -> Result<LogprobRequest, ApiError> {
    let top = top_count("logprobs", logprobs, bounds)?;
    let (show, top) = (top.is_some(), top.unwrap_or(0));
    Ok(LogprobRequest { show, top, echo, ..LogprobRequest::default() })
}

/// Tokens a choice may generate, given what the prompt and the cartridges already take of `limit`.
///
/// `requested` past the limit is an error; `default` (or, without one, the whole rest) is cut to fit.
pub fn token_budget(
    requested: Option<usize>,
    default: Option<usize>,
    prompt: usize,
    cartridge: usize,
    limit: usize,
) -> Result<usize, ApiError> {
    let rest = limit.saturating_sub(prompt).saturating_sub(cartridge);
    match requested {
        Some(tokens) if tokens > rest => Err(ApiError::too_long(prompt, cartridge, tokens, limit)),
        Some(0) if prompt.saturating_add(cartridge) > limit => {
            Err(ApiError::too_long(prompt, cartridge, 0, limit))
        }
        Some(tokens) => Ok(tokens),
        None if rest == 0 => Err(ApiError::too_long(prompt, cartridge, 1, limit)),
        None => Ok(default.unwrap_or(rest).min(rest)),
    }
}

/// 400 for a token id that the model does not have.
pub fn unknown_token(path: &str, id: i64, vocab_size: usize) -> ApiError {
    let message = format!("{path}: token id {id} is outside the vocabulary of {vocab_size} tokens");
    ApiError::invalid(path, message)
}

fn in_range(
    name: &str,
    value: Option<i64>,
    low: i64,
    high: i64,
) -> Result<Option<usize>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    if value < low || value > high {
        let message = match high {
            i64::MAX => format!("{name} must be at least {low}, not {value}"),
            high => format!("{name} must be between {low} and {high}, not {value}"),
        };
        return Err(ApiError::invalid(name, message));
    }
    Ok(usize::try_from(value).ok())
}

fn float(name: &str, value: Option<f64>, low: f64, high: f64) -> Result<Option<f32>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    let fits = value >= low && value <= high && (value as f32).is_finite();
    if !fits {
        let message = match high {
            f64::INFINITY => format!("{name} must be at least {low} and finite, not {value}"),
            high => format!("{name} must be between {low} and {high}, not {value}"),
        };
        return Err(ApiError::invalid(name, message));
    }
    Ok(Some(value as f32))
}

fn max_tokens(f: &CommonFields, allow_zero: bool) -> Result<Option<usize>, ApiError> {
    let (name, value) = match (f.max_tokens, f.max_completion_tokens) {
        (Some(a), Some(b)) if a != b => {
            let message =
                "exactly one of max_tokens or max_completion_tokens must be set; they differ";
            return Err(ApiError::invalid("max_tokens", message));
        }
        (_, Some(value)) => ("max_completion_tokens", value),
        (Some(value), None) => ("max_tokens", value),
        (None, None) => return Ok(None),
    };
    if value < 0 || (value == 0 && !allow_zero) {
        return Err(ApiError::invalid(name, "max tokens must be greater than 0"));
    }
    Ok(usize::try_from(value).ok())
}

fn sampling(f: &CommonFields, vocab_size: usize) -> Result<SamplingParams, ApiError> {
    let default = SamplingParams::default();
    let temperature = float("temperature", f.temperature, 0.0, f64::INFINITY)?;
    let top_p = float("top_p", f.top_p, 0.0, 1.0)?.unwrap_or(default.top_p);
    let top_k = match in_range("top_k", f.top_k, -1, i64::MAX) {
        Ok(k) => k.unwrap_or(0),
        Err(_) => {
            let message = "top_k must be -1 or 0 (all tokens) or more";
            return Err(ApiError::invalid("top_k", message));
        }
    };
    let repetition_penalty =
        float("repetition_penalty", f.repetition_penalty, 0.0, f64::INFINITY)?.unwrap_or(1.0);
    if repetition_penalty <= 0.0 {
        let message = "repetition_penalty must be greater than 0";
        return Err(ApiError::invalid("repetition_penalty", message));
    }
    Ok(SamplingParams {
        temperature: temperature.map_or(default.temperature, |t| {
            if f64::from(t) < GREEDY_TEMPERATURE { 0.0 } else { t }
        }),
        // OpenAI accepts 0, which leaves the most likely token only.
        top_p: if top_p == 0.0 { 1.0 } else { top_p },
        top_k: if top_p == 0.0 { 1 } else { top_k },
        min_p: float("min_p", f.min_p, 0.0, 1.0)?.unwrap_or(default.min_p),
        presence_penalty: float("presence_penalty", f.presence_penalty, -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: float("frequency_penalty", f.frequency_penalty, -2.0, 2.0)?
            .unwrap_or(0.0),
        repetition_penalty,
        logit_bias: logit_bias(f, vocab_size)?,
        seed: f.seed.map(|seed| seed as u64),
        ..default
    })
}

fn logit_bias(f: &CommonFields, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = &f.logit_bias else { return Ok(Vec::new()) };
    if map.len() > limits::MAX_LOGIT_BIAS {
        let message = format!("logit_bias has more than {} entries", limits::MAX_LOGIT_BIAS);
        return Err(ApiError::invalid("logit_bias", message));
    }
    map.iter()
        .map(|(key, value)| {
            let path = format!("logit_bias.{key}");
            let Ok(id) = key.parse::<u32>() else {
                let message = format!("{path}: keys of logit_bias are token ids");
                return Err(ApiError::invalid(path, message));
            };
            if id as usize >= vocab_size {
                return Err(unknown_token(&path, i64::from(id), vocab_size));
            }
            let Some(bias) = value.as_f64() else {
                return Err(ApiError::invalid(path.clone(), format!("{path} must be a number")));
            };
            Ok((id, float(&path, Some(bias), -100.0, 100.0)?.unwrap_or(0.0)))
        })
        .collect()
}

/// A number of alternatives, within what the server was configured for.
fn top_count(name: &str, k: Option<i64>, bounds: Bounds<'_>) -> Result<Option<usize>, ApiError> {
    let Some(k) = k else { return Ok(None) };
    let limit = bounds.max_top_logprobs.min(bounds.vocab_size);
    match usize::try_from(k) {
        Err(_) => Err(ApiError::invalid(name, format!("{name} must be non-negative"))),
        Ok(k) if k > limit => {
            let message =
                format!("{name}={k} but engine was configured with max_topk_logprobs={limit}");
            Err(ApiError::invalid(name, message))
        }
        Ok(k) => Ok(Some(k)),
    }
}

fn stop_strings(stop: Option<&Value>) -> Result<Vec<String>, ApiError> {
    let bad = |message: String| ApiError::invalid("stop", message);
    let list = match stop {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(list)) => list
            .iter()
            .enumerate()
            .map(|(i, v)| match v.as_str() {
                Some(text) => Ok(text.to_owned()),
                None => Err(ApiError::invalid(
                    format!("stop[{i}]"),
                    format!("stop[{i}] must be a string"),
                )),
            })
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(bad("stop must be a string or a list of strings".to_owned())),
    };
    if list.len() > limits::MAX_STOP_STRINGS {
        return Err(bad(format!("stop has more than {} strings", limits::MAX_STOP_STRINGS)));
    }
    if list.iter().any(String::is_empty) {
        return Err(bad("a stop string must not be empty".to_owned()));
    }
    if list.iter().any(|s| s.len() > limits::MAX_STOP_BYTES) {
        return Err(bad(format!("a stop string is longer than {} bytes", limits::MAX_STOP_BYTES)));
    }
    Ok(list)
}

fn include_usage(f: &CommonFields) -> Result<bool, ApiError> {
    match f.stream_options.as_ref().and_then(|o| o.get("include_usage")) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(_) => {
            let path = "stream_options.include_usage";
            Err(ApiError::invalid(path, format!("{path} must be true or false")))
        }
    }
}

/// A name, or vLLM's integer, of which lower ones go first: 0 (its default) and less are interactive.
fn priority(value: Option<&Value>) -> Result<Priority, ApiError> {
    match value {
        None | Some(Value::Null) => Ok(Priority::default()),
        Some(Value::String(name)) if name == "interactive" => Ok(Priority::Interactive),
        Some(Value::String(name)) if name == "batch" => Ok(Priority::Batch),
        Some(Value::Number(number)) if number.is_i64() || number.is_u64() => {
            match number.as_i64() {
                Some(..=0) => Ok(Priority::Interactive),
                _ => Ok(Priority::Batch),
            }
        }
        Some(_) => {
            let message = "priority must be \"interactive\", \"batch\" or an integer";
            Err(ApiError::invalid("priority", message))
        }
    }
}

#[cfg(test)]
#[path = "params_tests.rs"]
mod tests;
