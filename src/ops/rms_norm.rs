//! Root-mean-square normalisation over the last dimension.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{Lanes, dispatch};
use super::{Numbers, add_in_place, change_f32, contiguous_f32};
use crate::gpu::{self, machine_of};

/// Rows per parallel task: below this the work is cheaper than handing it over.
const ROWS: usize = 16;

/// `x / sqrt(mean(x², last dim) + eps) * weight` for `x` of shape `[.., width]` and `weight` `[width]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let x = x.contiguous()?;
    match machine_of(&x)? {
        Some(gpu) => gpu::ops::rms_norm(&*gpu, &x, weight, eps),
        None => x.apply_op2(weight, RmsNorm { eps }),
    }
}

/// `x + residual`, written to the place of `x`, which nobody else may hold; and [`rms_norm`] of that.
pub fn add_rms_norm(
    x: Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    match machine_of(&x)? {
        Some(gpu) => gpu::ops::add_rms_norm(&*gpu, x, &residual.contiguous()?, weight, eps),
        None => {
            let sum = add_in_place(x, residual)?;
            let normed = rms_norm(&sum, weight, eps)?;
            Ok((sum, normed))
        }
    }
}

struct RmsNorm {
    eps: f64,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = contiguous_f32(self.name(), s1, l1)?;
        let weight = contiguous_f32(self.name(), s2, l2)?;
        let width = weight.len();
        if width == 0 || l1.dims().last() != Some(&width) {
            candle_core::bail!("rms_norm: weight of {width} for input {:?}", l1.dims());
        }
        let eps = self.eps as f32;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_exact_mut(width).with_min_len(ROWS).zip(x.par_chunks_exact(width)).for_each(
            |(out, x)| {
                let mean = x.iter().map(|v| v * v).sum::<f32>() / width as f32;
                let scale = 1.0 / (mean + eps).sqrt();
                for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
                    *o = x * scale * w;
                }
            },
        );
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// The gradient of [`rms_norm`]'s `x`, given `grad` with respect to its result, all of one shape; added to
/// `to`, if it is given, in whose place the sum is written.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    grad: &Tensor,
    to: Option<Tensor>,
) -> Result<Tensor> {
    if grad.dims() != x.dims() || to.as_ref().is_some_and(|to| to.dims() != x.dims()) {
        let (x, grad, to) = (x.dims(), grad.dims(), to.map(|to| to.dims().to_vec()));
        candle_core::bail!("rms_norm: gradients of {grad:?} and {to:?} for {x:?}");
    }
    if let Some(gpu) = machine_of(x)? {
        return gpu::backward::rms_norm(&*gpu, x, weight, eps, grad, to);
    }
    let to = to.map_or_else(|| Tensor::zeros(x.shape(), x.dtype(), x.device()), Ok)?;
    let (x, weight, grad) = (Numbers::of(x)?, Numbers::of(weight)?, Numbers::of(grad)?);
    if weight.is_empty() {
        candle_core::bail!("rms_norm: no weight");
    }
    let (x, weight, grad, rows) = (&*x, &*weight, &*grad, ROWS * weight.len());
    change_f32(&to, |to| {
        to.par_chunks_mut(rows)
            .zip(x.par_chunks(rows).zip(grad.par_chunks(rows)))
            .for_each(|(to, (x, grad))| add_slopes(to, x, weight, eps as f32, grad));
        Ok(())
    })?;
    Ok(to)
}

fn add_slopes(to: &mut [f32], x: &[f32], weight: &[f32], eps: f32, grad: &[f32]) {
    dispatch!(add_slopes_with(
        to: &mut [f32],
        x: &[f32],
        weight: &[f32],
        eps: f32,
        grad: &[f32],
    ))
}

/// With r = 1/sqrt(mean(x²)+eps) and h = grad·w: r·h − x·r³·mean(h·x).
#[inline(always)]
fn add_slopes_with<L: Lanes>(to: &mut [f32], x: &[f32], weight: &[f32], eps: f32, grad: &[f32]) {
    let width = weight.len();
    let rows = x.chunks_exact(width).zip(grad.chunks_exact(width));
    for (to, (x, grad)) in to.chunks_exact_mut(width).zip(rows) {
        let (mut squares, mut along) = (L::splat(0.0), L::splat(0.0));
        let whole = width / 16 * 16;
        // SAFETY, here and below: 16 values from `at` on, which is less than `whole`.
        let load = |values: &[f32], at: usize| unsafe { L::load(values[at..at + 16].as_ptr()) };
        for at in (0..whole).step_by(16) {
            let x = load(x, at);
            squares = x.mul_add(x, squares);
            along = load(grad, at).mul(load(weight, at)).mul_add(x, along);
        }
        let rest = || (whole..width).map(|i| (x[i], grad[i] * weight[i]));
        let squares = squares.sum() + rest().map(|(x, _)| x * x).sum::<f32>();
        let along = along.sum() + rest().map(|(x, h)| x * h).sum::<f32>();
        let r = 1.0 / (squares / width as f32 + eps).sqrt();
        let back = along / width as f32 * r * r * r;
        for at in (0..whole).step_by(16) {
            let slope = load(grad, at).mul(load(weight, at)).mul(L::splat(r));
            let sum = load(to, at).add(slope.sub(load(x, at).mul(L::splat(back))));
            unsafe { sum.store(to[at..at + 16].as_mut_ptr()) };
        }
        for i in whole..width {
            to[i] += grad[i] * weight[i] * r - x[i] * back;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{D, Device, Var};

    fn naive(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
        let r = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
        x.broadcast_div(&r)?.broadcast_mul(w)
    }

    #[test]
    fn value_and_gradient_match_the_formula_written_in_plain_operations() -> Result<()> {
        let dev = Device::Cpu;
        for width in [48, 9, 37] {
            let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, (5, 7, width), &dev)?)?;
            let w = Tensor::randn(1f32, 0.2f32, width, &dev)?;
            let up = Tensor::randn(0f32, 1f32, (5, 7, width), &dev)?;
            let theirs = naive(&x, &w, 1e-6)?;
            crate::ops::tests::assert_close(&rms_norm(&x, &w, 1e-6)?, &theirs, 1e-5);
            let theirs = (theirs * &up)?.sum_all()?.backward()?;
            let theirs = theirs.get(&x).unwrap();
            let ours = rms_norm_backward(&x, &w, 1e-6, &up, None)?;
            crate::ops::tests::assert_close(&ours, theirs, 1e-5);
            let ours = rms_norm_backward(&x, &w, 1e-6, &up, Some(up.ones_like()?))?;
            crate::ops::tests::assert_close(&ours, &(theirs + 1.0)?, 1e-5);
        }
        Ok(())
    }
}
