//! The way back through the decoder's operations between products and attention, on a GPU.

use candle_core::{Result, Tensor};

use super::launch::{Arg, Launch};
use super::machine::address;
use super::ops::{ROPE_HEADS, SWIGLU_PART, int, like, named, null};

/// [`crate::ops::rms_norm_backward`] of contiguous tensors.
pub fn rms_norm(
    gpu: &dyn Launch,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    grad: &Tensor,
    to: Option<Tensor>,
) -> Result<Tensor> {
    let width = weight.elem_count();
    if width == 0 || x.dims().last() != Some(&width) {
        candle_core::bail!("rms_norm: weight of {width} for input {:?}", x.dims());
    }
    let rows = x.elem_count() / width;
    // The kernel may write where it reads what is added.
    let (dx, add) = match to {
        Some(to) => (to.clone(), address(&to)?.into()),
        None => (like(x)?, null()),
    };
    let args = [
        Arg::from(address(x)?),
        address(weight)?.into(),
        address(grad)?.into(),
        add,
        address(&dx)?.into(),
        int(width),
        Arg::from(eps as f32),
    ];
    // SAFETY: the arguments of the kernel, which writes all of `dx`; the caller checked the shapes.
    unsafe { gpu.launch(&named("rms_norm_backward", x), [rows, 1, 1], &args)? };
    Ok(dx)
}

/// [`crate::ops::swiglu_backward`] of contiguous tensors.
pub fn swiglu(
    gpu: &dyn Launch,
    gate: &Tensor,
    up: &Tensor,
    grad: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let Some(&width) = gate.dims().last() else {
        candle_core::bail!("swiglu: needs at least one dimension");
    };
    let rows = gate.elem_count() / width.max(1);
    let (d_gate, d_up) = (like(gate)?, like(up)?);
    let args = [
        Arg::from(address(gate)?),
        address(up)?.into(),
        address(grad)?.into(),
        address(&d_gate)?.into(),
        address(&d_up)?.into(),
        int(width),
        Arg::from(width as i64),
    ];
    let grid = [rows, width.div_ceil(SWIGLU_PART), 1];
    // SAFETY: as above.
    unsafe { gpu.launch(&named("swiglu_backward", gate), grid, &args)? };
    Ok((d_gate, d_up))
}

/// [`crate::ops::rope_backward`] of a contiguous gradient, in its place; the angles are f32.
pub fn rope(gpu: &dyn Launch, grad: Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (tokens, heads, dim) = grad.dims3()?;
    let at = Arg::from(address(&grad)?);
    let args = [
        at,
        null(), // no norm
        null(),
        address(cos)?.into(),
        address(sin)?.into(),
        at,
        int(tokens),
        int(heads),
        int(dim),
        Arg::from((heads * dim) as i64),
        Arg::from(0f32),
    ];
    let grid = [(tokens * heads).div_ceil(ROPE_HEADS), 1, 1];
    // SAFETY: as above.
    unsafe { gpu.launch(&named("rope_backward", &grad), grid, &args)? };
    Ok(grad)
}
