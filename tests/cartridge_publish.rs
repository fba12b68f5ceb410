//! Publishing and deleting cartridges while a registry serves.

mod cartridge_support;

use std::{fs, io::Write, path::Path, sync::Arc};

use cartouche::cartridge::*;
use cartridge_support::*;

fn over(dir: &Path, cartridges: u64) -> Arc<Registry> {
    Registry::new(RegistryOptions {
        dir: Some(dir.to_owned()),
        // What the registry itself does must count at once all the same.
        revalidate: std::time::Duration::from_secs(3600),
        ..options(cartridges)
    })
}

/// The bytes of a file of `cartridge(seed)`.
fn file(seed: f32, extension: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("cartridge.{extension}"));
    match extension {
        "pt" => {
            write_torch(&path, &cartridge(seed), TorchStyle::default(), Naming::default()).unwrap()
        }
        _ => write_safetensors(&path, &cartridge(seed)).unwrap(),
    }
    fs::read(path).unwrap()
}

fn upload(registry: &Registry, bytes: &[u8]) -> Upload {
    let mut upload = registry.upload().unwrap();
    upload.write_all(bytes).unwrap();
    upload
}

async fn publish(
    registry: &Arc<Registry>,
    id: &str,
    bytes: &[u8],
    expect: Expect,
) -> Result<Generation, CartridgeError> {
    registry.publish(id, upload(registry, bytes), expect).await
}

async fn served(registry: &Arc<Registry>, id: &str) -> Generation {
    registry.acquire(&local(id)).await.unwrap().generation()
}

fn files_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".changes.lock")
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_published_cartridge_is_served_at_once_and_leases_keep_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let registry = over(dir.path(), 8);
    let mut versions = Vec::new();
    for (seed, extension) in [(1., "pt"), (2., "safetensors"), (3., "pt"), (4., "safetensors")] {
        let published = publish(&registry, "org/a", &file(seed, extension), Expect::Anything).await;
        assert_eq!(published.unwrap(), cartridge(seed).generation());
        assert_eq!(served(&registry, "org/a").await, cartridge(seed).generation());
        versions.push((registry.acquire(&local("org/a")).await.unwrap(), seed));
    }
    for (lease, seed) in &versions {
        assert_eq!(lease.generation(), cartridge(*seed).generation());
    }
    assert_eq!(files_in(dir.path()), ["org-a"]);
    let folder = dir.path().join("org-a");
    assert_eq!(files_in(&folder), ["cartridge.id", "cartridge.safetensors", "config.yaml"]);
    // What was checked is what is in memory: it was not read again.
    assert_eq!(registry.stats().loads, 0);
    // Another server finds it in the folder, and what it was made from.
    let other = over(dir.path(), 8);
    assert_eq!(served(&other, "org/a").await, cartridge(4.).generation());
    let error = other.acquire(&local("org-a")).await.unwrap_err();
    assert!(error.to_string().contains("belongs to the id `org/a`"), "{error}");
    let config = fs::read_to_string(folder.join("config.yaml")).unwrap();
    assert_eq!(read_config_yaml(&config).unwrap().tokens, Some(4));
}

#[tokio::test]
async fn what_a_trainer_left_in_the_folder_does_not_win_over_what_was_published() {
    let dir = tempfile::tempdir().unwrap();
    let registry = over(dir.path(), 8);
    let folder = dir.path().join("a");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("cache-step9.pt"), file(1., "pt")).unwrap();
    assert_eq!(served(&registry, "a").await, cartridge(1.).generation());
    fs::write(folder.join("cartridge.pt"), file(2., "pt")).unwrap();
    publish(&registry, "a", &file(3., "safetensors"), Expect::Anything).await.unwrap();
    for registry in [registry, over(dir.path(), 8)] {
        assert_eq!(served(&registry, "a").await, cartridge(3.).generation());
        let forced = registry.acquire(&forced("a")).await.unwrap();
        assert_eq!(forced.generation(), cartridge(3.).generation());
    }
    // The checkpoints of a run are not the server's to remove.
    assert!(folder.join("cache-step9.pt").exists() && !folder.join("cartridge.pt").exists());
}

