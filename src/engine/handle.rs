//! The caller's side of the engine: submit requests, read tokens, watch the load.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use candle_core::DType;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::scheduler::SequenceId;
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
    /// Of keys and values, and so of the cartridges it takes.
    pub kv_dtype: DType,
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

/// What handles, streams and the engine thread have in common.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub queue: Queue,
    pub gauges: Gauges,
    /// The id of the next sequence. Those of one request are consecutive.
    next_id: AtomicU64,
    /// Sequences nobody wants any more, until the engine has seen it.
    cancelled: Mutex<Vec<Range<SequenceId>>>,
}

impl Shared {
    fn cancel(&self, ids: Range<SequenceId>) {
        self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).push(ids);
    }

    /// What was cancelled since the last call.
    pub fn take_cancelled(&self) -> Vec<Range<SequenceId>> {
        std::mem::take(&mut self.cancelled.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What was submitted and has not started.
#[derive(Debug, Default)]
pub(super) struct Queue {
    sequences: AtomicUsize,
    /// Their prompt tokens.
    tokens: AtomicUsize,
}

impl Queue {
    /// Takes places for `n` sequences with `prompt` tokens each.
    fn enter(&self, n: usize, prompt: usize, info: &EngineInfo) -> Result<(), EngineError> {
        let limit = info.max_queued_sequences;
        let add = |waiting: usize| waiting.checked_add(n).filter(|total| *total <= limit);
        self.sequences
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, add)
            .map_err(|waiting| EngineError::QueueFull { waiting, limit })?;
        let limit = info.max_queued_tokens;
        let tokens = prompt.saturating_mul(n);
        // One that is too large for the queue is taken when nobody waits.
        let add = |waiting: usize| {
            waiting.checked_add(tokens).filter(|total| waiting == 0 || *total <= limit)
        };
        let added = self.tokens.fetch_update(Ordering::AcqRel, Ordering::Acquire, add);
        added.map(drop).map_err(|waiting| {
            self.sequences.fetch_sub(n, Ordering::AcqRel);
            EngineError::QueueTokensFull { waiting, limit }
        })
    }

    /// Gives the places back.
    pub fn leave(&self, n: usize, prompt: usize) {
        self.sequences.fetch_sub(n, Ordering::AcqRel);
        self.tokens.fetch_sub(prompt.saturating_mul(n), Ordering::AcqRel);
    }
}

/// Readings the engine thread publishes.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    pub waiting: AtomicUsize,
    pub running: AtomicUsize,
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
    /// The id of the first choice.
    pub first_id: SequenceId,
    pub reply: Reply,
}

/// The engine's end of a [`TokenStream`].
pub(super) struct Reply {
    events: UnboundedSender<Event>,
    unread: Arc<AtomicUsize>,
}

impl Reply {
    pub fn send(&self, event: Event) {
        self.unread.fetch_add(1, Ordering::Relaxed);
        // A receiver that is gone has cancelled its sequences, which the next step sees.
        let _ = self.events.send(event);
    }

    /// Events sent and not yet received.
    pub fn unread(&self) -> usize {
        self.unread.load(Ordering::Relaxed)
    }
}

/// Submits requests to the engine thread. The engine stops when the last handle is gone and all work is
/// done.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    pub(super) submissions: mpsc::Sender<Submission>,
    pub(super) info: Arc<EngineInfo>,
    pub(super) shared: Arc<Shared>,
}

impl EngineHandle {
    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    pub fn stats(&self) -> EngineStats {
        let read = |value: &AtomicUsize| value.load(Ordering::Relaxed);
        let count = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let gauges = &self.shared.gauges;
        EngineStats {
            waiting: read(&gauges.waiting),
            running: read(&gauges.running),
            waiting_tokens: read(&self.shared.queue.tokens),
            used_blocks: read(&gauges.used_blocks),
            cached_blocks: read(&gauges.cached_blocks),
            total_blocks: read(&gauges.total_blocks),
            preemptions: count(&gauges.preemptions),
            prefix_queried_tokens: count(&gauges.prefix_queried_tokens),
            prefix_hit_tokens: count(&gauges.prefix_hit_tokens),
            steps: count(&gauges.steps),
        }
    }

    /// Checks a request and puts it into the queue. What can never run is refused here.
    pub fn submit(&self, request: GenerateRequest) -> Result<TokenStream, EngineError> {
        self.check(&request)?;
        let (n, prompt) = (request.n, request.prompt.len());
        self.shared.queue.enter(n, prompt, &self.info)?;
        // Bounded by the limit on unread events.
        let (events, receiver) = unbounded_channel();
        let unread = Arc::new(AtomicUsize::new(0));
        let first_id = self.shared.next_id.fetch_add(n as u64, Ordering::Relaxed);
        let reply = Reply { events, unread: Arc::clone(&unread) };
        if self.submissions.send(Submission { request, first_id, reply }).is_err() {
            self.shared.queue.leave(n, prompt);
            return Err(EngineError::ShuttingDown);
        }
        let ids = first_id..first_id + n as u64;
        Ok(TokenStream { events: receiver, unread, ids, shared: Arc::clone(&self.shared) })
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
            let (have, need) = (cartridge.dtype(), self.info.kv_dtype);
            if have != need {
                return invalid(
                    "cartridges",
                    format!("{have:?} tensors, the engine needs {need:?}"),
                );
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
    unread: Arc<AtomicUsize>,
    ids: Range<SequenceId>,
    shared: Arc<Shared>,
}

impl TokenStream {
    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        self.received(event)
    }

    /// Like [`Self::next`], for threads without an async runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        let event = self.events.blocking_recv();
        self.received(event)
    }

    fn received(&self, event: Option<Event>) -> Option<Event> {
        if event.is_some() {
            self.unread.fetch_sub(1, Ordering::Relaxed);
        }
        event
    }

    /// Stops one choice, e.g. because its text reached a stop string. No `Finished` follows for it.
    pub fn cancel_choice(&self, choice: usize) {
        let id = self.ids.start + choice as u64;
        if self.ids.contains(&id) {
            self.shared.cancel(id..id + 1);
        }
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        self.shared.cancel(self.ids.clone());
    }
}
