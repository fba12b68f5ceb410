//! The scheduler, the block pool and the prefix cache together, without a model, for millions of steps.
//!
//! In place of keys and values every slot holds a digest of what they would depend on: the cartridges
//! and all tokens up to its own. A block that is shared, stale or overwritten wrongly shows at once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Priority;
use super::blocks::{BLOCK_TOKENS, BlockPool, BlockTable};
use super::prefix_cache::{BlockTokens, ContextKey, Root};
use super::scheduler::{
    AGING, Arrival, LaneId, MAX_PREEMPTIONS, Memory, Plan, Scheduler, SchedulerLimits, SequenceId,
};

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

struct Request {
    first: SequenceId,
    n: usize,
    root: Root,
    priority: Priority,
    prompt: Vec<u32>,
}

struct Sequence {
    request: Rc<Request>,
    /// Prompt and generated tokens.
    tokens: Vec<u32>,
    /// `digests[i]` is of the cartridges and tokens `0..=i`.
    digests: Vec<u64>,
    /// Generated tokens after which it stops.
    length: usize,
    computed: usize,
    table: BlockTable,
    preemptions: usize,
    started: bool,
    counts_as: Priority,
    born: usize,
}

impl Sequence {
    fn push(&mut self, token: u32) {
        let before = self.digests.last().copied().unwrap_or_else(|| {
            let root = self.request.root;
            fold(root.request.unwrap_or(u64::MAX), &format!("{:?}", root.context))
        });
        self.tokens.push(token);
        self.digests.push(mix(before, u64::from(token)));
    }

    fn block(tokens: &[u32], block: usize) -> BlockTokens {
        std::array::from_fn(|i| tokens[block * BLOCK_TOKENS + i])
    }

    fn publish(&mut self) {
        let tokens = &self.tokens;
        self.table.publish(self.computed / BLOCK_TOKENS, |block| Self::block(tokens, block));
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let x = (a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (x ^ (x >> 29)) >> 1 // never GARBAGE
}

fn fold(seed: u64, text: &str) -> u64 {
    text.bytes().fold(seed, |digest, byte| mix(digest, u64::from(byte)))
}

struct Blocks<'a> {
    sequences: &'a mut BTreeMap<SequenceId, Sequence>,
    pool: &'a BlockPool,
}

impl Memory for Blocks<'_> {
    fn available(&self) -> usize {
        self.pool.available()
    }

    fn attach(&mut self, id: SequenceId) -> usize {
        let sequence = self.sequences.get_mut(&id).unwrap();
        let tokens = &sequence.tokens;
        let full = (tokens.len() - 1) / BLOCK_TOKENS;
        sequence.table.attach((0..full).map(|block| Sequence::block(tokens, block)))
    }

    fn reserve(&mut self, id: SequenceId, blocks: usize) {
        assert!(self.sequences.get_mut(&id).unwrap().table.grow_to(blocks), "not available");
    }

    fn release(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).unwrap();
        sequence.table.clear();
        sequence.computed = 0;
    }
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

    /// No sequence is computed again more often than promised.
    fn check_preempted(&mut self, plan: &Plan) {
        for id in &plan.preempted {
            let sequence = self.sequences.get_mut(id).unwrap();
            sequence.preemptions += 1;
            assert!(sequence.preemptions <= MAX_PREEMPTIONS, "preempted too often");
            self.totals.preempted += 1;
            self.totals.pinned += usize::from(sequence.preemptions == MAX_PREEMPTIONS);
        }
    }

    /// Lanes take turns, interactive goes before batch, and batch is not forgotten.
    fn check_admitted(&mut self, plan: &Plan, before: &[(Priority, Vec<LaneId>)]) {
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
    fn check_decoding(&self, plan: &Plan, decoding: &[SequenceId]) {
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

    /// A block in two tables is full, published, and the same part of both.
    fn check_tables(&self) {
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
