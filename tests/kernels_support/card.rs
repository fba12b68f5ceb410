//! The kernels of the program on a GPU. The buffers of a launch are copied there and back, with everything
//! beside their numbers: what a kernel writes next to them is found by `Buffer::read`, as on the CPU, or here.

use std::sync::OnceLock;

use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::{CudaDevice, Device, Result};
use cartouche::gpu::{self, Arg, CudaKernels, Launch};

use super::memory::{POISON, buffer_at};

/// Poison in the GPU's memory on either side of a buffer, in the place of the pages that trap.
const GUARD: usize = 4096;

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
    run(device(index), kernel, grid, args).map_err(|error| error.to_string())
}

/// A buffer of the test and its copy.
struct Copied {
    start: usize,
    bytes: usize,
    there: CudaSlice<u8>,
}

fn run(device: &CudaDevice, kernel: &str, grid: [usize; 3], args: &[Arg]) -> Result<()> {
    let stream = device.cuda_stream();
    let mut copies: Vec<Copied> = Vec::new();
    let mut there = Vec::with_capacity(args.len());
    for arg in args {
        // No number of these tests is as large as an address.
        let address = arg.bytes().try_into().map(u64::from_ne_bytes).unwrap_or_default() as usize;
        let Some((start, bytes)) = buffer_at(address) else {
            there.push(*arg);
            continue;
        };
        let at = match copies.iter().position(|copied| copied.start == start) {
            Some(at) => at,
            None => {
                let mut image = vec![POISON; bytes + 2 * GUARD];
                // SAFETY: a live buffer, which only this test uses, and no kernel runs.
                let here = unsafe { std::slice::from_raw_parts(start as *const u8, bytes) };
                image[GUARD..GUARD + bytes].copy_from_slice(here);
                copies.push(Copied { start, bytes, there: stream.clone_htod(&image).w()? });
                copies.len() - 1
            }
        };
        let base = copies[at].there.device_ptr(&stream).0;
        there.push(Arg::from(base + (GUARD + address - start) as u64));
    }
    // SAFETY: the arguments are those that the emulation checks against the kernel's declaration; addresses
    // are of copies that live until the launch has run.
    unsafe { CudaKernels::of(device)?.launch(kernel, grid, &there)? };
    stream.synchronize().w().map_err(|error| error.context(format!("kernel {kernel}")))?;
    for (i, Copied { start, bytes, there }) in copies.iter().enumerate() {
        let image = stream.clone_dtoh(there).w()?;
        stream.synchronize().w()?;
        let (front, rest) = image.split_at(GUARD);
        let (numbers, back) = rest.split_at(*bytes);
        if front.iter().chain(back).any(|byte| *byte != POISON) {
            candle_core::bail!("kernel {kernel}: a write outside of every buffer, near the {i}th");
        }
        // SAFETY: as above; `numbers` has as many bytes.
        unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), *start as *mut u8, *bytes) };
    }
    Ok(())
}
