//! The registry's books: which names point at which generations, what is in memory, what may be
//! evicted.
//!
//! Pure data, changed under one lock; no I/O and no tensors are made here.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use super::{
    Cartridge, CartridgeError, CartridgeInfo, Generation, Origin, Outline, RegistryStats, Stamp,
    error::UNNAMED,
};

pub(super) struct Residents {
    budget: u64,
    /// Promised to cartridges that are being read or converted.
    reserved: u64,
    /// Counts uses; the smallest `used` is evicted first.
    clock: u64,
    /// Ids registered by this process; their generations are pinned.
    inserted: HashMap<String, Generation>,
    /// Loaded files, by folder name (several ids can lead to one folder).
    files: HashMap<String, FileName>,
    held: HashMap<Generation, Held>,
    loads: u64,
    load_failures: u64,
    evictions: u64,
}

struct FileName {
    id: String,
    generation: Generation,
    stamp: Stamp,
}

struct Held {
    memory: Memory,
    bytes: u64,
    used: u64,
    /// The last name it had, for the list.
    id: String,
    origin: Origin,
}

impl Held {
    fn is_kept(&self) -> bool {
        matches!(self.memory, Memory::Kept(_))
    }
}

enum Memory {
    /// Kept for the next request.
    Kept(Arc<Cartridge>),
    /// No name points here any more; only leases keep it, and it counts as long as they do.
    Retired(Weak<Cartridge>),
}

impl Memory {
    fn leases(&self) -> usize {
        match self {
            // One of the references is ours.
            Self::Kept(cartridge) => Arc::strong_count(cartridge) - 1,
            Self::Retired(cartridge) => cartridge.strong_count(),
        }
    }

    fn get(&self) -> Option<Arc<Cartridge>> {
        match self {
            Self::Kept(cartridge) => Some(Arc::clone(cartridge)),
            Self::Retired(cartridge) => cartridge.upgrade(),
        }
    }
}

impl Residents {
    pub fn new(budget: u64) -> Self {
        let (inserted, files, held) = (HashMap::new(), HashMap::new(), HashMap::new());
        let (loads, load_failures, evictions) = (0, 0, 0);
        Self {
            budget,
            reserved: 0,
            clock: 0,
            inserted,
            files,
            held,
            loads,
            load_failures,
            evictions,
        }
    }

    /// Counts a load by how it ended.
    pub fn count_load(&mut self, succeeded: bool) {
        let count = if succeeded { &mut self.loads } else { &mut self.load_failures };
        *count += 1;
    }

    /// A reading for the metrics.
    pub fn stats(&self) -> RegistryStats {
        let alive = || self.held.values().filter(|held| held.memory.leases() > 0 || held.is_kept());
        RegistryStats {
            resident: alive().count(),
            bytes: alive().map(|held| held.bytes).sum(),
            budget: self.budget,
            leases: self.held.values().map(|held| held.memory.leases()).sum(),
            loads: self.loads,
            load_failures: self.load_failures,
            evictions: self.evictions,
        }
    }

    /// The inserted cartridge of an id.
    pub fn inserted(&mut self, id: &str) -> Option<Arc<Cartridge>> {
        let generation = *self.inserted.get(id)?;
        self.touch(generation)
    }

    /// The cartridge of a folder, if it was loaded from the file as it is now.
    pub fn current(&mut self, folder: &str, stamp: Stamp) -> Option<Arc<Cartridge>> {
        let file = self.files.get(folder).filter(|file| file.stamp == stamp)?;
        let generation = file.generation;
        self.touch(generation)
    }

    /// The cartridge of a generation, which counts as a use of it.
    pub fn touch(&mut self, generation: Generation) -> Option<Arc<Cartridge>> {
        let held = self.held.get_mut(&generation)?;
        let cartridge = held.memory.get()?;
        self.clock += 1;
        held.used = self.clock;
        held.memory = Memory::Kept(Arc::clone(&cartridge));
        Some(cartridge)
    }

    /// Whether something in memory might be what an outline announces; `bytes` is what that would
    /// take in memory.
    pub fn resembles_one(&self, outline: &Outline, bytes: u64) -> bool {
        let alike = |cartridge: Arc<Cartridge>| {
            let sizes = (cartridge.tokens(), cartridge.frozen_tokens());
            sizes == (outline.tokens, outline.frozen_tokens)
        };
        let mut held = self.held.values().filter(|held| held.bytes == bytes);
        held.any(|held| held.memory.get().is_some_and(alike))
    }

