//! The registry's books: what is in memory, under which names, and what may be evicted.
//!
//! Pure data, changed under one lock; no I/O and no tensors are made here.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use super::{
    Cartridge, CartridgeError, CartridgeInfo, Generation, Origin, Outline, RegistryStats, Source,
    Stamp, Tier,
    error::UNNAMED,
    host_tier::HostTier,
    names::{NameKey, Names},
};

pub(super) struct Residents {
    budget: u64,
    /// Promised to cartridges that are being read or converted.
    reserved: u64,
    /// Counts uses; the smallest `used` is evicted first.
    clock: u64,
    pub names: Names,
    held: HashMap<Generation, Held>,
    host: HostTier,
    pub counts: Counts,
}

/// What happened since the start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub loads: u64,
    pub load_failures: u64,
    pub evictions: u64,
    pub restores: u64,
    pub fetches: u64,
    pub fetch_failures: u64,
}

struct Held {
    memory: Memory,
    bytes: u64,
    used: u64,
    /// The last name it had, for the list.
    id: String,
    origin: Origin,
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

    fn is_alive(&self) -> bool {
        matches!(self, Self::Kept(_)) || self.leases() > 0
    }
}

/// What was evicted to make room, and is to be copied to host memory before the room is used.
#[derive(Default)]
pub(super) struct Leaving {
    pub cartridges: Vec<Arc<Cartridge>>,
    /// Bytes that are promised to nobody else until then, to be released afterwards.
    pub surplus: u64,
}

impl Residents {
    /// `host_budget` is 0 where there is no second tier.
    pub fn new(budget: u64, host_budget: u64) -> Self {
        let (names, host) = (Names::new(), HostTier::new(host_budget));
        let (reserved, clock, counts) = (0, 0, Counts::default());
        Self { budget, reserved, clock, names, held: HashMap::new(), host, counts }
    }

    /// A reading for the metrics.
    pub fn stats(&self) -> RegistryStats {
        let alive = || self.held.values().filter(|held| held.memory.is_alive());
        let Counts { loads, load_failures, evictions, restores, fetches, fetch_failures } =
            self.counts;
        RegistryStats {
            resident: alive().count(),
            bytes: alive().map(|held| held.bytes).sum(),
            budget: self.budget,
            leases: self.held.values().map(|held| held.memory.leases()).sum(),
            host: self.host.len(),
            host_bytes: self.host.bytes(),
            host_budget: self.host.budget(),
            loads,
            load_failures,
            evictions,
            restores,
            fetches,
            fetch_failures,
        }
    }

    /// The inserted cartridge of an id.
    pub fn inserted(&mut self, id: &str) -> Option<Arc<Cartridge>> {
        let generation = self.names.inserted(id)?;
        self.touch(generation)
    }

    /// What a request for `id` in `source` gets without anything being looked at, because it was less than
    /// `interval` ago.
    pub fn recent(
        &mut self,
        id: &str,
        source: Source,
        interval: Duration,
    ) -> Option<Arc<Cartridge>> {
        let generation = self.names.recent(id, source, interval)?;
        self.touch(generation)
    }

    /// The cartridge of a name, if it was loaded from the file as it is now.
    pub fn current(&mut self, key: &NameKey, stamp: Stamp) -> Option<Arc<Cartridge>> {
        let file = self.names.file(key).filter(|file| file.stamp == stamp)?;
        let generation = file.generation;
        self.touch(generation)
    }

    /// The same in host memory.
    pub fn hosted(&mut self, key: &NameKey, stamp: Stamp) -> Option<Arc<Cartridge>> {
        let file = self.names.file(key).filter(|file| file.stamp == stamp)?;
        self.clock += 1;
        self.host.get(file.generation, self.clock)
    }

