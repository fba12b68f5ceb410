//! The way of a request to its cartridge, when it is not simply at hand: the local file, the cache of the
//! remote source it names, that source.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use super::{
    Cartridge, CartridgeError, CartridgeRef, FileSource, Registry, Source, Stamp, folder_name,
    names::NameKey,
    registry::{Fetched, Loaded, Remote, interrupted},
    residents::Lookup,
    sources::not_found,
    staging::WithoutRoom,
};
use crate::{limits, ops::memory::give_back_freed};

/// How often a call that joined a load of an older file waits for another one.
const MAX_TRIES: usize = 4;

impl Registry {
    pub(super) async fn look_up(self: &Arc<Self>, r: &CartridgeRef) -> Fetched {
        let folder = NameKey::new(Source::Local, &r.id)?;
        let lookup = Lookup { at: Instant::now(), epoch: self.lock().names.epoch(&folder) };
        let remote = self.remotes.iter().position(|remote| remote.source == r.source);
        let (id, force) = (&r.id, r.force_redownload);
        if let (Some(remote), true) = (remote, force) {
            return self.fetch(remote, id, true).await;
        }
        let found = |key| self.lock().looked_up(id, r.source, key, lookup);
        if let Some(cartridge) = self.at_hand(Source::Local, id, force).await? {
            found(folder);
            return Ok(cartridge);
        }
        let remote = match (r.source, remote) {
            (Source::Local, _) => return Err(not_found(id)),
            (from, None) => return Err(no_such_source(id, from)),
            (_, Some(remote)) => remote,
        };
        let key = NameKey::new(r.source, id)?;
        if let Some(cartridge) = self.at_hand(r.source, id, false).await? {
            found(key);
            return Ok(cartridge);
        }
        if let Some(failed) = self.failures().get(&key, Instant::now()) {
            return Err(failed);
        }
        let cartridge = self.fetch(remote, id, false).await?;
        found(key);
        Ok(cartridge)
    }

    /// The cartridge of a file on this machine as it is now, loaded if need be; `None` where there is no
    /// file. `force` reads it even if it looks unchanged.
    async fn at_hand(
        self: &Arc<Self>,
        place: Source,
        id: &str,
        mut force: bool,
    ) -> Result<Option<Arc<Cartridge>>, CartridgeError> {
        let Some(files) = self.files(place) else {
            return Ok(None);
        };
        let key = NameKey::new(place, id)?;
        for _ in 0..MAX_TRIES {
            let epoch = self.lock().names.epoch(&key);
            let Some(seen) = stamp(&files, id).await? else {
                let mut residents = self.lock();
                if residents.names.epoch(&key) == epoch {
                    residents.forget(&key);
                }
                return Ok(None);
            };
            if !force && let Some(cartridge) = self.lock().current(&key, seen) {
                return Ok(Some(cartridge));
            }
            let load = || Arc::clone(self).load(key.clone(), id.to_owned(), force);
            let (flight, started) = self.loads.join(&key, load).map_err(|count| {
                let reason = format!("{count} loads are under way");
                CartridgeError::Busy { id: id.to_owned(), reason }
            })?;
            let (cartridge, stamp) =
                match flight.wait().await.unwrap_or_else(|| Err(interrupted(id))) {
                    // A damaged file of the disk cache is removed when that is found out; its source has another.
                    Err(_)
                        if place != Source::Local && self::stamp(&files, id).await?.is_none() =>
                    {
                        return Ok(None);
                    }
                    loaded => loaded?,
                };
            // A load that began before this call may have read an older file than this call saw.
            if started || stamp == seen {
                return Ok(Some(cartridge));
            }
            force = false;
        }
        let reason = "its file keeps changing".to_owned();
        Err(CartridgeError::Busy { id: id.to_owned(), reason })
    }

    /// Reads a file, or takes back what had to leave the device.
    async fn load(self: Arc<Self>, key: NameKey, id: String, force: bool) -> Loaded {
        let files = self.files(key.place).ok_or_else(|| not_found(&id))?;
        let permit = self.load_permits.acquire().await.map_err(|_| interrupted(&id))?;
        let (this, name) = (Arc::clone(&self), id.clone());
        let work = move || {
            let loaded = this.load_here(&key, &name, &*files, force);
            if loaded.is_err() {
                this.lock().counts.load_failures += 1;
            }
            loaded.map_err(|error| error.named(&name))
        };
        let loaded = tokio::task::spawn_blocking(work).await;
        drop(permit);
        loaded.unwrap_or_else(|_| Err(interrupted(&id)))
    }

