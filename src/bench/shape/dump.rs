//! A small case of the attention of training as a file, for other programs to hold against their own.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::attention::Operands;
use super::measure::Unmeasured;
use crate::bench::BenchError;
use crate::model::{ModelConfig, Placement};
use crate::ops::attention::PackedGradients;

/// Uneven on purpose: nothing is a multiple of a tile.
const LENGTHS: [usize; 3] = [70, 1, 185];
const PREFIX: usize = 101;

/// Writes a safetensors file: `q` `[tokens, heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]`,
/// `prefix_keys` and `prefix_values` `[kv_heads, prefix, head_dim]`, `cu_seqlens` `[sequences + 1]`, the result
/// `out`, a gradient `grad_out` of it, and `grad_q`, `grad_k`, `grad_v`, `grad_prefix_keys`,
/// `grad_prefix_values`. Scores are divided by the root of `head_dim`. Gradients are f32, the others as the
/// device computes.
///
/// # Errors
/// [`BenchError::Plan`] if the device cannot compute it, [`BenchError::Io`] names a file that cannot be written.
pub fn dump(path: &Path, config: &ModelConfig, placement: &Placement) -> Result<(), BenchError> {
    let tensors = tensors(config, placement)
        .map_err(|e| BenchError::Plan(format!("--dump: not computed: {e}")))?;
    candle_core::safetensors::save(&tensors, path).map_err(|e| BenchError::Io {
        path: path.to_owned(),
        source: std::io::Error::other(e.to_string()),
    })
}

fn tensors(
    config: &ModelConfig,
    placement: &Placement,
) -> Result<HashMap<&'static str, Tensor>, Unmeasured> {
    let operands = Operands::new(config, placement, &LENGTHS, PREFIX)?;
    let result = operands.forward()?;
    let PackedGradients { prefix, own } = operands.backward(&result)?;
    let (Some((keys, values)), Some((grad_keys, grad_values)), Some([q, k, v])) =
        (&operands.prefix, prefix, own)
    else {
        return Err(candle_core::Error::msg("an attention without prefix or gradients").into());
    };
    let grad = |tensor: &Tensor| tensor.to_dtype(DType::F32);
    let cu_seqlens = Tensor::new(operands.cu_seqlens.as_slice(), &Device::Cpu)?;
    let tensors = [
        ("grad_out", grad(&operands.grad)?),
        ("grad_q", grad(&q)?),
        ("grad_k", grad(&k)?),
        ("grad_v", grad(&v)?),
        ("grad_prefix_keys", grad(&grad_keys)?),
        ("grad_prefix_values", grad(&grad_values)?),
        ("cu_seqlens", cu_seqlens),
        ("q", operands.q.clone()),
        ("k", operands.k.clone()),
        ("v", operands.v.clone()),
        ("prefix_keys", keys.clone()),
        ("prefix_values", values.clone()),
        ("out", result.0),
    ];
    Ok(HashMap::from(tensors))
}
