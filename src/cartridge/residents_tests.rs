//! Seeded confusion: loads, leases, replacements, publications, pins and evictions in every order, with the
//! books compared after each step with what must hold.

use candle_core::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::cartridge::{LayerKv, Provenance};

const FOREVER: Duration = Duration::from_secs(1 << 30);
/// Of a cartridge of one token.
const UNIT: u64 = 16;
const IDS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// 1, 2 or 3 units.
fn content(number: usize) -> Cartridge {
    let tensor = Tensor::full(number as f32, (1, 1 + number % 3, 2), &Device::Cpu).unwrap();
    let layer = LayerKv { keys: tensor.clone(), values: tensor, bias: None };
    Cartridge::new(vec![layer], 0, Provenance::default()).unwrap()
}

/// A load that has its room.
struct Load {
    key: NameKey,
    id: &'static str,
    content: usize,
    stamp: Stamp,
    epoch: u64,
    reserved: u64,
}

struct World {
    residents: Residents,
    contents: Vec<Arc<Cartridge>>,
    /// What the file of each name holds. A file of another program is replaced without the books knowing.
    files: HashMap<NameKey, (usize, Stamp)>,
    inserted: HashMap<&'static str, usize>,
    /// The first stamp of each name since it was last changed by the registry itself.
    edited: HashMap<NameKey, u64>,
    loads: Vec<Load>,
    /// Evicted cartridges on their way to host memory, and the surplus to release with the last.
    leaving: Vec<Leaving>,
    lookups: Vec<(&'static str, Source, NameKey, Lookup)>,
    leases: Vec<Arc<Cartridge>>,
    stamps: u64,
    restores: u64,
}

impl World {
    fn new(budget: u64, host_budget: u64) -> Self {
        Self {
            residents: Residents::new(budget * UNIT, host_budget * UNIT),
            contents: (0..24).map(|number| Arc::new(content(number))).collect(),
            files: HashMap::new(),
            inserted: HashMap::new(),
            edited: HashMap::new(),
            loads: Vec::new(),
            leaving: Vec::new(),
            lookups: Vec::new(),
            leases: Vec::new(),
            stamps: 0,
            restores: 0,
        }
    }

    fn stamp(&mut self) -> Stamp {
        self.stamps += 1;
        Stamp { len: self.stamps, ..Stamp::default() }
    }

    /// Tensors of its own, as a load would make.
    fn make(&self, number: usize) -> Arc<Cartridge> {
        Arc::new(Cartridge::clone(&self.contents[number]))
    }

    fn reserve(&mut self, bytes: u64) -> bool {
        let Ok(leaving) = self.residents.reserve(bytes) else { return false };
        self.leaving.push(leaving);
        true
    }

    fn settle(&mut self, reserved: u64, number: usize) -> Arc<Cartridge> {
        let cartridge = self.make(number);
        self.residents.release(reserved);
        self.residents.publish(cartridge, self.contents[number].bytes())
    }