    /// On a thread that may block.
    fn load_here(&self, key: &NameKey, id: &str, files: &dyn FileSource, force: bool) -> Loaded {
        let epoch = self.lock().names.epoch(key);
        if let (false, Some(seen)) = (force, files.stamp(id)?) {
            let copy = self.lock().hosted(key, seen);
            if let Some(copy) = copy {
                return Ok((self.restore(&copy)?, seen));
            }
        }
        let (mut intake, room) = self.intake(self.max_file_bytes(), WithoutRoom::Refuse);
        let stamp = files.read(id, &mut intake)?;
        let cartridge = self.settle(intake.finish()?, room.take())?;
        let mut residents = self.lock();
        residents.counts.loads += 1;
        residents.point(key, id, (cartridge.generation(), stamp), epoch);
        drop(residents);
        self.give_back(cartridge.bytes());
        Ok((cartridge, stamp))
    }

    /// What had to leave for what was loaded is free by now.
    fn give_back(&self, loaded: u64) {
        let loaded = loaded + self.loaded_bytes.fetch_add(loaded, Ordering::Relaxed);
        if loaded >= limits::GIVE_BACK_AFTER_BYTES
            && self.loaded_bytes.swap(0, Ordering::Relaxed) >= limits::GIVE_BACK_AFTER_BYTES
        {
            give_back_freed();
        }
    }

    /// Asks a remote source, once for all that ask at the same time, and loads what it brings. A `force`d
    /// call does not join a fetch that began long ago, which may bring what was there before.
    async fn fetch(self: &Arc<Self>, remote: usize, id: &str, force: bool) -> Fetched {
        const JOIN: Duration = Duration::from_millis(limits::FORCED_FETCH_JOIN_MILLISECONDS);
        let Remote { source, fetches, .. } = &self.remotes[remote];
        let key = NameKey::new(*source, id)?;
        loop {
            let work = || Arc::clone(self).fetch_and_load(remote, key.clone(), id.to_owned());
            let (flight, started) = fetches.join(&key, work).map_err(|count| {
                let reason = format!("{count} fetches from `{source}` are under way");
                CartridgeError::Busy { id: id.to_owned(), reason }
            })?;
            let is_old = force && !started && flight.began.elapsed() > JOIN;
            let fetched = flight.wait().await;
            if !is_old {
                return fetched.unwrap_or_else(|| Err(interrupted(id)));
            }
        }
    }

    async fn fetch_and_load(self: Arc<Self>, remote: usize, key: NameKey, id: String) -> Fetched {
        let Remote { source, files, permits, .. } = &self.remotes[remote];
        const TURN: Duration = Duration::from_secs(limits::FETCH_TURN_SECONDS);
        let turn = tokio::time::timeout(TURN, permits.acquire()).await.map_err(|_| {
            let reason = format!("all fetches from `{source}` take more than {TURN:?}");
            CartridgeError::Busy { id: id.clone(), reason }
        })?;
        let permit = turn.map_err(|_| interrupted(&id))?;
        let (files, name) = (Arc::clone(files), id.clone());
        let fetched = tokio::task::spawn_blocking(move || files.fetch(&name)).await;
        drop(permit);
        let fetched = fetched.unwrap_or_else(|_| Err(interrupted(&id)));
        let fetched = fetched.map_err(|error| error.named(&id));
        self.failures().record(&key, &fetched, Instant::now());
        {
            let counts = &mut self.lock().counts;
            counts.fetches += 1;
            counts.fetch_failures += u64::from(fetched.is_err());
        }
        fetched?;
        let gone = || CartridgeError::SourceUnavailable {
            id: id.clone(),
            from: *source,
            reason: "what was fetched is gone again".to_owned(),
        };
        self.at_hand(*source, &id, false).await?.ok_or_else(gone)
    }

    /// The files of a place that are on this machine.
    pub(super) fn files(&self, place: Source) -> Option<Arc<dyn FileSource>> {
        if place == Source::Local {
            return self.local.clone();
        }
        let remote = self.remotes.iter().find(|remote| remote.source == place)?;
        Some(Arc::clone(&remote.files) as Arc<dyn FileSource>)
    }
}

async fn stamp(files: &Arc<dyn FileSource>, id: &str) -> Result<Option<Stamp>, CartridgeError> {
    let (files, name) = (Arc::clone(files), id.to_owned());
    let stamp = tokio::task::spawn_blocking(move || files.stamp(&name)).await;
    stamp.unwrap_or_else(|_| Err(interrupted(id)))
}

/// Says where to put the file by hand.
fn no_such_source(id: &str, from: Source) -> CartridgeError {
    match folder_name(id) {
        Err(error) => error,
        Ok(folder) => CartridgeError::SourceUnavailable {
            id: id.to_owned(),
            from,
            reason: format!(
                "it is not in the cartridge directory, and this server does not fetch from there; put \
                 the file into the directory as `{folder}/cartridge.pt`"
            ),
        },
    }
}
