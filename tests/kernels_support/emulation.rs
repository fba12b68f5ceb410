//! The emulation as a GPU of the program.

use std::sync::Arc;

use candle_core::{DType, Device, Result};
use cartouche::gpu::{self, Arg, Launch};
use cartouche::model::Placement;

use super::{Arg as RawArg, Library};

/// A machine that runs the kernels of `kernels/` on the CPU, each with its threads in an order of its own.
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

impl Launch for Emulation {
    unsafe fn launch(&self, kernel: &str, grid: [usize; 3], args: &[Arg]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let end = ["_bf16", "_f16", "_f32"].into_iter().find_map(|kind| kernel.find(kind));
        let name = &kernel[..end.unwrap_or(kernel.len())];
        let source = SOURCES.iter().find(|(known, _)| *known == name).map_or(name, |(_, at)| at);
        let args: Vec<RawArg> = args
            .iter()
            .map(|arg| match *arg.bytes() {
                [a, b, c, d] => RawArg::from(u32::from_ne_bytes([a, b, c, d])),
                ref bytes => RawArg::from(u64::from_ne_bytes(bytes.try_into().unwrap())),
            })
            .collect();
        Library::of(&format!("kernels/{source}.cu"))
            .try_launch(kernel, grid, self.seed, &args)
            .map_err(candle_core::Error::msg)
    }
}

/// Where a test of the GPU's path computes: on the emulation, or on the GPU that `CARTOUCHE_TEST_DEVICE`
/// names (`cuda:0`) if the test was built with the feature `cuda`. `dtype` has 16 bits.
pub fn placement(dtype: DType) -> Placement {
    match std::env::var("CARTOUCHE_TEST_DEVICE") {
        #[cfg(feature = "cuda")]
        Ok(name) => {
            let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok());
            let index = index.unwrap_or_else(|| panic!("CARTOUCHE_TEST_DEVICE={name}: not cuda:N"));
            Placement { device: gpu::device(index).unwrap(), dtype }
        }
        #[cfg(not(feature = "cuda"))]
        Ok(name) => {
            panic!("CARTOUCHE_TEST_DEVICE={name}: this test was built without the feature cuda")
        }
        Err(_) => {
            gpu::emulate(Arc::new(Emulation { seed: 7 }));
            Placement { device: Device::Cpu, dtype }
        }
    }
}
