//! Decides what the next step computes. Pure: no clock, no I/O, no device.
//!
//! First come, first served. A sequence takes blocks as it grows. When none are free the youngest running
//! sequence gives its blocks up and is computed again later; the oldest is never interrupted, so whatever
//! fits alone finishes. Decoding goes before prefilling, and prefilling is cut into chunks so that a long
//! prompt cannot hold up the tokens of others for long.

use std::collections::VecDeque;

use super::blocks::{BLOCK_TOKENS, blocks_for};

/// Names a sequence within one scheduler.
pub type SequenceId = u64;

#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Sequences in one step.
    pub max_running: usize,
    /// Tokens prefilled in one step, over all sequences.
    pub prefill_tokens: usize,
}

#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    waiting: VecDeque<Entry>,
    /// In the order of admission: the oldest first.
    running: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    id: SequenceId,
    /// Prompt and generated tokens.
    tokens: usize,
    /// How many of them have their keys and values stored.
    computed: usize,
    /// Blocks held.
    blocks: usize,
}

impl Entry {
    fn pending(&self) -> usize {
        self.tokens - self.computed
    }
}

/// A part of a step: the next `tokens` tokens of a sequence, which then holds `blocks` blocks. If that
/// completes its tokens, the sequence samples one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    pub id: SequenceId,
    pub tokens: usize,
    pub blocks: usize,
}

/// What one step does.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Sequences that lose their blocks before anything else happens.
    pub preempted: Vec<SequenceId>,
    /// Sequences that start, or start again.
    pub admitted: Vec<SequenceId>,
    pub work: Vec<Work>,
}

impl Scheduler {
    pub fn new(limits: SchedulerLimits) -> Self {
        Self { limits, waiting: VecDeque::new(), running: Vec::new() }
    }

    pub fn enqueue(&mut self, id: SequenceId, prompt_tokens: usize) {
        self.waiting.push_back(Entry { id, tokens: prompt_tokens, computed: 0, blocks: 0 });
    }

    /// Tells that a sequence has sampled a token, which is to be computed next.
    pub fn grow(&mut self, id: SequenceId) {
        if let Some(entry) = self.running.iter_mut().find(|entry| entry.id == id) {
            entry.tokens += 1;
        }
    }

