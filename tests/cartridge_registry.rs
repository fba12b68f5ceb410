//! The registry under concurrency: one load for many, leases that outlive replacement, eviction that never
//! takes what is lent, and slow or failing sources that disturb nobody else.

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
    Cartridge, CartridgeError, CartridgeRef, FileSource, KvShape, LayerKv, Provenance, Registry,
    RegistryOptions, RemoteSource, Source, Stamp,
};
use tokio::sync::Semaphore;

const SHAPE: KvShape = KvShape {
    layers: 2,
    kv_heads: 2,
    head_dim: 4,
};
/// Bytes of one cartridge of four tokens as f32.
const BYTES: u64 = 2 * 2 * 2 * 4 * 4 * 4;

fn cartridge(seed: f32) -> Cartridge {
    let layer = |offset: f32| {
        let tensor = |add: f32| Tensor::full(seed + offset + add, (2, 4, 4), &Device::Cpu).unwrap();
        LayerKv {
            keys: tensor(0.25),
            values: tensor(0.5),
            bias: None,
        }
    };
    Cartridge::new(vec![layer(0.), layer(1.)], 1, Provenance::default()).unwrap()
}

/// Files in memory. Reading an id whose gate is closed blocks until it is opened.
#[derive(Default)]
struct Fake {
    files: Mutex<HashMap<String, (Result<Cartridge, CartridgeError>, Stamp)>>,
    reads: AtomicUsize,
    gates: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Fake {
    fn put(&self, id: &str, content: Result<Cartridge, CartridgeError>) {
        let mut files = self.files.lock().unwrap();
        let stamp = Stamp {
            len: files.get(id).map_or(0, |file| file.1.len) + 1,
            ..Stamp::default()
        };
        files.insert(id.to_owned(), (content, stamp));
    }

    fn close(&self, id: &str) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        self.gates
            .lock()
            .unwrap()
            .insert(id.to_owned(), Arc::clone(&gate));
        gate
    }

    fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }
}

impl FileSource for Fake {
    fn stamp(&self, id: &str) -> Result<Option<Stamp>, CartridgeError> {
        Ok(self.files.lock().unwrap().get(id).map(|file| file.1))
    }

    fn read(&self, id: &str, _: u64) -> Result<(Cartridge, Stamp), CartridgeError> {
        let file = self.files.lock().unwrap()[id].clone();
        self.reads.fetch_add(1, Ordering::SeqCst);
        let gate = self.gates.lock().unwrap().get(id).cloned();
        while gate
            .as_ref()
            .is_some_and(|gate| gate.try_acquire().is_err())
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok((file.0?, file.1))
    }

    fn list(&self) -> Vec<String> {
        self.files.lock().unwrap().keys().cloned().collect()
    }
}

struct NoRemote;

impl RemoteSource for NoRemote {
    fn can_fetch(&self, _: Source) -> bool {
        false
    }

    fn fetch(&self, id: &str, from: Source) -> Result<(), CartridgeError> {
        let (id, reason) = (id.to_owned(), "offline".to_owned());
        Err(CartridgeError::SourceUnavailable { id, from, reason })
    }
}

fn options(cartridges: u64) -> RegistryOptions {
    RegistryOptions {
        dir: None,
        shape: SHAPE,
        model: "demo".into(),
        max_positions: 64,
        device: Device::Cpu,
        dtype: DType::F32,
        byte_budget: cartridges * BYTES,
        max_file_bytes: 1 << 20,
    }
}

fn registry(cartridges: u64) -> (Arc<Registry>, Arc<Fake>) {
    let fake = Arc::new(Fake::default());
    let registry = Registry::with_sources(
        options(cartridges),
        Some(Arc::clone(&fake) as Arc<dyn FileSource>),
        Arc::new(NoRemote),
    );
    (registry, fake)
}

fn local(id: &str) -> CartridgeRef {
    CartridgeRef {
        id: id.into(),
        source: Source::Local,
        force_redownload: false,
    }
}

fn forced(id: &str) -> CartridgeRef {
    CartridgeRef {
        force_redownload: true,
        ..local(id)
    }
}

