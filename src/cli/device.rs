//! `--device`: where the model computes.

use super::CliError;
use crate::model::Placement;

/// `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// Another word, or a GPU that this program or this machine does not have.
pub fn placement(name: &str) -> Result<Placement, CliError> {
    match name {
        "auto" => Ok(gpu(0).unwrap_or_else(|reason| {
            tracing::info!(reason, "computing on the CPU");
            Placement::default()
        })),
        "cpu" => Ok(Placement::default()),
        _ => {
            let index = match name.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|index| index.parse().ok()),
                None => None,
            };
            let bad = || CliError::Usage(format!("--device {name}: not auto, cpu, cuda or cuda:N"));
            let index = index.ok_or_else(bad)?;
            gpu(index).map_err(|reason| CliError::Usage(format!("--device {name}: {reason}")))
        }
    }
}

#[cfg(feature = "cuda")]
fn gpu(index: usize) -> Result<Placement, String> {
    use candle_core::cuda::cudarc::driver::{CudaContext, sys::CUresult};
    use candle_core::{DType, Device};
    let count = CudaContext::device_count().or_else(|error| match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        _ => Err(format!("CUDA cannot be used: {error}")),
    })?;
    match usize::try_from(count).unwrap_or(0) {
        0 => return Err("there is no NVIDIA GPU here, or no driver (libcuda.so.1)".to_owned()),
        count if index >= count => return Err(format!("GPUs here: {count}, from cuda:0 on")),
        _ => {}
    }
    let device = Device::new_cuda(index).map_err(|e| format!("cannot be used: {e}"))?;
    let Device::Cuda(cuda) = &device else { return Err("is no GPU".to_owned()) };
    // Kernels that do not fit this GPU are told here, not with the first request.
    crate::gpu::CudaKernels::of(cuda).map_err(|e| e.to_string())?;
    Ok(Placement { device, dtype: DType::BF16 })
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: usize) -> Result<Placement, String> {
    Err("this program was built without --features cuda".to_owned())
}
