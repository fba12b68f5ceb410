//! The gate between a readable file and a cartridge that may touch a request.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::{
    Cartridge, CartridgeError, KvShape, Provenance,
    artifact::{TENSORS, with_bytes},
    error::UNNAMED,
};

/// Checks a cartridge against the model it is to be used with: layers, KV heads, head size, finite
/// numbers.
///
/// # Errors
/// [`CartridgeError::Mismatch`] says which size differs, what the file has and what the model
/// needs; [`CartridgeError::Invalid`] says in which layer and tensor the first number that is not
/// finite lies.
pub fn validate(cartridge: &Cartridge, model: &KvShape) -> Result<(), CartridgeError> {
    check_shape(&cartridge.shape(), model)?;
    check_finite(cartridge)
}

/// Compares what a cartridge has with what the model needs.
pub(super) fn check_shape(have: &KvShape, model: &KvShape) -> Result<(), CartridgeError> {
    for (what, have, need) in [
        ("layers", have.layers, model.layers),
        ("KV heads", have.kv_heads, model.kv_heads),
        ("numbers per head", have.head_dim, model.head_dim),
    ] {
        if have != need {
            return Err(CartridgeError::Mismatch { name: UNNAMED.to_owned(), what, have, need });
        }
    }
    Ok(())
}

/// Finds the first number that is not finite.
pub(super) fn check_finite(cartridge: &Cartridge) -> Result<(), CartridgeError> {
    for (i, layer) in cartridge.layers().iter().enumerate() {
        for (tensor, name) in layer.tensors().zip(TENSORS) {
            check_tensor_finite(i, name, tensor)?;
        }
    }
    Ok(())
}

pub(super) fn check_tensor_finite(
    layer: usize,
    name: &str,
    tensor: &Tensor,
) -> Result<(), CartridgeError> {
    let Some(at) = first_non_finite(tensor)? else {
        return Ok(());
    };
    let dims = tensor.dims();
    let reason = format!("layer {layer} {name}: element {at} of {dims:?} is not finite");
    Err(CartridgeError::invalid(reason))
}

/// Index in row-major order. An exponent of all ones is an infinity or a NaN in each of the three
/// types.
fn first_non_finite(tensor: &Tensor) -> Result<Option<usize>, CartridgeError> {
    let dtype = tensor.dtype();
    with_bytes(tensor, |bytes| match dtype {
        DType::F32 => first_with_exponent::<4>(bytes, u32::from_le_bytes, 0x7f80_0000),
        DType::BF16 => first_with_exponent::<2>(bytes, |b| u16::from_le_bytes(b).into(), 0x7f80),
        _ => first_with_exponent::<2>(bytes, |b| u16::from_le_bytes(b).into(), 0x7c00),
    })
}

/// The first number that has all bits of `mask`. Whole blocks are looked at without a way out in
/// between, which compilers turn into vector code.
fn first_with_exponent<const WIDTH: usize>(
    bytes: &[u8],
    number: impl Fn([u8; WIDTH]) -> u32,
    mask: u32,
) -> Option<usize> {
    const BLOCK: usize = 4096;
    let hit = |bytes: &[u8; WIDTH]| number(*bytes) & mask == mask;
    let (numbers, _) = bytes.as_chunks::<WIDTH>();
    let block = numbers.chunks(BLOCK).position(|b| b.iter().fold(false, |any, n| any | hit(n)))?;
    let start = block * BLOCK;
    numbers[start..].iter().position(hit).map(|at| start + at)
}

/// What a careful operator would want to know about a cartridge that fits by shape: that it was
/// made for another model, or with other rotations (RoPE base, RoPE scaling as in `config.json`).
/// Advisory, because makers name models as they like. What either side does not say is not compared.
pub fn provenance_warnings(
    provenance: &Provenance,
    model: &str,
    rope_theta: Option<f64>,
    rope_scaling: Option<&Value>,
) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(made_for) = &provenance.model
        && !same_model(made_for, model)
    {
        warnings.push(format!("it was made for `{made_for}`, the model served is `{model}`"));
    }
    if let (Some(made_with), Some(serves)) = (provenance.rope_theta, rope_theta)
        && (made_with - serves).abs() > 1e-6 * serves.abs()
    {
        warnings.push(format!("its keys were rotated with rope_theta {made_with}, not {serves}"));
    }
    if let (Some(made_with), Some(serves)) = (&provenance.rope_scaling, rope_scaling)
        && !same_scaling(made_with, serves)
    {
        let made_with: String = made_with.to_string().chars().take(200).collect();
        warnings.push(format!("its keys were rotated with rope_scaling {made_with}, not {serves}"));
    }
    warnings
}

