//! How much memory is free, and how much a piece of work takes at its peak.

use candle_core::Device;

use crate::bench::Machine;

/// Bytes that can still be taken on the device, where that can be told.
pub fn free(device: &Device) -> Option<u64> {
    give_back(device);
    match device {
        Device::Cpu => status("/proc/meminfo", "MemAvailable:"),
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => gpu::free(cuda.cuda_stream().context()),
        _ => None,
    }
}

/// Returns what was freed but is held for the next to take it: otherwise it would be counted as taken.
fn give_back(device: &Device) {
    match device {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: may be called at any time; it says whether there was anything.
        Device::Cpu => unsafe {
            libc::malloc_trim(0);
        },
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => gpu::give_back(cuda.cuda_stream().context()),
        _ => {}
    }
}

/// What the device is called.
pub fn device_name(device: &Device) -> String {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => cuda.cuda_stream().context().name().unwrap_or("GPU".to_owned()),
        _ => {
            let machine = Machine::here();
            let cpu = machine.cpu.unwrap_or_else(|| machine.arch.to_owned());
            format!("{cpu}, {} cores", machine.cores)
        }
    }
}

/// A number of KiB in a file of `/proc`, as bytes.
fn status(file: &str, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// Watches how much memory is taken from now on.
pub enum Peak {
    /// The kernel keeps the peak of a process. Resident bytes at the start.
    Process(u64),
    #[cfg(feature = "cuda")]
    Gpu(gpu::Watch),
}

impl Peak {
    /// `None` where the system does not tell.
    pub fn watch(device: &Device) -> Option<Self> {
        give_back(device);
        match device {
            Device::Cpu => {
                // Forgets the peak so far.
                std::fs::write("/proc/self/clear_refs", "5").ok()?;
                status("/proc/self/status", "VmRSS:").map(Self::Process)
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => gpu::Watch::start(cuda.cuda_stream().context()).map(Self::Gpu),
            _ => None,
        }
    }

    /// By how many bytes more was taken than at the start, at most.
    pub fn growth(self) -> Option<u64> {
        match self {
            Self::Process(start) => {
                Some(status("/proc/self/status", "VmHWM:")?.saturating_sub(start))
            }
            #[cfg(feature = "cuda")]
            Self::Gpu(watch) => watch.growth(),
        }
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::JoinHandle;
    use std::time::Duration;

    use candle_core::cuda::cudarc::driver::{CudaContext, sys};

    /// Between two readings: an activation lives longer in the steps that are measured.
    const EVERY: Duration = Duration::from_millis(1);

    /// Empties the pool that candle's allocations come from.
    pub fn give_back(context: &Arc<CudaContext>) {
        let mut pool = std::ptr::null_mut();
        // SAFETY: the device is the context's, the pointer one to a live variable; the pool is the driver's
        // own, and only what nobody uses leaves it. A refusal changes nothing.
        unsafe {
            let found = context.synchronize().is_ok()
                && sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result().is_ok();
            if found {
                let _ = sys::cuMemPoolTrimTo(pool, 0).result();
            }
        }
    }

    /// As the driver says, for the whole device.
    pub fn free(context: &Arc<CudaContext>) -> Option<u64> {
        Some(context.mem_get_info().ok()?.0 as u64)
    }

    /// A thread that reads the free memory again and again.
    pub struct Watch {
        start: u64,
        done: Arc<AtomicBool>,
        least: JoinHandle<Option<u64>>,
    }

    impl Watch {
        pub fn start(context: &Arc<CudaContext>) -> Option<Self> {
            let start = free(context)?;
            let done = Arc::new(AtomicBool::new(false));
            let (context, ended) = (Arc::clone(context), Arc::clone(&done));
            let watch = move || {
                let mut least = free(&context)?;
                while !ended.load(Ordering::Relaxed) {
                    std::thread::sleep(EVERY);
                    least = least.min(free(&context)?);
                }
                Some(least)
            };
            let least = std::thread::Builder::new().name("memory".to_owned()).spawn(watch).ok()?;
            Some(Self { start, done, least })
        }

        pub fn growth(self) -> Option<u64> {
            self.done.store(true, Ordering::Relaxed);
            Some(self.start.saturating_sub(self.least.join().ok()??))
        }
    }
}
