//! The engine thread: take requests in, plan a step, run the model, hand tokens out.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread::JoinHandle;

use candle_core::{D, Tensor};

use super::blocks::{BLOCK_TOKENS, BlockPool, blocks_for};
use super::handle::{EngineHandle, EngineInfo, Gauges, Submission};
use super::kv_cache::{BatchEntry, KvCache, PagedAttention};
use super::scheduler::{Plan, Scheduler, SchedulerLimits, SequenceId};
use super::sequence::{ActiveRequest, Sequence};
use super::{EngineError, Event};
use crate::limits;
use crate::model::Decoder;

/// Rows of logits `[rows, vocab]` held at once while scoring a prompt.
const PROMPT_LOGIT_ROWS: usize = 32;

/// Sizes of an engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Bytes the KV cache may use. Cartridges are not part of it.
    pub kv_bytes: u64,
    pub max_running_sequences: usize,
    pub prefill_tokens_per_step: usize,
    pub max_queued_sequences: usize,
    /// Prompt tokens (times `n`) that may wait.
    pub max_queued_tokens: usize,
    /// Keep the blocks of finished sequences for prompts that begin the same way.
    pub prefix_cache: bool,
    /// Events one request may leave unread before it is cancelled.
    pub max_unread_events: usize,
    /// Sequences that must share a cartridge for attention to read it once for all of them.
    pub group_min_sequences: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            kv_bytes: 1 << 30,
            max_running_sequences: limits::DEFAULT_MAX_RUNNING_SEQUENCES,
            prefill_tokens_per_step: limits::DEFAULT_PREFILL_TOKENS_PER_STEP,
            max_queued_sequences: limits::DEFAULT_MAX_QUEUED_SEQUENCES,
            max_queued_tokens: limits::DEFAULT_MAX_QUEUED_TOKENS,
            prefix_cache: true,
            max_unread_events: limits::DEFAULT_MAX_UNREAD_EVENTS,
            group_min_sequences: 2,
        }
    }
}

/// Starts the engine thread. It ends when every [`EngineHandle`] is dropped and its work is done; the
/// returned handle waits for that.
pub fn start(
    decoder: Decoder,
    options: &EngineOptions,
) -> Result<(EngineHandle, JoinHandle<()>), EngineError> {
    let config = decoder.config();
    let shape = config.kv_shape();
    let block_bytes = KvCache::block_bytes(shape);
    // More blocks than all running sequences can fill would never be used.
    let useful = options.max_running_sequences.saturating_mul(blocks_for(config.max_positions));
    let blocks = ((options.kv_bytes / block_bytes) as usize).min(useful);
    if blocks == 0 || options.max_running_sequences == 0 || options.prefill_tokens_per_step == 0 {
        return Err(EngineError::InvalidRequest {
            field: "kv_cache_bytes",
            reason: format!(
                "{} bytes hold no block of {BLOCK_TOKENS} tokens ({block_bytes} bytes), or another \
                 engine limit is 0",
                options.kv_bytes
            ),
        });
    }
    let info = Arc::new(EngineInfo {
        max_context: config.max_positions,
        kv_tokens: blocks * BLOCK_TOKENS,
        kv_bytes: blocks as u64 * block_bytes,
        vocab_size: config.vocab_size,
        kv_shape: shape,
        max_queued_sequences: options.max_queued_sequences,
        max_queued_tokens: options.max_queued_tokens,
        prefix_cache: options.prefix_cache,
        max_running_sequences: options.max_running_sequences,
    });
    let gauges = Arc::new(Gauges::default());
    gauges.total_blocks.store(blocks, Ordering::Relaxed);
    let (submissions, receiver) = std::sync::mpsc::channel();
    let scheduler_limits = SchedulerLimits {
        max_running: options.max_running_sequences,
        prefill_tokens: options.prefill_tokens_per_step,
    };
    let group_min = options.group_min_sequences;
    let thread = {
        let gauges = Arc::clone(&gauges);
        std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let core = Core {
                cache: KvCache::new(shape, blocks),
                pool: BlockPool::new(blocks),
                scheduler: Scheduler::new(scheduler_limits),
                sequences: BTreeMap::new(),
                next_id: 0,
                receiver,
                gauges,
                decoder,
                group_min,
            };
            core.run();
        })
    };
    let thread = thread.map_err(|e| EngineError::Internal(format!("no engine thread: {e}")))?;
    Ok((EngineHandle { submissions, info, gauges }, thread))
}

