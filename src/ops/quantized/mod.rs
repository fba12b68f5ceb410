//! Frozen weight matrices in GGML blocks, and products with them.
//!
//! candle multiplies every block format. Where it pays, a matrix is laid out anew for kernels of our own
//! when it is loaded: so far Q8_0, on processors with AVX-512 VNNI.

mod activations;
mod q8_0;

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::contiguous_f32;
use q8_0::PackedQ8;

/// A frozen matrix `[out, in]` in blocks of 8 bits or less per weight. Cheap to clone.
#[derive(Debug, Clone)]
pub struct QuantizedMatrix(Arc<Form>);

#[derive(Debug)]
enum Form {
    /// As candle holds it.
    Ggml(QTensor),
    Packed(PackedQ8),
}

impl QuantizedMatrix {
    /// `tensor` is `[out, in]`; it is laid out anew if there is a kernel for it here.
    pub fn new(tensor: QTensor) -> Result<Self> {
        let form = match tensor.dtype() {
            GgmlDType::Q8_0 if tensor.device().is_cpu() && PackedQ8::is_supported() => {
                Form::Packed(PackedQ8::new(&tensor.data()?, tensor.shape().dims2()?)?)
            }
            _ => Form::Ggml(tensor),
        };
        Ok(Self(Arc::new(form)))
    }

    /// `x · weightᵀ` for `x` `[tokens, in]`. The activations are rounded to the 8 bits of the format's
    /// products; the gradient passes to `x` as if they were not.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op1(Product(self.clone()))
    }

    /// Rows `ids` of the matrix in f32, `[ids, in]`: an embedding lookup.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match &*self.0 {
            Form::Ggml(tensor) => tensor.embedding(ids),
            Form::Packed(packed) => {
                let ids = ids.to_vec1::<u32>()?;
                Tensor::from_vec(packed.rows(&ids)?, (ids.len(), packed.input()), &Device::Cpu)
            }
        }
    }

    /// The whole matrix in f32, `[out, in]`.
    pub fn dequantize(&self, device: &Device) -> Result<Tensor> {
        match &*self.0 {
            Form::Ggml(tensor) => tensor.dequantize(device),
            Form::Packed(packed) => {
                let all: Vec<u32> = (0..packed.out() as u32).collect();
                let shape = (packed.out(), packed.input());
                Tensor::from_vec(packed.rows(&all)?, shape, &Device::Cpu)?.to_device(device)
            }
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        match &*self.0 {
            Form::Ggml(tensor) => tensor.storage_size_in_bytes() as u64,
            Form::Packed(packed) => packed.bytes(),
        }
    }
}

/// A quantised product, given the backward that candle's lacks.
struct Product(QuantizedMatrix);

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "quantized_product"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match &*self.0.0 {
            Form::Ggml(tensor) => tensor.cpu_fwd(storage, layout),
            Form::Packed(packed) => {
                let x = contiguous_f32(self.name(), storage, layout)?;
                let (tokens, input) = layout.shape().dims2()?;
                if input != packed.input() {
                    let out = packed.out();
                    candle_core::bail!(
                        "{}: [{tokens}, {input}] with a weight of [{out}, {}]",
                        self.name(),
                        packed.input()
                    );
                }
                let shape = Shape::from((tokens, packed.out()));
                Ok((CpuStorage::F32(packed.product(x)), shape))
            }
        }
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        match &*self.0.0 {
            Form::Ggml(tensor) => tensor.cuda_fwd(storage, layout),
            Form::Packed(_) => candle_core::bail!("{}: these weights lie on the CPU", self.name()),
        }
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        // Dequantised for the length of this product only: the frozen weight stays in its blocks.
        Ok(Some(grad.contiguous()?.matmul(&self.0.dequantize(x.device())?)?))
    }
}
