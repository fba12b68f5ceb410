//! Cartridges and sources in memory, for the tests of the registry.
#![allow(dead_code, reason = "each test binary uses its share of this module")]

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use candle_core::{DType, Device, Tensor};
use cartouche::cartridge::{
    Cartridge, CartridgeError, CartridgeRef, FileSource, Intake, KvShape, LayerKv, Lease,
    Provenance, Registry, RegistryOptions, RemoteSource, Source, Stamp,
};
use tokio::sync::Semaphore;

pub const SHAPE: KvShape = KvShape { layers: 2, kv_heads: 2, head_dim: 4 };
/// Bytes of one cartridge of four tokens as f32.
pub const BYTES: u64 = 2 * 2 * 2 * 4 * 4 * 4;

pub fn cartridge(seed: f32) -> Cartridge {
    let layer = |offset: f32| {
        let tensor = |add: f32| Tensor::full(seed + offset + add, (2, 4, 4), &Device::Cpu).unwrap();
        LayerKv { keys: tensor(0.25), values: tensor(0.5), bias: None }
    };
    Cartridge::new(vec![layer(0.), layer(1.)], 1, Provenance::default()).unwrap()
}

/// What a file holds, or how reading it fails, and its stamp.
pub type File = (Result<Cartridge, CartridgeError>, Stamp);

/// Files in memory. Reading an id whose gate is closed blocks until it is opened.
#[derive(Default)]
pub struct Fake {
    pub files: Mutex<HashMap<String, File>>,
    reads: AtomicUsize,
    looks: AtomicUsize,
    gates: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Fake {
    pub fn put(&self, id: &str, content: Result<Cartridge, CartridgeError>) {
        let mut files = self.files.lock().unwrap();
        let stamp =
            Stamp { len: files.get(id).map_or(0, |file| file.1.len) + 1, ..Stamp::default() };
        files.insert(id.to_owned(), (content, stamp));
    }

    pub fn close(&self, id: &str) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        self.gates.lock().unwrap().insert(id.to_owned(), Arc::clone(&gate));
        gate
    }

    pub fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }

    /// How often a stamp was asked for.
    pub fn looks(&self) -> usize {
        self.looks.load(Ordering::SeqCst)
    }
}

impl FileSource for Fake {
    fn stamp(&self, id: &str) -> Result<Option<Stamp>, CartridgeError> {
        self.looks.fetch_add(1, Ordering::SeqCst);
        Ok(self.files.lock().unwrap().get(id).map(|file| file.1))
    }

    fn read(&self, id: &str, intake: &mut Intake<'_>) -> Result<Stamp, CartridgeError> {
        let file = self.files.lock().unwrap()[id].clone();
        self.reads.fetch_add(1, Ordering::SeqCst);
        let gate = self.gates.lock().unwrap().get(id).cloned();
        while gate.as_ref().is_some_and(|gate| gate.try_acquire().is_err()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        intake.take(&file.0?)?;
        Ok(file.1)
    }

    fn list(&self) -> Vec<String> {
        self.files.lock().unwrap().keys().cloned().collect()
    }
}

/// A remote source in memory: what it holds, what was fetched of it, and gates that make a fetch hang until
/// they are opened.
#[derive(Default)]
pub struct FakeRemote {
    pub upstream: Mutex<HashMap<String, Result<Cartridge, CartridgeError>>>,
    pub cache: Fake,
    fetches: AtomicUsize,
    gates: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl FakeRemote {
    pub fn put(&self, id: &str, content: Result<Cartridge, CartridgeError>) {
        self.upstream.lock().unwrap().insert(id.to_owned(), content);
    }

    pub fn close(&self, id: &str) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        self.gates.lock().unwrap().insert(id.to_owned(), Arc::clone(&gate));
        gate
    }

    pub fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }
}

impl FileSource for FakeRemote {
    fn stamp(&self, id: &str) -> Result<Option<Stamp>, CartridgeError> {
        self.cache.stamp(id)
    }

    fn read(&self, id: &str, intake: &mut Intake<'_>) -> Result<Stamp, CartridgeError> {
        self.cache.read(id, intake)
    }

    fn list(&self) -> Vec<String> {
        self.cache.list()
    }
}

impl RemoteSource for FakeRemote {
    fn fetch(&self, id: &str) -> Result<(), CartridgeError> {
        let content = self.upstream.lock().unwrap().get(id).cloned();
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let gate = self.gates.lock().unwrap().get(id).cloned();
        while gate.as_ref().is_some_and(|gate| gate.try_acquire().is_err()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let hint = "no such repository".to_owned();
        let missing = || CartridgeError::NotFound { id: id.to_owned(), hint };
        self.cache.put(id, Ok(content.ok_or_else(missing)??));
        Ok(())
    }
}

/// A registry with a local folder and two remote sources, all in memory.
pub struct Fakes {
    pub registry: Arc<Registry>,
    pub local: Arc<Fake>,
    pub hub: Arc<FakeRemote>,
    pub wandb: Arc<FakeRemote>,
}

pub fn sources(cartridges: u64) -> Fakes {
    let (local, hub, wandb) = (Arc::<Fake>::default(), Arc::default(), Arc::default());
    let registry = Registry::with_sources(
        options(cartridges),
        Some(Arc::clone(&local) as Arc<dyn FileSource>),
        vec![
            (Source::Huggingface, Arc::<FakeRemote>::clone(&hub) as Arc<dyn RemoteSource>),
            (Source::Wandb, Arc::<FakeRemote>::clone(&wandb) as Arc<dyn RemoteSource>),
        ],
    );
    Fakes { registry, local, hub, wandb }
}

/// Asks in a task of its own.
pub fn ask(
    registry: &Arc<Registry>,
    r: CartridgeRef,
) -> tokio::task::JoinHandle<Result<Lease, CartridgeError>> {
    let registry = Arc::clone(registry);
    tokio::spawn(async move { registry.acquire(&r).await })
}

/// Waits for what another task or thread brings about.
pub async fn until(what: impl Fn() -> bool) {
    while !what() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub fn from(source: Source, id: &str) -> CartridgeRef {
    CartridgeRef { source, ..local(id) }
}

pub fn options(cartridges: u64) -> RegistryOptions {
    RegistryOptions {
        dir: None,
        shape: SHAPE,
        model: "demo".into(),
        rope_theta: None,
        rope_scaling: None,
        max_positions: 64,
        device: Device::Cpu,
        dtype: DType::F32,
        byte_budget: cartridges * BYTES,
        host_budget: 0,
        revalidate: std::time::Duration::ZERO,
        max_file_bytes: 1 << 20,
    }
}

pub fn registry(cartridges: u64) -> (Arc<Registry>, Arc<Fake>) {
    let fake = Arc::new(Fake::default());
    let registry = Registry::with_sources(
        options(cartridges),
        Some(Arc::clone(&fake) as Arc<dyn FileSource>),
        Vec::new(),
    );
    (registry, fake)
}

pub fn local(id: &str) -> CartridgeRef {
    CartridgeRef { id: id.into(), source: Source::Local, force_redownload: false }
}

pub fn forced(id: &str) -> CartridgeRef {
    CartridgeRef { force_redownload: true, ..local(id) }
}

pub fn resident(registry: &Registry) -> Vec<String> {
    registry.list().into_iter().filter(|info| info.resident).map(|info| info.id).collect()
}