/// Compares by meaning: `type` is the older name of `rope_type`, 8 is 8.0, and transformers 5 put
/// `rope_theta`, which is compared by itself, among the fields.
fn same_scaling(a: &Value, b: &Value) -> bool {
    let kind = |scaling: &Value| {
        let kind = scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str());
        kind.unwrap_or("default").to_owned()
    };
    let fields = |scaling: &Value| -> BTreeMap<String, Value> {
        let fields = scaling.as_object().into_iter().flatten();
        let compared = |name: &str| !["rope_type", "type", "rope_theta"].contains(&name);
        fields
            .filter(|(name, value)| compared(name) && !value.is_null())
            .map(|(name, value)| {
                (name.clone(), value.as_f64().map_or(value.clone(), |number| number.into()))
            })
            .collect()
    };
    kind(a) == kind(b) && fields(a) == fields(b)
}

/// Compares the last part of a path or hub id, without case: `meta-llama/Llama-3.2-3B` is
/// `llama-3.2-3b`.
fn same_model(a: &str, b: &str) -> bool {
    let tail = |name: &str| {
        let name = name.trim_end_matches('/');
        name.rsplit('/').next().unwrap_or(name).to_lowercase()
    };
    tail(a) == tail(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cartridge::LayerKv;
    use candle_core::Device;
    use serde_json::json;

    fn cartridge(dtype: DType, poison: Option<(usize, f32)>) -> Cartridge {
        let layers = (0..2).map(|layer| {
            let tensor = |bad: Option<f32>| {
                let mut data: Vec<f32> = (0..12).map(|i| i as f32 - 5.0).collect();
                data[7] = bad.unwrap_or(data[7]);
                Tensor::from_vec(data, (2, 3, 2), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
            };
            let bad = poison.filter(|(at, _)| *at == layer).map(|(_, bad)| bad);
            LayerKv { keys: tensor(None), values: tensor(bad), bias: None }
        });
        Cartridge::new(layers.collect(), 1, Provenance::default()).unwrap()
    }

    const MODEL: KvShape = KvShape { layers: 2, kv_heads: 2, head_dim: 2 };

    #[test]
    fn every_shape_mismatch_is_named() {
        let good = cartridge(DType::F32, None);
        validate(&good, &MODEL).unwrap();
        for (model, named) in [
            (KvShape { layers: 3, ..MODEL }, ("layers", 2, 3)),
            (KvShape { kv_heads: 1, ..MODEL }, ("KV heads", 2, 1)),
            (KvShape { head_dim: 64, ..MODEL }, ("numbers per head", 2, 64)),
        ] {
            match validate(&good, &model) {
                Err(CartridgeError::Mismatch { what, have, need, .. }) => {
                    assert_eq!((what, have, need), named)
                }
                other => panic!("expected a mismatch, got {other:?}"),
            }
        }
    }

    #[test]
    fn non_finite_numbers_are_located_in_every_type() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            validate(&cartridge(dtype, None), &MODEL).unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let error = validate(&cartridge(dtype, Some((1, bad))), &MODEL).unwrap_err();
                assert!(error.to_string().contains("layer 1 values: element 7"), "{error}");
            }
        }
        validate(&cartridge(DType::F32, Some((0, f32::MAX))), &MODEL).unwrap();
    }

    #[test]
    fn warnings_name_what_differs() {
        let provenance = Provenance {
            model: Some("meta-llama/Llama-3.2-3B".into()),
            rope_theta: Some(500_000.0),
            ..Provenance::default()
        };
        assert!(provenance_warnings(&provenance, "llama-3.2-3b", Some(500_000.0), None).is_empty());
        let warnings = provenance_warnings(&provenance, "Qwen/Qwen3-4B", Some(1e6), None);
        assert_eq!(warnings.len(), 2);
        assert!(warnings[0].contains("Qwen3-4B") && warnings[1].contains("500000"));
    }

    #[test]
    fn other_rope_scaling_is_a_warning_and_other_spelling_is_not() {
        let made_with =
            |rope_scaling| Provenance { rope_scaling: Some(rope_scaling), ..Provenance::default() };
        let model = json!({"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5});
        for (scaling, expected) in [
            (json!({"type": "llama3", "factor": 8}), 0),
            (json!({"rope_type": "llama3", "factor": 32.0}), 1),
            (json!({"rope_type": "linear", "factor": 8.0}), 1),
            (json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}), 1),
            (json!(null), 1),
        ] {
            let warnings =
                provenance_warnings(&made_with(scaling.clone()), "m", None, Some(&model));
            assert_eq!(warnings.len(), expected, "{scaling}: {warnings:?}");
        }
        assert!(provenance_warnings(&made_with(model), "m", None, None).is_empty());
        assert!(
            provenance_warnings(&Provenance::default(), "m", None, Some(&json!({}))).is_empty()
        );
    }
}
