//! The machine of these tests as a GPU of the program.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::{DType, Device, Result};
use cartouche::gpu::{self, Arg, Launch};
use cartouche::model::Placement;

use super::{Library, gpu_index};

/// A machine that runs the kernels of `kernels/` over buffers in host memory: on the CPU, with the threads in
/// the order of a seed, or on the GPU of these tests.
pub struct Emulation {
    pub seed: u64,
}

/// Kernels that have no source of their own name: how their names begin, and where they are.
const SOURCES: [(&str, &str); 7] = [
    ("attention_backward_delta", "attention_backward_sums"),
    ("attention_backward_sum", "attention_backward_sums"),
    ("attention_backward_own", "attention_backward_keys"),
    ("attention_backward_prefix", "attention_backward_keys"),
    ("rms_norm_backward", "rms_norm"),
    ("rope_backward", "rope"),
    ("swiglu_backward", "swiglu"),
];

static LAUNCHES: LazyLock<Mutex<HashMap<String, usize>>> = LazyLock::new(Mutex::default);

/// How often this process has run a kernel on the emulation.
pub fn launches(kernel: &str) -> usize {
    LAUNCHES.lock().unwrap().get(kernel).copied().unwrap_or(0)
}

impl Launch for Emulation {
    unsafe fn launch(&self, kernel: &str, grid: [usize; 3], args: &[Arg]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        *LAUNCHES.lock().unwrap().entry(kernel.to_owned()).or_default() += 1;
        let end = ["_bf16", "_f16", "_f32"].into_iter().find_map(|kind| kernel.find(kind));
        let name = &kernel[..end.unwrap_or(kernel.len())];
        let source = SOURCES.iter().find(|(known, _)| *known == name).map_or(name, |(_, at)| at);
        Library::of(&format!("kernels/{source}.cu"))
            .try_launch(kernel, grid, self.seed, args)
            .map_err(candle_core::Error::msg)
    }
}

/// Where a test of the GPU's path computes: on the emulation, or on the GPU that `CARTOUCHE_TEST_DEVICE`
/// names (`cuda:0`) if the test was built with the feature `cuda`. `dtype` has 16 bits.
pub fn placement(dtype: DType) -> Placement {
    let device = match gpu_index() {
        #[cfg(feature = "cuda")]
        Some(index) => Device::Cuda(super::card::device(index).clone()),
        _ => {
            gpu::emulate(Arc::new(Emulation { seed: 7 }));
            Device::Cpu
        }
    };
    Placement { device, dtype }
}
