//! The registry and its remote sources: who is asked when, once for all, and what a source that fails or
//! hangs can do to others.

mod cartridge_support;

use std::{sync::Arc, time::Duration};

use Source::{Huggingface, Wandb};
use cartouche::cartridge::*;
use cartridge_support::*;

fn forced_from(source: Source, id: &str) -> CartridgeRef {
    CartridgeRef { force_redownload: true, ..from(source, id) }
}

type Asked = std::pin::Pin<Box<dyn Future<Output = Result<Lease, CartridgeError>> + Send>>;

/// A forced request that has asked its source, or waits for others that did.
fn begin(registry: &Arc<Registry>, id: &str) -> Asked {
    let (registry, r) = (Arc::clone(registry), forced_from(Huggingface, id));
    let mut asked: Asked = Box::pin(async move { registry.acquire(&r).await });
    let waker = std::task::Waker::noop();
    assert!(asked.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending());
    asked
}

fn broken() -> CartridgeError {
    let (id, reason) = ("a".to_owned(), "answered with 500".to_owned());
    CartridgeError::SourceUnavailable { id, from: Huggingface, reason }
}

#[tokio::test]
async fn memory_then_the_folder_then_the_cache_then_the_source() {
    let Fakes { registry, local, hub, .. } = sources(8);
    let generation = |seed| cartridge(seed).generation();
    hub.put("a", Ok(cartridge(1.)));
    let lease = registry.acquire(&from(Huggingface, "a")).await.unwrap();
    assert_eq!((lease.generation(), hub.fetches(), hub.cache.reads()), (generation(1.), 1, 1));
    // The source has another one by now; nobody asked for that.
    hub.put("a", Ok(cartridge(2.)));
    let lease = registry.acquire(&from(Huggingface, "a")).await.unwrap();
    assert_eq!((lease.generation(), hub.fetches(), hub.cache.reads()), (generation(1.), 1, 1));
    let forced = registry.acquire(&forced_from(Huggingface, "a")).await.unwrap();
    assert_eq!((forced.generation(), hub.fetches()), (generation(2.), 2));
    // A local file goes before what was fetched, unless a source is named and forced.
    local.put("a", Ok(cartridge(3.)));
    let lease = registry.acquire(&from(Huggingface, "a")).await.unwrap();
    assert_eq!(lease.generation(), generation(3.));
    let forced = registry.acquire(&forced_from(Huggingface, "a")).await.unwrap();
    assert_eq!((forced.generation(), hub.fetches()), (generation(2.), 3));
    registry.insert("a", cartridge(4.)).unwrap();
    let lease = registry.acquire(&forced_from(Huggingface, "a")).await.unwrap();
    assert_eq!((lease.generation(), hub.fetches()), (generation(4.), 3));
    // Fakes that this registry was not given are not asked.
    let error = registry.acquire(&from(Source::Http, "b")).await.unwrap_err();
    assert!(error.to_string().contains("`source` = `http`"), "{error}");
    let error = registry.acquire(&cartridge_support::local("b")).await.unwrap_err();
    assert!(matches!(error, CartridgeError::NotFound { .. }), "{error}");
    assert_eq!(hub.fetches(), 3);
}

/// Case 9: one id in two sources, and ids that are written alike.
#[tokio::test]
async fn the_same_id_in_two_sources_never_mixes() {
    let Fakes { registry, local, hub, wandb } = sources(8);
    hub.put("org/a", Ok(cartridge(1.)));
    hub.put("org-a", Ok(cartridge(2.)));
    wandb.put("org/a", Ok(cartridge(3.)));
    for _ in 0..2 {
        for (source, id, seed) in
            [(Huggingface, "org/a", 1.), (Huggingface, "org-a", 2.), (Wandb, "org/a", 3.)]
        {
            let lease = registry.acquire(&from(source, id)).await.unwrap();
            assert_eq!(lease.generation(), cartridge(seed).generation(), "{source} {id}");
        }
    }
    assert_eq!((hub.fetches(), wandb.fetches(), local.reads()), (2, 1, 0));
    let listed: Vec<_> = registry.info("org/a").into_iter().map(|info| info.source).collect();
    assert_eq!(listed.len(), 2, "{listed:?}");
    assert!(listed.contains(&Origin::Huggingface) && listed.contains(&Origin::Wandb));
}

/// Case 7: a herd on a cold id.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixty_four_first_uses_of_a_remote_cartridge_are_one_fetch() {
    let Fakes { registry, hub, .. } = sources(8);
    hub.put("a", Ok(cartridge(1.)));
    let gate = hub.close("a");
    let herd: Vec<_> = (0..64).map(|_| ask(&registry, from(Huggingface, "a"))).collect();
    until(|| hub.fetches() == 1).await;
    gate.add_permits(1000);
    for member in herd {
        let lease = member.await.unwrap().unwrap();
        assert_eq!(lease.generation(), cartridge(1.).generation());
    }
    assert_eq!((hub.fetches(), hub.cache.reads()), (1, 1));
}

