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
use super::{EngineError, Event, FinishReason};
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
    pub max_queued_requests: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            kv_bytes: 1 << 30,
            max_running_sequences: limits::DEFAULT_MAX_RUNNING_SEQUENCES,
            prefill_tokens_per_step: limits::DEFAULT_PREFILL_TOKENS_PER_STEP,
            max_queued_requests: limits::DEFAULT_MAX_QUEUED_REQUESTS,
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
    let useful = options.max_running_sequences * blocks_for(config.max_positions);
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
        max_queued_requests: options.max_queued_requests,
        max_running_sequences: options.max_running_sequences,
    });
    let gauges = Arc::new(Gauges::default());
    gauges.total_blocks.store(blocks, Ordering::Relaxed);
    let (submissions, receiver) = std::sync::mpsc::channel();
    let scheduler_limits = SchedulerLimits {
        max_running: options.max_running_sequences,
        prefill_tokens: options.prefill_tokens_per_step,
    };
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
            };
            core.run();
        })
    };
    let thread = thread.map_err(|e| EngineError::Internal(format!("no engine thread: {e}")))?;
    Ok((EngineHandle { submissions, info, gauges }, thread))
}

struct Core {
    decoder: Decoder,
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
            if let Err(error) = self.admit(&plan) {
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
        let prompt = request.prompt.len();
        let blocks = blocks_for(prompt + request.sampling.max_tokens);
        let n = request.n;
        let active = Rc::new(ActiveRequest { request, reply, cartridge_tokens });
        for choice in 0..n {
            let id = self.next_id;
            self.next_id += 1;
            self.sequences.insert(id, Sequence::new(Rc::clone(&active), choice));
            self.scheduler.enqueue(id, prompt, blocks);
        }
    }

    fn admit(&mut self, plan: &Plan) -> Result<(), EngineError> {
        for (id, blocks) in &plan.admitted {
            let table = self.pool.allocate(*blocks);
            let table = table.ok_or_else(|| {
                EngineError::Internal("the scheduler admitted more than the pool holds".to_owned())
            })?;
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.table = Some(table);
                if sequence.choice == 0 {
                    self.gauges.queued_requests.fetch_sub(1, Ordering::AcqRel);
                }
            }
        }
        Ok(())
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<SequenceId> =
            self.sequences.iter().filter(|(_, s)| s.is_cancelled()).map(|(id, _)| *id).collect();
        for id in gone {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        if let Some(sequence) = self.sequences.remove(&id)
            && sequence.choice == 0
            && sequence.table.is_none()
        {
            self.gauges.queued_requests.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Runs one step of the model and hands out what it produced.
    fn step(&mut self, plan: &Plan) -> candle_core::Result<()> {
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        let mut batch = Vec::new();
        for (id, count) in &plan.work {
            let sequence = &self.sequences[id];
            let Some(table) = &sequence.table else {
                candle_core::bail!("a running sequence holds no blocks")
            };
            let range = sequence.computed..sequence.computed + count;
            positions.extend(range.clone().map(|index| sequence.position(index)));
            tokens.extend_from_slice(&sequence.tokens[range]);
            batch.push(BatchEntry {
                table,
                cartridges: &sequence.active.request.cartridges,
                start: sequence.computed,
                rows: *count,
            });
        }
        let mut attention = PagedAttention { cache: &mut self.cache, batch: &batch };
        let hidden = self.decoder.forward(&tokens, &positions, &mut attention)?;
        drop(batch);

        let mut sampling = Vec::new();
        let mut first_row = 0;
        for (id, count) in &plan.work {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            if sequence.wants_prompt_logprobs() {
                score_prompt(&self.decoder, sequence, &hidden.narrow(0, first_row, *count)?)?;
            }
            first_row += count;
            let in_prompt = !sequence.prefill_done();
            sequence.computed += count;
            if sequence.prefill_done() {
                if in_prompt {
                    sequence.finish_prompt();
                }
                sampling.push((*id, first_row as u32 - 1));
            }
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
            Ok(None) => {}
            Ok(Some(reason)) => self.finish(id, reason),
            Err(error) => {
                tracing::error!(%error, "a request is ended");
                self.fail_request(id, &error);
            }
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        if let Some(sequence) = self.sequences.get(&id) {
            sequence.send(Event::Finished { choice: sequence.choice, reason });
        }
        self.remove(id);
    }

    /// Ends every request that takes part in `plan`.
    fn fail(&mut self, plan: &Plan, error: &EngineError) {
        let admitted = plan.admitted.iter().map(|(id, _)| *id);
        let ids: Vec<SequenceId> = plan.work.iter().map(|(id, _)| *id).chain(admitted).collect();
        for id in ids {
            self.fail_request(id, error);
        }
    }

    /// Ends all choices of the request that sequence `id` belongs to.
    fn fail_request(&mut self, id: SequenceId, error: &EngineError) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        sequence.send(Event::Failed(error.clone()));
        let active = Rc::clone(&sequence.active);
        let same = |s: &Sequence| Rc::ptr_eq(&s.active, &active);
        let ids: Vec<SequenceId> =
            self.sequences.iter().filter(|(_, s)| same(s)).map(|(id, _)| *id).collect();
        for id in ids {
            self.remove(id);
        }
    }

    fn publish_gauges(&self) {
        let gauges = &self.gauges;
        gauges.waiting.store(self.scheduler.waiting(), Ordering::Relaxed);
        gauges.running.store(self.scheduler.running(), Ordering::Relaxed);
        gauges.used_blocks.store(self.pool.total() - self.pool.free(), Ordering::Relaxed);
    }
}

/// Log-probabilities of the prompt tokens that `hidden` `[rows, hidden]` predicts.
fn score_prompt(
    decoder: &Decoder,
    sequence: &mut Sequence,
    hidden: &Tensor,
) -> candle_core::Result<()> {
    let rows = hidden.dim(0)?;
    for start in (0..rows).step_by(PROMPT_LOGIT_ROWS) {
        let len = PROMPT_LOGIT_ROWS.min(rows - start);
        let logits = decoder.logits(&hidden.narrow(0, start, len)?)?;
        for (i, logits) in logits.to_vec2::<f32>()?.iter().enumerate() {
            sequence.add_prompt_logprobs(sequence.computed + start + i + 1, logits);
        }
    }
    Ok(())
}
