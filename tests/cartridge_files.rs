//! Cartridge files: what PyTorch writes is read exactly, and what we write is read back, by us and
//! (see `scripts/fixtures/check_torch_loads.py`) by PyTorch. Fixtures:
//! `scripts/fixtures/cartridges.py`.

use std::{fs, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use cartouche::cartridge::{
    Cartridge, CartridgeError, KvShape, LayerKv, Naming, Provenance, TorchStyle, read_cartridge,
    validate, write_safetensors, write_torch,
};

const MAX_BYTES: u64 = 1 << 20;
const MODEL: KvShape = KvShape { layers: 2, kv_heads: 2, head_dim: 4 };

fn fixtures(kind: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cartridges").join(kind)
}

fn good(name: &str) -> Cartridge {
    read_cartridge(&fixtures("good").join(format!("{name}.pt")), MAX_BYTES).unwrap()
}

/// The numbers of all fixtures; see `code` in the script.
fn code(layer: usize, kind: usize, head: usize, token: usize, place: usize) -> f32 {
    let sum = layer * 7 + kind * 5 + head * 11 + token * 3 + place;
    ((sum % 127) as f32 - 63.0) / 4.0
}

fn expected(layer: usize, kind: usize, [heads, tokens, dim]: [usize; 3]) -> Vec<f32> {
    let mut numbers = Vec::new();
    for head in 0..heads {
        for token in 0..tokens {
            numbers.extend((0..dim).map(|place| code(layer, kind, head, token, place)));
        }
    }
    numbers
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn what_torch_writes_is_read_exactly() {
    let names = fs::read_dir(fixtures("good"))
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned());
    let names: Vec<_> = names.collect();
    assert_eq!(names.len(), 18, "a fixture is missing or new: {names:?}");
    for name in names {
        let cartridge = good(&name);
        let heads = if name.contains("one_head") { 1 } else { 2 };
        let layers = if name.contains("eleven") { 11 } else { 2 };
        assert_eq!(cartridge.shape(), KvShape { layers, kv_heads: heads, head_dim: 4 }, "{name}");
        assert_eq!(cartridge.tokens(), 5, "{name}");
        let dtype = match name.rsplit('_').next().unwrap() {
            "f16" => DType::F16,
            "f32" => DType::F32,
            _ => DType::BF16,
        };
        assert_eq!(cartridge.dtype(), dtype, "{name}");
        let without_frozen =
            ["no_frozen", "eleven", "parameter_state"].iter().any(|part| name.starts_with(part));
        assert_eq!(cartridge.frozen_tokens(), usize::from(!without_frozen), "{name}");
        for (i, layer) in cartridge.layers().iter().enumerate() {
            for (kind, tensor) in [&layer.keys, &layer.values].into_iter().enumerate() {
                assert_eq!(numbers(tensor), expected(i, kind, [heads, 5, 4]), "{name} layer {i}");
            }
        }
    }
}

#[test]
fn one_content_has_one_generation_in_every_container() {
    let reference = good("list_bf16").generation();
    for name in [
        "tuple_bf16",
        "parameters_bf16",
        "parameters_fixed_bf16",
        "list_fixed_bf16",
        "views_bf16",
        "protocol4_bf16",
        "protocol5_bf16",
        "ordered_dict_bf16",
        "strided_bf16",
        "extra_keys_bf16",
    ] {
        assert_eq!(good(name).generation(), reference, "{name}");
    }
    // Type, split and shape are part of the identity.
    for name in ["list_f16", "list_f32", "no_frozen_bf16", "views_one_head_bf16"] {
        assert_ne!(good(name).generation(), reference, "{name}");
    }
    let text = reference.to_hex();
    assert_eq!(text.len(), 64);
    assert!(text.starts_with(&reference.short()));
}

/// Pins the digest: if this fails, the identity of every existing cartridge has changed.
#[test]
fn the_digest_is_stable() {
    let digest = good("list_bf16").generation().to_hex();
    assert_eq!(digest, DIGEST_OF_LIST_BF16);
}

const DIGEST_OF_LIST_BF16: &str =
    "1897cf712ec9b979519f2e01b20dd5404bacb849252085626da274ca5959a074";

/// Leaves its files for `scripts/fixtures/check_torch_loads.py`.
#[test]
fn written_files_are_read_back() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("torch");
    fs::create_dir_all(&folder).unwrap();
    for name in ["list_bf16", "list_f16", "list_f32", "no_frozen_bf16", "eleven_layers_bf16"] {
        let cartridge = good(name);
        for style in [TorchStyle::PlainLists, TorchStyle::ParameterLists] {
            for naming in [Naming::Frozen, Naming::Fixed, Naming::Both] {
                let path = folder.join(format!("{name}-{style:?}-{naming:?}.pt"));
                write_torch(&path, &cartridge, style, naming).unwrap();
                let again = read_cartridge(&path, MAX_BYTES).unwrap();
                assert_eq!(
                    again.generation(),
                    cartridge.generation(),
                    "{name} {style:?} {naming:?}"
                );
                assert_eq!(again.frozen_tokens(), cartridge.frozen_tokens());
            }
        }
        let path = folder.join(format!("{name}.safetensors"));
        write_safetensors(&path, &cartridge).unwrap();
        let again = read_cartridge(&path, MAX_BYTES).unwrap();
        assert_eq!(again.generation(), cartridge.generation(), "{name}");
    }
    let names = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name());
    assert!(names.map(|n| n.into_string().unwrap()).all(|n| !n.ends_with(".tmp")));
}

