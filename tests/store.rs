//! The disk cache: crashes, damage, eviction, ids that are written alike, folders that cannot be written.

mod stand_in;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use candle_core::{DType, Device};
use cartouche::cartridge::{
    CartridgeError, CartridgeRef, FileSource, Registry, RegistryOptions, Source, Store,
};
use stand_in::{
    Trouble,
    hub::Hub,
    store_support::{cartridge, hub_source, hub_source_within, read, store, times, torch_bytes},
};

const ID: &str = "acme/notes";

fn hub_with(ids: &[(&str, f32)]) -> Hub {
    let hub = Hub::start();
    for (id, seed) in ids {
        hub.commit(id, &[("cartridge.pt", &torch_bytes(*seed))]);
    }
    hub
}

/// Files below a folder of the cache.
fn files(dir: &Path, folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join(folder)).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn age(path: &Path, days: u64) {
    let at = SystemTime::now() - Duration::from_secs(days * 24 * 3600);
    fs::File::options().write(true).open(path).unwrap().set_modified(at).unwrap();
}

/// Case 9: folders of ids are lossy, and sources may use the same ids.
#[test]
fn ids_that_are_written_alike_do_not_share_a_record() {
    let alike = [("a/b", 1.0), ("a-b", 2.0), ("a.b", 3.0), ("a_b", 4.0)];
    let (hub, dir) = (hub_with(&alike), tempfile::tempdir().unwrap());
    let source = hub_source(&hub, dir.path(), None);
    for (id, _) in alike {
        source.fetch(id).unwrap();
    }
    for (id, seed) in alike {
        assert_eq!(read(&source, id).unwrap().generation(), cartridge(seed).generation(), "{id}");
    }
    assert_eq!(store(dir.path()).record(Source::Wandb, "a-b").unwrap(), None);
    let long = format!("owner/{}", "x".repeat(240));
    hub.commit(&long, &[("cartridge.pt", &torch_bytes(1.0))]);
    source.fetch(&long).unwrap();
    assert_eq!(read(&source, &long).unwrap().generation(), cartridge(1.0).generation());
}

/// Case 42: a partial download that a crash left, and one that nobody wants any more.
#[test]
fn leftovers_of_a_crash_are_continued_or_removed_by_age() {
    let (hub, dir) = (hub_with(&[(ID, 1.0), ("b/b", 2.0)]), tempfile::tempdir().unwrap());
    let source = hub_source(&hub, dir.path(), None);
    hub.cdn.trouble("/", Trouble::HangAfter(800), 1);
    source.fetch(ID).unwrap_err();
    // As after a kill: bytes that are not of what the note says are found out by the digest.
    let part = files(dir.path(), "partial").into_iter().find(|p| p.extension().unwrap() == "part");
    let part = part.unwrap();
    let mut bytes = fs::read(&part).unwrap();
    bytes[10] ^= 1;
    fs::write(&part, bytes).unwrap();
    source.fetch(ID).unwrap();
    assert_eq!(read(&source, ID).unwrap().generation(), cartridge(1.0).generation());
    assert_eq!(files(dir.path(), "partial"), Vec::<PathBuf>::new());

    let names = dir.path().join("names/huggingface");
    let left = [dir.path().join("partial/old.part"), names.join(".x.json.1-0.tmp")];
    let fresh = dir.path().join("partial/fresh.part");
    left.iter().for_each(|path| fs::write(path, "left").unwrap());
    fs::write(&fresh, "fresh").unwrap();
    left.iter().for_each(|path| age(path, 8));
    source.fetch("b/b").unwrap();
    assert!(left.iter().all(|path| !path.exists()) && fresh.exists());
}

#[test]
fn a_record_that_cannot_be_read_counts_as_absent() {
    let (hub, dir) = (hub_with(&[(ID, 1.0)]), tempfile::tempdir().unwrap());
    let source = hub_source(&hub, dir.path(), None);
    source.fetch(ID).unwrap();
    let path = files(dir.path(), "names/huggingface").remove(0);
    let right = fs::read_to_string(&path).unwrap();
    let digest = right.split("\"digest\": \"").nth(1).unwrap()[..64].to_owned();
    for broken in
        [String::new(), right[..right.len() / 2].to_owned(), right.replace(&digest, "../../x")]
    {
        fs::write(&path, broken).unwrap();
        assert_eq!(source.stamp(ID).unwrap(), None);
        assert!(matches!(read(&source, ID), Err(CartridgeError::NotFound { .. })));
        source.fetch(ID).unwrap();
        assert_eq!(read(&source, ID).unwrap().generation(), cartridge(1.0).generation());
    }
}

