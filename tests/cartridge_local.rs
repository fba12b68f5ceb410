//! The cartridge directory: which file of a folder counts, what replacing it does, and what cannot
//! be reached through an id.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device};
use cartouche::cartridge::{
    CartridgeError, CartridgeRef, KvShape, Lease, Origin, Registry, RegistryOptions, Source,
    read_cartridge, write_config_yaml, write_safetensors,
};

fn fixture(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/fixtures/cartridges").join(name)
}

fn put(dir: &Path, file: &str, fixture_name: &str) {
    let path = dir.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let temporary = path.with_extension("new");
    fs::copy(fixture(fixture_name), &temporary).unwrap();
    fs::rename(temporary, path).unwrap();
}

fn registry(dir: &Path) -> Arc<Registry> {
    Registry::new(RegistryOptions {
        dir: Some(dir.to_owned()),
        shape: KvShape { layers: 2, kv_heads: 2, head_dim: 4 },
        model: "demo".into(),
        rope_theta: None,
        rope_scaling: None,
        max_positions: 64,
        device: Device::Cpu,
        dtype: DType::F32,
        byte_budget: 1 << 20,
        host_budget: 0,
        revalidate: std::time::Duration::ZERO,
        max_file_bytes: 1 << 20,
    })
}

async fn acquire(registry: &Arc<Registry>, id: &str) -> Result<Lease, CartridgeError> {
    let wanted = CartridgeRef { id: id.into(), source: Source::Local, force_redownload: false };
    registry.acquire(&wanted).await
}

fn digest(fixture_name: &str) -> cartouche::cartridge::Generation {
    read_cartridge(&fixture(fixture_name), 1 << 20).unwrap().generation()
}

#[tokio::test]
async fn files_are_chosen_as_trainers_leave_them() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    put(dir.path(), "org-name/whatever.pt", "good/list_f16.pt");
    assert_eq!(
        acquire(&registry, "org/name").await.unwrap().generation(),
        digest("good/list_f16.pt")
    );
    put(dir.path(), "org-name/other.pt", "good/list_f16.pt");
    let error = acquire(&registry, "org/name").await.unwrap_err();
    assert!(error.to_string().contains("2 .pt files"), "{error}");
    put(dir.path(), "org-name/cache-step9.pt", "good/list_f16.pt");
    put(dir.path(), "org-name/cache-step10.pt", "good/list_f32.pt");
    assert_eq!(
        acquire(&registry, "org/name").await.unwrap().generation(),
        digest("good/list_f32.pt")
    );
    let bf16 = read_cartridge(&fixture("good/list_bf16.pt"), 1 << 20).unwrap();
    write_safetensors(&dir.path().join("org-name/cartridge.safetensors"), &bf16).unwrap();
    assert_eq!(acquire(&registry, "org/name").await.unwrap().generation(), bf16.generation());
    put(dir.path(), "org-name/cartridge.pt", "good/no_frozen_bf16.pt");
    let lease = acquire(&registry, "org/name").await.unwrap();
    assert_eq!((lease.frozen_tokens(), lease.id()), (0, "org/name"));
    assert_eq!(lease.dtype(), DType::F32);
}

#[tokio::test]
async fn replacing_the_file_swaps_new_requests_only() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    put(dir.path(), "a/cartridge.pt", "good/list_bf16.pt");
    let old = acquire(&registry, "a").await.unwrap();
    assert_eq!(acquire(&registry, "a").await.unwrap().generation(), old.generation());
    put(dir.path(), "a/cartridge.pt", "good/list_f32.pt");
    let new = acquire(&registry, "a").await.unwrap();
    assert_eq!(new.generation(), digest("good/list_f32.pt"));
    assert_eq!(old.generation(), digest("good/list_bf16.pt"));
    // A bad file is an error for new requests, never the model without a cartridge nor an old
    // generation.
    put(dir.path(), "a/cartridge.pt", "hostile/system.pt");
    let error = acquire(&registry, "a").await.unwrap_err();
    assert!(matches!(&error, CartridgeError::Forbidden { name, .. } if name == "a"), "{error}");
    fs::remove_dir_all(dir.path().join("a")).unwrap();
    assert!(matches!(acquire(&registry, "a").await, Err(CartridgeError::NotFound { .. })));
}

#[tokio::test]
async fn config_yaml_is_advice() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    put(dir.path(), "a/cartridge.pt", "good/list_bf16.pt");
    let config = dir.path().join("a/config.yaml");
    let yaml =
        "kv_cache_initializer: {max_tokens: 4096}\nmodel: {pretrained_model_name_or_path: x/y}";
    fs::write(&config, yaml).unwrap();
    let lease = acquire(&registry, "a").await.unwrap();
    assert_eq!((lease.tokens(), lease.provenance().model.as_deref()), (5, Some("x/y")));
    put(dir.path(), "b/cartridge.pt", "good/list_f32.pt");
    fs::write(dir.path().join("b/config.yaml"), "{: [").unwrap();
    acquire(&registry, "b").await.unwrap();
    write_config_yaml(&config, &lease).unwrap();
    let written =
        cartouche::cartridge::read_config_yaml(&fs::read_to_string(config).unwrap()).unwrap();
    assert_eq!((written.tokens, written.model.as_deref()), (Some(5), Some("x/y")));
}

