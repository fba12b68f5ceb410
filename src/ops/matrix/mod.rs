//! Frozen weight matrices, and products with them.
//!
//! On the CPU a matrix is laid out for kernels of our own as it is loaded: f32 everywhere, Q8_0 on
//! processors with AVX-512 VNNI. Other block formats, and other devices, are candle's.
//!
//! What a kernel computes for a token has the same bits in any batch.

mod activations;
mod packed_f32;
mod q8_0;
mod transposed;

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor,
};

use super::product::{LANES, Output};
use super::{add_in_place, contiguous_f32, visit_bytes, with_f32};
use crate::gpu;
use packed_f32::PackedF32;
use q8_0::PackedQ8;
use transposed::transposed_product;

/// A frozen matrix `[out, in]`. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Matrix(Arc<Form>);

#[derive(Debug)]
enum Form {
    F32(PackedF32),
    Q8(PackedQ8),
    /// Blocks as candle holds them.
    Ggml(QTensor),
    /// On another device, or of another type.
    Dense(Tensor),
}

impl Matrix {
    /// From a dense tensor `[out, in]`.
    pub fn dense(tensor: &Tensor) -> Result<Self> {
        if !tensor.device().is_cpu() || tensor.dtype() != DType::F32 {
            return Ok(Self(Arc::new(Form::Dense(tensor.clone()))));
        }
        let (out, input) = tensor.dims2()?;
        with_f32(tensor, |values| {
            let rows = |rows: Range<usize>, to: &mut [f32]| {
                to.copy_from_slice(&values[rows.start * input..rows.end * input]);
            };
            Ok(Self::from_rows(out, input, rows))
        })
    }

    /// An f32 matrix on the CPU whose rows `fill` writes: some of them at a time, on several threads, so
    /// that a file is converted without a second copy of it in memory.
    pub fn from_rows(
        out: usize,
        input: usize,
        fill: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) -> Self {
        Self(Arc::new(Form::F32(PackedF32::new(out, input, fill))))
    }

    /// From blocks of any GGML type that candle multiplies, `[out, in]`.
    pub fn quantized(tensor: QTensor) -> Result<Self> {
        let form = match tensor.dtype() {
            GgmlDType::Q8_0 if tensor.device().is_cpu() && PackedQ8::is_supported() => {
                Form::Q8(PackedQ8::new(&tensor.data()?, tensor.shape().dims2()?)?)
            }
            _ => Form::Ggml(tensor),
        };
        Ok(Self(Arc::new(form)))
    }

    /// `x · weightᵀ + bias` for `x` `[tokens, in]` and `bias` `[out]`: `[tokens, out]`. With quantised weights
    /// the activations are rounded to the 8 bits of the format's products; the gradient
    /// ([`Self::transposed_product`]) is that of the product without this rounding.
    pub fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let dense = matches!(&*self.0, Form::Dense(_));
        match (&*self.0, bias) {
            (_, Some(bias)) if dense || !x.device().is_cpu() => {
                self.product(x, None)?.broadcast_add(bias)
            }
            (Form::Dense(weight), _) => x.matmul(&weight.t()?),
            // One operation: candle would keep a gradient of the frozen bias for every token.
            _ => x.contiguous()?.apply_op1(Product { matrix: self.clone(), bias: bias.cloned() }),
        }
    }

    /// [`Self::product`] in f32, also of 16-bit operands.
    pub fn product_f32(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match (&*self.0, bias) {
            (Form::Dense(weight), Some(bias)) => {
                gpu::ops::product_f32(x, weight)?.broadcast_add(&bias.to_dtype(DType::F32)?)
            }
            (Form::Dense(weight), None) => gpu::ops::product_f32(x, weight),
            _ => self.product(x, bias)?.to_dtype(DType::F32),
        }
    }

    /// `y · weight` for `y` `[tokens, out]`, which takes a gradient from the outputs of [`Self::product`] to
    /// its inputs, `[tokens, in]`; added to `to`, if it is given, in whose place the sum is written.
    pub fn transposed_product(&self, y: &Tensor, to: Option<Tensor>) -> Result<Tensor> {
        let ((out, input), (tokens, width)) = (self.dims()?, y.dims2()?);
        let fits = to.as_ref().is_none_or(|to| to.dims() == [tokens, input]);
        if out == 0 || width != out || !fits {
            let (y, to) = (y.dims(), to.map(|to| to.dims().to_vec()));
            candle_core::bail!("product: {y:?} to {to:?} with transposed weights [{out}, {input}]");
        }
        match &*self.0 {
            Form::F32(packed) => transposed_product(packed, y, to),
            Form::Q8(packed) => transposed_product(packed, y, to),
            Form::Dense(weight) => {
                let product = y.matmul(weight)?;
                match to {
                    Some(to) => add_in_place(to, &product),
                    None => Ok(product),
                }
            }
            // Laid out for the length of this product only: the frozen weight stays as it is.
            Form::Ggml(_) => Self::dense(&self.to_dense(y.device())?)?.transposed_product(y, to),
        }
    }

    /// Rows `ids` in f32, `[ids, in]`: an embedding lookup. A row that is not there is an error.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let (out, input) = self.dims()?;
        let checked = || {
            let ids = ids.to_vec1::<u32>()?;
            match ids.iter().find(|id| **id as usize >= out) {
                Some(id) => candle_core::bail!("row {id} of a matrix with {out}"),
                None => Ok(ids),
            }
        };
        let (ids, values) = match &*self.0 {
            Form::F32(packed) => checked().map(|ids| (ids.len(), packed.rows(&ids)))?,
            Form::Q8(packed) => checked().map(|ids| (ids.len(), packed.rows(&ids)))?,
            Form::Ggml(tensor) => return tensor.embedding(ids),
            Form::Dense(tensor) => return tensor.index_select(ids, 0),
        };
        Tensor::from_vec(values, (ids, input), &Device::Cpu)
    }

    /// The whole matrix in f32, `[out, in]`: a copy.
    pub fn to_dense(&self, device: &Device) -> Result<Tensor> {
        match &*self.0 {
            Form::Ggml(tensor) => tensor.dequantize(device),
            Form::Dense(tensor) => tensor.to_device(device)?.to_dtype(DType::F32),
            Form::F32(_) | Form::Q8(_) => {
                let all: Vec<u32> = (0..self.dims()?.0 as u32).collect();
                self.rows(&Tensor::new(all, &Device::Cpu)?)?.to_device(device)
            }
        }
    }

    /// `(out, in)`.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match &*self.0 {
            Form::F32(packed) => Ok(packed.dims()),
            Form::Q8(packed) => Ok(packed.dims()),
            Form::Ggml(tensor) => tensor.shape().dims2(),
            Form::Dense(tensor) => tensor.dims2(),
        }
    }

    /// Calls `f` with what is held, as it lies in memory.
    pub(crate) fn visit_bytes(&self, f: &mut impl FnMut(&[u8])) -> Result<()> {
        match &*self.0 {
            Form::F32(packed) => packed.visit_bytes(f),
            Form::Q8(packed) => packed.visit_bytes(f),
            Form::Ggml(tensor) => f(&tensor.data()?),
            Form::Dense(tensor) => return visit_bytes(tensor, f),
        }
        Ok(())
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        match &*self.0 {
            Form::F32(packed) => packed.bytes(),
            Form::Q8(packed) => packed.bytes(),
            Form::Ggml(tensor) => tensor.storage_size_in_bytes() as u64,
            Form::Dense(tensor) => (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64,
        }
    }
}

