//! Hostile and damaged cartridge files: nothing in them is executed, nothing makes the reader panic
//! or take much memory, and each gives an error that says what is wrong. Fixtures:
//! `scripts/fixtures/cartridges.py`.

use std::{
    fs,
    io::{Cursor, Read, Write},
    path::PathBuf,
};

use cartouche::cartridge::{
    Cartridge, CartridgeError, KvShape, read_cartridge, read_cartridge_bytes, validate,
    write_safetensors,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const MAX_BYTES: u64 = 1 << 20;
const MODEL: KvShape = KvShape { layers: 2, kv_heads: 2, head_dim: 4 };

fn fixtures(kind: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cartridges").join(kind)
}

fn good(name: &str) -> Cartridge {
    read_cartridge(&fixtures("good").join(format!("{name}.pt")), MAX_BYTES).unwrap()
}

fn hostile(name: &str) -> CartridgeError {
    let path = fixtures("hostile").join(name);
    let read = read_cartridge(&path, MAX_BYTES).and_then(|c| validate(&c, &MODEL));
    read.expect_err(name)
}

#[test]
fn forbidden_names_are_refused_by_name() {
    for (file, name) in [
        ("system.pt", "posix.system"),
        ("eval4.pt", "builtins.eval"),
        ("getattr.pt", "__builtin__.getattr"),
        ("torch_load.pt", "torch.load"),
        ("dotted.pt", "torch.serialization.load"),
    ] {
        match hostile(file) {
            CartridgeError::Forbidden { global, name: shown } => {
                assert_eq!((global.as_str(), shown.as_str()), (name, file))
            }
            other => panic!("{file}: {other}"),
        }
    }
}

/// Each hostile file gives an `Invalid` error that says what is wrong.
#[test]
fn every_lie_is_told_apart() {
    for (file, reason) in [
        ("instance.pt", "opcode 0x69"),
        ("extension.pt", "opcode 0x82"),
        ("recursive.pt", "top level"),
        ("recursive_state.pt", "top level"),
        ("no_stop.pt", "without STOP"),
        ("half_pickle.pt", "pickle byte"),
        ("long_string.pt", "pickle byte 2: a string longer"),
        ("long_string8.pt", "pickle byte 2: a string longer"),
        ("frame.pt", "a frame longer"),
        ("not_a_dict.pt", "top level"),
        ("huge_shape.pt", "expected [1, 2, 2147483647, 4]"),
        ("huge_stride.pt", "leaves its storage"),
        ("overflow.pt", "leaves its storage"),
        ("negative_stride.pt", "negative size, offset or stride -4"),
        ("zero_stride.pt", "expected [1, 2, 65535, 4]"),
        ("offset.pt", "leaves its storage"),
        ("negative_offset.pt", "negative size, offset or stride -1"),
        ("huge_storage.pt", "claims 2147483647 elements, has 64 bytes"),
        ("batch_two.pt", "shape [2, 1, 4, 4]"),
        ("fewer_strides.pt", "as many sizes as strides"),
        ("missing_storage.pt", "storage `0` is missing"),
        ("short_storage.pt", "claims 32 elements, has 63 bytes"),
        ("big_endian.pt", "byte order `big`"),
        ("no_pickle.pt", "exactly one data.pkl"),
        ("compressed.pt", "compressed"),
        ("two_stems.pt", "different folders"),
        ("two_pickles.pt", "exactly one data.pkl"),
        ("duplicate.pt", "several records of one name"),
        ("size_lie.pt", "claims 2147483647 bytes"),
        ("bomb_size.pt", "claims 2147483647 bytes in 64"),
        ("overlap.pt", "overlap"),
        ("checksum.pt", "checksum"),
        ("nan.pt", "layer 1 values: element"),
        ("infinite.pt", "layer 0 keys: element 0"),
        ("layers_disagree.pt", "layers of"),
        ("frozen_layers.pt", "1 layers of frozen keys, but 2"),
        ("frozen_values_missing.pt", "frozen tokens are missing"),
        ("shape_disagrees.pt", "layer 1 values: shape [1, 2, 5, 4], expected [1, 2, 4, 4]"),
        ("type_disagrees.pt", "layer 1 values: type F32, expected BF16"),
        ("batch_of_two.pt", "shape [2, 2, 4, 4]"),
        ("three_axes.pt", "shape [2, 4, 4], expected [1, kv_heads"),
        ("double.pt", "type float64"),
        ("no_keys.pt", "no `trainable_keys`"),
        ("text.pt", "no tensor"),
        ("no_layers.pt", "no layers"),
        ("no_tokens.pt", "0 tokens"),
        ("legacy.pt", "neither a torch zip nor safetensors"),
        ("empty.pt", "shorter than"),
        ("garbage.pt", "open the zip"),
    ] {
        match hostile(file) {
            CartridgeError::Invalid { reason: told, name } => {
                assert!(told.contains(reason), "{file}: expected `{reason}`, got `{told}`");
                assert_eq!(name == file, !["nan.pt", "infinite.pt"].contains(&file), "{name}");
            }
            other => panic!("{file}: {other:?}"),
        }
    }
    match hostile("sharing.pt") {
        CartridgeError::TooLarge { what, .. } => assert!(what.contains("share"), "{what}"),
        other => panic!("{other:?}"),
    }
}

fn safetensors_bytes() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    write_safetensors(&path, &good("list_bf16")).unwrap();
    fs::read(path).unwrap()
}

