//! The decoder's operations between products and attention, on a GPU.

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::launch::{Arg, Launch};
use super::machine::address;
use crate::model::{Angles, Unrotated};

/// Elements of a row that one thread block of `swiglu` takes.
pub(super) const SWIGLU_PART: usize = 2048;
/// Heads that a thread block of `rope` takes.
pub(super) const ROPE_HEADS: usize = 4;

/// [`crate::ops::rms_norm`] of a contiguous `x`.
pub fn rms_norm(gpu: &dyn Launch, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    launch_rms_norm(gpu, x, None, weight, eps)
}

/// [`crate::ops::add_rms_norm`] of contiguous operands.
pub fn add_rms_norm(
    gpu: &dyn Launch,
    x: Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    if x.dims() != residual.dims() || x.dtype() != residual.dtype() {
        candle_core::bail!("rms_norm: {residual:?} added to {x:?}");
    }
    let normed = launch_rms_norm(gpu, &x, Some(residual), weight, eps)?;
    Ok((x, normed))
}

/// With a residual, `x` becomes the sum that is normalised.
fn launch_rms_norm(
    gpu: &dyn Launch,
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let width = weight.elem_count();
    if width == 0 || x.dims().last() != Some(&width) {
        candle_core::bail!("rms_norm: weight of {width} for input {:?}", x.dims());
    }
    let rows = x.elem_count() / width;
    let out = like(x)?;
    let args = [
        Arg::from(address(x)?),
        residual.map_or(Ok(null()), |residual| address(residual).map(Arg::from))?,
        address(weight)?.into(),
        if residual.is_some() { address(x)?.into() } else { null() },
        address(&out)?.into(),
        int(width),
        Arg::from(eps as f32),
    ];
    // SAFETY: the arguments of the kernel, which writes all of `out` and reads each number of `x` before it
    // replaces it.
    unsafe { gpu.launch(&named("rms_norm", x), [rows, 1, 1], &args)? };
    Ok(out)
}

/// [`crate::ops::swiglu`] of contiguous operands.
pub fn swiglu(gpu: &dyn Launch, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let Some(&width) = gate.dims().last() else {
        candle_core::bail!("swiglu: needs at least one dimension");
    };
    if gate.dims() != up.dims() {
        candle_core::bail!("swiglu: shapes differ, {:?} and {:?}", gate.dims(), up.dims());
    }
    let rows = gate.elem_count() / width.max(1);
    let out = like(gate)?;
    let args = [
        Arg::from(address(gate)?),
        address(up)?.into(),
        address(&out)?.into(),
        int(width),
        Arg::from(width as i64),
    ];
    let grid = [rows, width.div_ceil(SWIGLU_PART), 1];
    // SAFETY: as above.
    unsafe { gpu.launch(&named("swiglu", gate), grid, &args)? };
    Ok(out)
}

/// [`crate::ops::apply_rope`] of a contiguous `x`; the angles are f32.
pub fn rope(gpu: &dyn Launch, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (tokens, heads, dim) = x.dims3()?;
    check_angles(x, cos, sin)?;
    let stride = Arg::from((heads * dim) as i64);
    let out = like(x)?;
    // Queries only: no keys, no cache.
    let mut args = vec![Arg::from(address(x)?), null(), null(), null(), null()];
    args.extend([Arg::from(address(cos)?), address(sin)?.into(), address(&out)?.into()]);
    args.extend([null(), null(), null(), null(), null()]);
    args.extend([int(tokens), int(heads), int(0), int(dim), stride, stride, stride]);
    args.extend([int(0), Arg::from(0f32)]);
    let grid = [(tokens * heads).div_ceil(ROPE_HEADS), 1, 1];
    // SAFETY: as above.
    unsafe { gpu.launch(&named("rope", x), grid, &args)? };
    Ok(out)
}

/// A layer of the paged cache, and where in it new tokens go.
#[derive(Debug, Clone, Copy)]
pub struct Pages<'a> {
    /// `[blocks, kv_heads, 16, head_dim]`
    pub keys: &'a Tensor,
    pub values: &'a Tensor,
    /// `[tokens]` u32: block * 16 + slot.
    pub places: &'a Tensor,
}

