//! The engine thread: take requests in, plan a step, run the model, hand tokens out.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};

use candle_core::Tensor;

use super::blocks::{BLOCK_TOKENS, BlockPool};
use super::draw::{Draw, Drawn, Logits, score_prompt};
use super::handle::{Shared, Submission};
use super::kv_cache::{BatchEntry, KvCache};
use super::prefix_cache::{ContextKey, Root};
use super::scheduler::{Arrival, Memory, Plan, Scheduler, SchedulerLimits, SequenceId};
use super::sequence::{ActiveRequest, Sequence};
use super::startup::EngineOptions;
use super::{EngineError, Event};
use crate::model::Decoder;
use crate::ops::on_host;

pub(super) struct Core {
    decoder: Decoder,
    group_min: usize,
    cache: KvCache,
    pool: BlockPool,
    scheduler: Scheduler,
    limits: SchedulerLimits,
    sequences: BTreeMap<SequenceId, Sequence>,
    receiver: Receiver<Submission>,
    shared: Arc<Shared>,
    prefix_cache: bool,
    max_unread_events: usize,
    /// Called with the tokens of every step, between the model and the sampling; tests let it panic.
    #[cfg(test)]
    pub(super) fault: Option<fn(&[u32])>,
    /// The same with a prompt, in the midst of planning.
    #[cfg(test)]
    pub(super) plan_fault: Option<fn(&[u32])>,
}

/// The blocks of the engine's sequences.
struct SequenceBlocks<'a> {
    sequences: &'a mut BTreeMap<SequenceId, Sequence>,
    pool: &'a BlockPool,
    #[cfg(test)]
    fault: Option<fn(&[u32])>,
}

impl Memory for SequenceBlocks<'_> {
    fn available(&self) -> usize {
        self.pool.available()
    }

    fn attach(&mut self, id: SequenceId) -> usize {
        self.sequences.get_mut(&id).map_or(0, Sequence::attach)
    }

    fn reserve(&mut self, id: SequenceId, blocks: usize) {
        // Whether it worked is checked before the blocks are used.
        let _ = self.sequences.get_mut(&id).is_some_and(|s| s.table.grow_to(blocks));
        #[cfg(test)]
        if let (Some(fault), Some(sequence)) = (self.fault, self.sequences.get(&id)) {
            fault(&sequence.active.request.prompt);
        }
    }

    fn release(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.release();
        }
    }
}

