//! Unloading and pinning while a registry serves.

mod cartridge_support;

use cartouche::cartridge::*;
use cartridge_support::*;

/// vllm-metal#641: registered is not resident.
#[tokio::test]
async fn unloaded_stays_registered_and_is_read_again() {
    let (registry, fake) = registry(8);
    fake.put("a", Ok(cartridge(1.)));
    assert!(!registry.unload("a").await.unwrap());
    let lease = registry.acquire(&local("a")).await.unwrap();
    assert!(registry.unload("a").await.unwrap());
    let info = registry.info("a");
    let brief: Vec<_> = info.iter().map(|i| (i.resident, i.retired, i.tier)).collect();
    assert_eq!(brief, [(false, true, Tier::Device), (false, false, Tier::Disk)]);
    // The very tensors that are still lent.
    let again = registry.acquire(&local("a")).await.unwrap();
    assert_eq!(again.layers()[0].keys.id(), lease.layers()[0].keys.id());
    drop((lease, again));
    assert!(registry.unload("a").await.unwrap());
    assert_eq!(registry.stats().bytes, 0);
    assert_eq!(registry.info("a")[0].tier, Tier::Disk);
    registry.insert("made", cartridge(2.)).unwrap();
    assert_eq!(registry.unload("made").await.unwrap_err().code(), "cartridge_conflict");
}

/// Case 3: all that is there is pinned.
#[tokio::test]
async fn a_pinned_name_is_never_evicted_whatever_it_points_at() {
    let (registry, fake) = registry(2);
    for (id, seed) in [("a", 1.), ("b", 2.), ("c", 3.)] {
        fake.put(id, Ok(cartridge(seed)));
    }
    assert_eq!(registry.pin("a", true).unwrap_err().code(), "cartridge_not_found");
    registry.acquire(&local("a")).await.unwrap();
    registry.pin("a", true).unwrap();
    for id in ["b", "c", "b"] {
        registry.acquire(&local(id)).await.unwrap();
        assert!(resident(&registry).contains(&"a".to_owned()));
    }
    fake.put("a", Ok(cartridge(4.)));
    registry.acquire(&local("a")).await.unwrap();
    assert!(registry.info("a")[0].pinned);
    registry.acquire(&local("b")).await.unwrap();
    registry.pin("b", true).unwrap();
    let error = registry.acquire(&local("c")).await.unwrap_err();
    assert!(matches!(error, CartridgeError::Busy { .. }), "{error}");
    assert_eq!(registry.unload("a").await.unwrap_err().code(), "cartridge_conflict");
    registry.pin("a", false).unwrap();
    registry.acquire(&local("c")).await.unwrap();
    assert_eq!(resident(&registry), ["b", "c"]);
    registry.insert("made", cartridge(9.)).unwrap();
    registry.pin("made", true).unwrap();
    assert_eq!(registry.pin("made", false).unwrap_err().code(), "cartridge_conflict");
}
