//! The gated activation of Llama-style feed-forward layers.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{Lanes, dispatch};
use super::{Numbers, change_f32, contiguous_f32};
use crate::gpu::{self, machine_of};

/// Elements per parallel task: below this the work is cheaper than handing it over.
const GRAIN: usize = 8192;

/// `silu(gate) * up`, element by element; both of the same shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    match machine_of(&gate)? {
        Some(gpu) => gpu::ops::swiglu(&*gpu, &gate, &up),
        None => gate.apply_op2(&up, SwiGlu),
    }
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gate = contiguous_f32(self.name(), s1, l1)?;
        let up = contiguous_f32(self.name(), s2, l2)?;
        if l1.dims() != l2.dims() {
            candle_core::bail!("swiglu: shapes differ, {:?} and {:?}", l1.dims(), l2.dims());
        }
        let mut out = vec![0f32; gate.len()];
        out.par_chunks_mut(GRAIN)
            .zip(gate.par_chunks(GRAIN))
            .zip(up.par_chunks(GRAIN))
            .for_each(|((out, gate), up)| activate(out, gate, up));
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

fn activate(out: &mut [f32], gate: &[f32], up: &[f32]) {
    dispatch!(activate_with(out: &mut [f32], gate: &[f32], up: &[f32]))
}

#[inline(always)]
fn activate_with<L: Lanes>(out: &mut [f32], gate: &[f32], up: &[f32]) {
    let mut out = out.chunks_exact_mut(16);
    let (mut gate, mut up) = (gate.chunks_exact(16), up.chunks_exact(16));
    for ((out, gate), up) in out.by_ref().zip(gate.by_ref()).zip(up.by_ref()) {
        // SAFETY: chunks of 16.
        unsafe { activated(L::load(gate.as_ptr()), L::load(up.as_ptr())).store(out.as_mut_ptr()) };
    }
    let rest = gate.remainder().iter().zip(up.remainder());
    for (out, (gate, up)) in out.into_remainder().iter_mut().zip(rest) {
        *out = activated(L::splat(*gate), L::splat(*up)).to_array()[0];
    }
}

#[inline(always)]
fn activated<L: Lanes>(gate: L, up: L) -> L {
    gate.div(L::splat(1.0).add(L::splat(0.0).sub(gate).exp())).mul(up)
}

/// Gradients of [`swiglu`]'s `gate` and `up`, given that of its result, all of one shape. That of `up` takes
/// the memory of `grad`, which nobody else may hold.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, grad: Tensor) -> Result<(Tensor, Tensor)> {
    if gate.dims() != grad.dims() || up.dims() != grad.dims() {
        candle_core::bail!("swiglu: a gradient of {:?} for {:?}", grad.dims(), gate.dims());
    }
    if let Some(gpu) = machine_of(gate)? {
        return gpu::backward::swiglu(&*gpu, gate, up, &grad);
    }
    let (gate, up) = (Numbers::of(gate)?, Numbers::of(up)?);
    let (gate, up) = (&*gate, &*up);
    let mut d_gate = vec![0f32; gate.len()];
    change_f32(&grad, |grad| {
        d_gate
            .par_chunks_mut(GRAIN)
            .zip(grad.par_chunks_mut(GRAIN))
            .zip(gate.par_chunks(GRAIN).zip(up.par_chunks(GRAIN)))
            .for_each(|((d_gate, grad), (gate, up))| slope(d_gate, grad, gate, up));
        Ok(())
    })?;
    Ok((Tensor::from_vec(d_gate, grad.shape(), grad.device())?, grad))
}

fn slope(d_gate: &mut [f32], grad: &mut [f32], gate: &[f32], up: &[f32]) {
    dispatch!(slope_with(d_gate: &mut [f32], grad: &mut [f32], gate: &[f32], up: &[f32]))
}

/// With s = sigmoid(gate): d up = grad·gate·s, in the place of `grad`, and
/// d gate = grad·up·s·(1 + gate·(1 − s)).
#[inline(always)]
fn slope_with<L: Lanes>(d_gate: &mut [f32], grad: &mut [f32], gate: &[f32], up: &[f32]) {
    for at in (0..gate.len()).step_by(16) {
        let len = (gate.len() - at).min(16);
        let lanes = |values: &[f32]| {
            if len == 16 {
                // SAFETY: 16 values from `at` on.
                return unsafe { L::load(values.as_ptr().add(at)) };
            }
            let mut lanes = [0f32; 16];
            lanes[..len].copy_from_slice(&values[at..at + len]);
            L::from_array(lanes)
        };
        let (gate, up, slope) = (lanes(gate), lanes(up), lanes(grad));
        let one = L::splat(1.0);
        let s = one.div(one.add(L::splat(0.0).sub(gate).exp()));
        let of_gate = slope.mul(up).mul(s).mul(one.add(gate.mul(one.sub(s)))).to_array();
        let of_up = slope.mul(gate).mul(s).to_array();
        d_gate[at..at + len].copy_from_slice(&of_gate[..len]);
        grad[at..at + len].copy_from_slice(&of_up[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn value_and_gradients_match_candles_silu() -> Result<()> {
        let dev = Device::Cpu;
        let gate = Var::from_tensor(&Tensor::randn(0f32, 2f32, (7, 33), &dev)?)?;
        let up = Var::from_tensor(&Tensor::randn(0f32, 2f32, (7, 33), &dev)?)?;
        let grad = Tensor::randn(0f32, 1f32, (7, 33), &dev)?;
        let theirs = (gate.silu()? * up.as_tensor())?;
        crate::ops::tests::assert_close(&swiglu(&gate, &up)?, &theirs, 1e-5);
        let theirs = (theirs * &grad)?.sum_all()?.backward()?;
        let (d_gate, d_up) = swiglu_backward(&gate, &up, grad)?;
        for (ours, var) in [(d_gate, &gate), (d_up, &up)] {
            crate::ops::tests::assert_close(&ours, theirs.get(var).unwrap(), 1e-4);
        }
        Ok(())
    }
}
