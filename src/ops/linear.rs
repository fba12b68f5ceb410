//! Linear layers over frozen weights.

use candle_core::{Result, Tensor};

use super::{Matrix, visit_bytes};

/// `y = x · weightᵀ + bias` with a frozen weight of shape `[out, in]`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
}

impl Linear {
    /// `weight` `[out, in]`, `bias` `[out]`.
    pub fn new(weight: Matrix, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// `x` `[tokens, in]` to `[tokens, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.product(x, self.bias.as_ref())
    }

    /// [`Self::forward`] in f32, whatever the type of `x` and of the weights: logits need more than 8 bits.
    pub fn forward_f32(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.product_f32(x, self.bias.as_ref())
    }

    /// Takes a gradient `[tokens, out]` of the outputs to one of the inputs, `[tokens, in]`; through
    /// quantised weights too.
    pub fn backward(&self, grad: &Tensor) -> Result<Tensor> {
        self.weight.transposed_product(grad, None)
    }

    /// [`Self::backward`], added to the gradient from elsewhere, whose memory it takes.
    pub fn backward_add(&self, grad: &Tensor, to: Tensor) -> Result<Tensor> {
        self.weight.transposed_product(grad, Some(to))
    }

    /// Outputs per token.
    pub fn outputs(&self) -> Result<usize> {
        Ok(self.weight.dims()?.0)
    }

    /// Calls `f` with the numbers of weight and bias as they lie in memory.
    pub(crate) fn visit_bytes(&self, f: &mut impl FnMut(&[u8])) -> Result<()> {
        self.weight.visit_bytes(f)?;
        self.bias.as_ref().map_or(Ok(()), |bias| visit_bytes(bias, f))
    }

    /// Bytes held by the weight and the bias.
    pub fn bytes(&self) -> u64 {
        let bias = self.bias.as_ref().map_or(0, |b| b.elem_count() * b.dtype().size_in_bytes());
        self.weight.bytes() + bias as u64
    }
}
