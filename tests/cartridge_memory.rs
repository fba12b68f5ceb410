//! What a file may cost before it is accepted: sizes are compared with the model and the budget
//! before any number is read, and tensors are read one by one.

mod cartridge_support;

use std::{
    cell::Cell,
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    path::Path,
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use cartouche::cartridge::*;
use cartridge_support::*;

const GIB: u64 = 1 << 30;

/// A safetensors cartridge whose numbers are a hole in the file.
fn sparse(path: &Path, shape: KvShape, tokens: usize) -> u64 {
    let KvShape { layers, kv_heads, head_dim } = shape;
    let tensor = kv_heads * tokens * head_dim * 4;
    let mut header = serde_json::json!({"__metadata__": {
        "format": "cartouche.cartridge", "format_version": "1", "generation": "0",
        "tokens": tokens.to_string(), "frozen_tokens": "0",
    }});
    for i in 0..2 * layers {
        let name = format!("layers.{}.{}", i / 2, ["keys", "values"][i % 2]);
        header[name] = serde_json::json!({
            "dtype": "F32", "shape": [kv_heads, tokens, head_dim],
            "data_offsets": [i * tensor, (i + 1) * tensor],
        });
    }
    let header = header.to_string();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let len = (8 + header.len() + 2 * layers * tensor) as u64;
    file.set_len(len).unwrap();
    len
}

fn over(dir: &Path, budget: u64) -> Arc<Registry> {
    Registry::new(RegistryOptions {
        dir: Some(dir.to_owned()),
        max_positions: 1 << 22,
        byte_budget: budget,
        max_file_bytes: 8 * GIB,
        ..options(1)
    })
}

/// Peak resident memory of this process.
#[cfg(target_os = "linux")]
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Reading, digesting or allocating five gigabytes of holes would show in the memory and the time
/// of this test.
#[tokio::test]
async fn files_over_four_gigabytes_are_refused_by_their_header() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/cartridge.safetensors");
    #[cfg(target_os = "linux")]
    let before = peak_bytes();
    // Larger than the budget: not opened further than its length.
    assert!(sparse(&path, SHAPE, 4_000_000) > GIB / 4);
    let error = over(dir.path(), 1 << 20).acquire(&local("a")).await.unwrap_err();
    assert!(matches!(&error, CartridgeError::TooLarge { what: "bytes", .. }), "{error}");
    // Another model's: the first thing to be told, however large it is.
    let wide = KvShape { head_dim: 2048, ..SHAPE };
    assert!(sparse(&path, wide, 100_000) > 5 * GIB);
    let error = over(dir.path(), 8 * GIB).acquire(&local("a")).await.unwrap_err();
    let CartridgeError::Mismatch { what: "numbers per head", have: 2048, need: 4, .. } = error
    else {
        panic!("{error}");
    };
    // Below the slack for headers, but not in the budget.
    sparse(&path, SHAPE, 100_000);
    let error = over(dir.path(), 1 << 20).acquire(&local("a")).await.unwrap_err();
    assert!(matches!(&error, CartridgeError::TooLarge { what: "bytes in memory", .. }), "{error}");
    #[cfg(target_os = "linux")]
    assert!(peak_bytes() - before < 64 << 20);
}

#[test]
fn a_tensor_larger_than_the_first_is_refused_before_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    sparse(&path, SHAPE, 8);
    // The last tensor claims 4 GiB, and the file has them.
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let mut header: serde_json::Value =
        serde_json::from_slice(&bytes[8..8 + length as usize]).unwrap();
    header["layers.1.values"]["shape"] = serde_json::json!([2, 1 << 27, 4]);
    let start = header["layers.1.values"]["data_offsets"][0].as_u64().unwrap();
    header["layers.1.values"]["data_offsets"] = serde_json::json!([start, start + 4 * GIB]);
    let header = header.to_string();
    let mut file = File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + start + 4 * GIB).unwrap();
    let error = read_cartridge(&path, 8 * GIB).unwrap_err().to_string();
    assert!(error.contains("layer 1 values: shape [2, 134217728, 4]"), "{error}");
}