impl Core {
    pub fn new(
        decoder: Decoder,
        cache: KvCache,
        blocks: usize,
        limits: SchedulerLimits,
        options: &EngineOptions,
        receiver: Receiver<Submission>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            decoder,
            cache,
            pool: BlockPool::new(blocks, options.prefix_cache),
            scheduler: Scheduler::new(limits, blocks),
            limits,
            sequences: BTreeMap::new(),
            receiver,
            shared,
            prefix_cache: options.prefix_cache,
            max_unread_events: options.max_unread_events,
            group_min: options.group_min_sequences,
            #[cfg(test)]
            fault: None,
            #[cfg(test)]
            plan_fault: None,
        }
    }

    pub fn run(mut self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => self.restart("planning a step panicked"),
            }
        }
    }

    /// Takes in what came, plans a step and runs it. False when the engine is done.
    fn turn(&mut self) -> bool {
        // Taken first: what they name was submitted before and is known after the next line.
        let cancelled = self.shared.take_cancelled();
        if !self.take_submissions() {
            return false;
        }
        cancelled.into_iter().for_each(|ids| self.remove(ids));
        if self.sequences.is_empty() {
            return true;
        }
        let mut blocks = SequenceBlocks {
            sequences: &mut self.sequences,
            pool: &self.pool,
            #[cfg(test)]
            fault: self.plan_fault,
        };
        let plan = self.scheduler.plan(&mut blocks);
        self.note(&plan);
        if !self.is_sound(&plan) {
            self.restart("the scheduler made an impossible plan");
            return true;
        }
        self.publish_gauges();
        // A panic may leave only the sequences of this step in doubt, and those are dropped. What they
        // wrote is in blocks that are not in the prefix cache.
        let failure = match catch_unwind(AssertUnwindSafe(|| self.step(&plan))) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("a step panicked".to_owned()),
        };
        if let Some(error) = failure {
            tracing::error!(%error, "a step failed; its requests are ended");
            self.fail(&plan, &EngineError::Internal(error));
        }
        // Every block must be free, used or cached. If not, nothing in the pool can be trusted.
        let counts = self.pool.counts();
        debug_assert!(counts.add_up(), "{counts:?}");
        if !counts.add_up() {
            self.restart("the books of the KV cache are wrong");
        }
        true
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

    fn accept(&mut self, Submission { request, first_id, reply }: Submission) {
        let generations = request.cartridges.iter().map(|cartridge| cartridge.generation().0);
        let lane = ContextKey::new(generations);
        // Without a prefix cache only the choices of one request share blocks.
        let request_id = (!self.prefix_cache).then_some(first_id);
        let context = lane.salted(request.cache_salt.as_ref());
        let root = Root { context, request: request_id };
        let arrival = Arrival {
            first: first_id,
            n: request.n,
            // Without the salt: a client could make itself as many lanes as it likes, each with its turn.
            lane,
            priority: request.priority,
            prompt_tokens: request.prompt.len(),
            max_tokens: request.sampling.max_tokens,
        };
        let cartridge_tokens = request.cartridges.iter().map(|c| c.tokens()).sum();
        let active = Arc::new(ActiveRequest { request, reply, first_id, cartridge_tokens });
        for choice in 0..arrival.n {
            let sequence = Sequence::new(Arc::clone(&active), choice, self.pool.table(root));
            self.sequences.insert(first_id + choice as u64, sequence);
        }
        self.scheduler.enqueue(arrival);
    }

    /// Carries out what the plan says about starts, and counts.
    fn note(&mut self, plan: &Plan) {
        let gauges = &self.shared.gauges;
        let add = |gauge: &AtomicU64, n: usize| gauge.fetch_add(n as u64, Ordering::Relaxed);
        add(&gauges.preemptions, plan.preempted.len());
        add(&gauges.steps, 1);
        for admitted in &plan.admitted {
            let Some(sequence) = self.sequences.get_mut(&admitted.id) else { continue };
            let looked_up = !sequence.wants_prompt_logprobs();
            if sequence.start(admitted.cached) {
                self.shared.queue.leave(1, sequence.prompt_len());
                if looked_up {
                    add(&gauges.prefix_queried_tokens, sequence.prompt_len());
                    add(&gauges.prefix_hit_tokens, admitted.cached);
                }
            }
        }
    }

    /// False for a plan that would write beyond the blocks of a sequence, or that does nothing for ever.
    fn is_sound(&self, plan: &Plan) -> bool {
        let fits = |s: &Sequence, tokens: usize| {
            s.computed + tokens <= s.table.blocks().len() * BLOCK_TOKENS
        };
        let sound = !plan.work.is_empty()
            && plan.work.iter().all(|work| {
                self.sequences.get(&work.id).is_some_and(|sequence| fits(sequence, work.tokens))
            });
        debug_assert!(sound, "{plan:?}");
        sound
    }

    /// Ends every request, also those that wait (one of them may be the cause), and goes on with a new
    /// scheduler and a new pool: for when the old ones cannot be trusted.
    fn restart(&mut self, why: &str) {
        tracing::error!(why, "the engine starts anew; all its requests are ended");
        let error = EngineError::Internal(why.to_owned());
        let blocks = self.pool.counts().total;
        // The sequences keep the old pool until they are gone.
        self.pool = BlockPool::new(blocks, self.prefix_cache);
        self.scheduler = Scheduler::new(self.limits, blocks);
        while let Some(id) = self.sequences.first_key_value().map(|(id, _)| *id) {
            self.fail_request(id, &error);
        }
    }

    /// Forgets sequences, wherever they stand; their blocks are free, or only cached, at once.
    fn remove(&mut self, ids: Range<SequenceId>) {
        for id in ids {
            let Some(sequence) = self.sequences.remove(&id) else { continue };
            if !sequence.has_started() {
                self.shared.queue.leave(1, sequence.prompt_len());
            }
            self.scheduler.remove(id);
        }
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
        let mut attention = self.cache.attention(&batch, self.group_min);
        let hidden = self.decoder.forward(&tokens, &positions, &mut *attention)?;
        drop(attention);
        drop(batch);
        #[cfg(test)]
        if let Some(fault) = &mut self.fault {
            fault(&tokens);
        }

        let mut rows = Vec::new();
        let mut draws = Vec::new();
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
                match sequence.draw() {
                    Some(draw) => {
                        rows.push(first_row as u32 - 1);
                        draws.push((work.id, draw));
                    }
                    None => failed.push((work.id, EngineError::Internal("no sampler".to_owned()))),
                }
            } else if is_finite(&hidden.narrow(0, first_row - 1, 1)?)? {
                sequence.publish(); // at most one prompt per step is cut
            }
        }
        for (id, error) in failed {
            self.fail_request(id, &error);
        }
        if rows.is_empty() {
            return Ok(());
        }
        let rows = hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?;
        let tokens = Logits::of(&self.decoder, &rows)?.draw(&mut draws)?;
        for ((id, draw), token) in draws.into_iter().zip(tokens) {
            self.advance(id, draw, token);
        }
        Ok(())
    }

    /// Hands out the token drawn for a sequence and ends it if that was the last.
    fn advance(&mut self, id: SequenceId, draw: Draw, token: Drawn) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let token = match token {
            Ok(token) => token,
            Err(error) => {
                tracing::error!(%error, "a request is ended");
                return self.fail_request(id, &error);
            }
        };
        let reason = sequence.take_back(draw, token);
        // The logits are finite, and so is everything they were computed from.
        sequence.publish();
        if let Some(reason) = reason {
            sequence.send(Event::Finished { choice: sequence.choice, reason });
            self.remove(id..id + 1);
        } else if sequence.active.reply.unread() > self.max_unread_events {
            let limit = self.max_unread_events;
            self.fail_request(id, &EngineError::SlowReader { limit });
        } else {
            self.scheduler.grow(id);
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
        let Some(sequence) = self.sequences.get(&id) else { return };
        sequence.send(Event::Failed(error.clone()));
        let first = sequence.active.first_id;
        self.remove(first..first + sequence.active.request.n as u64);
    }

    fn publish_gauges(&self) {
        let (gauges, counts) = (&self.shared.gauges, self.pool.counts());
        gauges.waiting.store(self.scheduler.waiting(), Ordering::Relaxed);
        gauges.running.store(self.scheduler.running(), Ordering::Relaxed);
        gauges.used_blocks.store(counts.used, Ordering::Relaxed);
        gauges.cached_blocks.store(counts.cached, Ordering::Relaxed);
    }
}

/// Whether the last token of a part of a prompt, and so all it attended to, came out finite.
fn is_finite(row: &Tensor) -> candle_core::Result<bool> {
    Ok(on_host(row)?.flatten_all()?.to_vec1::<f32>()?.iter().all(|value| value.is_finite()))
}
