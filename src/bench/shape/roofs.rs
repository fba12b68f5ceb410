//! The roofs of a device, measured: what a large copy and a large matrix product reach.

use candle_core::Device;
use rayon::prelude::*;

use super::measure::{Times, Timing, Unmeasured, time};
use super::roofline::Work;
use crate::model::{Placement, noise};
use crate::ops::Matrix;

/// How large the copy and the product are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoofSizes {
    /// Bytes that are read, and as many written.
    pub copy_bytes: usize,
    /// Rows, columns and depth of a product.
    pub product: usize,
}

impl RoofSizes {
    /// Far beyond the caches of a device, and long beside the start of a kernel.
    pub fn of(device: &Device) -> Self {
        match device {
            Device::Cpu => Self { copy_bytes: 256 << 20, product: 2048 },
            _ => Self { copy_bytes: 2 << 30, product: 8192 },
        }
    }
}

/// A copy within the device's memory.
pub fn copy(
    device: &Device,
    sizes: RoofSizes,
    timing: &Timing,
) -> Result<(Work, Times), Unmeasured> {
    let bytes = sizes.copy_bytes;
    let work = Work { bytes: 2 * bytes as u64, flops: 0 };
    let times = match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            use candle_core::cuda::WrapErr;
            let stream = cuda.cuda_stream();
            let from = stream.alloc_zeros::<u8>(bytes).w()?;
            let mut to = stream.alloc_zeros::<u8>(bytes).w()?;
            time(device, timing, || Ok(stream.memcpy_dtod(&from, &mut to).w()?))?
        }
        _ => {
            /// Bytes per parallel task.
            const GRAIN: usize = 1 << 20;
            // Ones: memory that was never written is one page of zeroes.
            let (from, mut to) = (vec![1u8; bytes], vec![1u8; bytes]);
            time(device, timing, || {
                let parts = to.par_chunks_mut(GRAIN).zip(from.par_chunks(GRAIN));
                parts.for_each(|(to, from)| to.copy_from_slice(from));
                std::hint::black_box(&to);
                Ok(())
            })?
        }
    };
    Ok((work, times))
}

/// A square matrix product, computed as the decoder's are.
pub fn product(
    placement: &Placement,
    sizes: RoofSizes,
    timing: &Timing,
) -> Result<(Work, Times), Unmeasured> {
    let side = sizes.product;
    let numbers = |seed| noise((side, side), 1.0 / (side as f64).sqrt(), placement, seed);
    let (x, weight) = (numbers(1)?, Matrix::dense(&numbers(2)?)?);
    let number = placement.dtype.size_in_bytes() as u64;
    let side = side as u64;
    let work = Work { bytes: 3 * side * side * number, flops: 2 * side * side * side };
    let times = time(&placement.device, timing, || {
        weight.product(&x, None)?;
        Ok(())
    })?;
    Ok((work, times))
}
