//! Root-mean-square normalisation over the last dimension.

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{contiguous_f32, with_f32};

/// `x / sqrt(mean(x², last dim) + eps) * weight` for `x` of shape `[.., width]` and `weight` `[width]`.
///
/// The gradient reaches `x` only; `weight` is frozen.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?.apply_op2(weight, RmsNorm { eps })
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
        out.par_chunks_exact_mut(width).with_min_len(16).zip(x.par_chunks_exact(width)).for_each(
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

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // With r = 1/sqrt(mean(x²)+eps) and h = grad·w:  dx = r·h − x·r³·mean(h·x)
        if x.device().is_cpu() && x.dtype() == DType::F32 {
            let slopes =
                |x: &[f32], weight: &[f32], grad: &[f32]| slopes(x, weight, grad, self.eps);
            let dx = with_f32(x, |x| {
                with_f32(weight, |weight| with_f32(grad, |grad| Ok(slopes(x, weight, grad))))
            })?;
            return Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), None));
        }
        let h = grad.broadcast_mul(weight)?;
        let r = (x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?;
        let projection = ((&h * x)?.mean_keepdim(D::Minus1)? * r.powf(3.0)?)?;
        let dx = (h.broadcast_mul(&r)? - x.broadcast_mul(&projection)?)?;
        Ok((Some(dx), None))
    }
}

/// The gradient of `x`, all of it `[rows, width]`.
fn slopes(x: &[f32], weight: &[f32], grad: &[f32], eps: f64) -> Vec<f32> {
    let width = weight.len();
    let mut dx = vec![0f32; x.len()];
    dx.par_chunks_exact_mut(width)
        .with_min_len(16)
        .zip(x.par_chunks_exact(width).zip(grad.par_chunks_exact(width)))
        .for_each(|(dx, (x, grad))| {
            let (mut squares, mut along) = (0f32, 0f32);
            for ((dx, x), (grad, weight)) in dx.iter_mut().zip(x).zip(grad.iter().zip(weight)) {
                *dx = grad * weight;
                squares += x * x;
                along += *dx * x;
            }
            let r = 1.0 / (squares / width as f32 + eps as f32).sqrt();
            let back = along / width as f32 * r * r * r;
            dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = *dx * r - x * back);
        });
    dx
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn naive(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
        let r = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
        x.broadcast_div(&r)?.broadcast_mul(w)
    }

    #[test]
    fn value_and_gradient_match_the_formula_written_in_plain_operations() -> Result<()> {
        let dev = Device::Cpu;
        let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, (5, 3, 48), &dev)?)?;
        let w = Tensor::randn(1f32, 0.2f32, 48, &dev)?;
        let up = Tensor::randn(0f32, 1f32, (5, 3, 48), &dev)?;
        let ours = rms_norm(&x, &w, 1e-6)?;
        let theirs = naive(&x, &w, 1e-6)?;
        let g1 = (ours.clone() * &up)?.sum_all()?.backward()?;
        let g2 = (theirs.clone() * &up)?.sum_all()?.backward()?;
        crate::ops::tests::assert_close(&ours, &theirs, 1e-5);
        crate::ops::tests::assert_close(g1.get(&x).unwrap(), g2.get(&x).unwrap(), 1e-5);
        Ok(())
    }
}