    fn step(&mut self, random: &mut ChaCha8Rng) {
        let id = IDS[random.random_range(0..IDS.len())];
        let place = [Source::Local, Source::Huggingface][random.random_range(0..2)];
        let key = NameKey::new(place, id).unwrap();
        let number = random.random_range(0..self.contents.len());
        let bytes = self.contents[number].bytes();
        let pick = |random: &mut ChaCha8Rng, len: usize| random.random_range(0..len);
        match random.random_range(0..16) {
            // Another program writes or removes a file.
            0 => {
                let stamp = self.stamp();
                self.files.insert(key, (number, stamp));
            }
            1 => {
                self.files.remove(&key);
                self.residents.forget(&key);
            }
            // A request, which finds what it wants in memory or begins to load it; then the load ends.
            2..=5 => self.request(key, id),
            6 | 7 if !self.loads.is_empty() => {
                let load = self.loads.swap_remove(pick(random, self.loads.len()));
                let cartridge = self.settle(load.reserved, load.content);
                let loaded = (cartridge.generation(), load.stamp);
                self.residents.point(&load.key, load.id, loaded, load.epoch);
                self.leases.push(cartridge);
            }
            8 if !self.loads.is_empty() => {
                let load = self.loads.swap_remove(pick(random, self.loads.len()));
                self.residents.release(load.reserved);
            }
            9 | 10 if !self.leases.is_empty() => {
                self.leases.truncate(pick(random, self.leases.len()));
            }
            // The registry publishes, or removes, a file.
            11 if key.place == Source::Local && self.reserve(bytes) => {
                let stamp = self.stamp();
                let cartridge = self.settle(bytes, number);
                self.files.insert(key.clone(), (number, stamp));
                self.edited.insert(key.clone(), stamp.len);
                self.inserted.remove(id);
                self.residents.names.edited(&key, id);
                self.residents.remove_inserted(id);
                let epoch = self.residents.names.epoch(&key);
                self.residents.point(&key, id, (cartridge.generation(), stamp), epoch);
                let recent = self.residents.recent(id, key.place, FOREVER);
                assert!(recent.is_none(), "a look-up outlived a publication");
            }
            12 if key.place == Source::Local => {
                self.files.remove(&key);
                self.inserted.remove(id);
                let stamp = self.stamp();
                self.edited.insert(key.clone(), stamp.len);
                self.residents.names.edited(&key, id);
                self.residents.remove_inserted(id);
                self.residents.forget(&key);
            }
            13 if self.inserted.len() < 2 && self.reserve(bytes) => {
                let cartridge = self.settle(bytes, number);
                self.residents.insert(id, cartridge.generation());
                self.inserted.insert(id, number);
            }
            14 => {
                let pinned = random.random_range(0..8) == 0;
                self.residents.pin(&key, pinned);
            }
            // A copy to host memory ends.
            _ if !self.leaving.is_empty() => {
                let mut leaving = self.leaving.swap_remove(pick(random, self.leaving.len()));
                if let Some(cartridge) = leaving.cartridges.pop() {
                    let succeeds = random.random_range(0..4) > 0;
                    let copy = succeeds.then(|| Arc::new(Cartridge::clone(&cartridge)));
                    self.residents.leave(cartridge.generation(), copy);
                }
                match leaving.cartridges.is_empty() {
                    true => self.residents.release(leaving.surplus),
                    false => self.leaving.push(leaving),
                }
            }
            _ => {
                self.residents.forget(&key);
            }
        }
    }

    fn request(&mut self, key: NameKey, id: &'static str) {
        let folder = NameKey::new(Source::Local, id).unwrap();
        let epoch = self.residents.names.epoch(&folder);
        let lookup = Lookup { at: Instant::now(), epoch };
        let Some(&(content, stamp)) = self.files.get(&key) else { return };
        let wanted = self.contents[content].generation();
        if let Some(cartridge) = self.residents.current(&key, stamp) {
            assert_eq!(cartridge.generation(), wanted, "another cartridge's numbers");
            self.leases.push(cartridge);
            self.lookups.push((id, key.place, key, lookup));
            if self.lookups.len() > 3 {
                let (id, source, key, lookup) = self.lookups.remove(0);
                self.residents.looked_up(id, source, key, lookup);
            }
            return;
        }
        // One load of a name at a time.
        if self.loads.iter().any(|load| load.key == key) {
            return;
        }
        let epoch = self.residents.names.epoch(&key);
        let reserved = self.contents[content].bytes();
        let copy = self.residents.hosted(&key, stamp);
        if let Some(copy) = &copy {
            assert_eq!(copy.generation(), wanted, "another cartridge's numbers");
        }
        if !self.reserve(reserved) {
            return;
        }
        match copy {
            Some(copy) => {
                drop(copy);
                self.restores += 1;
                let restored = self.settle(reserved, content);
                self.residents.retire_unnamed(restored.generation());
                self.leases.push(restored);
            }
            None => self.loads.push(Load { key, id, content, stamp, epoch, reserved }),
        }
    }

