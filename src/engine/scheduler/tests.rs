//! Rules of the scheduler, one by one. What holds for all of them together is in `simulator.rs`.

use super::*;

const INTERACTIVE: Priority = Priority::Interactive;

/// A pool without sharing: blocks are numbers, and a few ids have a cached beginning.
#[derive(Default)]
struct Pool {
    free: usize,
    held: HashMap<SequenceId, usize>,
    cached: HashMap<SequenceId, usize>,
}

impl Memory for Pool {
    fn available(&self) -> usize {
        self.free
    }

    fn attach(&mut self, id: SequenceId) -> usize {
        let blocks = self.cached.get(&id).copied().unwrap_or(0).min(self.free);
        self.reserve(id, blocks);
        blocks
    }

    fn reserve(&mut self, id: SequenceId, blocks: usize) {
        let held = self.held.entry(id).or_default();
        self.free = self.free.checked_sub(blocks - *held).expect("only what is available");
        *held = blocks;
    }

    fn release(&mut self, id: SequenceId) {
        self.free += self.held.remove(&id).unwrap_or(0);
    }
}

struct World {
    scheduler: Scheduler,
    pool: Pool,
}

impl World {
    fn new(max_running: usize, prefill_tokens: usize, blocks: usize) -> Self {
        let limits = SchedulerLimits { max_running, prefill_tokens };
        let pool = Pool { free: blocks, ..Pool::default() };
        Self { scheduler: Scheduler::new(limits, blocks), pool }
    }

    /// `lane` is any small number.
    fn enqueue(
        &mut self,
        first: SequenceId,
        n: usize,
        lane: u8,
        priority: Priority,
        prompt: usize,
    ) {
        let lane = ContextKey::new([[lane; 32]]);
        let arrival =
            Arrival { first, n, lane, priority, prompt_tokens: prompt, max_tokens: BLOCK_TOKENS };
        self.scheduler.enqueue(arrival);
    }

    fn plan(&mut self) -> Plan {
        self.scheduler.plan(&mut self.pool)
    }

    /// Plans a step, lets everything computed sample a token, and returns (id, tokens) of the work.
    fn step(&mut self) -> Vec<(SequenceId, usize)> {
        let plan = self.plan();
        for work in &plan.work {
            if self.scheduler.entries[&work.id].pending() == 0 {
                self.scheduler.grow(work.id);
            }
        }
        plan.work.iter().map(|w| (w.id, w.tokens)).collect()
    }

    fn remove(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.pool.release(id);
    }

    fn admitted(&mut self) -> Vec<SequenceId> {
        self.plan().admitted.iter().map(|admitted| admitted.id).collect()
    }
}

#[test]
fn decodes_first_and_cuts_prefill_to_the_budget() {
    let mut w = World::new(8, 10, 100);
    w.enqueue(1, 1, 0, INTERACTIVE, 4);
    w.enqueue(2, 1, 0, INTERACTIVE, 25);
    assert_eq!(w.step(), [(1, 4), (2, 6)]);
    assert_eq!(w.step(), [(1, 1), (2, 10)]);
    assert_eq!(w.step(), [(1, 1), (2, 9)]);
    assert_eq!(w.step(), [(1, 1), (2, 1)]);
}

#[test]
fn the_junior_gives_way_and_comes_back_first() {
    let mut w = World::new(8, 100, 4);
    for id in 1..4 {
        w.enqueue(id, 1, 0, INTERACTIVE, BLOCK_TOKENS);
    }
    // Each admission leaves room for one token more than the prompt.
    assert_eq!(w.step(), [(1, 16), (2, 16), (3, 16)]);
    assert_eq!(w.plan().preempted, [3], "1 takes the free block, 2 the one of 3");
    w.remove(1);
    let plan = w.plan();
    assert_eq!(plan.admitted, [Admitted { id: 3, cached: 0 }]);
    assert!(plan.work.contains(&Work { id: 3, tokens: 17 }), "its own token included");
}

#[test]
fn a_prompt_that_fills_the_pool_exactly_is_admitted() {
    let mut w = World::new(8, 100, 2);
    let lane = ContextKey::new([]);
    let (prompt_tokens, max_tokens) = (2 * BLOCK_TOKENS, 0);
    let priority = INTERACTIVE;
    w.scheduler.enqueue(Arrival { first: 1, n: 1, lane, priority, prompt_tokens, max_tokens });
    assert_eq!(w.plan().work, [Work { id: 1, tokens: 2 * BLOCK_TOKENS }]);
}

#[test]
fn what_is_cached_is_not_computed() {
    let mut w = World::new(8, 100, 10);
    w.enqueue(1, 1, 0, INTERACTIVE, 40);
    w.pool.cached.insert(1, 2);
    let plan = w.plan();
    assert_eq!(plan.admitted, [Admitted { id: 1, cached: 32 }]);
    assert_eq!(plan.work, [Work { id: 1, tokens: 8 }]);
}

