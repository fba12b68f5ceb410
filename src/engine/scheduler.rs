//! Decides what the next step computes. Pure: no clock, no I/O, no device.
//!
//! First come, first served. A sequence is admitted when the blocks for its whole prompt and output are
//! free, so nothing admitted can run out of memory later. Decoding goes before prefilling, and prefilling
//! is cut into chunks so that a long prompt cannot hold up the tokens of others for long.

use std::collections::VecDeque;

/// Names a sequence within one scheduler.
pub type SequenceId = u64;

#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Sequences in one step.
    pub max_running: usize,
    /// Prompt tokens in one step, over all sequences.
    pub prefill_tokens: usize,
}

#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    waiting: VecDeque<Waiting>,
    running: Vec<Running>,
}

#[derive(Debug)]
struct Waiting {
    id: SequenceId,
    prompt_tokens: usize,
    blocks: usize,
}

#[derive(Debug)]
struct Running {
    id: SequenceId,
    /// Prompt tokens not yet computed; 0 means decoding.
    prefill_left: usize,
}

/// What one step computes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Sequences that start now, with the blocks to give them.
    pub admitted: Vec<(SequenceId, usize)>,
    /// Sequences and how many of their tokens to compute. One that has tokens of its prompt left
    /// afterwards does not sample in this step.
    pub work: Vec<(SequenceId, usize)>,
}

impl Scheduler {
    pub fn new(limits: SchedulerLimits) -> Self {
        Self { limits, waiting: VecDeque::new(), running: Vec::new() }
    }

    pub fn enqueue(&mut self, id: SequenceId, prompt_tokens: usize, blocks: usize) {
        self.waiting.push_back(Waiting { id, prompt_tokens, blocks });
    }

    /// Forgets a sequence, waiting or running.
    pub fn remove(&mut self, id: SequenceId) {
        self.waiting.retain(|w| w.id != id);
        self.running.retain(|r| r.id != id);
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Admits what fits into `free_blocks` and plans one step over everything running.
    pub fn plan(&mut self, mut free_blocks: usize) -> Plan {
        let mut plan = Plan::default();
        while self.running.len() < self.limits.max_running
            && self.waiting.front().is_some_and(|w| w.blocks <= free_blocks)
        {
            let Some(next) = self.waiting.pop_front() else { break };
            free_blocks -= next.blocks;
            plan.admitted.push((next.id, next.blocks));
            self.running.push(Running { id: next.id, prefill_left: next.prompt_tokens });
        }
        plan.work.extend(self.running.iter().filter(|r| r.prefill_left == 0).map(|r| (r.id, 1)));
        let mut budget = self.limits.prefill_tokens;
        for sequence in self.running.iter_mut().filter(|r| r.prefill_left > 0) {
            let chunk = sequence.prefill_left.min(budget);
            if chunk == 0 {
                break;
            }
            budget -= chunk;
            sequence.prefill_left -= chunk;
            plan.work.push((sequence.id, chunk));
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn scheduler(max_running: usize, prefill_tokens: usize) -> Scheduler {
        Scheduler::new(SchedulerLimits { max_running, prefill_tokens })
    }

    #[test]
    fn decodes_first_and_cuts_prefill_to_the_budget() {
        let mut s = scheduler(8, 10);
        s.enqueue(1, 4, 1);
        s.enqueue(2, 25, 2);
        assert_eq!(s.plan(100).work, [(1, 4), (2, 6)]);
        assert_eq!(s.plan(100).work, [(1, 1), (2, 10)]);
        assert_eq!(s.plan(100).work, [(1, 1), (2, 9)]);
        assert_eq!(s.plan(100).work, [(1, 1), (2, 1)]);
    }

    #[test]
    fn a_large_request_is_not_overtaken_for_ever() {
        let mut s = scheduler(8, 100);
        s.enqueue(1, 4, 8);
        s.enqueue(2, 4, 4);
        assert_eq!(s.plan(10).admitted, [(1, 8)]);
        assert_eq!(s.plan(2).admitted, []);
        s.remove(1);
        assert_eq!(s.plan(10).admitted, [(2, 4)]);
    }

    proptest! {
        /// Whatever arrives finishes, within the block total, and each prompt is computed exactly once.
        #[test]
        fn everything_admitted_finishes(
            requests in prop::collection::vec((1usize..60, 1usize..20, 1usize..8), 1..40),
            max_running in 1usize..6,
            prefill in 1usize..32,
        ) {
            const TOTAL: usize = 8;
            let mut s = scheduler(max_running, prefill);
            for (id, (prompt, _, blocks)) in requests.iter().enumerate() {
                s.enqueue(id as u64, *prompt, *blocks);
            }
            let mut held: HashMap<u64, usize> = HashMap::new();
            let mut computed: HashMap<u64, usize> = HashMap::new();
            let mut done = 0;
            for _ in 0..20_000 {
                let free = TOTAL - held.values().sum::<usize>();
                let plan = s.plan(free);
                held.extend(plan.admitted.iter().copied());
                prop_assert!(held.values().sum::<usize>() <= TOTAL);
                prop_assert!(held.len() <= max_running);
                for (id, tokens) in plan.work {
                    let (prompt, output, _) = requests[id as usize];
                    let so_far = computed.entry(id).or_default();
                    prop_assert!(*so_far >= prompt || *so_far + tokens <= prompt);
                    *so_far += tokens;
                    if *so_far == prompt + output {
                        s.remove(id);
                        held.remove(&id);
                        done += 1;
                    }
                }
                if done == requests.len() {
                    break;
                }
            }
            prop_assert_eq!(done, requests.len());
            prop_assert_eq!((s.waiting(), s.running()), (0, 0));
        }
    }
}
