//! Who starts, and who starts again.

use std::ops::Bound::{Excluded, Unbounded};

use super::{
    AGING, Admitted, BATCH, BLOCK_TOKENS, Memory, Place, Plan, Priority, Scheduler, Seniority,
    SequenceId, blocks_for,
};

impl Scheduler {
    /// Admits whom the budget of prefill tokens, the blocks and the running sequences leave room for.
    pub(super) fn admit_all(
        &mut self,
        mut budget: usize,
        memory: &mut impl Memory,
        plan: &mut Plan,
    ) {
        let open = self.resume_interactive(&mut budget, memory, plan)
            && self.admit_interactive(&mut budget, memory, plan);
        // What was taken from batch sequences for interactive ones does not go back to batch.
        if open && plan.preempted.is_empty() {
            self.admit_batch(&mut budget, memory, plan);
        }
    }

    /// True when nobody is left who must go first.
    fn resume_interactive(
        &mut self,
        budget: &mut usize,
        memory: &mut impl Memory,
        plan: &mut Plan,
    ) -> bool {
        let mut last = None;
        let mut pinned_waits = false;
        loop {
            let after = last.map_or(Unbounded, Excluded);
            let next = self.preempted.range((after, Excluded(BATCH))).next();
            let Some((&seniority, &id)) = next else { return true };
            last = Some(seniority);
            if self.entries[&id].is_pinned() {
                // Whoever is junior to a pinned one that has no room has none either: its seniors
                // include this one.
                pinned_waits = pinned_waits || !self.has_room_for_good(id);
                if pinned_waits {
                    continue;
                }
                let before = plan.preempted.len();
                if *budget == 0 || !self.admit(id, seniority, budget, memory, plan) {
                    return false;
                }
                if plan.preempted.len() > before {
                    return false; // what is left over settles in the next step
                }
            } else if *budget == 0 || !self.admit(id, BATCH, budget, memory, plan) {
                return false;
            }
        }
    }

    /// Whether a sequence fits in its worst case beside all its living seniors in theirs.
    fn has_room_for_good(&self, id: SequenceId) -> bool {
        let own = &self.entries[&id];
        let running = self.running.range(..own.seniority);
        let seniors = running.chain(self.preempted.range(..own.seniority));
        let (count, blocks) = seniors.fold((0, own.worst), |(count, blocks), (_, senior)| {
            (count + 1, blocks.saturating_add(self.entries[senior].worst))
        });
        count < self.limits.max_running && blocks <= self.total_blocks
    }

    fn admit_interactive(
        &mut self,
        budget: &mut usize,
        memory: &mut impl Memory,
        plan: &mut Plan,
    ) -> bool {
        loop {
            if self.passed_batch >= AGING {
                let Some(id) = self.batch_head() else {
                    self.passed_batch = 0;
                    continue;
                };
                if *budget == 0 || !self.admit(id, BATCH, budget, memory, plan) {
                    return false;
                }
                self.passed_batch = 0;
                continue;
            }
            let Some(id) = self.interactive.head() else { return true };
            // Preempted sequences keep their place in the batch.
            let in_flight =
                self.running.range(..BATCH).count() + self.preempted.range(..BATCH).count();
            if *budget == 0
                || in_flight >= self.limits.max_running
                || !self.admit(id, BATCH, budget, memory, plan)
            {
                return false;
            }
            self.passed_batch = if self.batch_head().is_some() { self.passed_batch + 1 } else { 0 };
        }
    }

    fn admit_batch(&mut self, budget: &mut usize, memory: &mut impl Memory, plan: &mut Plan) {
        while let Some(id) = self.batch_head() {
            let newcomer = self.entries[&id].place == Place::Waiting;
            let in_flight = self.running.len() + self.preempted.len();
            if *budget == 0 || (newcomer && in_flight >= self.limits.max_running) {
                return;
            }
            let nobody = Seniority { priority: Priority::Batch, ticket: u64::MAX };
            if !self.admit(id, nobody, budget, memory, plan) {
                return;
            }
            self.passed_batch = 0;
        }
    }

    /// The batch sequence that is next: preempted ones first.
    fn batch_head(&self) -> Option<SequenceId> {
        let preempted = self.preempted.range(BATCH..).next().map(|(_, id)| *id);
        preempted.or_else(|| self.batch.head())
    }

    /// Admits a sequence and plans its first tokens, if there is a place and blocks for all its tokens.
    /// To make room running sequences junior to `above` may be preempted.
    fn admit(
        &mut self,
        id: SequenceId,
        above: Seniority,
        budget: &mut usize,
        memory: &mut impl Memory,
        plan: &mut Plan,
    ) -> bool {
        let entry = &self.entries[&id];
        // Beside others there must be room for one token more, or it would be preempted at once. Alone
        // it needs no room it may never use.
        let spare = usize::from(!self.running.is_empty());
        let blocks = blocks_for(entry.tokens);
        let needed = blocks_for(entry.tokens + spare).min(entry.worst).max(blocks);
        let juniors = || self.running.range((Excluded(above), Unbounded));
        if self.running.len() >= self.limits.max_running && juniors().next().is_none() {
            return false;
        }
        // At most; some of them may be shared.
        let takable: usize = juniors().map(|(_, id)| self.entries[id].blocks).sum();
        let offered = memory.available() + takable;
        let tried = self.refused.is_some_and(|(who, then)| who == id && offered <= then);
        if tried && !self.running.is_empty() {
            return false;
        }
        let cached = memory.attach(id);
        let missing = needed.saturating_sub(cached);
        if missing > memory.available() + takable {
            memory.release(id);
            self.refused = Some((id, offered));
            return false;
        }
        while self.running.len() >= self.limits.max_running || missing > memory.available() {
            if !self.preempt_junior(above, memory, plan) {
                memory.release(id); // the juniors shared their blocks with others
                return false;
            }
        }
        memory.reserve(id, blocks);
        self.enter(id, above);
        let Some(entry) = self.entries.get_mut(&id) else { return true };
        (entry.blocks, entry.computed) = (blocks, cached * BLOCK_TOKENS);
        plan.admitted.push(Admitted { id, cached: entry.computed });
        *budget -= self.schedule(id, *budget, plan);
        true
    }

    /// Moves a sequence among the running ones.
    fn enter(&mut self, id: SequenceId, above: Seniority) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let (place, lane, old) = (entry.place, entry.lane, entry.seniority);
        entry.place = Place::Running;
        // A batch sequence that is let in like an interactive one has waited long enough to be one.
        let promoted = old.priority == Priority::Batch && above == BATCH;
        if promoted {
            entry.seniority.priority = Priority::Interactive;
        }
        if promoted || place == Place::Waiting {
            entry.seniority.ticket = self.next_ticket;
            self.next_ticket += 1;
        }
        self.running.insert(entry.seniority, id);
        match place {
            Place::Preempted => drop(self.preempted.remove(&old)),
            _ => {
                debug_assert_eq!(self.lanes(old.priority).head(), Some(id), "{lane:?}");
                self.lanes(old.priority).take_head();
            }
        }
    }
}
