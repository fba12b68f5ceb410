//! The kernels of the program on a GPU, with the buffers of tests.

use std::sync::OnceLock;

use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::{CudaDevice, Device};
use cartouche::gpu::{self, Arg, CudaKernels, Launch};

use super::copies::{self, Elsewhere};

/// The GPU of all tests of this process. Says once which one it is.
pub fn device(index: usize) -> &'static CudaDevice {
    static DEVICE: OnceLock<CudaDevice> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let device = gpu::device(index).unwrap_or_else(|e| panic!("cuda:{index}: {e}"));
        let Device::Cuda(device) = device else { unreachable!("a GPU was asked for") };
        let name = device.cuda_stream().context().name();
        println!("KERNELS RUN ON cuda:{index}: {}", name.unwrap_or_default());
        device
    })
}

pub fn launch(index: usize, kernel: &str, grid: [usize; 3], args: &[Arg]) -> Result<(), String> {
    copies::launch(&Card(device(index)), kernel, grid, args)
}

struct Card(&'static CudaDevice);

impl Elsewhere for Card {
    type Memory = CudaSlice<u8>;

    fn put(&self, bytes: &[u8]) -> Result<Self::Memory, String> {
        self.0.cuda_stream().clone_htod(bytes).w().map_err(|e| e.to_string())
    }

    fn address(&self, memory: &Self::Memory) -> u64 {
        memory.device_ptr(&self.0.cuda_stream()).0
    }

    fn get(&self, memory: &Self::Memory) -> Result<Vec<u8>, String> {
        let stream = self.0.cuda_stream();
        let bytes = stream.clone_dtoh(memory).w().map_err(|e| e.to_string())?;
        stream.synchronize().w().map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    fn launch(&self, kernel: &str, grid: [usize; 3], args: &[Arg]) -> Result<(), String> {
        let run = || {
            // SAFETY: the arguments are those that the emulation holds to the kernel's declaration; addresses
            // are of copies that live until the launch has run.
            unsafe { CudaKernels::of(self.0)?.launch(kernel, grid, args)? };
            self.0.cuda_stream().synchronize().w()
        };
        run().map_err(|error: candle_core::Error| format!("kernel {kernel}: {error}"))
    }
}
