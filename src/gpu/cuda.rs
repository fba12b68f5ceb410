//! The kernels on a GPU, through candle's own context and stream: everything is ordered by that stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::cublas::result::gemm_ex;
use candle_core::cuda::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType,
};
use candle_core::cuda::cudarc::driver::result::device::get_default_mem_pool;
use candle_core::cuda::cudarc::driver::result::mem_pool;
use candle_core::cuda::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX_SHARED;
use candle_core::cuda::cudarc::driver::sys::CUmemPool_attribute_enum as CUmemPool_attribute;
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaModule, DevicePtr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda::cudarc::nvrtc::Ptx;
use candle_core::cuda::{CudaStorageSlice, DeviceId};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Tensor};

use super::launch::{Arg, Launch};
use super::machine::address;
use super::ops::room;

/// A source of `kernels/`, compiled.
struct Module {
    name: &'static str,
    /// For any GPU since Ampere.
    ptx: &'static str,
    /// Machine code for compute capability 9.0.
    hopper: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// The kernels, loaded on one device.
pub struct CudaKernels {
    device: CudaDevice,
    modules: Vec<Arc<CudaModule>>,
    functions: Mutex<HashMap<String, Arc<Kernel>>>,
}

struct Kernel {
    function: CudaFunction,
    threads: u32,
    shared_bytes: u32,
}

/// GPU number `index`, with its kernels loaded.
///
/// All threads work on one stream of its own: candle's default is a stream per thread, in which a step could
/// read a cartridge that another thread is still copying.
///
/// # Errors
/// There is no such GPU, or the kernels do not run on it.
pub fn device(index: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(index)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: nothing is allocated yet, and the one stream orders all that will be.
    unsafe { cuda.disable_event_tracking() };
    CudaKernels::of(cuda)?;
    keep_freed_memory(cuda)?;
    Ok(device)
}

/// Keeps freed memory for the next allocation: by default it goes back to the system whenever the host waits
/// for the device, which is once a step, and has to be mapped anew in the next.
fn keep_freed_memory(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    let mut most = u64::MAX;
    // SAFETY: the device is that of the context, and the attribute a u64.
    unsafe {
        let pool = get_default_mem_pool(stream.context().cu_device()).w()?;
        let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        mem_pool::set_attribute(pool, threshold, (&raw mut most).cast()).w()
    }
}

impl CudaKernels {
    /// The kernels of a device, loaded on first use.
    pub fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        static LOADED: Mutex<Vec<(DeviceId, Arc<CudaKernels>)>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kernels)) = loaded.iter().find(|(id, _)| *id == device.id()) {
            return Ok(Arc::clone(kernels));
        }
        let kernels = Arc::new(Self::load(device)?);
        loaded.push((device.id(), Arc::clone(&kernels)));
        Ok(kernels)
    }

    fn load(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let (major, minor) = context.compute_capability().w()?;
        if major < 8 {
            candle_core::bail!(
                "this GPU has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later"
            );
        }
        let load = |module: &Module| {
            let code = match major {
                9 => Ptx::from_binary(module.hopper.to_vec()),
                _ => Ptx::from_src(module.ptx),
            };
            let loaded = context.load_module(code).w();
            loaded.map_err(|error| error.context(format!("kernels/{}.cu", module.name)))
        };
        let modules = MODULES.iter().map(load).collect::<Result<_>>()?;
        Ok(Self { device: device.clone(), modules, functions: Mutex::default() })
    }

    fn kernel(&self, name: &str) -> Result<Arc<Kernel>> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = functions.get(name) {
            return Ok(Arc::clone(kernel));
        }
        let found =
            self.modules.iter().find_map(|module| Some((module, module.load_function(name).ok()?)));
        let Some((module, function)) = found else {
            candle_core::bail!("there is no kernel {name}: no form for this type or head size");
        };
        // KERNEL in `kernels/simt.cuh` writes threads and shared bytes beside every kernel.
        let stream = self.device.cuda_stream();
        let shape = module.get_global(&format!("{name}_shape"), &stream).w()?;
        let shape: Vec<u8> = stream.clone_dtoh(&shape).w()?;
        let number = |at: usize| {
            shape.get(at..at + 4).and_then(|b| Some(u32::from_ne_bytes(b.try_into().ok()?)))
        };
        let (Some(threads), Some(shared_bytes)) = (number(0), number(4)) else {
            candle_core::bail!("kernel {name} has a shape of {} bytes", shape.len());
        };
        function.set_attribute(MAX_SHARED, shared_bytes as i32).w()?;
        let kernel = Arc::new(Kernel { function, threads, shared_bytes });
        functions.insert(name.to_owned(), Arc::clone(&kernel));
        Ok(kernel)
    }
}

impl Launch for CudaKernels {
    unsafe fn launch(&self, name: &str, grid: [usize; 3], args: &[Arg]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let kernel = self.kernel(name)?;
        let stream = self.device.cuda_stream();
        let mut builder = stream.launch_builder(&kernel.function);
        for arg in args {
            // The driver reads as many bytes as the kernel's declaration says.
            builder.arg(arg.bits());
        }
        let [x, y, z] = grid.map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX));
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (kernel.threads, 1, 1),
            shared_mem_bytes: kernel.shared_bytes,
        };
        // SAFETY: the caller's promise.
        let launched = unsafe { builder.launch(config) }.w();
        launched.map(|_| ()).map_err(|error| error.context(format!("kernel {name}, grid {grid:?}")))
    }
}

/// [`super::ops::product_f32`].
pub(super) fn product_f32(device: &CudaDevice, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((rows, depth), (columns, _)) = (x.dims2()?, weight.dims2()?);
    let kind = match x.dtype() {
        DType::BF16 => cudaDataType::CUDA_R_16BF,
        DType::F16 => cudaDataType::CUDA_R_16F,
        _ => cudaDataType::CUDA_R_32F,
    };
    let out = room((rows, columns), DType::F32, x.device())?;
    let (a, b, c) = (address(weight)?, address(x)?, address(&out)?);
    let int = |n: usize| i32::try_from(n).map_err(candle_core::Error::wrap);
    let (rows, columns, depth) = (int(rows)?, int(columns)?, int(depth)?);
    let (one, zero) = (&1f32 as *const f32, &0f32 as *const f32);
    let blas = device.cublas_handle();
    // SAFETY: cuBLAS counts by columns, so this is weight · xᵀ of operands that are each other's transposes; the
    // addresses are of contiguous tensors of these shapes, used in the order of the handle's stream.
    unsafe {
        gemm_ex(
            *blas.handle(),
            cublasOperation_t::CUBLAS_OP_T,
            cublasOperation_t::CUBLAS_OP_N,
            columns,
            rows,
            depth,
            one.cast(),
            a as *const _,
            kind,
            depth,
            b as *const _,
            kind,
            depth,
            zero.cast(),
            c as *mut _,
            cudaDataType::CUDA_R_32F,
            columns,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()?;
    Ok(out)
}

/// Where a storage begins.
pub(super) fn base(storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    Ok(match &storage.slice {
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::I32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::I64(slice) => slice.device_ptr(&stream).0,
        _ => candle_core::bail!("a kernel takes bf16, f16, f32, u32, i32 or i64"),
    })
}
