//! Who waits to be admitted for the first time: round robin over lanes, first come first served in one.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::{LaneId, SequenceId};

/// The waiting sequences of one priority. A lane exists while somebody waits in it.
#[derive(Debug, Default)]
pub struct Lanes {
    /// Sequence ids grow with the time of arrival.
    lanes: HashMap<LaneId, BTreeSet<SequenceId>>,
    /// Every lane once; the front one is next.
    ring: VecDeque<LaneId>,
}

impl Lanes {
    pub fn push(&mut self, lane: LaneId, id: SequenceId) {
        let ids = self.lanes.entry(lane).or_default();
        if ids.is_empty() {
            self.ring.push_back(lane);
        }
        ids.insert(id);
    }

    /// The head of the line.
    pub fn head(&self) -> Option<SequenceId> {
        self.lanes.get(self.ring.front()?)?.first().copied()
    }

    /// Takes the head out; its lane is last from now on.
    pub fn take_head(&mut self) {
        let Some(lane) = self.ring.pop_front() else { return };
        let Some(ids) = self.lanes.get_mut(&lane) else { return };
        ids.pop_first();
        match ids.is_empty() {
            true => drop(self.lanes.remove(&lane)),
            false => self.ring.push_back(lane),
        }
    }

    /// Takes out a sequence that gave up.
    pub fn remove(&mut self, lane: LaneId, id: SequenceId) {
        let Some(ids) = self.lanes.get_mut(&lane) else { return };
        ids.remove(&id);
        if ids.is_empty() {
            self.lanes.remove(&lane);
            self.ring.retain(|other| *other != lane);
        }
    }

    /// The lanes in which somebody waits.
    #[cfg(test)]
    pub fn waiting(&self) -> Vec<LaneId> {
        assert_eq!(self.ring.len(), self.lanes.len());
        self.ring.iter().copied().collect()
    }
}
