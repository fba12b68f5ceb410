//! The registry's names: which cartridge an id leads to, and when that was last looked up.
//!
//! Pure data. A name is a folder of the cartridge directory, or an id in one of the remote sources: the
//! same id in two places is two names.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    time::{Duration, Instant},
};

use super::{CartridgeError, Generation, Source, Stamp, folder_name};
use crate::limits;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct NameKey {
    /// Where it was found.
    pub place: Source,
    /// A folder of [`Source::Local`]; the id itself elsewhere, where ids that are written alike differ.
    pub name: String,
}

impl NameKey {
    pub fn new(place: Source, id: &str) -> Result<Self, CartridgeError> {
        let folder = folder_name(id)?;
        let name = if place == Source::Local { folder } else { id.to_owned() };
        Ok(Self { place, name })
    }

    /// For sharing a fixed number of counters or locks among names.
    pub fn number(&self) -> usize {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish() as usize
    }
}

#[derive(Debug, Clone)]
pub(super) struct FileName {
    /// As it was asked for last; several ids can lead to one folder.
    pub id: String,
    pub generation: Generation,
    pub stamp: Stamp,
    pub pinned: bool,
}

/// When a request's id and source led to a name.
#[derive(Debug, Clone)]
struct Checked {
    key: NameKey,
    at: Instant,
}

const SOURCES: usize = 4;
const EPOCHS: usize = 64;

pub(super) struct Names {
    /// Ids registered by this process.
    inserted: HashMap<String, Generation>,
    files: HashMap<NameKey, FileName>,
    /// By id, then by the source that was asked for.
    checked: HashMap<String, [Option<Checked>; SOURCES]>,
    /// Counts publications and deletions, so that a look-up that began before one is not taken for the
    /// present state. Names share counters, so that these do not grow.
    edits: [u64; EPOCHS],
}

impl Names {
    pub fn new() -> Self {
        let (inserted, files, checked) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { inserted, files, checked, edits: [0; EPOCHS] }
    }

    pub fn inserted(&self, id: &str) -> Option<Generation> {
        self.inserted.get(id).copied()
    }

    /// What a request for `id` in `source` was led to less than `interval` ago.
    pub fn recent(&self, id: &str, source: Source, interval: Duration) -> Option<Generation> {
        let checked = self.checked.get(id)?[source as usize].as_ref()?;
        let is_recent = checked.at.elapsed() < interval;
        is_recent.then(|| self.files.get(&checked.key)).flatten().map(|file| file.generation)
    }

    /// Remembers that at the time `at` a request led to `key`.
    pub fn checked(&mut self, id: &str, source: Source, key: NameKey, at: Instant) {
        if self.checked.len() >= limits::MAX_CHECKED_IDS && !self.checked.contains_key(id) {
            self.checked.clear();
        }
        let sources = self.checked.entry(id.to_owned()).or_default();
        sources[source as usize] = Some(Checked { key, at });
    }

    pub fn file(&self, key: &NameKey) -> Option<&FileName> {
        self.files.get(key)
    }

    pub fn file_mut(&mut self, key: &NameKey) -> Option<&mut FileName> {
        self.files.get_mut(key)
    }

    pub fn files(&self) -> impl Iterator<Item = (&NameKey, &FileName)> {
        self.files.iter()
    }

    pub fn all_inserted(&self) -> impl Iterator<Item = (&String, Generation)> {
        self.inserted.iter().map(|(id, generation)| (id, *generation))
    }

    /// What the name pointed at before. A pin stays with the name.
    pub fn point(
        &mut self,
        key: &NameKey,
        id: &str,
        generation: Generation,
        stamp: Stamp,
    ) -> Option<Generation> {
        let pinned = self.files.get(key).is_some_and(|file| file.pinned);
        let file = FileName { id: id.to_owned(), generation, stamp, pinned };
        self.files.insert(key.clone(), file).map(|old| old.generation)
    }

    pub fn insert(&mut self, id: &str, generation: Generation) -> Option<Generation> {
        self.inserted.insert(id.to_owned(), generation)
    }

    pub fn remove_inserted(&mut self, id: &str) -> Option<Generation> {
        self.inserted.remove(id)
    }

    pub fn forget(&mut self, key: &NameKey) -> Option<Generation> {
        self.files.remove(key).map(|file| file.generation)
    }

    /// Forgets the names of what is kept nowhere.
    pub fn retain(&mut self, is_kept: impl Fn(Generation) -> bool) {
        self.files.retain(|_, file| is_kept(file.generation));
    }

    pub fn is_named(&self, generation: Generation) -> bool {
        self.files.values().any(|file| file.generation == generation)
            || self.inserted.values().any(|inserted| *inserted == generation)
    }

    /// What is never evicted.
    pub fn pinned(&self) -> HashSet<Generation> {
        let pinned = self.files.values().filter(|file| file.pinned).map(|file| file.generation);
        pinned.chain(self.inserted.values().copied()).collect()
    }

    /// The files of `key` are being changed by this process: nothing that was looked up before counts.
    pub fn edited(&mut self, key: &NameKey, id: &str) {
        self.edits[key.number() % EPOCHS] += 1;
        self.checked.remove(id);
        let leads_here =
            |checked: &Option<Checked>| checked.as_ref().is_some_and(|c| c.key == *key);
        self.checked.retain(|_, sources| !sources.iter().any(leads_here));
    }

    /// Changes when files of `key` are changed by this process.
    pub fn epoch(&self, key: &NameKey) -> u64 {
        self.edits[key.number() % EPOCHS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOREVER: Duration = Duration::from_secs(1 << 30);

    /// Registry case 10: many spellings lead to one folder, so clients could make these grow.
    #[test]
    fn what_is_remembered_of_ids_is_bounded() {
        let mut names = Names::new();
        let key = NameKey::new(Source::Local, "a").unwrap();
        let generation = Generation([7; 32]);
        names.point(&key, "a", generation, Stamp::default());
        for i in 0..3 * limits::MAX_CHECKED_IDS {
            let id = " ".repeat(i % 500) + &i.to_string();
            names.checked(&id, Source::Local, key.clone(), Instant::now());
            assert!(names.checked.len() <= limits::MAX_CHECKED_IDS);
            assert_eq!(names.recent(&id, Source::Local, FOREVER), Some(generation));
        }
        names.edited(&key, "a");
        assert!(names.checked.is_empty());
    }
}
