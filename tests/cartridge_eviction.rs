//! What the registry keeps: eviction never takes what is lent or pinned, and nothing unfit is kept.

mod cartridge_support;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use cartouche::cartridge::*;
use cartridge_support::*;

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
    assert_eq!(listed.len(), 3, "an evicted cartridge is still on disk: {listed:?}");
    let b = registry.acquire(&local("b")).await.unwrap();
    assert_eq!(b.generation(), cartridge(2.).generation());
    assert_eq!((fake.reads(), resident(&registry)), (4, vec!["b".to_owned(), "c".to_owned()]));
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
    assert!(matches!(&error, CartridgeError::Busy { id, .. } if id == "c"), "{error}");
    assert_eq!(resident(&registry), ["a", "b"]);
    drop(a);
    registry.acquire(&local("c")).await.unwrap();
    assert_eq!(resident(&registry), ["b", "c"]);
    // A retired generation counts as long as it is lent.
    fake.put("b", Ok(cartridge(4.)));
    let new_b = registry.acquire(&local("b")).await.unwrap();
    assert!(matches!(registry.acquire(&local("c")).await, Err(CartridgeError::Busy { .. })));
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
    assert!(a.layers()[0].keys.id() == b.layers()[0].keys.id(), "the same tensors");
    // Retiring one name keeps what the other one needs.
    fake.put("b", Err(CartridgeError::Invalid { name: "b".into(), reason: "gone bad".into() }));
    assert!(registry.acquire(&local("b")).await.is_err());
    assert_eq!(registry.acquire(&local("a")).await.unwrap().generation(), a.generation());
}

#[tokio::test]
async fn inserted_cartridges_are_pinned_and_found_from_any_source() {
    let (registry, fake) = registry(2);
    let built_in = registry.insert("demo", cartridge(1.)).unwrap();
    fake.put("demo", Ok(cartridge(9.)));
    fake.put("a", Ok(cartridge(2.)));
    fake.put("b", Ok(cartridge(3.)));
    for source in [Source::Wandb, Source::Local, Source::Huggingface] {
        let wanted = CartridgeRef { source, ..forced("demo") };
        assert_eq!(registry.acquire(&wanted).await.unwrap().generation(), built_in);
    }
    for id in ["a", "b", "a"] {
        registry.acquire(&local(id)).await.unwrap();
        assert!(resident(&registry).contains(&"demo".to_owned()));
    }
    let pinned: Vec<_> = registry.list().into_iter().filter(|info| info.pinned).collect();
    assert_eq!((pinned.len(), pinned[0].tokens, pinned[0].bytes), (1, Some(4), Some(BYTES)));
    // Publishing again under the name replaces it for new requests only.
    let lease = registry.acquire(&local("demo")).await.unwrap();
    let newer = registry.insert("demo", cartridge(5.)).unwrap();
    assert_eq!(registry.acquire(&local("demo")).await.unwrap().generation(), newer);
    assert_eq!(lease.generation(), built_in);
}

#[tokio::test]
async fn a_cartridge_that_does_not_fit_is_never_published() {
    let (registry, fake) = registry(1);
    let one_layer = Cartridge::new(cartridge(1.).layers()[..1].to_vec(), 0, Provenance::default());
    fake.put("other", Ok(one_layer.unwrap()));
    let error = registry.acquire(&local("other")).await.unwrap_err();
    assert!(matches!(&error, CartridgeError::Mismatch { name, .. } if name == "other"), "{error}");
    fake.put("nan", Ok(cartridge(f32::NAN)));
    let error = registry.acquire(&local("nan")).await.unwrap_err();
    assert!(matches!(&error, CartridgeError::Invalid { name, .. } if name == "nan"), "{error}");
    let long = |tokens| {
        let zeros = Tensor::zeros((2, tokens, 4), DType::BF16, &Device::Cpu).unwrap();
        let layer = LayerKv { keys: zeros.clone(), values: zeros, bias: None };
        Cartridge::new(vec![layer; 2], 0, Provenance::default()).unwrap()
    };
    fake.put("long", Ok(long(64)));
    let error = registry.acquire(&local("long")).await.unwrap_err();
    let too_large = |error: &CartridgeError, unit| match error {
        CartridgeError::TooLarge { what, .. } => *what == unit,
        _ => false,
    };
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
    let options = RegistryOptions { dtype: DType::F16, ..options(1) };
    let files = Some(Arc::clone(&fake) as Arc<dyn FileSource>);
    let registry = Registry::with_sources(options, files, Vec::new());
    fake.put("big", Ok(cartridge(1e6)));
    let error = registry.acquire(&local("big")).await.unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    fake.put("big", Ok(cartridge(1.)));
    assert_eq!(registry.acquire(&local("big")).await.unwrap().dtype(), DType::F16);
    assert_eq!(
        registry.acquire(&local("big")).await.unwrap().generation(),
        cartridge(1.).generation()
    );
}

/// Seeded confusion: many tasks use, replace and force a few ids under a tight budget. Every lease
/// holds what some version of its file held, and in the end the books balance.
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
    assert!(list.iter().all(|info| info.leases == 0 && !info.retired), "{list:?}");
    let generations: std::collections::HashSet<_> =
        list.iter().filter_map(|info| info.generation).collect();
    assert!(generations.len() <= 3, "{list:?}");
    for id in ids {
        registry.acquire(&local(id)).await.unwrap();
    }
}
