//! The scheduler, the block pool and the prefix cache together, without a model, for millions of steps.
//!
//! In place of keys and values every slot holds a digest of what they would depend on: the cartridges
//! and all tokens up to its own. A block that is shared, stale or overwritten wrongly shows at once.

mod checks;
mod sequence;

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Priority;
use super::blocks::{BLOCK_TOKENS, BlockPool};
use super::prefix_cache::{ContextKey, Root};
use super::scheduler::{Arrival, LaneId, Plan, Scheduler, SchedulerLimits, SequenceId};
use sequence::{Blocks, Request, Sequence};

/// Slots written by a step that failed.
const GARBAGE: u64 = u64::MAX;

/// What a scenario is like; chances are per thousand and step.
#[derive(Debug, Clone)]
struct Scenario {
    blocks: usize,
    limits: SchedulerLimits,
    keep: bool,
    lanes: u8,
    arrivals: u32,
    cancels: u32,
    failures: u32,
    /// Of a thousand requests.
    batch: u32,
    max_queued: usize,
}

#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    steps: usize,
    finished: usize,
    preempted: usize,
    pinned: usize,
    cached: usize,
    promoted: usize,
    oldest: usize,
}

struct Simulator {
    scenario: Scenario,
    rng: ChaCha8Rng,
    pool: BlockPool,
    scheduler: Scheduler,
    sequences: BTreeMap<SequenceId, Sequence>,
    next_id: SequenceId,
    /// By block and slot.
    slots: Vec<[u64; BLOCK_TOKENS]>,
    /// Per waiting lane, the turns of the other lanes since its own last.
    turns: HashMap<(Priority, LaneId), HashMap<LaneId, usize>>,
    /// Interactive newcomers since a batch sequence was let in.
    passed_batch: usize,
    totals: Totals,
}

