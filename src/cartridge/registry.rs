//! Lends cartridges to requests: finds, loads, checks, keeps and evicts them.
//!
//! A name points at a generation; residents are kept by generation, so two names of one content
//! share memory, and a replaced file is a new generation while running requests keep the old one.
//!
//! `lookup.rs` is the way of a request to its cartridge, `publish.rs` and `manage.rs` what an operator does.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use candle_core::{DType, Device};
use tokio::sync::Semaphore;

use super::{
    Cartridge, CartridgeError, CartridgeRef, FileSource, Generation, KvShape, Lease, LocalFolder,
    Origin, RemoteSource, Source, Stamp, failures::Failures, flights::Flights, folder_name,
    names::NameKey, residents::Residents, staging::WithoutRoom,
};
use crate::{gpu::is_gpu, limits};

/// What a registry serves and how much it may keep.
#[derive(Debug)]
pub struct RegistryOptions {
    /// Directory of the cartridge folders; `None` leaves inserted cartridges and remote sources.
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
    /// Host memory for cartridges that had to leave a GPU. On the CPU there is no such tier, whatever is
    /// said here.
    pub host_budget: u64,
    /// Nothing of a larger file is read, nor of one that cannot fit the budget.
    pub max_file_bytes: u64,
    /// How long a file that was looked at is taken to be unchanged. What this registry does itself
    /// (publications, deletions, unloading, `force_redownload`) counts at once. Zero looks at every use.
    pub revalidate: Duration,
}

/// Where the numbers of a cartridge are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Where the model computes, a GPU or host memory: ready for the next request.
    Device,
    /// Beside a GPU, to be copied there.
    Host,
    /// In a file of the cartridge directory, or of the cache of a remote source.
    Disk,
}

/// A line of [`Registry::list`].
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct CartridgeInfo {
    pub id: String,
    pub source: Origin,
    /// Ready for the next request. A file that was not used yet is registered, not resident.
    pub resident: bool,
    /// Replaced, unloaded or deleted under its name, kept only by the leases of running requests.
    pub retired: bool,
    /// Never evicted.
    pub pinned: bool,
    pub tier: Tier,
    /// Known once loaded, like the four sizes below.
    pub generation: Option<Generation>,
    pub tokens: Option<usize>,
    pub frozen_tokens: Option<usize>,
    pub bytes: Option<u64>,
    pub leases: usize,
}

impl CartridgeInfo {
    /// Of a file that is in no memory.
    pub(super) fn on_disk(id: String, source: Origin) -> Self {
        Self {
            id,
            source,
            resident: false,
            retired: false,
            pinned: false,
            tier: Tier::Disk,
            generation: None,
            tokens: None,
            frozen_tokens: None,
            bytes: None,
            leases: 0,
        }
    }
}

/// A momentary reading of a registry, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RegistryStats {
    /// Cartridges on the device, replaced ones that are still leased included.
    pub resident: usize,
    /// Bytes they take.
    pub bytes: u64,
    /// Bytes they may take.
    pub budget: u64,
    /// Leases on them.
    pub leases: usize,
    /// Cartridges in host memory beside a GPU, bytes they take and may take.
    pub host: usize,
    pub host_bytes: u64,
    pub host_budget: u64,
    /// Since the start: files read, loads that failed, cartridges that left the device, those that came back
    /// from host memory, fetches from remote sources, and fetches that failed.
    pub loads: u64,
    pub load_failures: u64,
    pub evictions: u64,
    pub restores: u64,
    pub fetches: u64,
    pub fetch_failures: u64,
}

/// The result of one load, shared by all that wait for it.
pub(super) type Loaded = Result<(Arc<Cartridge>, Stamp), CartridgeError>;
/// Of a fetch and the load of what it brought.
pub(super) type Fetched = Result<Arc<Cartridge>, CartridgeError>;

/// Lends cartridges to requests. Cheap to share: methods take `&self` and hold no lock while they
/// wait.
pub struct Registry {
    pub(super) options: RegistryOptions,
    pub(super) local: Option<Arc<dyn FileSource>>,
    pub(super) remotes: Vec<Remote>,
    residents: Mutex<Residents>,
    pub(super) loads: Arc<Flights<Loaded>>,
    pub(super) load_permits: Semaphore,
    /// Since freed memory was given back to the system.
    pub(super) loaded_bytes: AtomicU64,
    failures: Mutex<Failures>,
    /// The cartridge directory, for publications.
    pub(super) folder: Option<Arc<LocalFolder>>,
    pub(super) uploads: Arc<Semaphore>,
    /// Held while the files of a name are compared and replaced. Names share locks, so that these do not
    /// grow.
    pub(super) edits: Vec<Arc<tokio::sync::Mutex<()>>>,
}

/// A remote source, with permits of its own: one that hangs holds up nobody else.
pub(super) struct Remote {
    pub source: Source,
    pub files: Arc<dyn RemoteSource>,
    pub permits: Arc<Semaphore>,
    pub fetches: Arc<Flights<Fetched>>,
}

