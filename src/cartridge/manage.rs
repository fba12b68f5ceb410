//! What an operator sees and does of a registry, but for new files.

use std::{collections::HashSet, sync::Arc};

use super::{CartridgeError, CartridgeInfo, FileSource, Registry, Source, names::NameKey};

impl Registry {
    /// What can be named, and what is in memory. Looks into the cartridge directory and the caches of remote
    /// sources, so it may block.
    pub fn list(&self) -> Vec<CartridgeInfo> {
        let on_disk: Vec<_> =
            self.places().flat_map(|(place, files)| named(place, &files.list())).collect();
        let seen: HashSet<_> = on_disk.iter().map(|(key, _)| key.clone()).collect();
        let unseen = |(key, file): (&NameKey, &super::names::FileName)| {
            (!seen.contains(key)).then(|| (key.clone(), file.id.clone()))
        };
        let unseen: Vec<_> = self.lock().names.files().filter_map(unseen).collect();
        for (key, id) in unseen {
            self.forget_if_gone(&key, &id);
        }
        let residents = self.lock();
        let mut list = residents.list();
        // An inserted cartridge hides the file of its id; a loaded file is listed already.
        let is_listed = |key: &NameKey, id: &str| {
            residents.names.inserted(id).is_some() || residents.names.file(key).is_some()
        };
        let absent = on_disk.into_iter().filter(|(key, id)| !is_listed(key, id));
        list.extend(absent.map(|(key, id)| CartridgeInfo::on_disk(id, key.place.into())));
        list
    }

    /// All that is known as `id`: inserted, of the cartridge directory, of each remote source's cache, and
    /// replaced generations that are still leased. Blocks: it looks whether the files are there.
    pub fn info(&self, id: &str) -> Vec<CartridgeInfo> {
        let mut on_disk = Vec::new();
        for (place, files) in self.places() {
            let Ok(key) = NameKey::new(place, id) else { return Vec::new() };
            match files.stamp(id) {
                Ok(None) => self.forget_if_gone(&key, id),
                // A bad file is there too.
                Ok(Some(_)) | Err(CartridgeError::Invalid { .. }) => on_disk.push(key),
                // It belongs to another id, or cannot be reached.
                Err(_) => {}
            }
        }
        let residents = self.lock();
        let mut list = residents.list();
        // A file can be loaded under an id that is written alike.
        let own = |key: &NameKey| {
            residents.names.file(key).map(|file| (file.id.clone(), key.place.into()))
        };
        let own: Vec<_> = on_disk.iter().filter_map(own).collect();
        list.retain(|info| info.id == id || own.contains(&(info.id.clone(), info.source)));
        for info in &mut list {
            id.clone_into(&mut info.id);
        }
        for key in on_disk.iter().filter(|key| residents.names.file(key).is_none()) {
            list.push(CartridgeInfo::on_disk(id.to_owned(), key.place.into()));
        }
        list
    }

    /// Takes `id` out of memory, on the device and beside it; its files stay, and the next request reads them.
    /// Running requests keep what they have. True: it was resident.
    ///
    /// # Errors
    /// [`CartridgeError::Conflict`] for one that is pinned or was made in this process.
    pub async fn unload(&self, id: &str) -> Result<bool, CartridgeError> {
        let keys = self.keys(id)?;
        let mut residents = self.lock();
        let is_pinned = |key: &NameKey| residents.names.file(key).is_some_and(|file| file.pinned);
        let kept = match residents.names.inserted(id) {
            Some(_) => Some("one that has no file to be read again"),
            None if keys.iter().any(is_pinned) => Some("a pinned one"),
            None => None,
        };
        if let Some(found) = kept {
            return Err(CartridgeError::Conflict {
                id: id.to_owned(),
                expected: "a cartridge that may be unloaded".to_owned(),
                found: found.to_owned(),
            });
        }
        Ok(keys.iter().fold(false, |was_resident, key| residents.forget(key) | was_resident))
    }

    /// Keeps a resident from being evicted, whatever generation its name points at, or allows it again.
    ///
    /// # Errors
    /// [`CartridgeError::NotFound`] if no cartridge of that id is resident; [`CartridgeError::Conflict`] for
    /// unpinning one that was made in this process.
    pub fn pin(&self, id: &str, pinned: bool) -> Result<(), CartridgeError> {
        let keys = self.keys(id)?;
        let mut residents = self.lock();
        if residents.names.inserted(id).is_some() {
            return match pinned {
                true => Ok(()),
                false => Err(CartridgeError::Conflict {
                    id: id.to_owned(),
                    expected: "a cartridge that can be read again".to_owned(),
                    found: "one that has no file, which stays pinned".to_owned(),
                }),
            };
        }
        let found = keys.iter().fold(false, |found, key| residents.pin(key, pinned) | found);
        let hint = "it is not resident; load it first".to_owned();
        found.then_some(()).ok_or_else(|| CartridgeError::NotFound { id: id.to_owned(), hint })
    }

    /// Where `id` can have files.
    fn keys(&self, id: &str) -> Result<Vec<NameKey>, CartridgeError> {
        let remotes = self.remotes.iter().map(|remote| remote.source);
        [Source::Local].into_iter().chain(remotes).map(|place| NameKey::new(place, id)).collect()
    }

    fn places(&self) -> impl Iterator<Item = (Source, Arc<dyn FileSource>)> {
        let remotes = self.remotes.iter().map(|remote| remote.source);
        let places = [Source::Local].into_iter().chain(remotes);
        places.filter_map(|place| Some((place, self.files(place)?)))
    }

    /// Requests for a file that is gone get an error, so it is no resident any more.
    fn forget_if_gone(&self, key: &NameKey, id: &str) {
        let epoch = self.lock().names.epoch(key);
        let gone = self.files(key.place).is_none_or(|files| matches!(files.stamp(id), Ok(None)));
        let mut residents = self.lock();
        if gone && residents.names.epoch(key) == epoch {
            residents.forget(key);
        }
    }
}

fn named(place: Source, ids: &[String]) -> Vec<(NameKey, String)> {
    let key = |id: &String| Some((NameKey::new(place, id).ok()?, id.clone()));
    ids.iter().filter_map(key).collect()
}