impl Simulator {
    fn new(scenario: Scenario, seed: u64) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            pool: BlockPool::new(scenario.blocks, scenario.keep),
            scheduler: Scheduler::new(scenario.limits, scenario.blocks),
            sequences: BTreeMap::new(),
            next_id: 0,
            slots: vec![[GARBAGE; BLOCK_TOKENS]; scenario.blocks],
            turns: HashMap::new(),
            passed_batch: 0,
            totals: Totals::default(),
            scenario,
        }
    }

    fn below(&mut self, n: usize) -> usize {
        self.rng.next_u32() as usize % n.max(1)
    }

    fn chance(&mut self, per_mille: u32) -> bool {
        self.rng.next_u32() % 1000 < per_mille
    }

    fn arrive(&mut self) {
        let room = self.scenario.blocks * BLOCK_TOKENS;
        let context = ContextKey::new([[self.below(self.scenario.lanes.into()) as u8; 32]]);
        let (n, family) = (1 + self.below(4).saturating_sub(1), self.below(3) as u32);
        let longest = if self.chance(200) { room - 1 } else { room / 3 };
        let length = 1 + self.below(longest);
        let shared = self.below(length + 1);
        let tail = self.below(4) as u32;
        let prompt: Vec<u32> =
            (0..length as u32).map(|i| if i < shared as u32 { family } else { tail }).collect();
        let longest = (room - length).min(if self.chance(100) { room } else { 40 });
        let max_tokens = self.below(longest + 1);
        let priority = match self.chance(self.scenario.batch) {
            true => Priority::Batch,
            false => Priority::Interactive,
        };
        let first = self.next_id;
        self.next_id += n as u64;
        let root = Root { context, request: (!self.scenario.keep).then_some(first) };
        let request = Rc::new(Request { first, n, root, priority, prompt });
        for choice in 0..n as u64 {
            let mut sequence = Sequence {
                request: Rc::clone(&request),
                tokens: Vec::new(),
                digests: Vec::new(),
                length: if self.chance(500) { max_tokens } else { self.below(max_tokens + 1) },
                computed: 0,
                table: self.pool.table(root),
                preemptions: 0,
                started: false,
                counts_as: priority,
                born: self.totals.steps,
            };
            request.prompt.iter().for_each(|token| sequence.push(*token));
            self.sequences.insert(first + choice, sequence);
        }
        let (prompt_tokens, lane) = (request.prompt.len(), context);
        self.scheduler.enqueue(Arrival { first, n, lane, priority, prompt_tokens, max_tokens });
    }

    fn remove(&mut self, id: SequenceId) {
        let sequence = self.sequences.remove(&id).unwrap();
        self.scheduler.remove(id);
        self.totals.oldest = self.totals.oldest.max(self.totals.steps - sequence.born);
        self.forget_empty_lanes();
    }

    /// A lane that nobody waits in takes its place among the others anew.
    fn forget_empty_lanes(&mut self) {
        let lanes = [Priority::Interactive, Priority::Batch].map(|p| self.waiting_lanes(p));
        self.turns.retain(|(priority, lane), _| lanes[*priority as usize].contains(lane));
    }

    fn remove_request(&mut self, id: SequenceId) {
        let request = Rc::clone(&self.sequences[&id].request);
        for id in request.first..request.first + request.n as u64 {
            if self.sequences.contains_key(&id) {
                self.remove(id);
            }
        }
    }

    fn cancel(&mut self) {
        let nth = self.below(self.sequences.len());
        let Some(id) = self.sequences.keys().nth(nth).copied() else { return };
        match self.chance(500) {
            true => self.remove(id),
            false => self.remove_request(id),
        }
    }

    fn step(&mut self) {
        self.totals.steps += 1;
        if self.chance(self.scenario.cancels) {
            self.cancel();
        }
        if self.sequences.is_empty() {
            return;
        }
        let lanes = [Priority::Interactive, Priority::Batch].map(|p| (p, self.waiting_lanes(p)));
        let decoding: Vec<SequenceId> = (self.sequences.iter())
            .filter(|(_, s)| s.computed > 0 && s.computed + 1 == s.tokens.len())
            .map(|(id, _)| *id)
            .collect();
        let mut blocks = Blocks { sequences: &mut self.sequences, pool: &self.pool };
        let plan = self.scheduler.plan(&mut blocks);
        assert!(!plan.work.is_empty(), "everybody waits");
        assert!(self.scheduler.running() <= self.scenario.limits.max_running);
        self.check_preempted(&plan);
        self.check_admitted(&plan, &lanes);
        self.check_decoding(&plan, &decoding);
        self.compute(&plan);
        assert!(self.pool.counts().add_up(), "{:?}", self.pool.counts());
        if self.totals.steps.is_multiple_of(64) {
            self.pool.audit();
            self.check_tables();
        }
    }

    fn waiting_lanes(&self, priority: Priority) -> Vec<LaneId> {
        self.scheduler.waiting_lanes(priority)
    }

    fn compute(&mut self, plan: &Plan) {
        let failed = self.chance(self.scenario.failures);
        for work in &plan.work {
            let sequence = self.sequences.get_mut(&work.id).unwrap();
            for index in sequence.computed..sequence.computed + work.tokens {
                let (block, slot) = (index / BLOCK_TOKENS, index % BLOCK_TOKENS);
                assert!(block >= sequence.table.shared(), "a shared block is written");
                let written = if failed { GARBAGE } else { sequence.digests[index] };
                self.slots[sequence.table.blocks()[block] as usize][slot] = written;
            }
        }
        if failed {
            for work in &plan.work {
                if self.sequences.contains_key(&work.id) {
                    self.remove_request(work.id);
                }
            }
            return;
        }
        // What attention reads, once everything is written.
        for work in &plan.work {
            let sequence = self.sequences.get_mut(&work.id).unwrap();
            sequence.computed += work.tokens;
            for (index, digest) in sequence.digests[..sequence.computed].iter().enumerate() {
                let block = sequence.table.blocks()[index / BLOCK_TOKENS];
                let stored = self.slots[block as usize][index % BLOCK_TOKENS];
                assert_eq!(stored, *digest, "token {index} of {} is not its own", work.id);
            }
        }
        for work in &plan.work {
            let Some(sequence) = self.sequences.get_mut(&work.id) else { continue };
            if sequence.computed < sequence.tokens.len() {
                sequence.publish();
                continue;
            }
            if self.rng.next_u32() % 1000 < self.scenario.failures {
                self.remove_request(work.id); // its logits were not finite
                continue;
            }
            sequence.publish();
            let generated = sequence.tokens.len() - sequence.request.prompt.len();
            if generated < sequence.length {
                // Few enough continuations that some are computed twice at the same time.
                let token = (work.id % 2) as u32;
                sequence.push(token);
            }
            if generated + 1 >= sequence.length {
                self.totals.finished += 1;
                self.remove(work.id);
            } else {
                self.scheduler.grow(work.id);
            }
        }
    }

    fn run(mut self, steps: usize) -> Totals {
        let mut burst = true;
        for step in 0..steps {
            if step.is_multiple_of(500) {
                burst = self.chance(700);
            }
            let chance = if burst { self.scenario.arrivals } else { self.scenario.arrivals / 8 };
            while self.scheduler.waiting() < self.scenario.max_queued && self.chance(chance) {
                self.arrive();
            }
            self.step();
        }
        // Nobody new comes: everybody finishes, and every block comes back.
        let deadline = self.totals.steps + 200_000;
        while !self.sequences.is_empty() {
            self.step();
            assert!(self.totals.steps < deadline, "{} never finish", self.sequences.len());
        }
        assert_eq!((self.scheduler.waiting(), self.scheduler.running()), (0, 0));
        for priority in [Priority::Interactive, Priority::Batch] {
            assert!(self.scheduler.waiting_lanes(priority).is_empty());
        }
        self.pool.audit();
        let counts = self.pool.counts();
        assert_eq!((counts.used, counts.free + counts.cached), (0, self.scenario.blocks));
        assert!(self.scenario.keep || counts.cached == 0);
        self.totals
    }
}

