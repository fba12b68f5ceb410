//! Lends cartridges to requests: finds, loads, checks, keeps and evicts them.
//!
//! A name points at a generation; residents are kept by generation, so two names of one content
//! share memory, and a replaced file is a new generation while running requests keep the old one.

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{DType, Device};
use dashmap::{DashMap, Entry};
use tokio::sync::{Semaphore, watch};

use super::{
    Cartridge, CartridgeError, CartridgeRef, FileSource, Generation, KvShape, Lease, LocalFolder,
    Origin, RemoteSource, Source, Stamp, folder_name,
    residents::Residents,
    sources::{NoDownload, not_found},
};
use crate::limits;

/// What a registry serves and how much it may keep.
#[derive(Debug)]
pub struct RegistryOptions {
    /// Directory of the cartridge folders; `None` leaves only inserted cartridges.
    pub dir: Option<PathBuf>,
    /// Shape of the served model: every cartridge must have it.
    pub shape: KvShape,
    /// Name of the served model, compared with what cartridges say (a difference is a warning).
    pub model: String,
    /// RoPE base of the served model, likewise; `None` compares nothing.
    pub rope_theta: Option<f64>,
    /// RoPE scaling of the served model as in its `config.json`, likewise.
    pub rope_scaling: Option<serde_json::Value>,
    /// Positions of the model; a cartridge must leave at least one.
    pub max_positions: usize,
    /// Where and as what cartridges are kept.
    pub device: Device,
    pub dtype: DType,
    /// Memory for all residents, inserted ones included, and for those being read.
    pub byte_budget: u64,
    /// Nothing of a larger file is read, nor of one that cannot fit the budget.
    pub max_file_bytes: u64,
}

/// A line of [`Registry::list`].
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct CartridgeInfo {
    pub id: String,
    pub source: Origin,
    /// In memory, ready for the next request. A file that was not used yet is registered, not
    /// resident.
    pub resident: bool,
    /// Replaced or deleted under its name, kept only by the leases of running requests.
    pub retired: bool,
    /// Never evicted.
    pub pinned: bool,
    /// Known once loaded, like the four sizes below.
    pub generation: Option<Generation>,
    pub tokens: Option<usize>,
    pub frozen_tokens: Option<usize>,
    pub bytes: Option<u64>,
    pub leases: usize,
}

/// A momentary reading of a registry, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RegistryStats {
    /// Cartridges in memory, replaced ones that are still leased included.
    pub resident: usize,
    /// Bytes they take.
    pub bytes: u64,
    /// Bytes they may take.
    pub budget: u64,
    /// Leases on them.
    pub leases: usize,
    /// Files read since the start, loads that failed, cartridges that were evicted.
    pub loads: u64,
    pub load_failures: u64,
    pub evictions: u64,
}

/// How often a call that joined a load of an older file waits for another one.
const MAX_TRIES: usize = 4;

/// The result of one load, shared by all that wait for it.
type Loaded = Result<(Arc<Cartridge>, Stamp), CartridgeError>;
type Flight = watch::Receiver<Option<Loaded>>;