#[tokio::test]
async fn a_bad_upload_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let registry = over(dir.path(), 8);
    let good = publish(&registry, "a", &file(1., "pt"), Expect::Nothing).await.unwrap();
    let before = files_in(&dir.path().join("a"));
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cartridges/hostile");
    let mut corrupt = file(2., "safetensors");
    *corrupt.last_mut().unwrap() ^= 1;
    let two_layers = Cartridge::new(cartridge(1.).layers()[..1].to_vec(), 0, Provenance::default());
    let other_model = dir.path().join("other.safetensors");
    write_safetensors(&other_model, &two_layers.unwrap()).unwrap();
    for (bytes, code) in [
        (fs::read(fixture.join("system.pt")).unwrap(), "cartridge_invalid"),
        (file(f32::NAN, "pt"), "cartridge_invalid"),
        (file(2., "pt")[..100].to_vec(), "cartridge_invalid"),
        (corrupt, "cartridge_invalid"),
        (Vec::new(), "cartridge_invalid"),
        (fs::read(&other_model).unwrap(), "cartridge_mismatch"),
    ] {
        let error = publish(&registry, "a", &bytes, Expect::Anything).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains("`a`"), "{error}");
        assert_eq!(served(&registry, "a").await, good);
    }
    let mut too_large = registry.upload().unwrap();
    let chunk = vec![0; 1 << 20];
    let written = (0..2).try_for_each(|_| too_large.append(&chunk));
    assert!(matches!(written, Err(CartridgeError::TooLarge { .. })), "{written:?}");
    drop(too_large);
    let error = registry.upload().unwrap().set_config_yaml("{: [".into()).unwrap_err();
    assert_eq!(error.code(), "cartridge_invalid");
    fs::remove_file(other_model).unwrap();
    assert_eq!(files_in(dir.path()), ["a"], "no upload was left behind");
    assert_eq!(files_in(&dir.path().join("a")), before);
    assert_eq!(served(&over(dir.path(), 8), "a").await, good);
}

#[tokio::test]
async fn what_is_expected_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let registry = over(dir.path(), 8);
    let conflict = |result: Result<Generation, CartridgeError>, found: &str| match result {
        Err(CartridgeError::Conflict { id, found: has, .. }) => id == "a" && has.contains(found),
        _ => false,
    };
    let generation = |seed| cartridge(seed).generation();
    let one = Expect::Generation(generation(1.));
    assert!(conflict(publish(&registry, "a", &file(1., "pt"), one).await, "no cartridge"));
    publish(&registry, "a", &file(1., "pt"), Expect::Nothing).await.unwrap();
    let hex = generation(1.).to_hex();
    assert!(conflict(publish(&registry, "a", &file(2., "pt"), Expect::Nothing).await, &hex));
    publish(&registry, "a", &file(2., "pt"), one).await.unwrap();
    // A file put there by hand, not in memory, is compared by its content.
    fs::write(dir.path().join("a/cartridge.pt"), file(3., "pt")).unwrap();
    let two = Expect::Generation(generation(2.));
    assert!(conflict(
        publish(&registry, "a", &file(4., "pt"), two).await,
        &generation(3.).to_hex()
    ));
    assert!(conflict(registry.delete("a", two).await.map(|()| generation(0.)), "generation"));
    fs::write(dir.path().join("a/cartridge.pt"), "nonsense").unwrap();
    assert!(conflict(publish(&registry, "a", &file(4., "pt"), two).await, "a bad file"));
    publish(&registry, "a", &file(4., "pt"), Expect::Anything).await.unwrap();
    assert_eq!(served(&registry, "a").await, generation(4.));
    registry.delete("a", Expect::Generation(generation(4.))).await.unwrap();
    assert!(matches!(
        registry.delete("a", Expect::Anything).await,
        Err(CartridgeError::NotFound { .. })
    ));
}