/// Case 6, and SkyRL#1606: every item of a batch says `force_redownload`.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_forced_batch_is_one_fetch() {
    let Fakes { registry, hub, .. } = sources(8);
    hub.put("a", Ok(cartridge(1.)));
    registry.acquire(&from(Huggingface, "a")).await.unwrap();
    hub.put("a", Ok(cartridge(2.)));
    let gate = hub.close("a");
    let batch: Vec<_> = (0..512).map(|_| begin(&registry, "a")).collect();
    gate.add_permits(1000);
    for item in batch {
        assert_eq!(item.await.unwrap().generation(), cartridge(2.).generation());
    }
    assert_eq!(hub.fetches(), 2);
}

/// A fetch that began long before a forced request may bring what was there before.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_forced_request_does_not_join_an_old_fetch() {
    let Fakes { registry, hub, .. } = sources(8);
    hub.put("a", Ok(cartridge(1.)));
    let gate = hub.close("a");
    let early = ask(&registry, from(Huggingface, "a"));
    until(|| hub.fetches() == 1).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    hub.put("a", Ok(cartridge(2.)));
    let late: Vec<_> = (0..8).map(|_| ask(&registry, forced_from(Huggingface, "a"))).collect();
    gate.add_permits(1000);
    assert_eq!(early.await.unwrap().unwrap().generation(), cartridge(1.).generation());
    for late in late {
        assert_eq!(late.await.unwrap().unwrap().generation(), cartridge(2.).generation());
    }
}

/// Cases 7 and 8: a herd on an id that fails asks once, and who comes later is told without asking again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_failed_fetch_is_remembered_for_a_while_and_force_goes_past_that() {
    let Fakes { registry, local, hub, .. } = sources(8);
    hub.put("a", Err(broken()));
    let gate = hub.close("a");
    let herd: Vec<_> = (0..64).map(|_| begin(&registry, "a")).collect();
    gate.add_permits(1000);
    for member in herd {
        let error = member.await.unwrap_err();
        assert_eq!(error.code(), "cartridge_source_unavailable", "{error}");
    }
    assert_eq!(hub.fetches(), 1);
    // Each failure doubles the wait: half a minute now, which this test takes on no machine.
    for _ in 0..5 {
        registry.acquire(&forced_from(Huggingface, "a")).await.unwrap_err();
    }
    for _ in 0..64 {
        let later = registry.acquire(&from(Huggingface, "a")).await.unwrap_err();
        assert!(later.to_string().contains("the source is asked again in"), "{later}");
        assert_eq!(later.code(), "cartridge_source_unavailable");
    }
    assert_eq!(hub.fetches(), 6);
    let stats = registry.stats();
    assert_eq!((stats.fetches, stats.fetch_failures), (6, 6));
    // Another source, another id and a file that appears are not held up.
    registry.acquire(&from(Wandb, "a")).await.unwrap_err();
    hub.put("b", Ok(cartridge(1.)));
    registry.acquire(&from(Huggingface, "b")).await.unwrap();
    local.put("a", Ok(cartridge(3.)));
    registry.acquire(&from(Huggingface, "a")).await.unwrap();
    local.files.lock().unwrap().remove("a");
    hub.put("a", Ok(cartridge(2.)));
    registry.acquire(&from(Huggingface, "a")).await.unwrap_err();
    let forced = registry.acquire(&forced_from(Huggingface, "a")).await.unwrap();
    assert_eq!(forced.generation(), cartridge(2.).generation());
    registry.acquire(&from(Huggingface, "a")).await.unwrap();
}

/// What is there is served when its source is down, but never to who asked for the present content.
#[tokio::test]
async fn a_failed_forced_fetch_is_an_error_and_the_cached_generation_stays() {
    let Fakes { registry, hub, .. } = sources(8);
    hub.put("a", Ok(cartridge(1.)));
    let before = registry.acquire(&from(Huggingface, "a")).await.unwrap();
    hub.put("a", Err(broken()));
    let error = registry.acquire(&forced_from(Huggingface, "a")).await.unwrap_err();
    assert_eq!(error.code(), "cartridge_source_unavailable", "{error}");
    let after = registry.acquire(&from(Huggingface, "a")).await.unwrap();
    assert_eq!(after.generation(), before.generation());
    // Also when it has to be read again.
    registry.unload("a").await.unwrap();
    let after = registry.acquire(&from(Huggingface, "a")).await.unwrap();
    assert_eq!(after.generation(), before.generation());
}

/// What is wrong with fetched content is told like that of a file; it is not taken for the source's fault.
#[tokio::test]
async fn a_fetched_cartridge_of_another_model_is_refused() {
    let Fakes { registry, hub, .. } = sources(8);
    let one_layer = Cartridge::new(cartridge(1.).layers()[..1].to_vec(), 0, Provenance::default());
    hub.put("a", Ok(one_layer.unwrap()));
    for _ in 0..2 {
        let error = registry.acquire(&from(Huggingface, "a")).await.unwrap_err();
        assert!(matches!(&error, CartridgeError::Mismatch { name, .. } if name == "a"), "{error}");
    }
    assert_eq!(hub.fetches(), 1);
    hub.put("a", Ok(cartridge(1.)));
    registry.acquire(&forced_from(Huggingface, "a")).await.unwrap();
}

