//! Decides what the next step computes. Pure: no clock, no I/O, no device.
//!
//! *A step* computes first one token of every decoding sequence, then prompts, in chunks of
//! `prefill_tokens` per step altogether, so that a long prompt cannot hold up the tokens of others.
//!
//! *Seniority* orders those that were admitted: interactive before batch, then by ticket. A ticket is
//! drawn at the first admission and kept. A sequence takes the blocks of its known tokens when it is
//! admitted and one block at a time as it grows; if none is available the most junior running sequence is
//! preempted, never a senior one, so the most senior always goes on and whatever fits alone finishes.
//!
//! *Admission* (`admission.rs`): preempted sequences first, then newcomers, interactive before batch.
//! Nobody overtakes the head of a line. An interactive sequence may preempt batch ones to get in. Of
//! newcomers the lanes (the cartridges of the request) take turns.
//!
//! *Bounds.* After [`AGING`] interactive newcomers were admitted while a batch sequence waited, the head of
//! the batch line counts as interactive. After [`MAX_PREEMPTIONS`] preemptions a sequence counts as
//! interactive and is *pinned*: it is admitted again only when its worst case (prompt and `max_tokens`) fits
//! beside the worst cases of all its living seniors. Tickets only grow, so no senior is ever added;
//! while a senior lacks a block, somebody junior to the pinned one is running and is preempted instead. So
//! no sequence is computed again more than [`MAX_PREEMPTIONS`] times. Its seniors are finitely many and
//! each finishes, so a pinned sequence does not wait for ever; it takes blocks from its juniors.

mod admission;
mod lanes;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::Priority;
use super::blocks::{BLOCK_TOKENS, blocks_for};
use super::prefix_cache::ContextKey;
use lanes::Lanes;

/// Names a sequence within one scheduler; later arrivals have larger ids.
pub type SequenceId = u64;

/// What requests are to be treated fairly against each other: their cartridges. Opaque here.
pub type LaneId = ContextKey;

/// Interactive admissions a waiting batch sequence lets pass.
pub const AGING: usize = 16;

/// Times a sequence may lose its blocks.
pub const MAX_PREEMPTIONS: usize = 3;

#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Sequences in one step.
    pub max_running: usize,
    /// Tokens prefilled in one step, over all sequences.
    pub prefill_tokens: usize,
}

/// The blocks of the sequences, as the scheduler moves them.
pub trait Memory {
    /// Blocks that can be taken now.
    fn available(&self) -> usize;
    /// Gives a sequence without blocks the longest cached beginning of its tokens, but never its last
    /// token. Returns the blocks; all are full.
    fn attach(&mut self, id: SequenceId) -> usize;
    /// Adds blocks until the sequence has `blocks`. Called only with enough available.
    fn reserve(&mut self, id: SequenceId, blocks: usize);
    /// Takes all blocks away.
    fn release(&mut self, id: SequenceId);
}

/// A request of `n` sequences with one prompt. The first computes the prompt; the others wait for it, to
/// take over its blocks.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// The ids are `first..first + n`.
    pub first: SequenceId,
    pub n: usize,
    pub lane: LaneId,
    pub priority: Priority,
    pub prompt_tokens: usize,
    pub max_tokens: usize,
}

/// A part of a step: the next `tokens` tokens of a sequence, whose blocks are there. If that completes
/// its tokens, the sequence samples one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    pub id: SequenceId,
    pub tokens: usize,
}

/// A sequence that starts, or starts again, with `cached` tokens of its own already computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    pub id: SequenceId,
    pub cached: usize,
}

/// What one step does.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Sequences that lost their blocks.
    pub preempted: Vec<SequenceId>,
    pub admitted: Vec<Admitted>,
    pub work: Vec<Work>,
}

/// Less is more senior.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Seniority {
    priority: Priority,
    ticket: u64,
}

/// Junior to every interactive sequence, senior to every batch one.
const BATCH: Seniority = Seniority { priority: Priority::Batch, ticket: 0 };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Waits for another choice of its request to compute the prompt.
    Held,
    /// Waits in its lane for the first admission.
    Waiting,
    Running,
    Preempted,
}

#[derive(Debug)]
struct Entry {
    group: SequenceId,
    lane: LaneId,
    seniority: Seniority,
    place: Place,
    prompt: usize,
    /// Prompt and generated tokens.
    tokens: usize,
    /// How many of them have their keys and values stored after the planned step.
    computed: usize,
    /// Blocks held.
    blocks: usize,
    /// Blocks it may ever need.
    worst: usize,
    preemptions: usize,
}