/// Lends cartridges to requests. Cheap to share: methods take `&self` and hold no lock while they
/// wait.
pub struct Registry {
    pub(super) options: RegistryOptions,
    files: Option<Arc<dyn FileSource>>,
    remote: Arc<dyn RemoteSource>,
    residents: Mutex<Residents>,
    /// Loads under way, by folder name.
    flights: DashMap<String, Flight>,
    permits: Semaphore,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Registry {
    /// A registry over the folders of `options.dir`. Nothing is read before it is asked for.
    pub fn new(options: RegistryOptions) -> Arc<Self> {
        let files = options.dir.clone().map(|dir| Arc::new(LocalFolder::new(dir)) as Arc<_>);
        Self::with_sources(options, files, Arc::new(NoDownload))
    }

    /// A registry over other sources than the local folder.
    pub fn with_sources(
        options: RegistryOptions,
        files: Option<Arc<dyn FileSource>>,
        remote: Arc<dyn RemoteSource>,
    ) -> Arc<Self> {
        Arc::new(Self {
            residents: Mutex::new(Residents::new(options.byte_budget)),
            options,
            files,
            remote,
            flights: DashMap::new(),
            permits: Semaphore::new(limits::MAX_CONCURRENT_CARTRIDGE_LOADS),
        })
    }

    /// Registers a cartridge made in this process (built in, or just trained) under `id`, whatever
    /// `source` a request names. It is checked like any other, never evicted, and replaces an
    /// earlier one of that id: requests that run keep theirs.
    ///
    /// # Errors
    /// Those of [`folder_name`] and [`super::validate`]; [`CartridgeError::Busy`] or
    /// [`CartridgeError::TooLarge`] if it does not fit the budget.
    pub fn insert(&self, id: &str, cartridge: Cartridge) -> Result<Generation, CartridgeError> {
        let insert = || {
            folder_name(id)?;
            let (mut intake, room) = self.intake(u64::MAX);
            intake.take(&cartridge)?;
            let cartridge = self.settle(intake.finish()?, room.take())?;
            let generation = cartridge.generation();
            self.lock().pin(id, generation);
            Ok(generation)
        };
        insert().map_err(|error: CartridgeError| error.named(id))
    }

    /// Lends the cartridge a request names, loading it first if need be.
    ///
    /// Reading, checking and converting happen on blocking threads, at most once at a time per
    /// cartridge, and go on if the caller gives up. A failed load is told to all that waited for it
    /// and not remembered. A changed file is a new generation from this call on. `force_redownload`
    /// asks the remote source again and reads the file even if it looks unchanged.
    ///
    /// # Errors
    /// Any [`CartridgeError`]; never another cartridge than the one asked for.
    pub async fn acquire(self: &Arc<Self>, r: &CartridgeRef) -> Result<Lease, CartridgeError> {
        let folder = folder_name(&r.id)?;
        if let Some(cartridge) = self.lock().inserted(&r.id) {
            return Ok(Lease::new(&r.id, cartridge));
        }
        if self.files.is_none() {
            if r.source != Source::Local {
                self.remote_fetch(&r.id, r.source).await?;
            }
            return Err(not_found(&r.id));
        }
        let mut force = r.force_redownload;
        for _ in 0..MAX_TRIES {
            let seen = self.stamp(&r.id).await?;
            if let (Some(stamp), false) = (seen, force)
                && let Some(cartridge) = self.lock().current(&folder, stamp)
            {
                return Ok(Lease::new(&r.id, cartridge));
            }
            if seen.is_none() {
                self.lock().forget(&folder);
                if r.source == Source::Local {
                    return Err(not_found(&r.id));
                }
            }
            let (mut flight, started) = self.join_flight(&folder, r)?;
            let loaded = match flight.wait_for(Option::is_some).await {
                Ok(loaded) => loaded.clone(),
                Err(_) => None,
            };
            let (cartridge, stamp) = loaded.unwrap_or_else(|| Err(interrupted(&r.id)))?;
            // A load that began before this call may have read an older file than this call saw.
            if started || Some(stamp) == seen || seen.is_none() {
                return Ok(Lease::new(&r.id, cartridge));
            }
            force = false;
        }
        let reason = "its file keeps changing".to_owned();
        Err(CartridgeError::Busy { id: r.id.clone(), reason })
    }

    /// What can be named, and what is in memory. Looks into the cartridge directory, so it may
    /// block.
    pub fn list(&self) -> Vec<CartridgeInfo> {
        let on_disk = self.files.as_ref().map(|files| files.list()).unwrap_or_default();
        let folders: HashSet<_> = on_disk.iter().filter_map(|id| folder_name(id).ok()).collect();
        let loaded = self.lock().loaded();
        for (folder, id) in loaded.iter().filter(|(folder, _)| !folders.contains(folder)) {
            let gone = self.files.as_ref().is_none_or(|files| matches!(files.stamp(id), Ok(None)));
            if gone {
                self.lock().forget(folder);
            }
        }
        let residents = self.lock();
        let mut list = residents.list();
        // An inserted cartridge hides the file of its id; a loaded file is listed already.
        let is_listed = |id: &String| {
            residents.is_inserted(id)
                || folder_name(id).is_ok_and(|folder| residents.is_loaded(&folder))
        };
        let absent: Vec<_> = on_disk.into_iter().filter(|id| !is_listed(id)).collect();
        list.extend(absent.into_iter().map(|id| CartridgeInfo {
            id,
            source: Origin::Local,
            resident: false,
            retired: false,
            pinned: false,
            generation: None,
            tokens: None,
            frozen_tokens: None,
            bytes: None,
            leases: 0,
        }));
        list
    }

    /// What is in memory and what happened so far; nothing is looked up outside of it.
    pub fn stats(&self) -> RegistryStats {
        self.lock().stats()
    }

    /// Waits for the load of a folder, starting it if there is none. True: this call started it.
    fn join_flight(
        self: &Arc<Self>,
        folder: &str,
        r: &CartridgeRef,
    ) -> Result<(Flight, bool), CartridgeError> {
        let pending = self.flights.len();
        match self.flights.entry(folder.to_owned()) {
            Entry::Occupied(flight) => Ok((flight.get().clone(), false)),
            Entry::Vacant(_) if pending >= limits::MAX_PENDING_CARTRIDGE_LOADS => {
                let reason = format!("{pending} loads are under way");
                Err(CartridgeError::Busy { id: r.id.clone(), reason })
            }
            Entry::Vacant(slot) => {
                let (sender, flight) = watch::channel(None);
                slot.insert(flight.clone());
                let landing = Landing { registry: Arc::clone(self), folder: folder.to_owned() };
                let wanted = r.clone();
                // A task of its own: it outlives a caller that disconnects.
                tokio::spawn(async move {
                    let loaded = landing.registry.load(&landing.folder, &wanted).await;
                    landing.registry.lock().count_load(loaded.is_ok());
                    drop(landing);
                    sender.send_replace(Some(loaded));
                });
                Ok((flight, true))
            }
        }
    }

    async fn load(self: &Arc<Self>, folder: &str, r: &CartridgeRef) -> Loaded {
        let again = r.force_redownload && self.remote.can_fetch(r.source);
        if r.source != Source::Local && (again || self.stamp(&r.id).await?.is_none()) {
            self.remote_fetch(&r.id, r.source).await?;
        }
        let Some(files) = self.files.clone() else {
            return Err(not_found(&r.id));
        };
        let permit = self.permits.acquire().await.map_err(|_| interrupted(&r.id))?;
        let (this, id, folder) = (Arc::clone(self), r.id.clone(), folder.to_owned());
        let work = move || {
            let read = || {
                let (mut intake, room) = this.intake(this.max_file_bytes());
                let stamp = files.read(&id, &mut intake)?;
                Ok((this.settle(intake.finish()?, room.take())?, stamp))
            };
            let (cartridge, stamp) = read().map_err(|error: CartridgeError| error.named(&id))?;
            this.lock().point(&folder, &id, cartridge.generation(), stamp);
            Ok((cartridge, stamp))
        };
        let loaded = tokio::task::spawn_blocking(work).await;
        drop(permit);
        loaded.unwrap_or_else(|_| Err(interrupted(&r.id)))
    }

    async fn stamp(&self, id: &str) -> Result<Option<Stamp>, CartridgeError> {
        let Some(files) = self.files.clone() else {
            return Ok(None);
        };
        let name = id.to_owned();
        let stamp = tokio::task::spawn_blocking(move || files.stamp(&name)).await;
        stamp.unwrap_or_else(|_| Err(interrupted(id)))
    }

    async fn remote_fetch(&self, id: &str, from: Source) -> Result<(), CartridgeError> {
        let (remote, name) = (Arc::clone(&self.remote), id.to_owned());
        let fetched = tokio::task::spawn_blocking(move || remote.fetch(&name, from)).await;
        fetched.unwrap_or_else(|_| Err(interrupted(id)))
    }

    /// Short and without I/O, hence a plain mutex. A panic under it cannot leave it half changed in
    /// a way that matters more than losing every cartridge would.
    pub(super) fn lock(&self) -> MutexGuard<'_, Residents> {
        self.residents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a flight, however its task ends.
struct Landing {
    registry: Arc<Registry>,
    folder: String,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.registry.flights.remove(&self.folder);
    }
}

fn interrupted(id: &str) -> CartridgeError {
    CartridgeError::Busy { id: id.to_owned(), reason: "its load was interrupted".to_owned() }
}