#[test]
fn a_torch_file_announces_itself_before_its_numbers_are_read() {
    let good = |tokens| {
        let zeros = Tensor::zeros((2, tokens, 4), DType::BF16, &Device::Cpu).unwrap();
        let layer = LayerKv { keys: zeros.clone(), values: zeros, bias: None };
        Cartridge::new(vec![layer; 2], 1, Provenance::default()).unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("a")).unwrap();
    let path = dir.path().join("a/cartridge.pt");
    write_torch(&path, &good(1000), TorchStyle::default(), Naming::default()).unwrap();
    // Damaged numbers are not noticed by a reader that is not let in.
    let len = fs::metadata(&path).unwrap().len();
    let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(len / 2)).unwrap();
    file.write_all(&[0xff; 64]).unwrap();
    drop(file);
    let files = LocalFolder::new(dir.path().to_owned());
    let seen = Cell::new(None);
    let mut intake = Intake::new(len, |outline| {
        seen.set(Some((outline.shape, outline.tokens, outline.dtype, outline.scratch_bytes)));
        Err(CartridgeError::Busy { id: "a".into(), reason: "full".into() })
    });
    let refused = files.read("a", &mut intake).unwrap_err();
    assert!(matches!(refused, CartridgeError::Busy { .. }), "{refused}");
    assert_eq!(seen.get(), Some((SHAPE, 1000, DType::BF16, 0)));
    let mut intake = Intake::as_stored(len);
    let damaged = files.read("a", &mut intake).unwrap_err();
    assert!(damaged.to_string().contains("checksum"), "{damaged}");
}

/// A file is read with the room for it promised, so that loads at the same time share the budget.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn room_is_taken_before_reading_and_given_back_on_failure() {
    let (registry, fake) = registry(1);
    fake.put("nan", Ok(cartridge(f32::NAN)));
    fake.put("a", Ok(cartridge(1.)));
    fake.put("b", Ok(cartridge(2.)));
    for _ in 0..3 {
        let error = registry.acquire(&local("nan")).await.unwrap_err();
        assert!(matches!(&error, CartridgeError::Invalid { .. }), "{error}");
    }
    let a = registry.acquire(&local("a")).await.unwrap();
    // No room for another content of the same sizes: digested, not kept.
    let error = registry.acquire(&local("b")).await.unwrap_err();
    assert!(matches!(&error, CartridgeError::Busy { id, .. } if id == "b"), "{error}");
    // The same content again needs none.
    let again = registry.acquire(&forced("a")).await.unwrap();
    assert_eq!(again.generation(), a.generation());
}

/// A storage that is much larger than what a cartridge uses of it takes memory while it is read.
#[tokio::test]
async fn large_shared_storages_count_against_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("a")).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cartridges/good");
    fs::copy(fixture.join("views_bf16.pt"), dir.path().join("a/cartridge.pt")).unwrap();
    let files = LocalFolder::new(dir.path().to_owned());
    let scratch = Cell::new(0);
    let mut intake = Intake::new(1 << 20, |outline| {
        scratch.set(outline.scratch_bytes);
        Ok(Keep::AsStored)
    });
    files.read("a", &mut intake).unwrap();
    let cartridge = intake.into_cartridge().unwrap();
    let resident = cartridge.bytes_as(DType::F32);
    let options = |byte_budget| RegistryOptions {
        dir: Some(dir.path().to_owned()),
        byte_budget,
        ..options(1)
    };
    let enough = Registry::new(options(resident + scratch.get()));
    enough.acquire(&local("a")).await.unwrap();
    assert_eq!(enough.list()[0].bytes, Some(resident));
    let short = Registry::new(options(resident + scratch.get() - 1));
    let error = short.acquire(&local("a")).await.unwrap_err();
    assert!(matches!(&error, CartridgeError::TooLarge { .. }), "{error}");
}
