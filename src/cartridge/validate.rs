//! The gate between a readable file and a cartridge that may touch a request.

use candle_core::{DType, Tensor};

use super::{Cartridge, CartridgeError, KvShape, Provenance, artifact::with_bytes, error::UNNAMED};

/// Checks a cartridge against the model it is to be used with: layers, KV heads, head size, finite
/// numbers.
///
/// # Errors
/// [`CartridgeError::Mismatch`] says which size differs, what the file has and what the model
/// needs; [`CartridgeError::Invalid`] says in which layer and tensor the first number that is not
/// finite lies.
pub fn validate(cartridge: &Cartridge, model: &KvShape) -> Result<(), CartridgeError> {
    let have = cartridge.shape();
    for (what, have, need) in [
        ("layers", have.layers, model.layers),
        ("KV heads", have.kv_heads, model.kv_heads),
        ("numbers per head", have.head_dim, model.head_dim),
    ] {
        if have != need {
            return Err(CartridgeError::Mismatch { name: UNNAMED.to_owned(), what, have, need });
        }
    }
    check_finite(cartridge)
}

/// Finds the first number that is not finite.
pub(super) fn check_finite(cartridge: &Cartridge) -> Result<(), CartridgeError> {
    for (i, layer) in cartridge.layers().iter().enumerate() {
        for (tensor, name) in layer.tensors().zip(["keys", "values", "bias"]) {
            if let Some(at) = first_non_finite(tensor)? {
                let reason =
                    format!("layer {i} {name}: element {at} of {:?} is not finite", tensor.dims());
                return Err(CartridgeError::invalid(reason));
            }
        }
    }
    Ok(())
}

/// Index in row-major order. An exponent of all ones is an infinity or a NaN in each of the three
/// types.
fn first_non_finite(tensor: &Tensor) -> Result<Option<usize>, CartridgeError> {
    let dtype = tensor.dtype();
    with_bytes(tensor, |bytes| match dtype {
        DType::F32 => bytes.chunks_exact(4).position(|b| b[3] & 0x7f == 0x7f && b[2] & 0x80 != 0),
        DType::BF16 => bytes.chunks_exact(2).position(|b| b[1] & 0x7f == 0x7f && b[0] & 0x80 != 0),
        _ => bytes.chunks_exact(2).position(|b| b[1] & 0x7c == 0x7c),
    })
}

/// What a careful operator would want to know about a cartridge that fits by shape: that it was
/// made for another model, or with another RoPE base. Advisory, because makers name models as they
/// like.
pub fn provenance_warnings(
    provenance: &Provenance,
    model: &str,
    rope_theta: Option<f64>,
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
    warnings
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
        assert!(provenance_warnings(&provenance, "llama-3.2-3b", Some(500_000.0)).is_empty());
        let warnings = provenance_warnings(&provenance, "Qwen/Qwen3-4B", Some(1e6));
        assert_eq!(warnings.len(), 2);
        assert!(warnings[0].contains("Qwen3-4B") && warnings[1].contains("500000"));
    }
}
