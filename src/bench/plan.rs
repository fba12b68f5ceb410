//! What to run: targets, levels of load and what each request asks for.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value};

use super::Endpoint;

/// A server under test.
#[derive(Debug, Clone)]
pub struct Target {
    pub label: String,
    pub url: String,
    pub endpoint: Endpoint,
}

/// A whole run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// At least one; ratios are to the first.
    pub targets: Vec<Target>,
    pub levels: Vec<Load>,
    pub amount: Amount,
    /// Unmeasured requests: of each client before a closed level, in all before an open one.
    pub warmup: usize,
    /// Times each level is measured on each target; medians are shown.
    pub repeat: usize,
    pub timeout_s: f64,
    /// Times a 429 is waited out before it counts as failed.
    pub retry_429: u32,
    /// The model to ask for; by default each server's own.
    pub model: Option<String>,
    pub workload: WorkloadOptions,
    /// Keep every request in the report.
    pub raw: bool,
}

/// How hard a server is pressed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "loop")]
pub enum Load {
    /// So many clients, each sending its next request when the last one is answered.
    Closed { clients: usize },
    /// Requests per second at Poisson arrivals, however slow the answers are. What goes past
    /// `max_outstanding` waits here, and the wait counts as latency.
    Open { rate: f64, max_outstanding: usize },
}

impl Load {
    /// The number on the x axis: clients, or requests per second.
    pub fn size(self) -> f64 {
        match self {
            Self::Closed { clients } => clients as f64,
            Self::Open { rate, .. } => rate,
        }
    }

    pub fn unit(self) -> &'static str {
        match self {
            Self::Closed { .. } => "clients",
            Self::Open { .. } => "requests/s",
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { clients: 1 } => f.write_str("1 client"),
            _ => write!(f, "{} {}", self.size(), self.unit()),
        }
    }
}

/// When a level ends.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Amount {
    /// Requests of each client (closed loop), or in all (open loop).
    Requests(usize),
    /// No request starts later than this.
    Seconds(f64),
}

/// The route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Api {
    Chat,
    Completions,
}

impl Api {
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

/// What stands before the prompt of each request.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Prefix {
    None,
    /// Random words: a system message in chat. Of each client, or one for all.
    Text {
        tokens: usize,
        shared: bool,
    },
    /// Cartridges: client `i` names `ids[i % len]`.
    Cartridge {
        ids: Vec<String>,
        source: String,
    },
}

/// Where prompts come from.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum PromptSource {
    /// Random words that make so many tokens, as `usage.prompt_tokens` counts them (chat template
    /// included, prefix text not).
    Random { tokens: usize },
    /// JSON lines: a string, `{"prompt": ...}` or `{"messages": [...]}`.
    File { path: PathBuf },
}

/// What each request asks for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorkloadOptions {
    pub api: Api,
    pub prompt: PromptSource,
    pub prefix: Prefix,
    pub output_tokens: usize,
    /// Ask for exactly `output_tokens`: `ignore_eos` and `min_tokens`.
    pub exact_output: bool,
    pub temperature: f64,
    pub seed: u64,
    /// Send the same prompt every time.
    pub same_prompt: bool,
    /// Merged into every body; null removes a member.
    pub extra_body: Map<String, Value>,
}
