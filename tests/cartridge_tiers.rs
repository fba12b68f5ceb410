//! Two tiers: what has to leave a GPU (here 16-bit tensors on the CPU, which the emulation makes one) stays in
//! host memory, and comes back from there.

mod cartridge_support;

use std::sync::Arc;

use candle_core::DType;
use cartouche::{
    cartridge::*,
    gpu::{Arg, Launch, emulate},
};
use cartridge_support::*;

/// Nothing is computed here.
struct Idle;

impl Launch for Idle {
    unsafe fn launch(&self, kernel: &str, _: [usize; 3], _: &[Arg]) -> candle_core::Result<()> {
        candle_core::bail!("{kernel} was launched")
    }
}

/// Room for so many cartridges of bf16 on the "GPU" and beside it.
fn tiers(device: u64, host: u64) -> (Arc<Registry>, Arc<Fake>) {
    emulate(Arc::new(Idle));
    let fake = Arc::new(Fake::default());
    let options = RegistryOptions {
        dtype: DType::BF16,
        byte_budget: device * BYTES / 2,
        host_budget: host * BYTES / 2,
        ..options(0)
    };
    let files = Some(Arc::clone(&fake) as Arc<dyn FileSource>);
    let registry = Registry::with_sources(options, files, Vec::new());
    for (i, id) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
        fake.put(id, Ok(cartridge(i as f32)));
    }
    (registry, fake)
}

fn where_is(registry: &Registry) -> Vec<(String, Tier)> {
    let mut list: Vec<_> = registry.list().into_iter().map(|info| (info.id, info.tier)).collect();
    list.sort();
    list
}

fn tiers_of(registry: &Registry) -> String {
    let letter = |tier| match tier {
        Tier::Device => 'g',
        Tier::Host => 'h',
        Tier::Disk => '-',
    };
    where_is(registry).into_iter().map(|(_, tier)| letter(tier)).collect()
}

async fn first_number(registry: &Arc<Registry>, id: &str) -> f32 {
    let lease = registry.acquire(&local(id)).await.unwrap();
    assert_eq!(lease.dtype(), DType::BF16);
    assert!(lease.is_for_attention());
    let numbers = lease.layers()[0].keys.to_dtype(DType::F32).unwrap();
    numbers.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]
}

/// Row 16: an evicted cartridge comes back from its host copy, with its own numbers.
#[tokio::test]
async fn what_leaves_the_gpu_comes_back_without_its_file_being_read() {
    let (registry, fake) = tiers(2, 2);
    for (id, number) in [("a", 0.25), ("b", 1.25), ("c", 2.25), ("d", 3.25)] {
        assert_eq!(first_number(&registry, id).await, number);
    }
    assert_eq!((tiers_of(&registry), fake.reads()), ("hhgg-".to_owned(), 4));
    assert_eq!(first_number(&registry, "a").await, 0.25);
    // While "a" was copied back it took its room there; the host's least recently used one had to go.
    assert_eq!((tiers_of(&registry), fake.reads()), ("g-hg-".to_owned(), 4));
    assert_eq!(first_number(&registry, "e").await, 4.25);
    assert_eq!(first_number(&registry, "b").await, 1.25);
    assert_eq!(fake.reads(), 6);
    let stats = registry.stats();
    assert_eq!((stats.restores, stats.loads, stats.resident), (1, 6, 2));
    assert!(stats.host <= 2 && stats.host_bytes <= stats.host_budget, "{stats:?}");
    let info = &registry.info("a")[0];
    let known = (info.tokens, info.bytes, info.generation);
    assert_eq!(known, (Some(4), Some(BYTES / 2), Some(cartridge(0.).generation())), "{info:?}");
    assert!(!info.resident && info.tier == Tier::Host);
}

#[tokio::test]
async fn a_file_that_changed_is_read_though_its_old_content_is_in_host_memory() {
    let (registry, fake) = tiers(1, 4);
    first_number(&registry, "a").await;
    first_number(&registry, "b").await;
    fake.put("a", Ok(cartridge(8.)));
    assert_eq!(first_number(&registry, "a").await, 8.25);
    first_number(&registry, "b").await;
    // `force_redownload` does not take the copy either.
    fake.files.lock().unwrap().get_mut("a").unwrap().0 = Ok(cartridge(9.));
    let forced = registry.acquire(&forced("a")).await.unwrap();
    assert_eq!(forced.generation(), cartridge(9.).generation());
    // Nothing of the replaced ones is left.
    drop(forced);
    first_number(&registry, "b").await;
    assert_eq!(registry.stats().host, 1);
    fake.files.lock().unwrap().remove("a");
    registry.acquire(&local("a")).await.unwrap_err();
    assert_eq!(registry.stats().host, 0);
}

#[tokio::test]
async fn unloading_leaves_both_tiers() {
    let (registry, fake) = tiers(1, 4);
    first_number(&registry, "a").await;
    first_number(&registry, "b").await;
    assert_eq!(tiers_of(&registry), "hg---");
    assert!(!registry.unload("a").await.unwrap(), "it was not resident");
    assert!(registry.unload("b").await.unwrap());
    assert_eq!((tiers_of(&registry), registry.stats().host_bytes), ("-----".to_owned(), 0));
    first_number(&registry, "a").await;
    assert_eq!(fake.reads(), 3);
}

#[tokio::test]
async fn a_host_budget_that_is_too_small_keeps_nothing() {
    for host in [0, 1] {
        let (registry, fake) = tiers(1, host);
        for id in ["a", "b", "c", "a"] {
            first_number(&registry, id).await;
        }
        assert_eq!((registry.stats().host, fake.reads()), (host as usize, 4));
    }
}

/// On the CPU, where cartridges are used is host memory.
#[tokio::test]
async fn on_the_cpu_there_is_one_tier() {
    let (_, fake) = tiers(1, 0);
    let options = RegistryOptions { host_budget: 1 << 20, ..options(1) };
    let files = Some(Arc::clone(&fake) as Arc<dyn FileSource>);
    let registry = Registry::with_sources(options, files, Vec::new());
    registry.acquire(&local("a")).await.unwrap();
    registry.acquire(&local("b")).await.unwrap();
    let stats = registry.stats();
    assert_eq!((stats.host, stats.host_budget), (0, 0));
    assert_eq!(tiers_of(&registry), "-g---");
}

/// Many at once, with less room than they need.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_request_gets_its_own_numbers_while_both_tiers_are_full() {
    let (registry, _) = tiers(3, 1);
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let registry = Arc::clone(&registry);
            tokio::spawn(async move {
                for i in 0..200 {
                    let number = (task * 3 + i * 7) % 5;
                    let id = ["a", "b", "c", "d", "e"][number];
                    match registry.acquire(&local(id)).await {
                        Ok(lease) => {
                            assert_eq!(lease.generation(), cartridge(number as f32).generation());
                        }
                        Err(error) => assert_eq!(error.code(), "cartridge_busy", "{error}"),
                    }
                    let stats = registry.stats();
                    assert!(stats.bytes <= stats.budget && stats.host_bytes <= stats.host_budget);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(registry.stats().restores > 0);
}