fn scenario(rng: &mut ChaCha8Rng) -> Scenario {
    let mut pick = |choices: &[u32]| choices[rng.next_u32() as usize % choices.len()];
    Scenario {
        blocks: pick(&[2, 4, 8, 16, 32]) as usize,
        limits: SchedulerLimits {
            max_running: pick(&[1, 2, 4, 8]) as usize,
            prefill_tokens: pick(&[1, 7, 32, 100]) as usize,
        },
        keep: pick(&[0, 1, 1]) == 1,
        lanes: pick(&[1, 3, 6]) as u8,
        arrivals: pick(&[20, 100, 500, 900]),
        cancels: pick(&[0, 0, 5, 50]),
        failures: pick(&[0, 0, 2]),
        batch: pick(&[0, 300, 700, 1000]),
        max_queued: pick(&[3, 10, 40]) as usize,
    }
}

#[test]
fn everything_finishes_and_every_promise_holds_for_two_million_steps() {
    const SCENARIOS: u64 = 100;
    const STEPS: usize = 20_000;
    let mut sum = Totals::default();
    for seed in 0..SCENARIOS {
        let scenario = scenario(&mut ChaCha8Rng::seed_from_u64(seed));
        let shown = format!("seed {seed}: {scenario:?}");
        let run = || Simulator::new(scenario, seed).run(STEPS);
        let Ok(totals) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) else {
            panic!("failed with {shown}");
        };
        if std::env::var_os("SHOW").is_some() {
            println!("{shown} {totals:?}");
        }
        sum.steps += totals.steps;
        sum.finished += totals.finished;
        sum.preempted += totals.preempted;
        sum.pinned += totals.pinned;
        sum.cached += totals.cached;
        sum.promoted += totals.promoted;
        sum.oldest = sum.oldest.max(totals.oldest);
    }
    println!("{sum:?}");
    assert!(sum.steps >= SCENARIOS as usize * STEPS);
    // The scenarios reach what they are about.
    assert!(sum.finished > 10_000 && sum.preempted > 10_000 && sum.cached > 100_000, "{sum:?}");
    assert!(sum.pinned > 100 && sum.promoted > 100, "{sum:?}");
    // Nobody waits until the load ends. Where one token is prefilled per step the queue takes long.
    assert!(sum.oldest < STEPS * 3 / 4, "{sum:?}");
}
