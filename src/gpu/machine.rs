//! On which machine a tensor is computed.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};

use super::launch::Launch;

/// A machine that runs the kernels of `kernels/`, usable from any thread.
pub type Machine = Arc<dyn Launch + Send + Sync>;

static EMULATION: OnceLock<Machine> = OnceLock::new();

/// Makes `machine` the GPU of 16-bit tensors in host memory, for the rest of the process; the first call
/// counts. Tests run model, engine and trainer as on a GPU this way, with the kernels on the emulation and
/// candle's operations on the CPU. Everything else computes in f32 on the CPU and is not touched.
pub fn emulate(machine: Machine) {
    let _ = EMULATION.set(machine);
}

/// The GPU that computes with tensors of `dtype` on `device`, if one does.
///
/// # Errors
/// The kernels cannot be loaded on that device.
pub fn machine(device: &Device, dtype: DType) -> Result<Option<Machine>> {
    match (device, dtype) {
        #[cfg(feature = "cuda")]
        (Device::Cuda(device), _) => Ok(Some(super::CudaKernels::of(device)?)),
        (Device::Cpu, DType::BF16 | DType::F16) => Ok(EMULATION.get().cloned()),
        _ => Ok(None),
    }
}

/// Whether [`machine`] has one.
pub fn is_gpu(device: &Device, dtype: DType) -> bool {
    match (device, dtype) {
        (Device::Cuda(_), _) => true,
        (Device::Cpu, DType::BF16 | DType::F16) => EMULATION.get().is_some(),
        _ => false,
    }
}

/// The same for a tensor.
pub(crate) fn machine_of(tensor: &Tensor) -> Result<Option<Machine>> {
    machine(tensor.device(), tensor.dtype())
}

/// Where a contiguous tensor lies in the memory of its machine. It must stay alive until what uses the
/// address is launched; a GPU's memory is freed in the order of its stream.
pub fn address(tensor: &Tensor) -> Result<u64> {
    if !tensor.is_contiguous() {
        candle_core::bail!("a kernel needs a contiguous tensor, got {:?}", tensor.layout());
    }
    first_address(tensor)
}

/// Where the first element of a tensor lies, whatever its strides.
pub(crate) fn first_address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let base = match &*storage {
        Storage::Cpu(storage) => match storage {
            CpuStorage::BF16(values) => values.as_ptr() as u64,
            CpuStorage::F16(values) => values.as_ptr() as u64,
            CpuStorage::F32(values) => values.as_ptr() as u64,
            CpuStorage::U32(values) => values.as_ptr() as u64,
            CpuStorage::I32(values) => values.as_ptr() as u64,
            CpuStorage::I64(values) => values.as_ptr() as u64,
            _ => candle_core::bail!("a kernel takes no {:?}", tensor.dtype()),
        },
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => super::cuda::base(storage)?,
        _ => candle_core::bail!("a kernel takes no tensor on {:?}", tensor.device()),
    };
    Ok(base + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}
