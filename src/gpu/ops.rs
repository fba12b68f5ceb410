//! The decoder's operations between products and attention, on a GPU.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CudaStorage, Layout, Result, Shape};

use super::cuda::{CudaKernels, storage_address};
use super::launch::{Arg, Launch};

/// A tensor as candle hands it to an operation.
pub type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// Elements of a row that one thread block of `swiglu` takes.
const SWIGLU_PART: usize = 2048;
/// Heads that a thread block of `rope` takes.
const ROPE_HEADS: usize = 4;

/// [`crate::ops::rms_norm`].
pub fn rms_norm(x: Operand<'_>, weight: Operand<'_>, eps: f64) -> Result<(CudaStorage, Shape)> {
    let width = weight.1.shape().elem_count();
    if width == 0 || x.1.dims().last() != Some(&width) {
        candle_core::bail!("rms_norm: weight of {width} for input {:?}", x.1.dims());
    }
    let rows = x.1.shape().elem_count() / width;
    like(x, "rms_norm", [rows, 1, 1], |out| {
        let (x, weight) = (address(x)?, address(weight)?);
        Ok(vec![x, null(), weight, null(), out, int(width), Arg::from(eps as f32)])
    })
}

/// [`crate::ops::swiglu`].
pub fn swiglu(gate: Operand<'_>, up: Operand<'_>) -> Result<(CudaStorage, Shape)> {
    let Some(&width) = gate.1.dims().last() else {
        candle_core::bail!("swiglu: needs at least one dimension");
    };
    if gate.1.dims() != up.1.dims() {
        candle_core::bail!("swiglu: shapes differ, {:?} and {:?}", gate.1.dims(), up.1.dims());
    }
    let rows = gate.1.shape().elem_count() / width.max(1);
    like(gate, "swiglu", [rows, width.div_ceil(SWIGLU_PART), 1], |out| {
        Ok(vec![address(gate)?, address(up)?, out, int(width), Arg::from(width as i64)])
    })
}

/// [`crate::ops::apply_rope`]; the angles are f32.
pub fn rope(x: Operand<'_>, cos: Operand<'_>, sin: Operand<'_>) -> Result<(CudaStorage, Shape)> {
    let (tokens, heads, dim) = x.1.shape().dims3()?;
    if [cos, sin].iter().any(|(_, angles)| angles.dims() != [tokens, dim / 2]) || dim % 2 != 0 {
        candle_core::bail!("rope: angles {:?} for input {:?}", cos.1.dims(), x.1.dims());
    }
    let stride = Arg::from((heads * dim) as i64);
    like(x, "rope", [(tokens * heads).div_ceil(ROPE_HEADS), 1, 1], |out| {
        let (x, cos, sin) = (address(x)?, address(cos)?, address(sin)?);
        // Queries only: no keys, no cache.
        let mut args = vec![x, null(), null(), null(), null(), cos, sin, out];
        args.extend([null(), null(), null(), null(), null()]);
        args.extend([int(tokens), int(heads), int(0), int(dim), stride, stride, stride]);
        args.extend([int(0), Arg::from(0f32)]);
        Ok(args)
    })
}

/// Runs `kernel` for the type of `x` with a result of its shape.
fn like(
    x: Operand<'_>,
    kernel: &str,
    grid: [usize; 3],
    args: impl FnOnce(Arg) -> Result<Vec<Arg>>,
) -> Result<(CudaStorage, Shape)> {
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let shape = x.1.shape().clone();
    // SAFETY: the kernel writes all of it.
    let out = unsafe { device.alloc_uninit(&shape, dtype)? };
    let args = args(address((&out, &Layout::contiguous(&shape)))?)?;
    // SAFETY: the arguments are those of the kernel; shapes were checked, and the stream orders the launch
    // before anything that frees an operand.
    unsafe {
        let kernels = CudaKernels::of(device)?;
        kernels.launch(&format!("{kernel}_{}", dtype.as_str()), grid, &args)?;
    }
    Ok((out, shape))
}

fn address((storage, layout): Operand<'_>) -> Result<Arg> {
    storage_address(storage, layout).map(Arg::from)
}

fn null() -> Arg {
    Arg::from(0u64)
}

fn int(value: usize) -> Arg {
    Arg::from(value as i32)
}