impl Entry {
    fn pending(&self) -> usize {
        self.tokens - self.computed
    }

    fn is_pinned(&self) -> bool {
        self.preemptions >= MAX_PREEMPTIONS
    }
}

/// The choices of a request that wait for one of them to compute the prompt.
#[derive(Debug)]
struct Group {
    leader: SequenceId,
    held: BTreeSet<SequenceId>,
}

#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    /// Blocks there are.
    total_blocks: usize,
    entries: HashMap<SequenceId, Entry>,
    /// By the first id of the request; only while somebody is held.
    groups: HashMap<SequenceId, Group>,
    /// Never admitted yet.
    interactive: Lanes,
    batch: Lanes,
    running: BTreeMap<Seniority, SequenceId>,
    preempted: BTreeMap<Seniority, SequenceId>,
    next_ticket: u64,
    /// Interactive newcomers admitted while a batch sequence waited.
    passed_batch: usize,
    /// A head of line that did not fit, and the blocks it was offered; it is not tried again before there
    /// are more, or nobody runs. Only what it could share with somebody running is noticed late.
    refused: Option<(SequenceId, usize)>,
}

impl Scheduler {
    /// `total_blocks` is what [`Memory::available`] says when nothing runs.
    pub fn new(limits: SchedulerLimits, total_blocks: usize) -> Self {
        Self {
            limits,
            total_blocks,
            entries: HashMap::new(),
            groups: HashMap::new(),
            interactive: Lanes::default(),
            batch: Lanes::default(),
            running: BTreeMap::new(),
            preempted: BTreeMap::new(),
            next_ticket: 1,
            passed_batch: 0,
            refused: None,
        }
    }

    pub fn enqueue(&mut self, arrival: Arrival) {
        let Arrival { first, n, lane, priority, prompt_tokens, max_tokens } = arrival;
        for id in first..first + n as u64 {
            let entry = Entry {
                group: first,
                lane,
                seniority: Seniority { priority, ticket: u64::MAX },
                place: if id == first { Place::Waiting } else { Place::Held },
                prompt: prompt_tokens,
                tokens: prompt_tokens,
                computed: 0,
                blocks: 0,
                worst: blocks_for(prompt_tokens.saturating_add(max_tokens)),
                preemptions: 0,
            };
            self.entries.insert(id, entry);
        }
        if n > 1 {
            let held = (first + 1..first + n as u64).collect();
            self.groups.insert(first, Group { leader: first, held });
        }
        self.lanes(priority).push(lane, first);
    }

    /// Tells that a sequence has sampled a token, which is to be computed next.
    pub fn grow(&mut self, id: SequenceId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.tokens += 1;
        if entry.tokens == entry.prompt + 1 {
            let group = entry.group;
            self.release_group(group, id);
        }
    }

    /// Forgets a sequence, wherever it stands. Its blocks are the caller's to give back.
    pub fn remove(&mut self, id: SequenceId) {
        let Some(entry) = self.entries.remove(&id) else { return };
        // First, so that the request keeps its lane's turn.
        match entry.computed >= entry.prompt {
            true => self.release_group(entry.group, id),
            false => self.replace_leader(entry.group, id),
        }
        match entry.place {
            Place::Held => {
                if let Some(group) = self.groups.get_mut(&entry.group) {
                    group.held.remove(&id);
                    if group.held.is_empty() {
                        self.groups.remove(&entry.group);
                    }
                }
            }
            Place::Waiting => self.lanes(entry.seniority.priority).remove(entry.lane, id),
            Place::Running => drop(self.running.remove(&entry.seniority)),
            Place::Preempted => drop(self.preempted.remove(&entry.seniority)),
        }
    }