    /// The cartridge of a generation, which counts as a use of it.
    pub fn touch(&mut self, generation: Generation) -> Option<Arc<Cartridge>> {
        let held = self.held.get_mut(&generation)?;
        let cartridge = held.memory.get()?;
        self.clock += 1;
        held.used = self.clock;
        if let Memory::Retired(_) = held.memory {
            held.memory = Memory::Kept(Arc::clone(&cartridge));
        }
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
    /// cartridges that nobody leases. Evicts none if that would not be enough. What it returns has to
    /// [`Self::leave`] before the room is used.
    pub fn reserve(&mut self, bytes: u64) -> Result<Leaving, CartridgeError> {
        if bytes > self.budget {
            return Err(CartridgeError::too_large("bytes in memory", bytes, self.budget));
        }
        self.held.retain(|_, held| held.memory.is_alive());
        let used = self.reserved + self.held.values().map(|held| held.bytes).sum::<u64>();
        let excess = used.saturating_add(bytes).saturating_sub(self.budget);
        let pinned = self.names.pinned();
        let may_evict = |(generation, held): &(&Generation, &Held)| {
            held.memory.leases() == 0 && !pinned.contains(*generation)
        };
        let mut idle: Vec<_> = self.held.iter().filter(may_evict).collect();
        let evictable: u64 = idle.iter().map(|(_, held)| held.bytes).sum();
        if excess > evictable {
            let (budget, lent) = (self.budget, used - evictable);
            return Err(CartridgeError::Busy {
                id: UNNAMED.to_owned(),
                reason: format!(
                    "it needs {bytes} bytes; {lent} of the {budget} for cartridges are in use or pinned"
                ),
            });
        }
        idle.sort_by_key(|(_, held)| held.used);
        let (mut evicted, mut freed) = (Vec::new(), 0);
        for (generation, held) in idle {
            if freed >= excess {
                break;
            }
            freed += held.bytes;
            evicted.push(*generation);
        }
        self.counts.evictions += evicted.len() as u64;
        let cartridges: Vec<_> = evicted.iter().filter_map(|g| self.evict(*g)).collect();
        if !evicted.is_empty() {
            self.drop_names();
        }
        let surplus = if cartridges.is_empty() { 0 } else { freed - excess };
        self.reserved += bytes + surplus;
        Ok(Leaving { cartridges, surplus })
    }

    /// The cartridge, if there is room for it in host memory.
    fn evict(&mut self, generation: Generation) -> Option<Arc<Cartridge>> {
        let Held { memory, bytes, used, .. } = self.held.remove(&generation)?;
        let cartridge = memory.get().filter(|_| self.names.is_named(generation))?;
        self.host.announce(&cartridge, bytes, used).then_some(cartridge)
    }

    /// An evicted cartridge left the device; `copy` is in host memory.
    pub fn leave(&mut self, generation: Generation, copy: Option<Arc<Cartridge>>) {
        self.host.arrive(generation, copy);
        self.drop_names();
    }

    /// Names of what is in no memory are looked up again when they are used.
    fn drop_names(&mut self) {
        let (held, host) = (&self.held, &self.host);
        self.names.retain(|generation| held.contains_key(&generation) || host.contains(generation));
    }

    pub fn release(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_sub(bytes);
    }

    /// Makes a resident, in room just released. If the same content got there first, that one is
    /// returned.
    pub fn publish(&mut self, cartridge: Arc<Cartridge>, bytes: u64) -> Arc<Cartridge> {
        let generation = cartridge.generation();
        self.host.remove(generation);
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

    /// Names a resident after its file, unless that was replaced since `epoch`. What the name pointed at
    /// before is retired.
    pub fn point(
        &mut self,
        key: &NameKey,
        id: &str,
        (generation, stamp): (Generation, Stamp),
        epoch: u64,
    ) {
        if self.names.epoch(key) != epoch {
            return self.retire_unnamed(generation);
        }
        self.remember_name(generation, id, key.place.into());
        if let Some(old) = self.names.point(key, id, generation, stamp) {
            self.retire_unnamed(old);
        }
    }

    /// Names a resident and keeps it for good.
    pub fn insert(&mut self, id: &str, generation: Generation) {
        self.remember_name(generation, id, Origin::Memory);
        if let Some(old) = self.names.insert(id, generation) {
            self.retire_unnamed(old);
        }
    }

    /// Lets go of what this process registered under an id.
    pub fn remove_inserted(&mut self, id: &str) {
        if let Some(old) = self.names.remove_inserted(id) {
            self.retire_unnamed(old);
        }
    }

    /// Lets go of what was loaded from a file. True: it was on the device.
    pub fn forget(&mut self, key: &NameKey) -> bool {
        let Some(old) = self.names.forget(key) else {
            return false;
        };
        let was_held = self.held.contains_key(&old);
        self.retire_unnamed(old);
        was_held
    }

    /// Pins a resident, or lets it be evicted again. False: it is none.
    pub fn pin(&mut self, key: &NameKey, pinned: bool) -> bool {
        let Some(file) = self.names.file_mut(key) else {
            return false;
        };
        let is_held = self.held.contains_key(&file.generation);
        if is_held {
            file.pinned = pinned;
        }
        is_held
    }

    fn remember_name(&mut self, generation: Generation, id: &str, origin: Origin) {
        if let Some(held) = self.held.get_mut(&generation) {
            held.origin = origin;
            held.id = id.to_owned();
        }
    }

    /// Lets go of a generation that no name points at: its memory goes with its last lease.
    pub fn retire_unnamed(&mut self, generation: Generation) {
        if self.names.is_named(generation) {
            return;
        }
        self.host.remove(generation);
        if let Some(held) = self.held.get_mut(&generation)
            && let Memory::Kept(cartridge) = &held.memory
        {
            held.memory = Memory::Retired(Arc::downgrade(cartridge));
        }
    }

    /// Inserted and loaded names, then retired generations that are still leased.
    pub fn list(&self) -> Vec<CartridgeInfo> {
        let inserted =
            self.names.all_inserted().map(|(id, generation)| (id, generation, Origin::Memory));
        let files =
            self.names.files().map(|(key, file)| (&file.id, file.generation, key.place.into()));
        let pinned = self.names.pinned();
        let mut list: Vec<_> = inserted
            .chain(files)
            .filter_map(|(id, generation, origin)| {
                let info = self.info(id, generation, origin)?;
                Some(CartridgeInfo { pinned: pinned.contains(&generation), ..info })
            })
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
        let (id, generation) = (id.to_owned(), Some(generation));
        let on_disk = CartridgeInfo { generation, ..CartridgeInfo::on_disk(id, origin) };
        let generation = generation?;
        let Some(held) = self.held.get(&generation) else {
            let hosted = self.host.entry(generation)?;
            return Some(CartridgeInfo {
                tier: Tier::Host,
                tokens: Some(hosted.tokens),
                frozen_tokens: Some(hosted.frozen_tokens),
                bytes: Some(hosted.bytes),
                ..on_disk
            });
        };
        let leases = held.memory.leases();
        let cartridge = held.memory.get()?;
        let retired = matches!(held.memory, Memory::Retired(_));
        Some(CartridgeInfo {
            resident: !retired,
            retired,
            tier: Tier::Device,
            tokens: Some(cartridge.tokens()),
            frozen_tokens: Some(cartridge.frozen_tokens()),
            bytes: Some(held.bytes),
            leases,
            ..on_disk
        })
    }
}

/// When the registry looked something up, for [`Residents::looked_up`].
#[derive(Clone, Copy)]
pub(super) struct Lookup {
    pub at: Instant,
    /// Of the id's folder.
    pub epoch: u64,
}

impl Residents {
    /// A request for `id` in `source` was led to `key` by a look-up that began at `lookup`. Not remembered if
    /// the folder was changed by this process since.
    pub fn looked_up(&mut self, id: &str, source: Source, key: NameKey, lookup: Lookup) {
        let folder = NameKey::new(Source::Local, id);
        if folder.is_ok_and(|folder| self.names.epoch(&folder) == lookup.epoch) {
            self.names.checked(id, source, key, lookup.at);
        }
    }
}
