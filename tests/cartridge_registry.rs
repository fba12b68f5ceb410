//! The registry under concurrency: one load for many, leases that outlive replacement, and slow or
//! failing sources that disturb nobody else.

mod cartridge_support;

use std::{sync::Arc, time::Duration};

use cartouche::cartridge::*;
use cartridge_support::*;

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
        assert_eq!(task.await.unwrap().unwrap().generation(), cartridge(1.).generation());
    }
    assert_eq!(fake.reads(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_load_fails_all_waiters_and_is_not_remembered() {
    let (registry, fake) = registry(8);
    let error = CartridgeError::Invalid { name: "a".into(), reason: "half written".into() };
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
    let first =
        |c: &Cartridge| c.layers()[0].keys.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
    assert_eq!((first(&old), first(&new)), (1.25, 2.25));
    let list = registry.list();
    let state: Vec<_> =
        list.iter().map(|i| (i.id.as_str(), i.resident, i.retired, i.leases)).collect();
    assert_eq!(state, [("a", true, false, 1), ("a", false, true, 1)]);
    drop(old);
    assert_eq!(registry.list().len(), 1, "the retired generation went with its last lease");
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
    assert_eq!(registry.acquire(&local("a")).await.unwrap().generation(), first.generation());
    let second = registry.acquire(&forced("a")).await.unwrap();
    assert_eq!(second.generation(), cartridge(3.).generation());
    assert_eq!(registry.acquire(&local("a")).await.unwrap().generation(), second.generation());
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
    assert_eq!(early.await.unwrap().unwrap().generation(), cartridge(1.).generation());
    assert_eq!(late.await.unwrap().unwrap().generation(), cartridge(2.).generation());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_slow_file_does_not_hold_up_another_id() {
    let (registry, fake) = registry(8);
    fake.put("slow", Ok(cartridge(1.)));
    fake.put("fast", Ok(cartridge(2.)));
    fake.put("broken", Err(CartridgeError::Invalid { name: String::new(), reason: "x".into() }));
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
        let limit = Duration::from_secs(10);
        async move { tokio::time::timeout(limit, registry.acquire(&local(id))).await }
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
async fn remote_sources_are_looked_for_at_home_first() {
    let (registry, fake) = registry(2);
    let remote =
        |source, force_redownload| CartridgeRef { id: "a".into(), source, force_redownload };
    for source in [Source::Wandb, Source::Huggingface] {
        let error = registry.acquire(&remote(source, false)).await.unwrap_err();
        assert!(matches!(error, CartridgeError::SourceUnavailable { from, .. } if from == source));
    }
    assert!(matches!(
        registry.acquire(&remote(Source::Local, false)).await,
        Err(CartridgeError::NotFound { .. })
    ));
    fake.put("a", Ok(cartridge(1.)));
    registry.acquire(&remote(Source::Wandb, false)).await.unwrap();
    registry.acquire(&remote(Source::Huggingface, true)).await.unwrap();
    assert_eq!(fake.reads(), 2);
}

#[tokio::test]
async fn without_a_directory_only_inserted_ids_exist() {
    let registry = Registry::new(options(1));
    registry.insert("demo", cartridge(1.)).unwrap();
    registry.acquire(&local("demo")).await.unwrap();
    assert!(matches!(registry.acquire(&local("x")).await, Err(CartridgeError::NotFound { .. })));
    let remote = CartridgeRef { source: Source::Wandb, ..local("x") };
    let error = registry.acquire(&remote).await.unwrap_err();
    assert_eq!(error.code(), "cartridge_source_unavailable");
    assert!(error.to_string().contains("`source` = `wandb`"), "{error}");
    let error = registry.acquire(&local("..")).await.unwrap_err();
    assert_eq!(error.code(), "cartridge_id_invalid");
}

/// Row 15: between looks at a file, uses of it cost none. What the registry itself does counts at once
/// (`cartridge_publish.rs`).
#[tokio::test]
async fn a_file_is_not_looked_at_again_within_the_interval() {
    let fake = Arc::new(Fake::default());
    let files = Some(Arc::clone(&fake) as Arc<dyn FileSource>);
    let hour = Duration::from_secs(3600);
    let registry =
        Registry::with_sources(RegistryOptions { revalidate: hour, ..options(8) }, files, vec![]);
    fake.put("a", Ok(cartridge(1.)));
    registry.acquire(&local("a")).await.unwrap();
    let looks = fake.looks();
    for _ in 0..10 {
        registry.acquire(&local("a")).await.unwrap();
    }
    assert_eq!(fake.looks(), looks);
    // Of the same id elsewhere nothing is known yet.
    registry.acquire(&CartridgeRef { source: Source::Wandb, ..local("a") }).await.unwrap();
    assert!(fake.looks() > looks);
    fake.put("a", Ok(cartridge(2.)));
    let old = registry.acquire(&local("a")).await.unwrap();
    assert_eq!(old.generation(), cartridge(1.).generation());
    let new = registry.acquire(&forced("a")).await.unwrap();
    assert_eq!(new.generation(), cartridge(2.).generation());
    assert_eq!(registry.acquire(&local("a")).await.unwrap().generation(), new.generation());
    // A look that says that the file is gone counts, too.
    fake.files.lock().unwrap().remove("a");
    registry.list();
    registry.acquire(&local("a")).await.unwrap_err();
}