/// A product as candle's operation.
struct Product {
    matrix: Matrix,
    bias: Option<Tensor>,
}

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (out, input) = self.matrix.dims()?;
        if let Form::Ggml(tensor) = &*self.matrix.0 {
            let (mut y, shape) = tensor.cpu_fwd(storage, layout)?;
            match &mut y {
                CpuStorage::F32(y) => self.add_bias(y, out)?,
                _ => candle_core::bail!("product: quantised weights give f32"),
            }
            return Ok((y, shape));
        }
        let x = contiguous_f32(self.name(), storage, layout)?;
        let (tokens, width) = layout.shape().dims2()?;
        if width != input {
            candle_core::bail!("product: [{tokens}, {width}] with weights [{out}, {input}]");
        }
        let mut y = match &*self.matrix.0 {
            Form::F32(packed) => packed.product(x),
            Form::Q8(packed) => packed.product(x),
            Form::Ggml(_) | Form::Dense(_) => candle_core::bail!("product: weights not laid out"),
        };
        self.add_bias(&mut y, out)?;
        Ok((CpuStorage::F32(y), Shape::from((tokens, out))))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        match &*self.matrix.0 {
            Form::Ggml(tensor) => tensor.cuda_fwd(storage, layout),
            _ => candle_core::bail!("product: these weights lie on the CPU"),
        }
    }
}

impl Product {
    fn add_bias(&self, y: &mut [f32], out: usize) -> Result<()> {
        let Some(bias) = &self.bias else { return Ok(()) };
        with_f32(bias, |bias| {
            if bias.len() != out {
                candle_core::bail!("product: {} biases for {out} outputs", bias.len());
            }
            for row in y.chunks_exact_mut(out) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
            Ok(())
        })
    }
}

/// Calls `f` with ranges that cover `0..tiles`, on several threads where the work is worth it. A range has
/// at most `most` tiles, and like it an even number where there are enough; `work` is the number of
/// multiply-adds in all.
fn for_tiles(tiles: usize, most: usize, work: usize, f: impl Fn(Range<usize>) + Sync) {
    use rayon::prelude::*;
    /// Below this, handing work to another thread costs more than doing it.
    const SERIAL_WORK: usize = 1 << 16;
    let threads = if work < SERIAL_WORK { 1 } else { rayon::current_num_threads() };
    // Large products in more parts than threads, so that none waits long for a slower one.
    let parts = if work < 64 * SERIAL_WORK { threads } else { 4 * threads };
    // Kernels take tiles in pairs.
    let len = tiles.div_ceil(parts).next_multiple_of(2).clamp(1, most.max(1));
    let range = |i: usize| i * len..((i + 1) * len).min(tiles);
    match threads {
        1 => (0..tiles.div_ceil(len)).for_each(|i| f(range(i))),
        _ => (0..tiles.div_ceil(len)).into_par_iter().for_each(|i| f(range(i))),
    }
}

#[cfg(test)]
mod tests;
