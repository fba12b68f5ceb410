//! The gated activation of Llama-style feed-forward layers.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{Lanes, dispatch};
use super::{contiguous_f32, with_f32};

/// Elements per parallel task: below this the work is cheaper than handing it over.
const GRAIN: usize = 8192;

/// `silu(gate) * up`, element by element; both of the same shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu)
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

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // With s = sigmoid(gate):  d up = grad·gate·s,  d gate = grad·up·s·(1 + gate·(1 − s))
        if gate.device().is_cpu() && gate.dtype() == DType::F32 {
            let (d_gate, d_up) = with_f32(gate, |gate| {
                with_f32(up, |up| with_f32(grad, |grad| Ok(slopes(gate, up, grad))))
            })?;
            let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device());
            return Ok((Some(tensor(d_gate)?), Some(tensor(d_up)?)));
        }
        let s = ((gate.neg()?.exp()? + 1.0)?).recip()?;
        let d_up = ((grad * gate)? * &s)?;
        let slope = (&s * ((gate * (1.0 - &s)?)? + 1.0)?)?;
        let d_gate = ((grad * up)? * slope)?;
        Ok((Some(d_gate), Some(d_up)))
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

/// Gradients of `gate` and `up`.
fn slopes(gate: &[f32], up: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut d_gate, mut d_up) = (vec![0f32; gate.len()], vec![0f32; gate.len()]);
    d_gate
        .par_chunks_mut(GRAIN)
        .zip(d_up.par_chunks_mut(GRAIN))
        .zip(gate.par_chunks(GRAIN).zip(up.par_chunks(GRAIN)).zip(grad.par_chunks(GRAIN)))
        .for_each(|((d_gate, d_up), ((gate, up), grad))| slope(d_gate, d_up, gate, up, grad));
    (d_gate, d_up)
}

fn slope(d_gate: &mut [f32], d_up: &mut [f32], gate: &[f32], up: &[f32], grad: &[f32]) {
    dispatch!(slope_with(
        d_gate: &mut [f32],
        d_up: &mut [f32],
        gate: &[f32],
        up: &[f32],
        grad: &[f32],
    ))
}

#[inline(always)]
fn slope_with<L: Lanes>(
    d_gate: &mut [f32],
    d_up: &mut [f32],
    gate: &[f32],
    up: &[f32],
    grad: &[f32],
) {
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
        let (gate, up, grad) = (lanes(gate), lanes(up), lanes(grad));
        let one = L::splat(1.0);
        let s = one.div(one.add(L::splat(0.0).sub(gate).exp()));
        let slope = s.mul(one.add(gate.mul(one.sub(s))));
        let values = grad.mul(up).mul(slope).to_array();
        d_gate[at..at + len].copy_from_slice(&values[..len]);
        let values = grad.mul(gate).mul(s).to_array();
        d_up[at..at + len].copy_from_slice(&values[..len]);
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
        let ours = swiglu(&gate, &up)?;
        let theirs = (gate.silu()? * up.as_tensor())?;
        let g1 = ours.sqr()?.sum_all()?.backward()?;
        let g2 = theirs.sqr()?.sum_all()?.backward()?;
        crate::ops::tests::assert_close(&ours, &theirs, 1e-5);
        for var in [&gate, &up] {
            crate::ops::tests::assert_close(g1.get(var).unwrap(), g2.get(var).unwrap(), 1e-3);
        }
        Ok(())
    }
}
