//! Host memory for cartridges that had to leave a GPU: they come back without their file being read.
//!
//! Pure data with a budget of its own. On the CPU there is no such tier: where cartridges are used is host
//! memory already.

use std::{collections::HashMap, sync::Arc};

use super::{Cartridge, Generation};

pub(super) struct HostTier {
    budget: u64,
    entries: HashMap<Generation, Hosted>,
}

pub(super) struct Hosted {
    /// `None` while it is being copied.
    copy: Option<Arc<Cartridge>>,
    pub bytes: u64,
    pub tokens: usize,
    pub frozen_tokens: usize,
    used: u64,
}

impl Hosted {
    /// A copy that is on its way back to the GPU is in use.
    fn is_idle(&self) -> bool {
        self.copy.as_ref().is_some_and(|copy| Arc::strong_count(copy) == 1)
    }
}

impl HostTier {
    /// Keeps nothing with a budget of 0.
    pub fn new(budget: u64) -> Self {
        Self { budget, entries: HashMap::new() }
    }

    pub fn budget(&self) -> u64 {
        self.budget
    }

    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|hosted| hosted.bytes).sum()
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn entry(&self, generation: Generation) -> Option<&Hosted> {
        self.entries.get(&generation)
    }

    pub fn contains(&self, generation: Generation) -> bool {
        self.entries.contains_key(&generation)
    }

    /// Makes room for a cartridge that is about to be copied, by dropping the least recently used ones.
    /// Without enough room nothing is dropped, and the answer is `false`.
    pub fn announce(&mut self, cartridge: &Cartridge, bytes: u64, now: u64) -> bool {
        let mut excess = self.bytes().saturating_add(bytes).saturating_sub(self.budget);
        let mut idle: Vec<_> = self.entries.iter().filter(|(_, hosted)| hosted.is_idle()).collect();
        if excess > idle.iter().map(|(_, hosted)| hosted.bytes).sum() {
            return false;
        }
        idle.sort_by_key(|(_, hosted)| hosted.used);
        let mut dropped = Vec::new();
        for (generation, hosted) in idle {
            if excess == 0 {
                break;
            }
            excess = excess.saturating_sub(hosted.bytes);
            dropped.push(*generation);
        }
        for generation in dropped {
            self.entries.remove(&generation);
        }
        let (tokens, frozen_tokens) = (cartridge.tokens(), cartridge.frozen_tokens());
        let hosted = Hosted { copy: None, bytes, tokens, frozen_tokens, used: now };
        self.entries.insert(cartridge.generation(), hosted);
        true
    }

    /// The copy that was announced, or `None` if it could not be made.
    pub fn arrive(&mut self, generation: Generation, copy: Option<Arc<Cartridge>>) {
        match (self.entries.get_mut(&generation), copy) {
            (Some(hosted), Some(copy)) => hosted.copy = Some(copy),
            (Some(_), None) => self.remove(generation),
            // In the meantime it was loaded again, or let go of.
            (None, _) => {}
        }
    }

    pub fn get(&mut self, generation: Generation, now: u64) -> Option<Arc<Cartridge>> {
        let hosted = self.entries.get_mut(&generation)?;
        hosted.used = now;
        hosted.copy.clone()
    }

    pub fn remove(&mut self, generation: Generation) {
        self.entries.remove(&generation);
    }
}