/// Whether a file became shorter, other bytes, or other numbers, nothing of it reaches a request.
#[test]
fn a_damaged_file_is_found_out_removed_and_fetched_again() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let bytes = stand_in::store_support::safetensors_bytes(1.0);
    hub.commit(ID, &[("cartridge.safetensors", &bytes)]);
    let source = hub_source(&hub, dir.path(), None);
    let shorter = bytes[..bytes.len() - 1].to_vec();
    let mut number = bytes.clone();
    *number.last_mut().unwrap() ^= 1;
    let mut header = bytes.clone();
    header[9] ^= 0x40;
    for (what, damaged) in [("shorter", shorter), ("number", number), ("header", header)] {
        source.fetch(ID).unwrap();
        let blob = files(dir.path(), "blobs").remove(0);
        fs::write(&blob, damaged).unwrap();
        let error = read(&source, ID).unwrap_err();
        match what {
            "shorter" => assert!(matches!(error, CartridgeError::NotFound { .. }), "{error}"),
            _ => assert!(matches!(error, CartridgeError::Busy { .. }), "{what}: {error}"),
        }
        assert_eq!(source.stamp(ID).unwrap(), None, "{what}");
        source.fetch(ID).unwrap();
        assert_eq!(read(&source, ID).unwrap().generation(), cartridge(1.0).generation());
    }
    assert_eq!(hub.cdn.asked().len(), 4, "once, and again after each damage");
}

#[tokio::test]
async fn a_request_that_finds_a_damaged_file_in_the_cache_gets_a_sound_one_from_the_source() {
    let (hub, dir) = (hub_with(&[(ID, 1.0)]), tempfile::tempdir().unwrap());
    let source = Arc::new(hub_source(&hub, dir.path(), None));
    let options = RegistryOptions {
        dir: None,
        shape: cartridge(1.0).shape(),
        model: "demo".into(),
        rope_theta: None,
        rope_scaling: None,
        max_positions: 64,
        device: Device::Cpu,
        dtype: DType::F32,
        byte_budget: 1 << 20,
        host_budget: 0,
        max_file_bytes: 1 << 20,
        revalidate: Duration::ZERO,
    };
    let registry = Registry::with_sources(options, None, vec![(Source::Huggingface, source)]);
    let wanted =
        CartridgeRef { id: ID.into(), source: Source::Huggingface, force_redownload: false };
    let first = registry.acquire(&wanted).await.unwrap();
    let blob = files(dir.path(), "blobs").remove(0);
    let mut damaged = fs::read(&blob).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(&blob, damaged).unwrap();
    let again = registry.acquire(&wanted).await.unwrap();
    assert_eq!(again.generation(), first.generation());
    assert_eq!(fs::read(&blob).unwrap(), torch_bytes(1.0));
    assert_eq!(registry.stats().fetches, 2);
}

/// A sound cartridge of the same length in the place of another: no check of the file itself tells.
#[test]
fn another_cartridge_in_the_place_of_the_fetched_one_is_found_out() {
    let (hub, dir) = (hub_with(&[(ID, 1.0)]), tempfile::tempdir().unwrap());
    let source = hub_source(&hub, dir.path(), None);
    source.fetch(ID).unwrap();
    let other = torch_bytes(2.0);
    assert_eq!(other.len(), torch_bytes(1.0).len());
    fs::write(files(dir.path(), "blobs").remove(0), other).unwrap();
    assert!(matches!(read(&source, ID), Err(CartridgeError::Busy { .. })));
    assert_eq!(source.stamp(ID).unwrap(), None);
}

/// A refusal of the reader is not damage.
#[test]
fn a_sound_file_that_is_refused_stays() {
    let (hub, dir) = (hub_with(&[(ID, 1.0)]), tempfile::tempdir().unwrap());
    let source = hub_source(&hub, dir.path(), None);
    source.fetch(ID).unwrap();
    let mut refusing = cartouche::cartridge::Intake::new(u64::MAX, |_| {
        Err(CartridgeError::Invalid {
            name: String::new(),
            reason: "not for this model".to_owned(),
        })
    });
    let error = source.read(ID, &mut refusing).unwrap_err();
    assert!(error.to_string().contains("not for this model"), "{error}");
    assert!(source.stamp(ID).unwrap().is_some());
}

