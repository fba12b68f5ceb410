//! The elements of f32 tensors in host memory, to be read or changed in place.

use std::cell::Cell;
use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Storage, Tensor};

/// Whether our own loops compute with a tensor, and not candle or a kernel.
pub(crate) fn is_ours(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

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

/// Lets `f` change the elements of a contiguous f32 CPU tensor. Whoever shares its memory sees the change;
/// nobody may hold its [`Numbers`].
pub(crate) fn change_f32<R>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<R>) -> Result<R> {
    let op = Change { f: Cell::new(Some(f)), result: Cell::new(None) };
    tensor.inplace_op1(&op)?;
    op.result.take().unwrap_or_else(|| candle_core::bail!("a tensor was not changed"))
}

/// A function as candle's operation.
struct Change<F, R> {
    f: Cell<Option<F>>,
    result: Cell<Option<Result<R>>>,
}

impl<R, F: FnOnce(&mut [f32]) -> Result<R>> InplaceOp1 for Change<F, R> {
    fn name(&self) -> &'static str {
        "change"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets(), self.f.take()) {
            (CpuStorage::F32(values), Some((start, end)), Some(f)) => {
                self.result.set(Some(f(&mut values[start..end])));
                Ok(())
            }
            _ => candle_core::bail!("needs a contiguous f32 tensor on the CPU, got {layout:?}"),
        }
    }
}
