//! The promises of the scheduler and the pool, checked after every plan.

use std::collections::{HashMap, HashSet};

use super::super::Priority;
use super::super::blocks::BLOCK_TOKENS;
use super::super::scheduler::{AGING, LaneId, MAX_PREEMPTIONS, Plan, SequenceId};
use super::Simulator;

impl Simulator {
    /// No sequence is computed again more often than promised.
    pub(super) fn check_preempted(&mut self, plan: &Plan) {
        for id in &plan.preempted {
            let sequence = self.sequences.get_mut(id).unwrap();
            sequence.preemptions += 1;
            assert!(sequence.preemptions <= MAX_PREEMPTIONS, "preempted too often");
            self.totals.preempted += 1;
            self.totals.pinned += usize::from(sequence.preemptions == MAX_PREEMPTIONS);
        }
    }

    /// Lanes take turns, interactive goes before batch, and batch is not forgotten.
    pub(super) fn check_admitted(&mut self, plan: &Plan, before: &[(Priority, Vec<LaneId>)]) {
        let waiting = |p: Priority| &before.iter().find(|(other, _)| *other == p).unwrap().1;
        for admitted in &plan.admitted {
            let sequence = self.sequences.get_mut(&admitted.id).unwrap();
            let newcomer = !std::mem::replace(&mut sequence.started, true);
            assert!(admitted.cached < sequence.tokens.len());
            assert_eq!(admitted.cached % BLOCK_TOKENS, 0);
            sequence.computed = admitted.cached;
            self.totals.cached += admitted.cached;
            let (priority, lane) = (sequence.request.priority, sequence.request.root.context);
            let was = sequence.counts_as;
            let counts_as = self.scheduler.priority(admitted.id).unwrap();
            match counts_as {
                Priority::Batch => assert!(
                    self.scheduler.waiting_lanes(Priority::Interactive).is_empty(),
                    "batch goes before interactive"
                ),
                Priority::Interactive if was == Priority::Batch => self.totals.promoted += 1,
                Priority::Interactive => {}
            }
            match (was, newcomer) {
                (Priority::Batch, _) => self.passed_batch = 0,
                (Priority::Interactive, true) => self.passed_batch += 1,
                _ => {}
            }
            if newcomer {
                for other in waiting(priority) {
                    let turns = self.turns.entry((priority, *other)).or_default();
                    match *other == lane {
                        true => turns.clear(),
                        false => *turns.entry(lane).or_default() += 1,
                    }
                }
            }
        }
        self.forget_empty_lanes();
        for (priority, _) in before {
            for lane in self.scheduler.waiting_lanes(*priority) {
                let turns = self.turns.get(&(*priority, lane));
                let most = turns.and_then(|turns| turns.values().max().copied());
                assert!(most.unwrap_or(0) <= 1, "a lane has a second turn while another waits");
            }
        }
        if self.scheduler.waiting_lanes(Priority::Batch).is_empty() {
            self.passed_batch = 0;
        }
        assert!(self.passed_batch <= AGING, "batch is forgotten");
        for id in plan.preempted.iter().chain(plan.admitted.iter().map(|a| &a.id)) {
            let counts_as = self.scheduler.priority(*id).unwrap();
            self.sequences.get_mut(id).unwrap().counts_as = counts_as;
        }
    }

    /// Whoever is about to decode does, unless it was preempted or waits for a block of its seniors.
    pub(super) fn check_decoding(&self, plan: &Plan, decoding: &[SequenceId]) {
        let working: HashSet<SequenceId> = plan.work.iter().map(|work| work.id).collect();
        assert_eq!(working.len(), plan.work.len(), "one part per sequence");
        let mut stuck = 0;
        for id in decoding {
            if working.contains(id) || plan.preempted.contains(id) {
                continue;
            }
            let sequence = &self.sequences[id];
            assert_eq!(sequence.table.blocks().len() * BLOCK_TOKENS, sequence.computed);
            stuck += 1;
        }
        assert!(stuck <= 1, "only the most junior waits");
        let prefilled: usize =
            plan.work.iter().filter(|w| !decoding.contains(&w.id)).map(|w| w.tokens).sum();
        assert!(prefilled <= self.scenario.limits.prefill_tokens + 1 + decoding.len());
    }

    /// A block in two tables is full, published, and the same part of both.
    pub(super) fn check_tables(&self) {
        let mut holders: HashMap<u32, (usize, bool)> = HashMap::new();
        for sequence in self.sequences.values() {
            for (index, block) in sequence.table.blocks().iter().enumerate() {
                let shared = index < sequence.table.shared();
                assert!(!shared || (index + 1) * BLOCK_TOKENS <= sequence.computed);
                if let Some(other) = holders.insert(*block, (index, shared)) {
                    assert_eq!(other, (index, true));
                    assert!(shared, "a block that is still written belongs to one sequence");
                }
            }
        }
    }
}