    fn check(&mut self) {
        let stats = self.residents.stats();
        let residents = &self.residents;
        let bytes_of = |generation: &Generation| {
            let mut contents = self.contents.iter();
            contents.find(|c| c.generation() == *generation).unwrap().bytes()
        };
        // Memory: never over a budget, and counted as what it is.
        assert!(stats.bytes + residents.reserved <= residents.budget, "{stats:?}");
        assert!(stats.host_bytes <= stats.host_budget, "{stats:?}");
        let alive = residents.held.iter().filter(|(_, held)| held.memory.is_alive());
        assert_eq!(stats.bytes, alive.map(|(generation, _)| bytes_of(generation)).sum::<u64>());
        let promised: u64 = self.loads.iter().map(|load| load.reserved).sum();
        let surplus: u64 = self.leaving.iter().map(|leaving| leaving.surplus).sum();
        assert_eq!(residents.reserved, promised + surplus);
        // Leases: each counts, and what is lent is there.
        assert_eq!(stats.leases, self.leases.len());
        for lease in &self.leases {
            assert!(residents.held[&lease.generation()].memory.is_alive());
        }
        // Names: of what was loaded from the file they stand for, and not older than a publication.
        for (key, file) in residents.names.files() {
            assert!(self.edited.get(key).is_none_or(|first| file.stamp.len >= *first), "{key:?}");
            if let Some((number, _)) = self.files.get(key).filter(|(_, s)| *s == file.stamp) {
                assert_eq!(file.generation, self.contents[*number].generation());
            }
            let held = residents.held.get(&file.generation);
            assert!(held.is_some() || residents.host.contains(file.generation), "{key:?}");
            assert!(held.is_some() || !file.pinned, "a pinned one was evicted");
        }
        for (id, number) in &self.inserted {
            let generation = self.contents[*number].generation();
            assert_eq!(residents.names.inserted(id), Some(generation));
            assert!(matches!(residents.held[&generation].memory, Memory::Kept(_)));
        }
        // Nothing is kept that no name leads to, and nothing is in both tiers.
        for (generation, held) in &residents.held {
            let is_kept = matches!(held.memory, Memory::Kept(_));
            assert_eq!(is_kept, residents.names.is_named(*generation), "{generation:?}");
            assert!(!is_kept || !residents.host.contains(*generation));
        }
    }

    fn rest(mut self) {
        for load in self.loads.drain(..) {
            self.residents.release(load.reserved);
        }
        for leaving in self.leaving.drain(..) {
            leaving.cartridges.iter().for_each(|c| self.residents.leave(c.generation(), None));
            self.residents.release(leaving.surplus);
        }
        self.leases.clear();
        self.check();
        assert_eq!(self.residents.reserved, 0);
        let files: Vec<_> = self.residents.names.files().map(|(key, _)| key.clone()).collect();
        for key in files {
            self.residents.forget(&key);
        }
        let ids: Vec<_> = self.inserted.drain().map(|(id, _)| id).collect();
        ids.iter().for_each(|id| self.residents.remove_inserted(id));
        let stats = self.residents.stats();
        assert_eq!((stats.resident, stats.bytes, stats.host, stats.leases), (0, 0, 0, 0));
    }
}

#[test]
fn the_books_balance_in_every_order_of_events() {
    let (mut evictions, mut restores) = (0, 0);
    for seed in 0..60 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let host = if seed % 3 == 0 { 0 } else { random.random_range(1..12) };
        let mut world = World::new(random.random_range(6..16), host);
        for _ in 0..2000 {
            world.step(&mut random);
            world.check();
        }
        evictions += world.residents.counts.evictions;
        restores += world.restores;
        world.rest();
    }
    assert!(evictions > 2000 && restores > 100, "{evictions} evictions, {restores} restores");
}
