//! Building blocks of the decoder, with forward and backward.
//!
//! Forward passes are candle operations. Backward passes are functions over slices, on the CPU only: candle's
//! graph would keep every tensor in between, and add each gradient to zeroes. An operation asked for its
//! gradient through candle's graph is an error. The model's own weights are frozen by design: nothing
//! computes their gradient.

pub mod attention;
mod linear;
mod matrix;
pub(crate) mod memory;
pub(crate) mod product;
mod reduce;
mod rms_norm;
mod rope;
pub(crate) mod simd;
mod sum;
mod swiglu;

pub use linear::Linear;
pub use matrix::Matrix;
pub use reduce::{all_finite, argmax, exp_in_place, exp_sum, max};
pub use rms_norm::{add_rms_norm, rms_norm, rms_norm_backward};
pub use rope::{RopeScaling, RopeTable, apply_rope, rope_backward};
pub use sum::add_in_place;
pub use swiglu::{swiglu, swiglu_backward};

use std::ops::{Deref, Range};

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

/// The elements of a contiguous f32 CPU tensor, held for reading.
pub(crate) struct Numbers<'a> {
    /// A guard of candle's.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: Range<usize>,
}

impl<'a> Numbers<'a> {
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => {
                Ok(Self { storage: Box::new(storage), range: start..end })
            }
            _ => candle_core::bail!("needs a contiguous f32 tensor on the CPU, got {tensor:?}"),
        }
    }
}

impl Deref for Numbers<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => &[], // `of` refuses them
        }
    }
}

/// Calls `f` with the elements of an f32 CPU tensor, copied only if they are not contiguous.
pub(crate) fn with_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    f(&Numbers::of(&tensor.contiguous()?)?)
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