struct Core {
    decoder: Decoder,
    group_min: usize,
    cache: KvCache,
    pool: BlockPool,
    scheduler: Scheduler,
    sequences: BTreeMap<SequenceId, Sequence>,
    next_id: SequenceId,
    receiver: Receiver<Submission>,
    gauges: Arc<Gauges>,
}

impl Core {
    fn run(mut self) {
        while self.take_submissions() {
            self.drop_cancelled();
            let plan = self.scheduler.plan(self.pool.free());
            if let Err(error) = self.apply(&plan) {
                self.fail(&plan, &error);
                continue;
            }
            self.publish_gauges();
            if plan.work.is_empty() {
                continue;
            }
            // A panic may leave only the sequences of this step in doubt, and those are dropped.
            match catch_unwind(AssertUnwindSafe(|| self.step(&plan))) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::error!(%error, "a step failed; its requests are ended");
                    self.fail(&plan, &EngineError::Internal(error.to_string()));
                }
                Err(_) => {
                    tracing::error!("a step panicked; its requests are ended");
                    self.fail(&plan, &EngineError::Internal("a step panicked".to_owned()));
                }
            }
        }
    }

    /// Takes in what was submitted, waiting if there is nothing else to do. False when the engine is done.
    fn take_submissions(&mut self) -> bool {
        if self.sequences.is_empty() {
            self.publish_gauges();
            match self.receiver.recv() {
                Ok(submission) => self.accept(submission),
                Err(_) => return false,
            }
        }
        loop {
            match self.receiver.try_recv() {
                Ok(submission) => self.accept(submission),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return !self.sequences.is_empty(),
            }
        }
    }

    fn accept(&mut self, Submission { request, reply }: Submission) {
        let cartridge_tokens = request.cartridges.iter().map(|c| c.tokens()).sum();
        let (prompt, n) = (request.prompt.len(), request.n);
        let active = Rc::new(ActiveRequest { request, reply, cartridge_tokens });
        for choice in 0..n {
            let id = self.next_id;
            self.next_id += 1;
            let sequence = Sequence::new(Rc::clone(&active), choice, self.pool.table());
            self.sequences.insert(id, sequence);
            self.scheduler.enqueue(id, prompt);
        }
    }

    /// Moves blocks as the plan says.
    fn apply(&mut self, plan: &Plan) -> Result<(), EngineError> {
        for id in &plan.preempted {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.preempt(self.pool.table());
            }
        }
        for id in &plan.admitted {
            if let Some(sequence) = self.sequences.get_mut(id)
                && sequence.start()
            {
                self.gauges.queued.fetch_sub(1, Ordering::AcqRel);
            }
        }
        for work in &plan.work {
            let grown = self.sequences.get_mut(&work.id).map(|s| s.table.grow_to(work.blocks));
            if grown != Some(true) {
                let reason = "the scheduler planned more than the pool holds".to_owned();
                return Err(EngineError::Internal(reason));
            }
        }
        Ok(())
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<SequenceId> =
            self.sequences.iter().filter(|(_, s)| s.is_cancelled()).map(|(id, _)| *id).collect();
        self.remove(&gone);
    }

    /// Forgets sequences, wherever they stand; their blocks are free at once.
    fn remove(&mut self, ids: &[SequenceId]) {
        if ids.is_empty() {
            return;
        }
        for id in ids {
            if self.sequences.remove(id).is_some_and(|sequence| !sequence.has_started()) {
                self.gauges.queued.fetch_sub(1, Ordering::AcqRel);
            }
        }
        self.scheduler.retain(|id| self.sequences.contains_key(&id));
    }

    /// Runs one step of the model and hands out what it produced.
    fn step(&mut self, plan: &Plan) -> candle_core::Result<()> {
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        let mut batch = Vec::new();
        for work in &plan.work {
            let sequence = &self.sequences[&work.id];
            tokens.extend(sequence.next_tokens(work.tokens));
            let indices = sequence.computed..sequence.computed + work.tokens;
            positions.extend(indices.map(|index| sequence.position(index)));
            batch.push(BatchEntry {
                table: &sequence.table,
                cartridges: &sequence.active.request.cartridges,
                start: sequence.computed,
                rows: work.tokens,
            });
        }
        let mut attention =
            PagedAttention { cache: &mut self.cache, batch: &batch, group_min: self.group_min };
        let hidden = self.decoder.forward(&tokens, &positions, &mut attention)?;
        drop(batch);

        let mut sampling = Vec::new();
        let mut failed = Vec::new();
        let mut first_row = 0;
        for work in &plan.work {
            let Some(sequence) = self.sequences.get_mut(&work.id) else { continue };
            if sequence.wants_prompt_logprobs() {
                let rows = hidden.narrow(0, first_row, work.tokens)?;
                if let Err(error) = score_prompt(&self.decoder, sequence, &rows)? {
                    failed.push((work.id, error));
                }
            }
            first_row += work.tokens;
            sequence.computed += work.tokens;
            if sequence.is_computed() {
                sequence.announce_prompt();
                sampling.push((work.id, first_row as u32 - 1));
            }
        }
        for (id, error) in failed {
            self.fail_request(id, &error);
        }
        if sampling.is_empty() {
            return Ok(());
        }
        let rows: Vec<u32> = sampling.iter().map(|(_, row)| *row).collect();
        let rows = hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?;
        let logits = self.decoder.logits(&rows)?;
        let vocab = logits.dim(D::Minus1)?;
        let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        for ((id, _), logits) in sampling.iter().zip(logits.chunks_exact(vocab)) {
            self.advance(*id, logits);
        }
        Ok(())
    }

    /// Samples one token for a sequence and ends it if that was the last.
    fn advance(&mut self, id: SequenceId, logits: &[f32]) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        match sequence.step(logits) {
            Ok(None) => self.scheduler.grow(id),
            Ok(Some(reason)) => {
                sequence.send(Event::Finished { choice: sequence.choice, reason });
                self.remove(&[id]);
            }
            Err(error) => {
                tracing::error!(%error, "a request is ended");
                self.fail_request(id, &error);
            }
        }
    }

    /// Ends every request that takes part in `plan`.
    fn fail(&mut self, plan: &Plan, error: &EngineError) {
        for work in &plan.work {
            self.fail_request(work.id, error);
        }
    }

    /// Ends all choices of the request that sequence `id` belongs to.
    fn fail_request(&mut self, id: SequenceId, error: &EngineError) {
        let Some(sequence) = self.sequences.get(&id) else {
            self.scheduler.retain(|other| other != id);
            return;
        };
        sequence.send(Event::Failed(error.clone()));
        let active = Rc::clone(&sequence.active);
        let same = |s: &Sequence| Rc::ptr_eq(&s.active, &active);
        let ids: Vec<SequenceId> =
            self.sequences.iter().filter(|(_, s)| same(s)).map(|(id, _)| *id).collect();
        self.remove(&ids);
    }

    fn publish_gauges(&self) {
        let gauges = &self.gauges;
        gauges.waiting.store(self.scheduler.waiting(), Ordering::Relaxed);
        gauges.running.store(self.scheduler.running(), Ordering::Relaxed);
        gauges.used_blocks.store(self.pool.total() - self.pool.free(), Ordering::Relaxed);
    }
}

/// Log-probabilities of the prompt tokens that `hidden` `[rows, hidden]` predicts. The inner error is the
/// request's own.
fn score_prompt(
    decoder: &Decoder,
    sequence: &mut Sequence,
    hidden: &Tensor,
) -> candle_core::Result<Result<(), EngineError>> {
    let rows = hidden.dim(0)?;
    for start in (0..rows).step_by(PROMPT_LOGIT_ROWS) {
        let len = PROMPT_LOGIT_ROWS.min(rows - start);
        let logits = decoder.logits(&hidden.narrow(0, start, len)?)?;
        for (i, logits) in logits.to_vec2::<f32>()?.iter().enumerate() {
            let predicted = sequence.computed + start + i + 1;
            if let Err(error) = sequence.add_prompt_logprobs(predicted, logits) {
                return Ok(Err(error));
            }
        }
    }
    Ok(Ok(()))
}