    /// Promises room, for [`Self::release`] to give back, by evicting the least recently used
    /// cartridges that nobody leases. Evicts none if that would not be enough.
    pub fn reserve(&mut self, bytes: u64) -> Result<(), CartridgeError> {
        if bytes > self.budget {
            return Err(CartridgeError::too_large("bytes in memory", bytes, self.budget));
        }
        self.held.retain(|_, held| held.memory.get().is_some());
        let used = self.reserved + self.held.values().map(|held| held.bytes).sum::<u64>();
        let mut excess = used.saturating_add(bytes).saturating_sub(self.budget);
        let mut idle: Vec<_> = self.held.iter().filter(|(g, h)| self.may_evict(**g, h)).collect();
        let evictable: u64 = idle.iter().map(|(_, held)| held.bytes).sum();
        if excess > evictable {
            let (budget, lent) = (self.budget, used - evictable);
            return Err(CartridgeError::Busy {
                id: UNNAMED.to_owned(),
                reason: format!(
                    "it needs {bytes} bytes; {lent} of the {budget} for cartridges are in use"
                ),
            });
        }
        idle.sort_by_key(|(_, held)| held.used);
        let mut evicted = Vec::new();
        for (generation, held) in idle {
            if excess == 0 {
                break;
            }
            excess = excess.saturating_sub(held.bytes);
            evicted.push(*generation);
        }
        for generation in &evicted {
            self.held.remove(generation);
        }
        self.evictions += evicted.len() as u64;
        self.files.retain(|_, file| !evicted.contains(&file.generation));
        self.reserved += bytes;
        Ok(())
    }

    fn may_evict(&self, generation: Generation, held: &Held) -> bool {
        held.memory.leases() == 0 && !self.is_pinned(generation)
    }

    fn is_pinned(&self, generation: Generation) -> bool {
        self.inserted.values().any(|pinned| *pinned == generation)
    }

    pub fn release(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_sub(bytes);
    }

    /// Makes a resident, in room just released. If the same content got there first, that one is
    /// returned.
    pub fn publish(&mut self, cartridge: Arc<Cartridge>, bytes: u64) -> Arc<Cartridge> {
        let generation = cartridge.generation();
        if let Some(resident) = self.touch(generation) {
            return resident;
        }
        self.clock += 1;
        let memory = Memory::Kept(Arc::clone(&cartridge));
        let held =
            Held { memory, bytes, used: self.clock, id: String::new(), origin: Origin::Memory };
        self.held.insert(generation, held);
        cartridge
    }

    /// Names a resident after its file. What the name pointed at before is retired.
    pub fn point(&mut self, folder: &str, id: &str, generation: Generation, stamp: Stamp) {
        self.remember_name(generation, id, Origin::Local);
        let file = FileName { id: id.to_owned(), generation, stamp };
        if let Some(old) = self.files.insert(folder.to_owned(), file) {
            self.retire_unnamed(old.generation);
        }
    }

    /// Names a resident and keeps it for good.
    pub fn pin(&mut self, id: &str, generation: Generation) {
        self.remember_name(generation, id, Origin::Memory);
        if let Some(old) = self.inserted.insert(id.to_owned(), generation) {
            self.retire_unnamed(old);
        }
    }

    /// Lets go of what was loaded from a file that is gone.
    pub fn forget(&mut self, folder: &str) {
        if let Some(old) = self.files.remove(folder) {
            self.retire_unnamed(old.generation);
        }
    }

    /// The loaded files: folder and id.
    pub fn loaded(&self) -> Vec<(String, String)> {
        self.files.iter().map(|(folder, file)| (folder.clone(), file.id.clone())).collect()
    }

    pub fn is_loaded(&self, folder: &str) -> bool {
        self.files.contains_key(folder)
    }

    pub fn is_inserted(&self, id: &str) -> bool {
        self.inserted.contains_key(id)
    }

    fn remember_name(&mut self, generation: Generation, id: &str, origin: Origin) {
        if let Some(held) = self.held.get_mut(&generation) {
            held.origin = origin;
            held.id = id.to_owned();
        }
    }

    /// Lets go of a generation that no name points at: its memory goes with its last lease.
    fn retire_unnamed(&mut self, generation: Generation) {
        let named = self.files.values().any(|file| file.generation == generation);
        if named || self.is_pinned(generation) {
            return;
        }
        if let Some(held) = self.held.get_mut(&generation)
            && let Memory::Kept(cartridge) = &held.memory
        {
            held.memory = Memory::Retired(Arc::downgrade(cartridge));
        }
    }

    /// Inserted and loaded names, then retired generations that are still leased.
    pub fn list(&self) -> Vec<CartridgeInfo> {
        let inserted =
            self.inserted.iter().map(|(id, generation)| (id, *generation, Origin::Memory));
        let files = self.files.values().map(|file| (&file.id, file.generation, Origin::Local));
        let mut list: Vec<_> = inserted
            .chain(files)
            .filter_map(|(id, generation, origin)| self.info(id, generation, origin))
            .collect();
        for (generation, held) in &self.held {
            if matches!(held.memory, Memory::Retired(_)) {
                list.extend(self.info(&held.id, *generation, held.origin));
            }
        }
        list.sort_by(|a, b| (a.retired, &a.id).cmp(&(b.retired, &b.id)));
        list
    }

    fn info(&self, id: &str, generation: Generation, origin: Origin) -> Option<CartridgeInfo> {
        let held = self.held.get(&generation)?;
        let leases = held.memory.leases();
        let cartridge = held.memory.get()?;
        let retired = matches!(held.memory, Memory::Retired(_));
        Some(CartridgeInfo {
            id: id.to_owned(),
            source: origin,
            resident: !retired,
            retired,
            pinned: self.is_pinned(generation),
            generation: Some(generation),
            tokens: Some(cartridge.tokens()),
            frozen_tokens: Some(cartridge.frozen_tokens()),
            bytes: Some(held.bytes),
            leases,
        })
    }
}
