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
    let count = CudaContext::device_count().or_else(|error| match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        _ => Err(format!("CUDA cannot be used: {error}")),
    })?;
    match usize::try_from(count).unwrap_or(0) {
        0 => return Err("there is no NVIDIA GPU here, or no driver (libcuda.so.1)".to_owned()),
        count if index >= count => return Err(format!("GPUs here: {count}, from cuda:0 on")),
        _ => {}
    }
    let device = crate::gpu::device(index).map_err(|e| format!("cannot be used: {e}"))?;
    Ok(Placement { device, dtype: candle_core::DType::BF16 })
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: usize) -> Result<Placement, String> {
    Err("this program was built without --features cuda".to_owned())
}