#[test]
fn dishonest_safetensors_are_told_apart() {
    let bytes = safetensors_bytes();
    let with = |old: &str, new: &str| {
        assert_eq!(old.len(), new.len());
        let at = bytes.windows(old.len()).position(|w| w == old.as_bytes()).expect(old);
        let mut changed = bytes.clone();
        changed[at..at + old.len()].copy_from_slice(new.as_bytes());
        changed
    };
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let length = |n: u64| [&n.to_le_bytes()[..], &bytes[8..]].concat();
    let longer = [&bytes[..], b"x"].concat();
    let cases = [
        (flipped, "digest"),
        (with("\"tokens\":\"5\"", "\"tokens\":\"6\""), "says 6 tokens"),
        (with("\"frozen_tokens\":\"1\"", "\"frozen_tokens\":\"0\""), "digest"),
        (
            with("\"frozen_tokens\":\"1\"", "\"frozen_tokens\":\"x\""),
            "no number as `frozen_tokens`",
        ),
        (with("cartouche.cartridge", "cartouche.cartridgX"), "no cartridge"),
        (with("\"format_version\":\"1\"", "\"format_version\":\"2\""), "format version"),
        (with("layers.1.values", "layers.1.valueZ"), "layer 1: values are missing"),
        (with("layers.1.keys", "layers.2.keys"), "belong to no layer"),
        (with("\"BF16\"", "\"I16\" "), "type I16"),
        (length(u64::MAX), "neither a torch zip"),
        (length(3 << 20), "safetensors"),
        (length(2), "safetensors"),
        (longer, "safetensors"),
        (bytes[..bytes.len() - 1].to_vec(), "safetensors"),
    ];
    for (bytes, reason) in cases {
        match read_cartridge_bytes(&bytes, "x") {
            Err(CartridgeError::Invalid { reason: told, .. }) => {
                assert!(told.contains(reason), "expected `{reason}`, got `{told}`")
            }
            other => panic!("expected `{reason}`, got {other:?}"),
        }
    }
}

