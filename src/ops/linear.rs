//! Linear layers over frozen weights, dense or block-quantised.

use candle_core::{Result, Tensor};

use super::QuantizedMatrix;

/// Rows below which the CPU's matrix product takes other kernels, which sum in another order: a sequence
/// would get other bits alone than in a batch. Such products are padded; weights dominate their cost.
const MIN_ROWS: usize = 3;

/// `y = x · weightᵀ + bias` with a frozen weight of shape `[out, in]`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Weight {
    Dense(Tensor),
    Quantized(QuantizedMatrix),
}

impl Linear {
    /// `weight` `[out, in]`, `bias` `[out]`.
    pub fn dense(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight: Weight::Dense(weight), bias }
    }

    /// `weight` `[out, in]`, `bias` `[out]`.
    pub fn quantized(weight: QuantizedMatrix, bias: Option<Tensor>) -> Self {
        Self { weight: Weight::Quantized(weight), bias }
    }

    /// `x` `[tokens, in]` to `[tokens, out]`. The gradient passes to `x`, through quantised weights too.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            Weight::Dense(weight) if x.dim(0)? < MIN_ROWS && x.device().is_cpu() => {
                let rows = x.dim(0)?;
                let padded = Tensor::cat(&[x; MIN_ROWS], 0)?.narrow(0, 0, MIN_ROWS)?;
                padded.matmul(&weight.t()?)?.narrow(0, 0, rows)?
            }
            Weight::Dense(weight) => x.matmul(&weight.t()?)?,
            Weight::Quantized(weight) => weight.product(x)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// Bytes held by the weight and the bias.
    pub fn bytes(&self) -> u64 {
        let tensor_bytes = |t: &Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
        let weight = match &self.weight {
            Weight::Dense(weight) => tensor_bytes(weight),
            Weight::Quantized(weight) => weight.bytes(),
        };
        weight + self.bias.as_ref().map_or(0, tensor_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Var};

    #[test]
    fn gradient_passes_through_quantised_weights() -> Result<()> {
        let dev = Device::Cpu;
        let quantized = QuantizedMatrix::new(QTensor::quantize(
            &Tensor::randn(0f32, 1f32, (24, 64), &dev)?,
            GgmlDType::Q8_0,
        )?)?;
        let dense = Linear::dense(quantized.dequantize(&dev)?, None);
        let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, (5, 64), &dev)?)?;
        let up = Tensor::randn(0f32, 1f32, (5, 24), &dev)?;
        let loss = |l: &Linear| (l.forward(&x)? * &up)?.sum_all()?.backward();
        let (ours, theirs) = (loss(&Linear::quantized(quantized, None))?, loss(&dense)?);
        crate::ops::tests::assert_close(ours.get(&x).unwrap(), theirs.get(&x).unwrap(), 1e-4);
        Ok(())
    }

    /// What invariant 9 rests on: a row's result must not depend on how many rows share the product.
    /// Up to 64 outputs, as only toy models have, the product is blocked differently and not covered.
    #[test]
    fn a_row_of_a_product_is_the_same_bit_for_bit_in_any_batch() -> Result<()> {
        let dev = Device::Cpu;
        for (input, out) in [(32, 96), (64, 128), (256, 512), (1000, 130), (2048, 256)] {
            let linear = Linear::dense(Tensor::randn(0f32, 1f32, (out, input), &dev)?, None);
            let x = Tensor::randn(0f32, 1f32, (130, input), &dev)?;
            let all = linear.forward(&x)?.to_vec2::<f32>()?;
            for rows in [1, 2, 3, 7, 8, 16, 33, 64, 65, 129] {
                let part = linear.forward(&x.narrow(0, 0, rows)?)?.to_vec2::<f32>()?;
                assert_eq!(part, all[..rows], "{rows} rows of {input} to {out}");
            }
        }
        Ok(())
    }
}
