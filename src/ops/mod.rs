//! Building blocks of the decoder, with forward and backward.
//!
//! candle's fused `rms_norm`, `rope` and quantised product drop the gradient without an error, so the
//! decoder uses these instead. On the CPU the backward passes are loops of our own; elsewhere they are plain
//! tensor operations, which need no second kernel per device. The model's own weights are frozen by design: no op returns their gradient.

pub mod attention;
pub(crate) mod gemm;
mod linear;
mod matrix;
pub(crate) mod memory;
mod reduce;
mod rms_norm;
mod rope;
pub(crate) mod simd;
mod swiglu;

pub use linear::Linear;
pub use matrix::Matrix;
pub use reduce::{all_finite, argmax, exp_in_place, exp_sum, max};
pub use rms_norm::rms_norm;
pub use rope::{RopeScaling, RopeTable, apply_rope};
pub use swiglu::swiglu;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor};

/// Calls `f` with the numbers of a tensor, as f32.
pub(crate) fn visit_bytes(tensor: &Tensor, f: &mut impl FnMut(&[u8])) -> Result<()> {
    with_f32(&on_host(tensor)?, |values| {
        f(bytemuck::cast_slice(values));
        Ok(())
    })
}

/// The elements of a contiguous f32 CPU tensor; an error names the op that was given something else.
pub(crate) fn contiguous_f32<'a>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [f32]> {
    let data = match storage {
        CpuStorage::F32(data) => data,
        other => candle_core::bail!(
            "{op}: the CPU path computes in f32, got {:?}",
            candle_core::backend::BackendStorage::dtype(other)
        ),
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => candle_core::bail!("{op}: needs a contiguous tensor, got {layout:?}"),
    }
}

/// The elements of a contiguous f32 CPU tensor whose storage the caller holds.
pub(crate) fn f32_slice<'a>(storage: &'a Storage, tensor: &Tensor) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(storage) => contiguous_f32("attention", storage, tensor.layout()),
        _ => candle_core::bail!("attention: this path runs on the CPU only"),
    }
}

/// The numbers of a tensor as f32 in host memory; the tensor itself if they are there already.
pub(crate) fn on_host(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)
}

/// Calls `f` with the elements of an f32 CPU tensor, copied only if they are not contiguous.
pub(crate) fn with_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, _) = tensor.storage_and_layout();
    f(f32_slice(&storage, &tensor)?)
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::Tensor;

    /// Panics unless both tensors have one shape and differ by at most `tolerance` anywhere.
    pub fn assert_close(a: &Tensor, b: &Tensor, tolerance: f32) {
        assert_eq!(a.dims(), b.dims());
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let worst = flat(a).iter().zip(flat(b)).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max);
        assert!(worst <= tolerance, "largest difference {worst} exceeds {tolerance}");
    }
}