/// Locks for changes of files.
const EDIT_LOCKS: usize = 64;

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Registry {
    /// A registry over the folders of `options.dir`. Nothing is read before it is asked for.
    pub fn new(options: RegistryOptions) -> Arc<Self> {
        let files = options.dir.clone().map(|dir| Arc::new(LocalFolder::new(dir)) as Arc<_>);
        Self::with_sources(options, files, Vec::new())
    }

    /// A registry over other sources: `local` is looked at first, whatever source a request names.
    /// Publications go to `options.dir`, which `local` should read.
    pub fn with_sources(
        options: RegistryOptions,
        local: Option<Arc<dyn FileSource>>,
        remotes: Vec<(Source, Arc<dyn RemoteSource>)>,
    ) -> Arc<Self> {
        let remote = |(source, files)| Remote {
            source,
            files,
            permits: Arc::new(Semaphore::new(limits::MAX_CONCURRENT_FETCHES)),
            fetches: Flights::new(limits::MAX_PENDING_FETCHES),
        };
        let host_budget =
            if is_gpu(&options.device, options.dtype) { options.host_budget } else { 0 };
        Arc::new(Self {
            residents: Mutex::new(Residents::new(options.byte_budget, host_budget)),
            local,
            remotes: remotes.into_iter().map(remote).collect(),
            loads: Flights::new(limits::MAX_PENDING_CARTRIDGE_LOADS),
            load_permits: Semaphore::new(limits::MAX_CONCURRENT_CARTRIDGE_LOADS),
            loaded_bytes: AtomicU64::new(0),
            failures: Mutex::default(),
            folder: options.dir.clone().map(|dir| Arc::new(LocalFolder::new(dir))),
            uploads: Arc::new(Semaphore::new(limits::MAX_CONCURRENT_UPLOADS)),
            edits: (0..EDIT_LOCKS).map(|_| Arc::default()).collect(),
            options,
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
            let (mut intake, room) = self.intake(u64::MAX, WithoutRoom::Refuse);
            intake.take(&cartridge)?;
            let cartridge = self.settle(intake.finish()?, room.take())?;
            let generation = cartridge.generation();
            self.lock().insert(id, generation);
            Ok(generation)
        };
        insert().map_err(|error: CartridgeError| error.named(id))
    }

    /// Lends the cartridge a request names, loading it first if need be.
    ///
    /// An inserted one is found first, then the local file of the id, then what was fetched earlier from the
    /// `source` of the request, and at last that source is asked. `force_redownload` asks a remote source in
    /// any case, once for all that ask within a second; of a local file, it reads it even if it looks
    /// unchanged. If that fails, so does the request: it never gets what was there before.
    ///
    /// Fetching, reading, checking and converting happen on blocking threads, at most once at a time per
    /// name, and go on if the caller gives up. A failed load is told to all that waited for it and not
    /// remembered; a failed fetch is for a while, see `failures.rs`. A file that another program changed is a
    /// new generation from the next look on, see [`RegistryOptions::revalidate`].
    ///
    /// # Errors
    /// Any [`CartridgeError`]; never another cartridge than the one asked for.
    pub async fn acquire(self: &Arc<Self>, r: &CartridgeRef) -> Result<Lease, CartridgeError> {
        if let Some(cartridge) = self.in_memory(r) {
            return Ok(Lease::new(&r.id, cartridge));
        }
        let cartridge = self.look_up(r).await?;
        Ok(Lease::new(&r.id, cartridge))
    }

    /// Lends the cartridge a request names if it is in memory: inserted, or loaded before from the cartridge
    /// directory or from the source that is named. Looks at no file and asks nobody.
    pub fn resident(&self, r: &CartridgeRef) -> Option<Lease> {
        let mut residents = self.lock();
        let mut cartridge = residents.inserted(&r.id);
        for place in [Source::Local, r.source] {
            let key = NameKey::new(place, &r.id).ok()?;
            let loaded = residents.names.file(&key).map(|file| file.generation);
            cartridge = cartridge.or_else(|| residents.touch(loaded?));
        }
        Some(Lease::new(&r.id, cartridge?))
    }

    /// What needs no look at any file.
    fn in_memory(&self, r: &CartridgeRef) -> Option<Arc<Cartridge>> {
        let mut residents = self.lock();
        let inserted = residents.inserted(&r.id);
        if inserted.is_some() || r.force_redownload {
            return inserted;
        }
        residents.recent(&r.id, r.source, self.options.revalidate)
    }

    /// What is in memory and what happened so far; nothing is looked up outside of it.
    pub fn stats(&self) -> RegistryStats {
        self.lock().stats()
    }

    /// Short and without I/O, hence a plain mutex. A panic under it cannot leave it half changed in
    /// a way that matters more than losing every cartridge would.
    pub(super) fn lock(&self) -> MutexGuard<'_, Residents> {
        self.residents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Likewise.
    pub(super) fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn interrupted(id: &str) -> CartridgeError {
    CartridgeError::Busy { id: id.to_owned(), reason: "its load was interrupted".to_owned() }
}