/// Facts stay in memory for as long as the cartridge does, and no budget counts them.
#[test]
fn facts_of_any_length_do_not_stay_in_memory() {
    let bytes = safetensors_bytes();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let with = |name: &str, fact: String| {
        let mut json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        json["__metadata__"][name] = fact.into();
        let json = json.to_string().into_bytes();
        [&(json.len() as u64).to_le_bytes()[..], &json, &bytes[8 + header..]].concat()
    };
    let limit = cartouche::limits::MAX_CARTRIDGE_FACT_BYTES;
    read_cartridge_bytes(&with("origin", "x".repeat(limit)), "x").unwrap();
    for (name, fact) in [
        ("origin", "x".repeat(limit + 1)),
        ("model", "x".repeat(limit + 1)),
        ("rope_scaling", format!("[{}0]", "0,".repeat(limit))),
        ("rope_theta", format!("1{}", "0".repeat(limit))),
    ] {
        match read_cartridge_bytes(&with(name, fact), "x") {
            Err(CartridgeError::TooLarge { what, .. }) => assert!(what.contains("fact"), "{what}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    // Compared with the model's, and not a number is no answer.
    for theta in ["NaN", "inf", "-infinity"] {
        match read_cartridge_bytes(&with("rope_theta", theta.to_owned()), "x") {
            Err(CartridgeError::Invalid { reason, .. }) => assert!(reason.contains("rope_theta")),
            other => panic!("{theta}: {other:?}"),
        }
    }
    let long = cartouche::cartridge::Provenance {
        origin: Some("x".repeat(limit + 1)),
        ..cartouche::cartridge::Provenance::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let error = write_safetensors(&path, &good("list_bf16").with_provenance(long)).unwrap_err();
    assert!(error.to_string().contains("fact"), "never written either: {error}");
}

/// Found by fuzzing: serde repeats a text that stands where none is expected, up to the header's four megabytes.
#[test]
fn errors_cut_what_the_file_said() {
    let json = format!(r#"{{"layers.0.keys":"{}"}}"#, "x".repeat(100_000));
    let file = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat();
    let error = read_cartridge_bytes(&file, "x").unwrap_err().to_string();
    assert!(error.contains("xxx") && error.len() < 1200, "{} bytes", error.len());
}

#[test]
fn no_truncation_is_read_as_a_cartridge() {
    for name in ["list_bf16", "parameters_bf16"] {
        let bytes = fs::read(fixtures("good").join(format!("{name}.pt"))).unwrap();
        for len in 0..bytes.len() {
            assert!(read_cartridge_bytes(&bytes[..len], "x").is_err(), "{name} cut at {len}");
        }
    }
    let bytes = safetensors_bytes();
    for len in 0..bytes.len() {
        assert!(read_cartridge_bytes(&bytes[..len], "x").is_err(), "safetensors cut at {len}");
    }
}

fn mutate(bytes: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    let at = random.random_range(0..bytes.len());
    match random.random_range(0..4) {
        0 => bytes[at] ^= 1 << random.random_range(0..8),
        1 => bytes[at] = random.random(),
        2 => drop(bytes.remove(at)),
        _ => bytes.insert(at, random.random()),
    }
}

/// Thousands of damaged files: whatever comes out, it is an answer, and a file that still reads is
/// sound.
#[test]
fn no_mutation_makes_the_reader_panic() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let read = |name: &str| fs::read(fixtures("good").join(name)).unwrap();
    let files = [
        read("list_bf16.pt"),
        read("parameters_bf16.pt"),
        read("views_bf16.pt"),
        read("extra_keys_bf16.pt"),
        read("protocol4_bf16.pt"),
        safetensors_bytes(),
    ];
    let (mut refused, mut accepted) = (0, 0);
    for round in 0..3000 {
        let mut bytes = files[round % files.len()].clone();
        for _ in 0..random.random_range(1..4) {
            mutate(&mut bytes, &mut random);
        }
        match read_cartridge_bytes(&bytes, "x") {
            Ok(cartridge) => {
                accepted += 1;
                assert_eq!((cartridge.tokens(), cartridge.shape()), (5, MODEL));
            }
            Err(_) => refused += 1,
        }
    }
    // Padding and unused header fields may change without harm; most changes must be noticed.
    assert!(refused > 1500 && accepted > 0, "{refused} refused, {accepted} accepted");
}

/// A cartridge-sized pickle is a few hundred kilobytes; these would need a stack or an arena
/// without end.
#[test]
fn deep_and_endless_pickles_are_bounded() {
    let repeat = |parts: [(&[u8], usize); 3]| -> Vec<u8> {
        parts.into_iter().flat_map(|(bytes, count)| bytes.repeat(count)).collect()
    };
    let n = 400_000;
    for (pickle, expected) in [
        (repeat([(b"\x80\x02", 1), (b"(", n), (b"t", n)]), "without STOP"),
        (repeat([(b"\x80\x02N", 1), (b"\x85", 2 * n), (b".", 1)]), "top level"),
        (repeat([(b"\x80\x02]", 1), (b"\x94h\x00a", n), (b".", 1)]), "pickle opcodes"),
        (repeat([(b"\x80\x02", 1), (b"N2", n * 2), (b".", 1)]), "pickle opcodes"),
        (repeat([(b"\x80\x02", 1), (b"N", 17 << 20), (b".", 1)]), "bytes in a record"),
    ] {
        let error = read_cartridge_bytes(&zipped(&[("x/data.pkl".into(), pickle)]), "x")
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
    }
}

/// A zip as torch makes it, with right checksums around whatever the records hold.
fn zipped(records: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in records {
        zip.start_file(name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn records(file: &str) -> Vec<(String, Vec<u8>)> {
    let bytes = fs::read(fixtures("good").join(file)).unwrap();
    let config = zip::read::Config { archive_offset: zip::read::ArchiveOffset::Known(0) };
    let mut zip = zip::ZipArchive::with_config(config, Cursor::new(bytes)).unwrap();
    let count = zip.len();
    let read = |i| {
        let mut record = zip.by_index(i).unwrap();
        let mut bytes = Vec::new();
        record.read_to_end(&mut bytes).unwrap();
        (record.name().unwrap().into_owned(), bytes)
    };
    (0..count).map(read).collect()
}

/// The checksums of a zip hide the pickle from blind mutation, so here they are made right again.
#[test]
fn no_mutated_pickle_makes_the_reader_panic() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let names = ["list_bf16", "parameters_bf16", "views_bf16", "extra_keys_bf16", "protocol4_bf16"];
    let files = names.map(|name| records(&format!("{name}.pt")));
    let (mut refused, mut accepted) = (0, 0);
    for round in 0..5000 {
        let mut records = files[round % files.len()].clone();
        let pickle = records.iter_mut().find(|(name, _)| name.ends_with("data.pkl")).unwrap();
        for _ in 0..random.random_range(1..4) {
            mutate(&mut pickle.1, &mut random);
        }
        match read_cartridge_bytes(&zipped(&records), "x") {
            Ok(cartridge) => {
                accepted += 1;
                assert!(cartridge.bytes() <= 4 * 4096);
            }
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 2500 && accepted > 50, "{refused} refused, {accepted} accepted");
}

/// The zip reader takes memory for the records that a directory claims before it reads any.
#[test]
fn directories_of_too_many_records_are_refused_by_their_claim() {
    let end64 = |claimed: u64| {
        let mut zip = zipped(&[("x/data.pkl".into(), b"\x80\x02N.".to_vec())]);
        let end = zip.split_off(zip.len() - 22);
        let (size, start) = (&end[12..16], &end[16..20]);
        let at = zip.len() as u64;
        zip.extend(b"PK\x06\x06");
        zip.extend(44u64.to_le_bytes());
        zip.extend([45, 0, 45, 0]);
        zip.extend([0; 8]);
        zip.extend(claimed.to_le_bytes());
        zip.extend(claimed.to_le_bytes());
        zip.extend([size, &[0; 4], start, &[0; 4]].concat());
        zip.extend(b"PK\x06\x07");
        zip.extend(0u32.to_le_bytes());
        zip.extend(at.to_le_bytes());
        zip.extend(1u32.to_le_bytes());
        zip.extend(b"PK\x05\x06\0\0\0\0");
        zip.extend([0xff; 12]);
        zip.extend([0, 0]);
        zip
    };
    let error = read_cartridge_bytes(&end64(1), "x").unwrap_err().to_string();
    assert!(error.contains("top level"), "an honest zip64 is read: {error}");
    for claimed in [65_537, 1 << 40, u64::MAX] {
        // Also where a comment hides the record that counts.
        let hidden = [end64(claimed), b"PK\x05\x06 no end record".to_vec()].concat();
        for bytes in [end64(claimed), hidden] {
            match read_cartridge_bytes(&bytes, "x") {
                Err(CartridgeError::TooLarge { what: "zip records", size, .. }) => {
                    assert_eq!(size, claimed)
                }
                other => panic!("{other:?}"),
            }
        }
    }
    let long = |i| (format!("x/{i}{}", "-".repeat(60_000)), Vec::new());
    let error = read_cartridge_bytes(&zipped(&(0..300).map(long).collect::<Vec<_>>()), "x");
    match error {
        Err(CartridgeError::TooLarge { what: "bytes of zip directory", .. }) => {}
        other => panic!("{other:?}"),
    }
}

/// Opcodes that torch's cartridges have. All others end the reading, out-of-band buffers (protocol 5),
/// instances, extension codes and text-mode numbers among them.
#[test]
fn opcodes_that_no_cartridge_needs_are_refused() {
    let known = b"\x80\x95.(012N\x88\x89JKM\x8aGX\x8c\x8dBCTU\x8eqrhj\x94c\x93}])\x8ftl\x91\x85\x86\x87ae\x90suQR\x81b";
    for code in 0..=u8::MAX {
        let pickle = [b"\x80\x05N", &[code][..], b"\n\n\n\n\n\n\n\n."].concat();
        let error = read_cartridge_bytes(&zipped(&[("x/data.pkl".into(), pickle)]), "x");
        let error = error.unwrap_err().to_string();
        let refused = error.contains("has no place in a cartridge");
        assert_eq!(
            refused && error.contains("byte 3"),
            !known.contains(&code),
            "{code:#x}: {error}"
        );
    }
}

/// Loaders that were said to take numbers only have built other tensors than dense ones, or run what a name
/// stands for on the way.
#[test]
fn names_that_make_other_tensors_are_refused() {
    for (module, name) in [
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_sparse_csr_tensor"),
        ("torch._utils", "_rebuild_nested_tensor"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch.storage", "_load_from_bytes"),
        ("torch", "_utils._rebuild_tensor_v2"),
        ("torch", "Tensor"),
        ("torch", "sparse_coo_tensor"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
        ("builtins", "getattr"),
        ("copyreg", "_reconstructor"),
        ("collections", "defaultdict"),
        ("torch._utils ", "_rebuild_tensor_v2"),
    ] {
        let global = format!("c{module}\n{name}\n");
        let stacked = [&[0x8c, module.len() as u8], module.as_bytes(), &[0x8c, name.len() as u8]];
        let stacked = [&stacked.concat(), name.as_bytes(), b"\x93"].concat();
        for named in [global.into_bytes(), stacked] {
            let pickle = [b"\x80\x04", &named[..], b"."].concat();
            match read_cartridge_bytes(&zipped(&[("x/data.pkl".into(), pickle)]), "x") {
                Err(CartridgeError::Forbidden { global, .. }) => {
                    assert_eq!(global, format!("{module}.{name}"))
                }
                other => panic!("{module}.{name}: {other:?}"),
            }
        }
    }
}

/// Records are looked up by name and never written anywhere: names that would be paths are just names.
#[test]
fn record_names_are_never_paths() {
    let outside = tempfile::tempdir().unwrap();
    let absolute = outside.path().join("x").to_str().unwrap().to_owned();
    let good = records("list_bf16.pt");
    for stem in ["..", "../../../tmp/x", &absolute, "C:\\x", "x/../y", "\0"] {
        let renamed: Vec<_> = good
            .iter()
            .map(|(name, data)| {
                (format!("{stem}/{}", name.split_once('/').unwrap().1), data.clone())
            })
            .collect();
        let read = read_cartridge_bytes(&zipped(&renamed), "x").unwrap();
        assert_eq!(read.generation(), self::good("list_bf16").generation(), "{stem}");
        // One record that would leave the folder of the others is no part of a torch file.
        let mut mixed = good.clone();
        mixed.push((format!("{stem}/other"), b"x".to_vec()));
        let error = read_cartridge_bytes(&zipped(&mixed), "x").unwrap_err().to_string();
        assert!(error.contains("different folders"), "{stem}: {error}");
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}