/// Also of two servers that share the folder.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_publishers_that_expect_the_same_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let servers = [over(dir.path(), 64), over(dir.path(), 64)];
    let mut current = Expect::Nothing;
    for round in 0..4 {
        let tasks: Vec<_> = (0..8)
            .map(|i| {
                let (registry, seed) = (Arc::clone(&servers[i % 2]), (10 * round + i) as f32);
                tokio::spawn(async move {
                    let upload = loop {
                        match registry.upload() {
                            Ok(upload) => break upload,
                            Err(error) => assert_eq!(error.code(), "cartridge_busy"),
                        }
                        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                    };
                    let mut upload = upload;
                    upload.append(&file(seed, ["pt", "safetensors"][i / 2 % 2])).unwrap();
                    registry.publish("a", upload, current).await
                })
            })
            .collect();
        let mut won = Vec::new();
        for task in tasks {
            match task.await.unwrap() {
                Ok(generation) => won.push(generation),
                Err(error) => assert_eq!(error.code(), "cartridge_conflict", "{error}"),
            }
        }
        assert_eq!(won.len(), 1, "round {round}");
        let fresh = over(dir.path(), 8);
        assert_eq!(served(&fresh, "a").await, won[0]);
        current = Expect::Generation(won[0]);
    }
}

#[tokio::test]
async fn publishing_needs_no_room_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let registry = over(dir.path(), 1);
    publish(&registry, "a", &file(1., "pt"), Expect::Nothing).await.unwrap();
    let lease = registry.acquire(&local("a")).await.unwrap();
    // Checked all the same.
    let error = publish(&registry, "b", &file(f32::NAN, "pt"), Expect::Nothing).await.unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    publish(&registry, "b", &file(2., "pt"), Expect::Nothing).await.unwrap();
    publish(&registry, "a", &file(3., "pt"), Expect::Anything).await.unwrap();
    let error = registry.acquire(&local("b")).await.unwrap_err();
    assert_eq!(error.code(), "cartridge_busy");
    assert_eq!(registry.acquire(&local("a")).await.unwrap_err().code(), "cartridge_busy");
    assert_eq!(lease.generation(), cartridge(1.).generation());
    drop(lease);
    assert_eq!(served(&registry, "b").await, cartridge(2.).generation());
    assert_eq!(served(&registry, "a").await, cartridge(3.).generation());
}

#[tokio::test]
async fn uploads_under_way_are_bounded_and_go_with_their_owner() {
    let dir = tempfile::tempdir().unwrap();
    let registry = over(dir.path(), 1);
    let limit = cartouche::limits::MAX_CONCURRENT_UPLOADS;
    let uploads: Vec<_> = (0..limit).map(|_| upload(&registry, b"x")).collect();
    assert_eq!(registry.upload().unwrap_err().code(), "cartridge_busy");
    assert_eq!(files_in(dir.path()).len(), limit);
    drop(uploads);
    assert!(files_in(dir.path()).is_empty());
    // One that a process left behind when it was killed.
    let abandoned = dir.path().join(".upload-1-1.tmp");
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(100_000);
    fs::File::create(&abandoned).unwrap().set_modified(old).unwrap();
    registry.upload().unwrap();
    assert!(files_in(dir.path()).is_empty());
    let nowhere = Registry::new(options(1)).upload().unwrap_err();
    assert_eq!(nowhere.code(), "cartridge_source_unavailable");
}

#[tokio::test]
async fn deleted_is_gone_at_once_and_what_is_lent_stays() {
    let dir = tempfile::tempdir().unwrap();
    let registry = over(dir.path(), 8);
    publish(&registry, "a", &file(1., "pt"), Expect::Nothing).await.unwrap();
    let folder = dir.path().join("a");
    fs::write(folder.join("cache-step1.pt"), file(2., "pt")).unwrap();
    fs::write(folder.join("notes.txt"), "kept").unwrap();
    let lease = registry.acquire(&local("a")).await.unwrap();
    registry.delete("a", Expect::Anything).await.unwrap();
    let error = registry.acquire(&local("a")).await.unwrap_err();
    assert!(matches!(error, CartridgeError::NotFound { .. }), "{error}");
    assert_eq!(files_in(&folder), ["notes.txt"]);
    let info = registry.info("a");
    assert!(info.len() == 1 && info[0].retired && info[0].leases == 1, "{info:?}");
    assert_eq!(lease.generation(), cartridge(1.).generation());
    drop(lease);
    assert!(registry.info("a").is_empty() && registry.list().is_empty());
    publish(&registry, "b", &file(1., "pt"), Expect::Nothing).await.unwrap();
    registry.delete("b", Expect::Anything).await.unwrap();
    assert!(!dir.path().join("b").exists());
    // One that has no file.
    registry.insert("made", cartridge(5.)).unwrap();
    registry.delete("made", Expect::Nothing).await.unwrap_err();
    registry.delete("made", Expect::Generation(cartridge(5.).generation())).await.unwrap();
    assert_eq!(registry.acquire(&local("made")).await.unwrap_err().code(), "cartridge_not_found");
}