#[test]
fn the_least_recently_used_leaves_first_and_open_files_stay_readable() {
    let ids = [("a/a", 1.0), ("b/b", 2.0), ("c/c", 3.0), ("d/d", 4.0)];
    let (hub, dir) = (hub_with(&ids), tempfile::tempdir().unwrap());
    let size = torch_bytes(1.0).len() as u64;
    let small = Arc::new(Store::new(dir.path().to_owned(), 3 * size + size / 2));
    let source = hub_source_within(&hub, Arc::clone(&small), None, times());
    for (id, _) in &ids[..3] {
        source.fetch(id).unwrap();
    }
    // Not used for days; then one of them is.
    files(dir.path(), "names/huggingface").iter().for_each(|path| age(path, 2));
    source.stamp("a/a").unwrap().unwrap();
    read(&source, "c/c").unwrap();
    let record = small.record(Source::Huggingface, "b/b").unwrap().unwrap();
    let mut open = small.open(&record).unwrap().unwrap();
    source.fetch("d/d").unwrap();
    assert_eq!(source.list(), ["a/a", "c/c", "d/d"]);
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut open, &mut bytes).unwrap();
    assert_eq!(bytes, torch_bytes(2.0));

    let orphan = dir.path().join("blobs").join("0".repeat(64));
    fs::write(&orphan, vec![0; size as usize]).unwrap();
    source.fetch("b/b").unwrap();
    assert!(!orphan.exists(), "what a crash left goes before what is used");

    let tiny = Arc::new(Store::new(dir.path().join("tiny"), size - 1));
    let error = hub_source_within(&hub, tiny, None, times()).fetch("a/a").unwrap_err();
    assert!(matches!(error, CartridgeError::TooLarge { .. }), "{error}");
}

#[test]
fn a_file_of_two_ids_stays_until_both_are_removed() {
    let (hub, dir) = (hub_with(&[("a/a", 1.0), ("b/b", 1.0)]), tempfile::tempdir().unwrap());
    let source = hub_source(&hub, dir.path(), None);
    source.fetch("a/a").unwrap();
    source.fetch("b/b").unwrap();
    let store = store(dir.path());
    assert!(store.remove(Source::Huggingface, "a/a").unwrap());
    assert!(!store.remove(Source::Huggingface, "a/a").unwrap());
    assert_eq!(source.stamp("a/a").unwrap(), None);
    assert!(read(&source, "b/b").is_ok());
    store.remove(Source::Huggingface, "b/b").unwrap();
    assert_eq!(files(dir.path(), "blobs"), Vec::<PathBuf>::new());
}

/// Case 7: threads of one process; `sources_cli.rs` does it with two processes.
#[test]
fn many_who_fetch_the_same_at_once_download_it_once() {
    let (hub, dir) = (hub_with(&[(ID, 1.0)]), tempfile::tempdir().unwrap());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            // Each as a process of its own would: another store, another agent.
            scope.spawn(|| hub_source(&hub, dir.path(), None).fetch(ID).unwrap());
        }
    });
    assert_eq!(hub.cdn.asked().len(), 1);
    let locks = files(dir.path(), "names/huggingface");
    assert_eq!(locks.len(), 1, "locks leave with their holders: {locks:?}");
}

/// Case 42: a folder that cannot be made.
#[test]
fn a_folder_that_cannot_be_written_is_told_with_what_to_set() {
    let (hub, dir) = (hub_with(&[(ID, 1.0)]), tempfile::tempdir().unwrap());
    fs::write(dir.path().join("file"), "").unwrap();
    let error = hub_source(&hub, &dir.path().join("file/cache"), None).fetch(ID).unwrap_err();
    assert!(matches!(error, CartridgeError::Io { .. }), "{error:?}");
    assert!(error.to_string().contains("--cartridge-cache-dir"), "{error}");
    assert!(!error.to_string().contains(dir.path().to_str().unwrap()), "no paths: {error}");
}