fn resident(registry: &Registry) -> Vec<String> {
    registry
        .list()
        .into_iter()
        .filter(|info| info.resident)
        .map(|info| info.id)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixty_four_first_uses_are_one_load() {
    let (registry, fake) = registry(8);
    fake.put("a", Ok(cartridge(1.)));
    let gate = fake.close("a");
    let tasks: Vec<_> = (0..64)
        .map(|_| {
            let registry = Arc::clone(&registry);
            tokio::spawn(async move { registry.acquire(&local("a")).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    gate.add_permits(64);
    for task in tasks {
        assert_eq!(
            task.await.unwrap().unwrap().generation(),
            cartridge(1.).generation()
        );
    }
    assert_eq!(fake.reads(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_load_fails_all_waiters_and_is_not_remembered() {
    let (registry, fake) = registry(8);
    let error = CartridgeError::Invalid {
        name: "a".into(),
        reason: "half written".into(),
    };
    fake.put("a", Err(error.clone()));
    let gate = fake.close("a");
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let registry = Arc::clone(&registry);
            tokio::spawn(async move { registry.acquire(&local("a")).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    gate.add_permits(1000);
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap_err(), error);
    }
    assert_eq!(fake.reads(), 1);
    fake.put("a", Ok(cartridge(1.)));
    registry.acquire(&local("a")).await.unwrap();
}

#[tokio::test]
async fn a_replaced_file_is_a_new_generation_and_the_old_lease_stays_readable() {
    let (registry, fake) = registry(8);
    fake.put("a", Ok(cartridge(1.)));
    let old = registry.acquire(&local("a")).await.unwrap();
    fake.put("a", Ok(cartridge(2.)));
    let new = registry.acquire(&local("a")).await.unwrap();
    assert_ne!(old.generation(), new.generation());
    let first = |c: &Cartridge| {
        c.layers()[0]
            .keys
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()[0]
    };
    assert_eq!((first(&old), first(&new)), (1.25, 2.25));
    let list = registry.list();
    let state: Vec<_> = list
        .iter()
        .map(|i| (i.id.as_str(), i.resident, i.retired, i.leases))
        .collect();
    assert_eq!(state, [("a", true, false, 1), ("a", false, true, 1)]);
    drop(old);
    assert_eq!(
        registry.list().len(),
        1,
        "the retired generation went with its last lease"
    );
}

#[tokio::test]
async fn force_reads_again_and_unforced_does_not() {
    let (registry, fake) = registry(8);
    fake.put("a", Ok(cartridge(1.)));
    let first = registry.acquire(&local("a")).await.unwrap();
    registry.acquire(&local("a")).await.unwrap();
    assert_eq!(fake.reads(), 1);
    // The content changes under an unchanged stamp.
    fake.files.lock().unwrap().get_mut("a").unwrap().0 = Ok(cartridge(3.));
    assert_eq!(
        registry.acquire(&local("a")).await.unwrap().generation(),
        first.generation()
    );
    let second = registry.acquire(&forced("a")).await.unwrap();
    assert_eq!(second.generation(), cartridge(3.).generation());
    assert_eq!(
        registry.acquire(&local("a")).await.unwrap().generation(),
        second.generation()
    );
    assert_eq!(fake.reads(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_batch_of_forced_requests_shares_reads() {
    let (registry, fake) = registry(8);
    fake.put("a", Ok(cartridge(1.)));
    let gate = fake.close("a");
    let tasks: Vec<_> = (0..256)
        .map(|_| {
            let registry = Arc::clone(&registry);
            tokio::spawn(async move { registry.acquire(&forced("a")).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    gate.add_permits(1000);
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(fake.reads(), 1);
}

/// A load that began before a file was replaced must not answer a request that came after.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_request_never_gets_an_older_file_than_it_found() {
    let (registry, fake) = registry(8);
    fake.put("a", Ok(cartridge(1.)));
    let gate = fake.close("a");
    let early = tokio::spawn({
        let registry = Arc::clone(&registry);
        async move { registry.acquire(&local("a")).await }
    });
    while fake.reads() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    fake.put("a", Ok(cartridge(2.)));
    let late = tokio::spawn({
        let registry = Arc::clone(&registry);
        async move { registry.acquire(&local("a")).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    gate.add_permits(1000);
    assert_eq!(
        early.await.unwrap().unwrap().generation(),
        cartridge(1.).generation()
    );
    assert_eq!(
        late.await.unwrap().unwrap().generation(),
        cartridge(2.).generation()
    );
}

#[tokio::test]
async fn the_least_recently_used_is_evicted_and_comes_back() {
    let (registry, fake) = registry(2);
    for (id, seed) in [("a", 1.), ("b", 2.), ("c", 3.)] {
        fake.put(id, Ok(cartridge(seed)));
    }
    for id in ["a", "b", "a", "c"] {
        registry.acquire(&local(id)).await.unwrap();
    }
    assert_eq!(resident(&registry), ["a", "c"]);
    let listed = registry.list();
    assert_eq!(
        listed.len(),
        3,
        "an evicted cartridge is still on disk: {listed:?}"
    );
    let b = registry.acquire(&local("b")).await.unwrap();
    assert_eq!(b.generation(), cartridge(2.).generation());
    assert_eq!(
        (fake.reads(), resident(&registry)),
        (4, vec!["b".to_owned(), "c".to_owned()])
    );
}

#[tokio::test]
async fn what_is_lent_is_never_evicted() {
    let (registry, fake) = registry(2);
    for (id, seed) in [("a", 1.), ("b", 2.), ("c", 3.)] {
        fake.put(id, Ok(cartridge(seed)));
    }
    let a = registry.acquire(&local("a")).await.unwrap();
    let b = registry.acquire(&local("b")).await.unwrap();
    let error = registry.acquire(&local("c")).await.unwrap_err();
    assert!(
        matches!(&error, CartridgeError::Busy { id, .. } if id == "c"),
        "{error}"
    );
    assert_eq!(resident(&registry), ["a", "b"]);
    drop(a);
    registry.acquire(&local("c")).await.unwrap();
    assert_eq!(resident(&registry), ["b", "c"]);
    // A retired generation counts as long as it is lent.
    fake.put("b", Ok(cartridge(4.)));
    let new_b = registry.acquire(&local("b")).await.unwrap();
    assert!(matches!(
        registry.acquire(&local("c")).await,
        Err(CartridgeError::Busy { .. })
    ));
    drop(b);
    registry.acquire(&local("c")).await.unwrap();
    drop(new_b);
}

#[tokio::test]
async fn one_content_under_two_names_is_kept_once() {
    let (registry, fake) = registry(1);
    fake.put("a", Ok(cartridge(1.)));
    fake.put("b", Ok(cartridge(1.)));
    let a = registry.acquire(&local("a")).await.unwrap();
    let b = registry.acquire(&local("b")).await.unwrap();
    assert_eq!((a.id(), b.id()), ("a", "b"));
    assert!(
        a.layers()[0].keys.id() == b.layers()[0].keys.id(),
        "the same tensors"
    );
    // Retiring one name keeps what the other one needs.
    fake.put(
        "b",
        Err(CartridgeError::Invalid {
            name: "b".into(),
            reason: "gone bad".into(),
        }),
    );
    assert!(registry.acquire(&local("b")).await.is_err());
    assert_eq!(
        registry.acquire(&local("a")).await.unwrap().generation(),
        a.generation()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_slow_file_does_not_hold_up_another_id() {
    let (registry, fake) = registry(8);
    fake.put("slow", Ok(cartridge(1.)));
    fake.put("fast", Ok(cartridge(2.)));
    fake.put(
        "broken",
        Err(CartridgeError::Invalid {
            name: String::new(),
            reason: "x".into(),
        }),
    );
    let gate = fake.close("slow");
    let slow = tokio::spawn({
        let registry = Arc::clone(&registry);
        async move { registry.acquire(&local("slow")).await }
    });
    while fake.reads() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let soon = |id: &'static str| {
        let registry = Arc::clone(&registry);
        async move { tokio::time::timeout(Duration::from_secs(10), registry.acquire(&local(id))).await }
    };
    soon("broken").await.unwrap().unwrap_err();
    soon("fast").await.unwrap().unwrap();
    assert!(!slow.is_finished());
    gate.add_permits(1);
    slow.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_load_survives_the_one_who_asked() {
    let (registry, fake) = registry(8);
    fake.put("a", Ok(cartridge(1.)));
    let gate = fake.close("a");
    let asked = tokio::spawn({
        let registry = Arc::clone(&registry);
        async move { registry.acquire(&local("a")).await }
    });
    while fake.reads() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    asked.abort();
    gate.add_permits(1);
    while resident(&registry).is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(registry.acquire(&local("a")).await.unwrap().id(), "a");
    assert_eq!(fake.reads(), 1);
}

#[tokio::test]
async fn inserted_cartridges_are_pinned_and_found_from_any_source() {
    let (registry, fake) = registry(2);
    let built_in = registry.insert("demo", cartridge(1.)).unwrap();
    fake.put("demo", Ok(cartridge(9.)));
    fake.put("a", Ok(cartridge(2.)));
    fake.put("b", Ok(cartridge(3.)));
    for source in [Source::Wandb, Source::Local, Source::Huggingface] {
        let wanted = CartridgeRef {
            source,
            ..forced("demo")
        };
        assert_eq!(
            registry.acquire(&wanted).await.unwrap().generation(),
            built_in
        );
    }
    for id in ["a", "b", "a"] {
        registry.acquire(&local(id)).await.unwrap();
        assert!(resident(&registry).contains(&"demo".to_owned()));
    }
    let pinned: Vec<_> = registry
        .list()
        .into_iter()
        .filter(|info| info.pinned)
        .collect();
    assert_eq!(
        (pinned.len(), pinned[0].tokens, pinned[0].bytes),
        (1, Some(4), Some(BYTES))
    );
    // Publishing again under the name replaces it for new requests only.
    let lease = registry.acquire(&local("demo")).await.unwrap();
    let newer = registry.insert("demo", cartridge(5.)).unwrap();
    assert_eq!(
        registry.acquire(&local("demo")).await.unwrap().generation(),
        newer
    );
    assert_eq!(lease.generation(), built_in);
}

#[tokio::test]
async fn a_cartridge_that_does_not_fit_is_never_published() {
    let (registry, fake) = registry(1);
    let one_layer = Cartridge::new(
        cartridge(1.).layers()[..1].to_vec(),
        0,
        Provenance::default(),
    );
    fake.put("other", Ok(one_layer.unwrap()));
    let error = registry.acquire(&local("other")).await.unwrap_err();
    assert!(
        matches!(&error, CartridgeError::Mismatch { name, .. } if name == "other"),
        "{error}"
    );
    fake.put("nan", Ok(cartridge(f32::NAN)));
    let error = registry.acquire(&local("nan")).await.unwrap_err();
    assert!(
        matches!(&error, CartridgeError::Invalid { name, .. } if name == "nan"),
        "{error}"
    );
    let long = |tokens| {
        let zeros = Tensor::zeros((2, tokens, 4), DType::BF16, &Device::Cpu).unwrap();
        let layer = LayerKv {
            keys: zeros.clone(),
            values: zeros,
            bias: None,
        };
        Cartridge::new(vec![layer; 2], 0, Provenance::default()).unwrap()
    };
    fake.put("long", Ok(long(64)));
    let error = registry.acquire(&local("long")).await.unwrap_err();
    let too_large = |e: &CartridgeError, unit| matches!(e, CartridgeError::TooLarge { what, .. } if *what == unit);
    assert!(too_large(&error, "tokens"), "{error}");
    // It fits as bf16, but not as the f32 it is to be kept as.
    fake.put("wide", Ok(long(5)));
    let error = registry.acquire(&local("wide")).await.unwrap_err();
    assert!(too_large(&error, "bytes in memory"), "{error}");
    assert!(resident(&registry).is_empty());
    // Nothing stayed reserved.
    fake.put("a", Ok(cartridge(1.)));
    registry.acquire(&local("a")).await.unwrap();
}

#[tokio::test]
async fn numbers_that_overflow_the_servers_type_are_refused() {
    let fake = Arc::new(Fake::default());
    let options = RegistryOptions {
        dtype: DType::F16,
        ..options(1)
    };
    let files = Some(Arc::clone(&fake) as Arc<dyn FileSource>);
    let registry = Registry::with_sources(options, files, Arc::new(NoRemote));
    fake.put("big", Ok(cartridge(1e6)));
    let error = registry.acquire(&local("big")).await.unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    fake.put("big", Ok(cartridge(1.)));
    assert_eq!(
        registry.acquire(&local("big")).await.unwrap().dtype(),
        DType::F16
    );
    assert_eq!(
        registry.acquire(&local("big")).await.unwrap().generation(),
        cartridge(1.).generation()
    );
}

#[tokio::test]
async fn remote_sources_are_looked_for_at_home_first() {
    let (registry, fake) = registry(2);
    let remote = |source, force_redownload| CartridgeRef {
        id: "a".into(),
        source,
        force_redownload,
    };
    for source in [Source::Wandb, Source::Huggingface] {
        let error = registry.acquire(&remote(source, false)).await.unwrap_err();
        assert!(matches!(error, CartridgeError::SourceUnavailable { from, .. } if from == source));
    }
    assert!(matches!(
        registry.acquire(&remote(Source::Local, false)).await,
        Err(CartridgeError::NotFound { .. })
    ));
    fake.put("a", Ok(cartridge(1.)));
    registry
        .acquire(&remote(Source::Wandb, false))
        .await
        .unwrap();
    registry
        .acquire(&remote(Source::Huggingface, true))
        .await
        .unwrap();
    assert_eq!(fake.reads(), 2);
}

#[tokio::test]
async fn without_a_directory_only_inserted_ids_exist() {
    let registry = Registry::new(options(1));
    registry.insert("demo", cartridge(1.)).unwrap();
    registry.acquire(&local("demo")).await.unwrap();
    assert!(matches!(
        registry.acquire(&local("x")).await,
        Err(CartridgeError::NotFound { .. })
    ));
    let remote = CartridgeRef {
        source: Source::Wandb,
        ..local("x")
    };
    let error = registry.acquire(&remote).await.unwrap_err();
    assert_eq!(error.code(), "cartridge_source_unavailable");
    assert!(error.to_string().contains("`source` = `wandb`"), "{error}");
    let error = registry.acquire(&local("..")).await.unwrap_err();
    assert_eq!(error.code(), "cartridge_id_invalid");
}

/// Seeded confusion: many tasks use, replace and force a few ids under a tight budget. Every lease holds
/// what some version of its file held, and in the end the books balance.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn books_balance_after_confusion() {
    use rand::{RngExt, SeedableRng};
    let (registry, fake) = registry(3);
    let ids = ["a", "b", "c", "d", "e"];
    for (i, id) in ids.iter().enumerate() {
        fake.put(id, Ok(cartridge(i as f32)));
    }
    let tasks: Vec<_> = (0..16)
        .map(|task| {
            let (registry, fake) = (Arc::clone(&registry), Arc::clone(&fake));
            tokio::spawn(async move {
                let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(task);
                for _ in 0..40 {
                    let id = ids[random.random_range(0..ids.len())];
                    match random.random_range(0..8) {
                        0 => fake.put(id, Ok(cartridge(random.random_range(0..9) as f32))),
                        choice => {
                            let wanted = if choice == 1 { forced(id) } else { local(id) };
                            match registry.acquire(&wanted).await {
                                Ok(lease) => assert_eq!((lease.id(), lease.tokens()), (id, 4)),
                                Err(error) => assert!(matches!(error, CartridgeError::Busy { .. })),
                            }
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let list = registry.list();
    assert!(
        list.iter().all(|info| info.leases == 0 && !info.retired),
        "{list:?}"
    );
    let generations: std::collections::HashSet<_> =
        list.iter().filter_map(|info| info.generation).collect();
    assert!(generations.len() <= 3, "{list:?}");
    for id in ids {
        registry.acquire(&local(id)).await.unwrap();
    }
}