    /// Forgets all sequences, waiting or running, that `keep` does not want.
    pub fn retain(&mut self, keep: impl Fn(SequenceId) -> bool) {
        self.waiting.retain(|entry| keep(entry.id));
        self.running.retain(|entry| keep(entry.id));
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Plans one step. `free` is the number of free blocks; the plan's work fits into them together with
    /// what the preempted sequences give back.
    pub fn plan(&mut self, mut free: usize) -> Plan {
        let mut plan = Plan::default();
        let mut budget = self.limits.prefill_tokens;
        // Decoding first: those that miss exactly the token they sampled last.
        let mut next = 0;
        while next < self.running.len() {
            if self.running[next].pending() == 1 {
                self.schedule(next, 1, &mut free, &mut plan);
            }
            next += 1;
        }
        let mut next = 0;
        while next < self.running.len() && budget > 0 {
            let pending = self.running[next].pending();
            if pending > 0 {
                budget -= self.schedule(next, pending.min(budget), &mut free, &mut plan);
            }
            next += 1;
        }
        // Blocks just taken away are not handed to newcomers.
        while plan.preempted.is_empty() && budget > 0 {
            let outstanding: usize =
                self.running.iter().map(|e| blocks_for(e.tokens).saturating_sub(e.blocks)).sum();
            // Beside others there must be room for one token more, or it would be interrupted at
            // once. Alone it needs no room it may never use.
            let spare = usize::from(!self.running.is_empty());
            let fits = |entry: &Entry| blocks_for(entry.tokens + spare) + outstanding <= free;
            if self.running.len() >= self.limits.max_running
                || !self.waiting.front().is_some_and(fits)
            {
                break;
            }
            let Some(entry) = self.waiting.pop_front() else { break };
            plan.admitted.push(entry.id);
            let chunk = entry.pending().min(budget);
            self.running.push(entry);
            budget -= self.schedule(self.running.len() - 1, chunk, &mut free, &mut plan);
        }
        plan
    }

    /// Plans up to `tokens` tokens of the running sequence at `index`, interrupting younger ones if it
    /// could not go on at all. Returns how many were planned.
    fn schedule(
        &mut self,
        index: usize,
        tokens: usize,
        free: &mut usize,
        plan: &mut Plan,
    ) -> usize {
        let room =
            |entry: &Entry, free: usize| (entry.blocks + free) * BLOCK_TOKENS - entry.computed;
        while room(&self.running[index], *free) == 0 && self.running.len() > index + 1 {
            self.preempt_youngest(free, plan);
        }
        let entry = &mut self.running[index];
        let tokens = tokens.min(room(entry, *free));
        if tokens == 0 {
            return 0; // it waits for the older ones
        }
        let blocks = blocks_for(entry.computed + tokens);
        *free -= blocks.saturating_sub(entry.blocks);
        entry.blocks = entry.blocks.max(blocks);
        entry.computed += tokens;
        plan.work.push(Work { id: entry.id, tokens, blocks: entry.blocks });
        tokens
    }

    fn preempt_youngest(&mut self, free: &mut usize, plan: &mut Plan) {
        let Some(mut victim) = self.running.pop() else { return };
        *free += victim.blocks;
        victim.blocks = 0;
        victim.computed = 0;
        plan.work.retain(|work| work.id != victim.id);
        plan.preempted.push(victim.id);
        self.waiting.push_front(victim);
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

    /// (id, tokens) of the work, and growth of everything that then has nothing pending.
    fn step(s: &mut Scheduler, free: usize) -> Vec<(u64, usize)> {
        let work: Vec<_> = s.plan(free).work.iter().map(|w| (w.id, w.tokens)).collect();
        let done: Vec<_> = s.running.iter().filter(|e| e.pending() == 0).map(|e| e.id).collect();
        done.into_iter().for_each(|id| s.grow(id));
        work
    }

    #[test]
    fn decodes_first_and_cuts_prefill_to_the_budget() {
        let mut s = scheduler(8, 10);
        s.enqueue(1, 4);
        s.enqueue(2, 25);
        assert_eq!(step(&mut s, 100), [(1, 4), (2, 6)]);
        assert_eq!(step(&mut s, 100), [(1, 1), (2, 10)]);
        assert_eq!(step(&mut s, 100), [(1, 1), (2, 9)]);
        assert_eq!(step(&mut s, 100), [(1, 1), (2, 1)]);
    }

    #[test]
    fn the_youngest_gives_way_and_comes_back_first() {
        let mut s = scheduler(8, 100);
        s.enqueue(1, BLOCK_TOKENS);
        s.enqueue(2, BLOCK_TOKENS);
        s.enqueue(3, BLOCK_TOKENS);
        // Each admission leaves room for one token more than the prompt.
        assert_eq!(step(&mut s, 3), [(1, 16), (2, 16)]);
        assert_eq!(step(&mut s, 1), [(1, 1)]);
        assert_eq!(s.running(), 2, "a sequence without room waits, it is not thrown out");
        s.running[0].computed = 2 * BLOCK_TOKENS;
        s.running[0].tokens = 2 * BLOCK_TOKENS + 1;
        let plan = s.plan(0);
        assert_eq!((plan.preempted, plan.work.len()), (vec![2], 1));
        s.retain(|id| id != 1);
        let plan = s.plan(4);
        assert_eq!(plan.admitted, [2, 3]);
        assert_eq!(plan.work[0], Work { id: 2, tokens: 17, blocks: 2 }, "its own token included");
    }

    #[test]
    fn a_prompt_that_fills_the_pool_exactly_is_admitted() {
        let mut s = scheduler(8, 100);
        s.enqueue(1, 2 * BLOCK_TOKENS);
        assert_eq!(s.plan(2).work, [Work { id: 1, tokens: 2 * BLOCK_TOKENS, blocks: 2 }]);
    }

    proptest! {
        /// Whatever fits alone finishes, blocks never exceed the pool, and the work of each step is the
        /// next tokens of its sequence.
        #[test]
        fn everything_finishes_within_the_pool(
            requests in prop::collection::vec((1usize..90, 1usize..40), 1..30),
            max_running in 1usize..6,
            prefill in 1usize..40,
        ) {
            const TOTAL: usize = 8; // 128 tokens: two large requests do not fit together
            let mut s = scheduler(max_running, prefill);
            for (id, (prompt, _)) in requests.iter().enumerate() {
                s.enqueue(id as u64, *prompt);
            }
            let mut held: HashMap<u64, usize> = HashMap::new();
            let mut state: HashMap<u64, (usize, usize)> = HashMap::new(); // computed, generated
            let mut done = 0;
            for _ in 0..50_000 {
                let free = TOTAL - held.values().sum::<usize>();
                let plan = s.plan(free);
                for id in plan.preempted {
                    held.remove(&id);
                    state.get_mut(&id).unwrap().0 = 0;
                }
                let mut seen = Vec::new();
                for work in plan.work {
                    prop_assert!(!seen.contains(&work.id));
                    seen.push(work.id);
                    let (prompt, output) = requests[work.id as usize];
                    let (computed, generated) = state.entry(work.id).or_default();
                    *computed += work.tokens;
                    held.insert(work.id, work.blocks);
                    prop_assert!(*computed <= prompt + *generated);
                    prop_assert!(blocks_for(*computed) <= work.blocks);
                    if *computed == prompt + *generated {
                        *generated += 1;
                        if *generated == output {
                            s.retain(|id| id != work.id);
                            held.remove(&work.id);
                            done += 1;
                        } else {
                            s.grow(work.id);
                        }
                    }
                }
                prop_assert!(held.values().sum::<usize>() <= TOTAL);
                prop_assert!(s.running() <= max_running);
                if done == requests.len() {
                    break;
                }
            }
            prop_assert_eq!(done, requests.len());
            prop_assert_eq!((s.waiting(), s.running()), (0, 0));
        }
    }
}