/// Defect 0.5 #7: sources that hang hold up neither files, nor other sources, nor what they delivered before;
/// and no more of their fetches wait than a limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn hanging_fetches_hold_up_nobody_else() {
    let Fakes { registry, local, hub, wandb } = sources(200);
    hub.put("fetched", Ok(cartridge(9.)));
    registry.acquire(&from(Huggingface, "fetched")).await.unwrap();
    let ids: Vec<String> =
        (0..cartouche::limits::MAX_PENDING_FETCHES).map(|i| i.to_string()).collect();
    let gates: Vec<_> = ids.iter().map(|id| hub.close(id)).collect();
    let hanging: Vec<_> = ids
        .iter()
        .map(|id| {
            hub.put(id, Ok(cartridge(2.)));
            begin(&registry, id)
        })
        .collect();
    until(|| hub.fetches() == 1 + cartouche::limits::MAX_CONCURRENT_FETCHES).await;
    let full = registry.acquire(&forced_from(Huggingface, "more")).await.unwrap_err();
    assert!(matches!(&full, CartridgeError::Busy { id, .. } if id == "more"), "{full}");
    let soon = |r| tokio::time::timeout(Duration::from_secs(20), ask(&registry, r));
    local.put("file", Ok(cartridge(3.)));
    wandb.put("run", Ok(cartridge(4.)));
    for r in [cartridge_support::local("file"), from(Wandb, "run"), from(Huggingface, "fetched")] {
        soon(r).await.unwrap().unwrap().unwrap();
    }
    for gate in gates {
        gate.add_permits(1000);
    }
    for hanging in hanging {
        hanging.await.unwrap();
    }
}

/// Case 7: an id whose source hangs, for those who wait behind it.
#[tokio::test(start_paused = true)]
async fn who_waits_behind_hanging_fetches_is_told_in_bounded_time() {
    let Fakes { registry, hub, .. } = sources(8);
    let limit = cartouche::limits::MAX_CONCURRENT_FETCHES;
    let ids: Vec<_> = (0..limit).map(|i| i.to_string()).collect();
    let gates: Vec<_> = ids.iter().map(|id| hub.close(id)).collect();
    let hanging: Vec<_> = ids.iter().map(|id| begin(&registry, id)).collect();
    let behind = begin(&registry, "behind");
    // The clock is the test's. All are given their turn to wait before it goes on.
    until_idle(|| hub.fetches() == limit).await;
    tokio::time::advance(Duration::from_secs(cartouche::limits::FETCH_TURN_SECONDS + 1)).await;
    let error = behind.await.unwrap_err();
    assert!(matches!(&error, CartridgeError::Busy { id, .. } if id == "behind"), "{error}");
    gates.iter().for_each(|gate| gate.add_permits(1000));
    for hanging in hanging {
        hanging.await.unwrap_err();
    }
    // It was no failure of the source.
    hub.put("behind", Ok(cartridge(1.)));
    registry.acquire(&from(Huggingface, "behind")).await.unwrap();
}

/// While the clock is stopped.
async fn until_idle(done: impl Fn() -> bool) {
    while !done() {
        tokio::task::yield_now().await;
    }
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// Case 2: abort while it is still being fetched.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_fetch_and_its_load_survive_the_one_who_asked() {
    let Fakes { registry, hub, .. } = sources(1);
    hub.put("a", Ok(cartridge(1.)));
    let gate = hub.close("a");
    let asked = ask(&registry, from(Huggingface, "a"));
    until(|| hub.fetches() == 1).await;
    asked.abort();
    gate.add_permits(1000);
    until(|| resident(&registry) == ["a"]).await;
    // No lease and no room was lost with the request.
    until(|| registry.stats().leases == 0).await;
    hub.put("b", Ok(cartridge(2.)));
    registry.acquire(&from(Huggingface, "b")).await.unwrap();
    assert_eq!(hub.fetches(), 2);
}

/// A panicking source ends its own requests, with an error.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_panic_in_a_source_is_an_error_of_its_requests() {
    struct Panics;
    impl FileSource for Panics {
        fn stamp(&self, _: &str) -> Result<Option<Stamp>, CartridgeError> {
            Ok(None)
        }
        fn read(&self, _: &str, _: &mut Intake<'_>) -> Result<Stamp, CartridgeError> {
            unreachable!()
        }
        fn list(&self) -> Vec<String> {
            Vec::new()
        }
    }
    impl RemoteSource for Panics {
        fn fetch(&self, _: &str) -> Result<(), CartridgeError> {
            panic!("a bug")
        }
    }
    let remotes = vec![(Wandb, Arc::new(Panics) as Arc<dyn RemoteSource>)];
    let registry = Registry::with_sources(options(1), None, remotes);
    for _ in 0..2 {
        let error = registry.acquire(&from(Wandb, "a")).await.unwrap_err();
        assert!(matches!(error, CartridgeError::Busy { .. }), "{error}");
    }
}
