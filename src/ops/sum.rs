//! Sums of tensors.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor};
use rayon::prelude::*;

use super::{contiguous_f32, is_ours};

/// Elements per parallel task: below this the work is cheaper than handing it over.
const GRAIN: usize = 1 << 15;

/// `x + y`, written to the place of `x`, which nobody else may hold; both of the same shape.
///
/// candle's own sum makes a third tensor, and on the CPU wakes a pool of threads that wait for one another
/// without sleeping, a sixth of the processor time of a training step.
pub fn add_in_place(x: Tensor, y: &Tensor) -> Result<Tensor> {
    if !is_ours(&x) {
        return x + y;
    }
    x.inplace_op2(y, &Add { factor: 1.0 })?;
    Ok(x)
}

/// `x + factor · y`, as [`add_in_place`].
pub fn add_scaled(x: Tensor, y: &Tensor, factor: f32) -> Result<Tensor> {
    if !is_ours(&x) {
        return x + (y * f64::from(factor))?;
    }
    x.inplace_op2(y, &Add { factor })?;
    Ok(x)
}

struct Add {
    /// Of what is added.
    factor: f32,
}

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add_in_place"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<()> {
        let y = contiguous_f32(self.name(), s2, l2)?;
        let x = match (s1, l1.contiguous_offsets()) {
            (CpuStorage::F32(x), Some((start, end))) if l1.dims() == l2.dims() => {
                &mut x[start..end]
            }
            _ => candle_core::bail!("add_in_place: {l1:?} and {l2:?} in f32"),
        };
        let factor = self.factor;
        x.par_chunks_mut(GRAIN).zip(y.par_chunks(GRAIN)).for_each(|(x, y)| {
            x.iter_mut().zip(y).for_each(|(x, y)| *x += factor * y);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn equals_candles_sum_and_refuses_other_shapes() -> Result<()> {
        let random = |rows| Tensor::randn(0f32, 1f32, (rows, 1000), &Device::Cpu);
        let (x, y) = (random(70)?, random(70)?);
        let want = (&x + &y)?.to_vec2::<f32>()?;
        let scaled = (&x + (&y * 0.25)?)?.to_vec2::<f32>()?;
        // In f64 as on a GPU.
        for dtype in [DType::F32, DType::F64] {
            let (x, y) = (x.copy()?.to_dtype(dtype)?, y.to_dtype(dtype)?);
            let numbers = |t: Tensor| t.to_dtype(DType::F32)?.to_vec2::<f32>();
            assert_eq!(numbers(add_scaled(x.copy()?, &y, 0.25)?)?, scaled);
            assert_eq!(numbers(add_in_place(x, &y)?)?, want);
        }
        assert!(add_in_place(x, &random(7)?).is_err());
        Ok(())
    }
}
