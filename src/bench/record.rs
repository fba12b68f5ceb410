//! What was seen of one request.

use serde::{Serialize, Serializer};

use super::Failure;

/// One request. All times are seconds since its level began.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    pub client: usize,
    /// Number of the request: of its client (closed loop) or of the level (open loop).
    pub index: usize,
    /// When it should have been sent. In the open loop a late start counts as latency.
    pub intended_s: f64,
    /// When it was sent the first time.
    pub sent_s: f64,
    /// When `[DONE]` or the failure came.
    pub ended_s: f64,
    /// Arrivals of the chunks that hold text.
    pub chunks_s: Vec<f64>,
    pub prompt_tokens: Option<u64>,
    pub cached_tokens: Option<u64>,
    /// Tokens as the server counted them, or chunks with text where it did not.
    pub output_tokens: u64,
    pub tokens_from_usage: bool,
    /// How often it was sent again after a 429.
    pub retries: u32,
    #[serde(serialize_with = "as_text")]
    pub failure: Option<Failure>,
}

fn as_text<S: Serializer>(failure: &Option<Failure>, serializer: S) -> Result<S::Ok, S::Error> {
    failure.as_ref().map(Failure::to_string).serialize(serializer)
}

impl Record {
    /// A request that has not been sent.
    pub fn new(client: usize, index: usize, intended_s: f64) -> Self {
        Self {
            client,
            index,
            intended_s,
            sent_s: intended_s,
            ended_s: intended_s,
            chunks_s: Vec::new(),
            prompt_tokens: None,
            cached_tokens: None,
            output_tokens: 0,
            tokens_from_usage: false,
            retries: 0,
            failure: None,
        }
    }

    /// Seconds from the intended start to the first text.
    pub fn ttft_s(&self) -> Option<f64> {
        self.chunks_s.first().map(|first| first - self.intended_s)
    }

    /// Seconds from the intended start to the end.
    pub fn latency_s(&self) -> f64 {
        self.ended_s - self.intended_s
    }

    /// Seconds between chunks that hold text. Chunks that came in one read are 0 apart.
    pub fn gaps_s(&self) -> impl Iterator<Item = f64> {
        self.chunks_s.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// Seconds from the first text to the end, and the tokens that came in them. The end is that of the
    /// stream, as the last tokens may have no text.
    pub fn decode(&self) -> Option<(f64, u64)> {
        let seconds = self.ended_s - self.chunks_s.first()?;
        let tokens = self.output_tokens.checked_sub(1)?;
        (tokens > 0 && seconds > 0.0).then_some((seconds, tokens))
    }
}