#[test]
fn safetensors_keep_provenance_and_bias() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let mut layers = good("list_bf16").layers().to_vec();
    let bias = Tensor::arange(0f32, 10., &Device::Cpu).unwrap().reshape((2, 5)).unwrap();
    layers[1].bias = Some(bias.clone());
    let provenance = Provenance {
        model: Some("meta-llama/Llama-3.2-3B".into()),
        rope_theta: Some(500_000.0),
        rope_scaling: Some(serde_json::json!({"rope_type": "llama3", "factor": 32.0})),
        origin: Some("a test \"quoted\" \u{1f4e6}".into()),
    };
    let cartridge = Cartridge::new(layers, 1, provenance.clone()).unwrap();
    assert_ne!(cartridge.generation(), good("list_bf16").generation());
    write_safetensors(&path, &cartridge).unwrap();
    let bytes = fs::read(&path).unwrap();
    write_safetensors(&path, &cartridge).unwrap();
    assert_eq!(bytes, fs::read(&path).unwrap(), "equal cartridges give equal files");
    let again = read_cartridge(&path, MAX_BYTES).unwrap();
    assert_eq!(again.provenance(), &provenance);
    assert_eq!(again.generation(), cartridge.generation());
    assert!(again.layers()[0].bias.is_none());
    assert_eq!(numbers(again.layers()[1].bias.as_ref().unwrap()), numbers(&bias));
    let error = write_torch(&path, &cartridge, TorchStyle::PlainLists, Naming::Both).unwrap_err();
    assert!(error.to_string().contains("bias"), "{error}");
}

#[test]
fn a_change_of_type_keeps_the_generation_but_not_the_files_digest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let stored = good("list_bf16");
    let wide = stored.to(&Device::Cpu, DType::F32).unwrap();
    assert_eq!(wide.generation(), stored.generation());
    assert_eq!((stored.bytes(), wide.bytes()), (320, 640));
    write_safetensors(&path, &wide).unwrap();
    let again = read_cartridge(&path, MAX_BYTES).unwrap();
    assert_eq!(again.generation(), good("list_f32").generation());
}

#[test]
fn cartridges_that_disagree_with_themselves_are_refused() {
    let layer = good("list_f32").layers()[0].clone();
    let new = |layers: Vec<LayerKv>, frozen| Cartridge::new(layers, frozen, Provenance::default());
    let reason = |layers, frozen| new(layers, frozen).unwrap_err().to_string();
    assert!(reason(vec![], 0).contains("no layers"));
    assert!(reason(vec![layer.clone()], 6).contains("6 frozen tokens of 5"));
    let mut odd = layer.clone();
    odd.values = layer.values.narrow(1, 0, 4).unwrap();
    assert!(reason(vec![layer.clone(), odd.clone()], 0).contains("layer 1 values: shape"));
    odd.values = layer.values.to_dtype(DType::F16).unwrap();
    assert!(reason(vec![odd.clone()], 0).contains("layer 0 values: type"));
    odd = layer.clone();
    odd.bias = Some(layer.keys.clone());
    assert!(reason(vec![odd], 0).contains("layer 0 bias: shape"));
    let ints = layer.keys.to_dtype(DType::U32).unwrap();
    let odd = LayerKv { keys: ints.clone(), values: ints, bias: None };
    assert!(reason(vec![odd], 0).contains("f16, bf16 or f32"));
    assert_eq!(new(vec![layer.clone()], 5).unwrap().frozen_tokens(), 5);
    // Tensors that are views are digested by content.
    let view =
        |t: &Tensor| t.transpose(0, 1).unwrap().contiguous().unwrap().transpose(0, 1).unwrap();
    let views = LayerKv { keys: view(&layer.keys), values: view(&layer.values), bias: None };
    let (a, b) = (new(vec![layer], 1).unwrap(), new(vec![views], 1).unwrap());
    assert_eq!(a.generation(), b.generation());
}

#[test]
fn another_models_cartridge_is_a_mismatch() {
    let error = validate(&good("eleven_layers_bf16"), &MODEL).unwrap_err();
    let CartridgeError::Mismatch { what: "layers", have: 11, need: 2, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(error.code(), "cartridge_mismatch");
}

#[test]
fn limits_are_checked_before_reading() {
    let path = fixtures("good").join("list_bf16.pt");
    let error = read_cartridge(&path, 1000).unwrap_err();
    assert!(matches!(error, CartridgeError::TooLarge { limit: 1000, .. }), "{error:?}");
    let error = read_cartridge(&fixtures("good"), MAX_BYTES).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
    let error = read_cartridge(&path.with_file_name("absent.pt"), MAX_BYTES).unwrap_err();
    let CartridgeError::Io { name, kind: std::io::ErrorKind::NotFound, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(name, "absent.pt");
}

/// A trainer hands over views; attention would fail on them for all requests of a step.
#[test]
fn tensors_that_are_views_are_made_contiguous() {
    let layer = good("list_f32").layers()[0].clone();
    let view =
        |t: &Tensor| t.transpose(0, 1).unwrap().contiguous().unwrap().transpose(0, 1).unwrap();
    let bias = Tensor::zeros((5, 2), DType::F32, &Device::Cpu).unwrap().t().unwrap();
    let views = LayerKv { keys: view(&layer.keys), values: view(&layer.values), bias: Some(bias) };
    assert!(!views.keys.is_contiguous());
    let cartridge = Cartridge::new(vec![views], 1, Provenance::default()).unwrap();
    let kept = &cartridge.layers()[0];
    for tensor in [&kept.keys, &kept.values, kept.bias.as_ref().unwrap()] {
        assert!(tensor.is_contiguous());
    }
}