#[test]
fn lanes_take_turns() {
    let mut w = World::new(1, 100, 10);
    for (id, lane) in [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 2)] {
        w.enqueue(id, 1, lane, INTERACTIVE, 4);
    }
    let mut order = Vec::new();
    for _ in 0..6 {
        let admitted = w.admitted();
        w.remove(admitted[0]);
        order.extend(admitted);
    }
    assert_eq!(order, [1, 4, 5, 2, 6, 3]);
    assert!(w.scheduler.waiting_lanes(INTERACTIVE).is_empty(), "no lane is left behind");
}

#[test]
fn the_head_of_the_line_is_not_overtaken() {
    let mut w = World::new(8, 100, 4);
    w.enqueue(1, 1, 0, INTERACTIVE, 33);
    w.enqueue(2, 1, 1, INTERACTIVE, 40);
    w.enqueue(3, 1, 2, INTERACTIVE, 4);
    assert_eq!(w.admitted(), [1]);
    w.scheduler.grow(1);
    assert_eq!(w.admitted(), [] as [SequenceId; 0], "3 would fit");
    w.remove(1);
    assert_eq!(w.admitted(), [2, 3]);
}

#[test]
fn choices_wait_for_the_one_that_computes_their_prompt() {
    let mut w = World::new(8, 10, 100);
    w.enqueue(1, 3, 0, INTERACTIVE, 15);
    w.enqueue(9, 1, 1, INTERACTIVE, 10);
    assert_eq!(w.step(), [(1, 10)]);
    assert_eq!(w.step(), [(1, 5), (9, 5)], "others need not wait");
    assert_eq!(w.scheduler.waiting(), 2);
    assert_eq!(w.step(), [(1, 1), (9, 5), (2, 5)]);
}

#[test]
fn another_choice_leads_when_the_first_is_cancelled() {
    let mut w = World::new(8, 10, 100);
    w.enqueue(1, 3, 0, INTERACTIVE, 15);
    w.step();
    w.remove(1);
    assert_eq!(w.step(), [(2, 10)]);
    w.remove(2);
    assert_eq!(w.step(), [(3, 10)]);
    assert!(w.scheduler.groups.is_empty());
    w.remove(3);
    assert_eq!((w.scheduler.waiting(), w.scheduler.running()), (0, 0));
}

#[test]
fn interactive_takes_the_place_of_batch() {
    let mut w = World::new(2, 100, 100);
    w.enqueue(1, 1, 0, Priority::Batch, 4);
    w.enqueue(2, 1, 0, Priority::Batch, 4);
    w.enqueue(3, 1, 0, INTERACTIVE, 4);
    assert_eq!(w.admitted(), [3, 1]);
    w.enqueue(4, 1, 0, INTERACTIVE, 4);
    let plan = w.plan();
    assert_eq!((plan.preempted, plan.admitted[0].id), (vec![1], 4));
    w.remove(3);
    assert_eq!(w.admitted(), [1], "the preempted one before newcomers of its kind");
}

#[test]
fn batch_is_let_in_after_enough_interactive_ones() {
    let mut w = World::new(1, 100, 100);
    w.enqueue(1000, 1, 0, Priority::Batch, 4);
    for id in 0..40 {
        w.enqueue(id, 1, id as u8, INTERACTIVE, 4);
    }
    let mut order = Vec::new();
    for _ in 0..AGING + 2 {
        let admitted = w.admitted();
        w.remove(admitted[0]);
        order.extend(admitted);
    }
    assert_eq!(order.iter().position(|id| *id == 1000), Some(AGING));
}

#[test]
fn whoever_was_preempted_often_enough_comes_back_for_good() {
    let mut w = World::new(2, 1000, 4);
    w.enqueue(100, 1, 0, Priority::Batch, 4);
    assert_eq!(w.admitted(), [100]);
    for round in 0..MAX_PREEMPTIONS as u64 {
        let (a, b) = (2 * round, 2 * round + 1);
        w.enqueue(a, 1, 0, INTERACTIVE, 4);
        w.enqueue(b, 1, 0, INTERACTIVE, 4);
        assert!(w.plan().preempted.contains(&100));
        w.remove(a);
        w.remove(b);
        if round + 1 < MAX_PREEMPTIONS as u64 {
            assert_eq!(w.admitted(), [100]);
        }
    }
    w.enqueue(50, 1, 0, INTERACTIVE, 4);
    w.enqueue(51, 1, 0, INTERACTIVE, 4);
    assert_eq!(w.admitted(), [100, 50], "it is senior to newcomers now");
    assert!(w.plan().preempted.is_empty());
}