#[cfg(unix)]
#[tokio::test]
async fn links_are_not_written_through() {
    let outside = tempfile::tempdir().unwrap();
    let dir = outside.path().join("root");
    fs::create_dir_all(outside.path().join("secret")).unwrap();
    fs::create_dir_all(dir.join("real")).unwrap();
    let registry = over(&dir, 8);
    for (link, target) in [("out", "../secret"), ("alias", "real")] {
        std::os::unix::fs::symlink(target, dir.join(link)).unwrap();
        let error = publish(&registry, link, &file(1., "pt"), Expect::Anything).await.unwrap_err();
        assert_eq!(error.code(), "cartridge_id_invalid", "{error}");
    }
    assert!(files_in(&outside.path().join("secret")).is_empty());
    publish(&registry, "real", &file(1., "pt"), Expect::Anything).await.unwrap();
    fs::remove_file(dir.join("real/cartridge.id")).unwrap();
    registry.acquire(&local("alias")).await.unwrap();
    registry.delete("alias", Expect::Anything).await.unwrap();
    assert!(dir.join("real/cartridge.pt").exists() && !dir.join("alias").exists());
    let error = registry.publish("..", upload(&registry, b""), Expect::Anything).await.unwrap_err();
    assert_eq!(error.code(), "cartridge_id_invalid", "{error}");
}

/// Case 9 of publications: `a/b` and `a-b` share a folder.
#[tokio::test]
async fn an_id_written_alike_cannot_be_published_over() {
    let dir = tempfile::tempdir().unwrap();
    let registry = over(dir.path(), 8);
    publish(&registry, "a/b", &file(1., "pt"), Expect::Nothing).await.unwrap();
    let error = publish(&registry, "a-b", &file(2., "pt"), Expect::Anything).await.unwrap_err();
    assert_eq!(error.code(), "cartridge_id_invalid", "{error}");
    let error = registry.delete("a-b", Expect::Anything).await.unwrap_err();
    assert_eq!(error.code(), "cartridge_id_invalid", "{error}");
    assert_eq!(served(&registry, "a/b").await, cartridge(1.).generation());
}

/// A reader of the old file must not put its name back on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_load_that_began_before_a_publication_does_not_undo_it() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Arc::new(Slow(LocalFolder::new(dir.path().to_owned()), Fake::default()));
    let registry = Registry::with_sources(
        RegistryOptions {
            dir: Some(dir.path().to_owned()),
            revalidate: std::time::Duration::from_secs(3600),
            ..options(8)
        },
        Some(Arc::clone(&fake) as Arc<dyn FileSource>),
        Vec::new(),
    );
    fs::create_dir(dir.path().join("a")).unwrap();
    fs::write(dir.path().join("a/cartridge.pt"), file(1., "pt")).unwrap();
    fake.1.put("a", Ok(cartridge(1.)));
    let gate = fake.1.close("a");
    let early = ask(&registry, local("a"));
    until(|| fake.1.reads() == 1).await;
    publish(&registry, "a", &file(2., "pt"), Expect::Anything).await.unwrap();
    assert_eq!(served(&registry, "a").await, cartridge(2.).generation());
    gate.add_permits(1000);
    assert_eq!(early.await.unwrap().unwrap().generation(), cartridge(1.).generation());
    for _ in 0..3 {
        assert_eq!(served(&registry, "a").await, cartridge(2.).generation());
    }
    until(|| registry.stats().resident == 1).await;
    assert_eq!(resident(&registry), ["a"]);
}

/// A folder from which reading takes as long as from the other source.
struct Slow(LocalFolder, Fake);

impl FileSource for Slow {
    fn stamp(&self, id: &str) -> Result<Option<Stamp>, CartridgeError> {
        self.0.stamp(id)
    }

    fn read(&self, id: &str, intake: &mut Intake<'_>) -> Result<Stamp, CartridgeError> {
        let stamp = self.0.read(id, intake)?;
        self.1.read(id, &mut Intake::as_stored(u64::MAX))?;
        Ok(stamp)
    }

    fn list(&self) -> Vec<String> {
        self.0.list()
    }
}