/// [`Unrotated::rotated`], with keys and values stored in the same launch.
///
/// # Safety
/// Every place is inside of the cache, and nobody else uses these places.
pub unsafe fn rotate_and_store(
    gpu: &dyn Launch,
    from: &Unrotated<'_>,
    to: &Pages<'_>,
) -> Result<(Tensor, Tensor)> {
    let (q, k, v) = (from.q.contiguous()?, from.k.contiguous()?, from.v.contiguous()?);
    let ((tokens, heads, dim), (_, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let Angles { cos, sin } = from.k_angles;
    check_angles(&q, cos, sin)?;
    let (blocks, block_heads, slots, block_dim) = to.keys.dims4()?;
    let one_pass = std::ptr::eq(from.q_angles, from.k_angles);
    let alike = [&q, &k, &v].iter().all(|x| x.dtype() == to.keys.dtype());
    if k.dims() != [tokens, kv_heads, dim]
        || v.dims() != k.dims()
        || (block_heads, block_dim) != (kv_heads, dim)
        || to.places.dims() != [tokens]
        || to.values.dims() != to.keys.dims()
        || !(alike && one_pass)
    {
        candle_core::bail!("rope: {q:?}, {k:?} and {v:?} for a cache {:?}", to.keys);
    }
    let norm = |norm: Option<&Tensor>| norm.map_or(Ok(null()), |norm| address(norm).map(Arg::from));
    let (q_out, k_out) = (like(&q)?, like(&k)?);
    let args = [
        Arg::from(address(&q)?),
        address(&k)?.into(),
        address(&v)?.into(),
        norm(from.q_norm)?,
        norm(from.k_norm)?,
        address(cos)?.into(),
        address(sin)?.into(),
        address(&q_out)?.into(),
        address(&k_out)?.into(),
        address(to.keys)?.into(),
        address(to.values)?.into(),
        address(to.places)?.into(),
        null(),
        int(tokens),
        int(heads),
        int(kv_heads),
        int(dim),
        Arg::from((heads * dim) as i64),
        Arg::from((kv_heads * dim) as i64),
        Arg::from((kv_heads * dim) as i64),
        int(blocks * slots),
        Arg::from(from.eps as f32),
    ];
    let grid = [(tokens * (heads + 2 * kv_heads)).div_ceil(ROPE_HEADS), 1, 1];
    // SAFETY: the arguments of the kernel; the places are the caller's.
    unsafe { gpu.launch(&named("rope", &q), grid, &args)? };
    Ok((q_out, k_out))
}

fn check_angles(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    let (tokens, _, dim) = x.dims3()?;
    let fit = |angles: &&Tensor| angles.dims() == [tokens, dim / 2] && angles.dtype() == DType::F32;
    if ![cos, sin].iter().all(fit) || dim % 2 != 0 {
        candle_core::bail!("rope: angles {:?} for input {:?}", cos.dims(), x.dims());
    }
    Ok(())
}

/// `x · weightᵀ` in f32, of 16-bit operands `[rows, in]` and `[out, in]`: candle rounds its result to 16 bits.
pub fn product_f32(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let fit = matches!((x.dims(), weight.dims()), ([_, a], [_, b]) if a == b);
    if !fit || x.dtype() != weight.dtype() {
        candle_core::bail!("product: {:?} with weights {:?}", x.dims(), weight.dims());
    }
    match x.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::product_f32(device, &x.contiguous()?, weight),
        _ => x.to_dtype(DType::F32)?.matmul(&weight.to_dtype(DType::F32)?.t()?),
    }
}

/// Room for a result, to be written whole by a kernel.
pub fn room(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: numbers of any bits are valid; a kernel writes them before they are read.
    unsafe { Tensor::empty(shape, dtype, device) }
}

/// Room for a result like `x`.
pub(super) fn like(x: &Tensor) -> Result<Tensor> {
    room(x.shape(), x.dtype(), x.device())
}

/// The kernel for the type of `x`.
pub(super) fn named(kernel: &str, x: &Tensor) -> String {
    format!("{kernel}_{}", x.dtype().as_str())
}

pub(super) fn null() -> Arg {
    Arg::from(0u64)
}

pub(super) fn int(value: usize) -> Arg {
    Arg::from(value as i32)
}
