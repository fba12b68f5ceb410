//! The caller's side of the engine: submit requests, read tokens, watch the load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;

use candle_core::DType;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{EngineError, Event, GenerateRequest};
use crate::cartridge::KvShape;

/// Fixed facts about a running engine.
#[derive(Debug, Clone)]
pub struct EngineInfo {
    /// Cartridge, prompt and output tokens one sequence may have together.
    pub max_context: usize,
    /// Tokens the KV cache holds; prompt and output of one sequence must fit.
    pub kv_tokens: usize,
    pub kv_bytes: u64,
    pub vocab_size: usize,
    pub kv_shape: KvShape,
    pub max_queued_sequences: usize,
    pub max_queued_tokens: usize,
    pub prefix_cache: bool,
    pub max_running_sequences: usize,
}

/// A momentary reading of the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences not yet admitted.
    pub waiting: usize,
    /// Sequences in the running batch.
    pub running: usize,
    /// Prompt tokens of the sequences not yet admitted.
    pub waiting_tokens: usize,
    /// Blocks that running sequences hold; `free + used + cached == total`.
    pub used_blocks: usize,
    /// Blocks only the prefix cache holds; they are given up when somebody needs them.
    pub cached_blocks: usize,
    pub total_blocks: usize,
    /// Sequences that gave their blocks up since the start.
    pub preemptions: u64,
    /// Prompt tokens that were looked up in the prefix cache since the start.
    pub prefix_queried_tokens: u64,
    /// Prompt tokens that were found there.
    pub prefix_hit_tokens: u64,
    /// Model steps since the start.
    pub steps: u64,
}

/// Readings the engine thread publishes.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    /// Sequences submitted and not yet started; bounded by `max_queued_sequences`.
    pub queued: AtomicUsize,
    pub waiting: AtomicUsize,
    pub running: AtomicUsize,
    pub waiting_tokens: AtomicUsize,
    pub used_blocks: AtomicUsize,
    pub cached_blocks: AtomicUsize,
    pub total_blocks: AtomicUsize,
    pub preemptions: AtomicU64,
    pub prefix_queried_tokens: AtomicU64,
    pub prefix_hit_tokens: AtomicU64,
    pub steps: AtomicU64,
}

/// A request on its way to the engine thread.
pub(super) struct Submission {
    pub request: GenerateRequest,
    pub reply: Reply,
}

/// The engine's end of a [`TokenStream`].
pub(super) struct Reply {
    pub events: UnboundedSender<Event>,
    pub cancelled: Arc<[AtomicBool]>,
}

impl Reply {
    pub fn is_cancelled(&self, choice: usize) -> bool {
        self.events.is_closed() || self.cancelled[choice].load(Ordering::Relaxed)
    }
}

/// Submits requests to the engine thread. The engine stops when the last handle is gone and all work is
/// done.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    pub(super) submissions: mpsc::Sender<Submission>,
    pub(super) info: Arc<EngineInfo>,
    pub(super) gauges: Arc<Gauges>,
}

impl EngineHandle {
    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    pub fn stats(&self) -> EngineStats {
        let read = |value: &AtomicUsize| value.load(Ordering::Relaxed);
        let count = |value: &AtomicU64| value.load(Ordering::Relaxed);
        EngineStats {
            waiting: read(&self.gauges.waiting),
            running: read(&self.gauges.running),
            waiting_tokens: read(&self.gauges.waiting_tokens),
            used_blocks: read(&self.gauges.used_blocks),
            cached_blocks: read(&self.gauges.cached_blocks),
            total_blocks: read(&self.gauges.total_blocks),
            preemptions: count(&self.gauges.preemptions),
            prefix_queried_tokens: count(&self.gauges.prefix_queried_tokens),
            prefix_hit_tokens: count(&self.gauges.prefix_hit_tokens),
            steps: count(&self.gauges.steps),
        }
    }

    /// Checks a request and puts it into the queue. What can never run is refused here.
    pub fn submit(&self, request: GenerateRequest) -> Result<TokenStream, EngineError> {
        self.check(&request)?;
        let (n, limit) = (request.n, self.info.max_queued_sequences);
        let queued = &self.gauges.queued;
        queued
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |waiting| {
                waiting.checked_add(n).filter(|total| *total <= limit)
            })
            .map_err(|waiting| EngineError::QueueFull { waiting, limit })?;
        // The number of events is bounded by the request's own n and max_tokens.
        let (events, receiver) = unbounded_channel();
        let cancelled: Arc<[AtomicBool]> = (0..request.n).map(|_| AtomicBool::new(false)).collect();
        let reply = Reply { events, cancelled: Arc::clone(&cancelled) };
        if self.submissions.send(Submission { request, reply }).is_err() {
            queued.fetch_sub(n, Ordering::AcqRel);
            return Err(EngineError::ShuttingDown);
        }
        Ok(TokenStream { events: receiver, cancelled })
    }

    fn check(&self, request: &GenerateRequest) -> Result<(), EngineError> {
        let invalid = |field, reason: String| Err(EngineError::InvalidRequest { field, reason });
        let max_tokens = request.sampling.max_tokens;
        if request.prompt.is_empty() {
            return invalid("prompt", "is empty; it needs at least one token".to_owned());
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= self.info.vocab_size) {
            return invalid(
                "prompt",
                format!("holds token id {id}; the vocabulary has {}", self.info.vocab_size),
            );
        }
        if request.n == 0 {
            return invalid("n", "must be at least 1".to_owned());
        }
        if max_tokens == 0 && request.logprobs.prompt_top.is_none() {
            return invalid("max_tokens", "must be at least 1".to_owned());
        }
        for cartridge in &request.cartridges {
            if cartridge.shape() != self.info.kv_shape {
                let (have, need) = (cartridge.shape(), self.info.kv_shape);
                return invalid("cartridges", format!("shape {have:?}, the model has {need:?}"));
            }
            if cartridge.dtype() != DType::F32 {
                let dtype = cartridge.dtype();
                return invalid("cartridges", format!("{dtype:?} tensors, the engine needs F32"));
            }
            if !cartridge.is_for_attention() {
                let reason = "keys are not laid out for attention (Cartridge::for_attention)";
                return invalid("cartridges", reason.to_owned());
            }
        }
        let cartridge: usize = request.cartridges.iter().map(|c| c.tokens()).sum();
        let own = request.prompt.len().saturating_add(max_tokens);
        let limit = self.info.max_context.min(self.info.kv_tokens + cartridge);
        if own.saturating_add(cartridge) > limit {
            let prompt = request.prompt.len();
            return Err(EngineError::TooLong { prompt, cartridge, max_tokens, limit });
        }
        Ok(())
    }
}

/// The tokens of one request as they are generated. Dropping it cancels the request.
#[derive(Debug)]
pub struct TokenStream {
    events: UnboundedReceiver<Event>,
    cancelled: Arc<[AtomicBool]>,
}

impl TokenStream {
    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Like [`Self::next`], for threads without an async runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// Stops one choice, e.g. because its text reached a stop string. No `Finished` follows for it.
    pub fn cancel_choice(&self, choice: usize) {
        if let Some(flag) = self.cancelled.get(choice) {
            flag.store(true, Ordering::Relaxed);
        }
    }
}