#[tokio::test]
async fn files_on_disk_are_listed_apart_from_resident_ones() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    for name in ["a", "b"] {
        put(dir.path(), &format!("{name}/cartridge.pt"), "good/list_bf16.pt");
    }
    fs::create_dir(dir.path().join("empty")).unwrap();
    let lease = acquire(&registry, "b").await.unwrap();
    let list = registry.list();
    let brief: Vec<_> = list.iter().map(|i| (i.id.as_str(), i.resident, i.leases)).collect();
    assert_eq!(brief, [("b", true, 1), ("a", false, 0)]);
    assert_eq!(list[0].generation, Some(lease.generation()));
}

#[tokio::test]
async fn ids_that_share_a_folder_are_told_apart_by_its_record() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    put(dir.path(), "a-b/cartridge.pt", "good/list_bf16.pt");
    acquire(&registry, "a/b").await.unwrap();
    fs::write(dir.path().join("a-b/cartridge.id"), "a/b").unwrap();
    acquire(&registry, "a/b").await.unwrap();
    let error = acquire(&registry, "a-b").await.unwrap_err();
    assert!(matches!(error, CartridgeError::InvalidId { .. }), "{error}");
    assert!(error.to_string().contains("belongs to the id `a/b`"), "{error}");
    assert_eq!(registry.list()[0].id, "a/b");
}

#[tokio::test]
async fn nothing_outside_the_directory_is_reached() {
    let outside = tempfile::tempdir().unwrap();
    put(outside.path(), "secret/cartridge.pt", "good/list_bf16.pt");
    let dir = outside.path().join("root");
    fs::create_dir(&dir).unwrap();
    let registry = registry(&dir);
    let absolute = outside.path().join("secret").to_str().unwrap().to_owned();
    for id in ["../secret", "secret", &absolute, "x/../../secret", "..\\secret", "\0"] {
        let error = acquire(&registry, id).await.unwrap_err();
        assert!(!error.to_string().contains(absolute.trim_start_matches('/')) || id == absolute);
    }
}

#[cfg(unix)]
#[tokio::test]
async fn links_out_and_special_files_are_refused() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    put(outside.path(), "secret/cartridge.pt", "good/list_bf16.pt");
    let dir = outside.path().join("root");
    put(&dir, "real/cartridge.pt", "good/list_bf16.pt");
    let registry = registry(&dir);
    symlink(outside.path().join("secret"), dir.join("linked_folder")).unwrap();
    fs::create_dir(dir.join("linked_file")).unwrap();
    let secret = outside.path().join("secret/cartridge.pt");
    symlink(secret, dir.join("linked_file/cartridge.pt")).unwrap();
    for id in ["linked_folder", "linked_file"] {
        let error = acquire(&registry, id).await.unwrap_err();
        assert!(matches!(error, CartridgeError::InvalidId { .. }), "{error}");
    }
    // Links that stay inside are an operator's way to name things.
    symlink(dir.join("real"), dir.join("alias")).unwrap();
    acquire(&registry, "alias").await.unwrap();
    fs::create_dir(dir.join("pipe")).unwrap();
    let made = std::process::Command::new("mkfifo").arg(dir.join("pipe/cartridge.pt")).status();
    assert!(made.unwrap().success());
    fs::create_dir_all(dir.join("folder/cartridge.pt")).unwrap();
    for id in ["pipe", "folder"] {
        let error = acquire(&registry, id).await.unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }
    symlink("/dev/zero", dir.join("linked_file/other")).unwrap();
    symlink("loop", dir.join("loop")).unwrap();
    assert!(matches!(acquire(&registry, "loop").await, Err(CartridgeError::Io { .. })));
}

/// Requests for a deleted file get 404, so it is no resident any more: only what is lent stays.
#[tokio::test]
async fn a_deleted_file_is_not_listed_as_resident() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    put(dir.path(), "a/cartridge.pt", "good/list_bf16.pt");
    put(dir.path(), "b/cartridge.pt", "good/list_f32.pt");
    let lease = acquire(&registry, "a").await.unwrap();
    acquire(&registry, "b").await.unwrap();
    for folder in ["a", "b"] {
        fs::remove_dir_all(dir.path().join(folder)).unwrap();
    }
    let list = registry.list();
    let brief: Vec<_> =
        list.iter().map(|i| (i.id.as_str(), i.resident, i.retired, i.leases)).collect();
    assert_eq!(brief, [("a", false, true, 1)]);
    drop(lease);
    assert!(registry.list().is_empty());
    put(dir.path(), "a/cartridge.pt", "good/list_bf16.pt");
    acquire(&registry, "a").await.unwrap();
    assert!(registry.list()[0].resident);
}

#[tokio::test]
async fn the_list_says_where_each_cartridge_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    put(dir.path(), "a-b/cartridge.pt", "good/list_bf16.pt");
    put(dir.path(), "demo/cartridge.pt", "good/list_f16.pt");
    let made = |name| read_cartridge(&fixture(name), 1 << 20).unwrap();
    registry.insert("demo", made("good/list_f32.pt")).unwrap();
    // Written alike, but another id: the file answers to its own.
    registry.insert("a/b", made("good/list_f32.pt")).unwrap();
    let list = registry.list();
    let brief: Vec<_> = list.iter().map(|i| (i.id.as_str(), i.source, i.resident)).collect();
    let expected = [
        ("a/b", Origin::Memory, true),
        ("demo", Origin::Memory, true),
        ("a-b", Origin::Local, false),
    ];
    assert_eq!(brief, expected);
    assert_eq!(serde_json::to_value(&list[0]).unwrap()["source"], "memory");
    acquire(&registry, "a-b").await.unwrap();
    let listed = registry.list();
    let file = listed.iter().find(|info| info.id == "a-b").unwrap();
    assert_eq!((file.source, file.resident, file.pinned), (Origin::Local, true, false));
}