    /// Sequences that do not run: never admitted, held or preempted.
    pub fn waiting(&self) -> usize {
        self.entries.len() - self.running.len()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Plans one step and moves the blocks for it.
    pub fn plan(&mut self, memory: &mut impl Memory) -> Plan {
        let mut plan = Plan::default();
        // Decoding: those that miss exactly the token they sampled last. Seniors first, so that whoever is
        // preempted for them has no work yet.
        let running: Vec<SequenceId> = self.running.values().copied().collect();
        for &id in &running {
            if self.entries[&id].place == Place::Running && self.entries[&id].pending() == 1 {
                self.decode(id, memory, &mut plan);
            }
        }
        let mut budget = self.limits.prefill_tokens;
        for &id in &running {
            let entry = &self.entries[&id];
            if entry.place == Place::Running && entry.pending() > 1 {
                budget -= self.schedule(id, budget, &mut plan);
            }
        }
        // Blocks just taken away are not handed to newcomers.
        if plan.preempted.is_empty() {
            self.admit_all(budget, memory, &mut plan);
        }
        plan
    }

    /// Plans the one pending token of a sequence, preempting juniors if it needs a block.
    fn decode(&mut self, id: SequenceId, memory: &mut impl Memory, plan: &mut Plan) {
        let entry = &self.entries[&id];
        let (seniority, blocks) = (entry.seniority, blocks_for(entry.tokens));
        if blocks > entry.blocks {
            while memory.available() == 0 {
                if !self.preempt_junior(seniority, memory, plan) {
                    return; // it waits for its seniors
                }
            }
            memory.reserve(id, blocks);
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.blocks = blocks;
            }
        }
        self.schedule(id, 1, plan);
    }

    /// Plans up to `limit` tokens of a sequence, for which it has blocks. Returns how many.
    fn schedule(&mut self, id: SequenceId, limit: usize, plan: &mut Plan) -> usize {
        let Some(entry) = self.entries.get_mut(&id) else { return 0 };
        let room = entry.blocks * BLOCK_TOKENS - entry.computed;
        let tokens = entry.pending().min(limit).min(room);
        if tokens > 0 {
            entry.computed += tokens;
            plan.work.push(Work { id, tokens });
        }
        tokens
    }

    /// Preempts the most junior running sequence if it is junior to `senior`.
    fn preempt_junior(
        &mut self,
        senior: Seniority,
        memory: &mut impl Memory,
        plan: &mut Plan,
    ) -> bool {
        let Some(victim) = self.running.last_entry().filter(|last| *last.key() > senior) else {
            return false;
        };
        let id = victim.remove();
        memory.release(id);
        plan.work.retain(|work| work.id != id);
        plan.preempted.push(id);
        let ticket = self.next_ticket;
        let Some(entry) = self.entries.get_mut(&id) else { return true };
        entry.place = Place::Preempted;
        (entry.computed, entry.blocks) = (0, 0);
        entry.preemptions += 1;
        if entry.is_pinned() && entry.seniority.priority == Priority::Batch {
            // A new ticket: nobody who is pinned already gets another senior.
            entry.seniority = Seniority { priority: Priority::Interactive, ticket };
            self.next_ticket += 1;
        }
        self.preempted.insert(entry.seniority, id);
        true
    }

    /// The prompt is computed: those that waited for it join their lane, in their order of arrival.
    fn release_group(&mut self, group: SequenceId, leader: SequenceId) {
        if self.groups.get(&group).is_none_or(|group| group.leader != leader) {
            return;
        }
        let held = self.groups.remove(&group).map(|group| group.held);
        held.into_iter().flatten().for_each(|id| self.wait(id));
    }

    /// The leader is gone before it computed the prompt: the next choice does it.
    fn replace_leader(&mut self, group: SequenceId, leader: SequenceId) {
        let Some(waiting) = self.groups.get_mut(&group).filter(|g| g.leader == leader) else {
            return;
        };
        let Some(next) = waiting.held.pop_first() else { return };
        waiting.leader = next;
        if waiting.held.is_empty() {
            self.groups.remove(&group);
        }
        self.wait(next);
    }

    /// Puts a held sequence into its lane.
    fn wait(&mut self, id: SequenceId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.place = Place::Waiting;
        let (priority, lane) = (entry.seniority.priority, entry.lane);
        self.lanes(priority).push(lane, id);
    }

    fn lanes(&mut self, priority: Priority) -> &mut Lanes {
        match priority {
            Priority::Interactive => &mut self.interactive,
            Priority::Batch => &mut self.batch,
        }
    }

    /// The lanes in which newcomers wait, for tests.
    #[cfg(test)]
    pub fn waiting_lanes(&self, priority: Priority) -> Vec<LaneId> {
        match priority {
            Priority::Interactive => self.interactive.waiting(),
            Priority::Batch => self.batch.waiting(),
        }
    }

    /// What a sequence counts as, for tests.
    #[cfg(test)]
    pub fn priority(&self, id: SequenceId) -> Option<Priority> {
        self.entries.get(&id).map(|entry| entry.seniority.priority)
    }
}
