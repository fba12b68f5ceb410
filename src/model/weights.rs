//! Where the decoder's weights come from, and how it is put together from them.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::decoder::Decoder;
use super::layer::Layer;
use super::{ModelConfig, ModelError, Quantize};
use crate::gpu::is_gpu;
use crate::ops::memory::Pages;
use crate::ops::{Linear, Matrix, RopeTable};

/// Where weights lie, and as what: in f32 on the CPU.
#[derive(Debug, Clone)]
pub struct Placement {
    pub device: Device,
    /// Of weights, hidden states, keys and values.
    pub dtype: DType,
}

impl Placement {
    /// Whether kernels of `kernels/` compute there.
    pub fn is_gpu(&self) -> bool {
        is_gpu(&self.device, self.dtype)
    }
}

impl Default for Placement {
    fn default() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32 }
    }
}

/// Named weights, addressed as in a Hugging Face checkpoint (`model.layers.0.mlp.up_proj.weight`).
pub(super) trait WeightReader {
    /// A vector of `len` elements in f32, or `None` if the files have no such weight.
    fn vector(&self, name: &str, len: usize) -> Result<Option<Tensor>, ModelError>;
    /// A matrix `[rows, columns]`, or `None`.
    fn matrix(&self, name: &str, shape: (usize, usize)) -> Result<Option<Matrix>, ModelError>;
    /// Divisors of the rotary frequencies, `[head_dim / 2]`, where the file carries them.
    fn rope_divisors(&self) -> Result<Option<Vec<f32>>, ModelError>;
}

/// Reads every weight the configuration asks for, checks its shape, and builds the decoder.
pub(super) fn build(config: ModelConfig, reader: &dyn WeightReader) -> Result<Decoder, ModelError> {
    let c = &config;
    let missing = |name: &str| ModelError::MissingWeight { name: name.to_owned() };
    let vector = |name: &str, len: usize| reader.vector(name, len)?.ok_or_else(|| missing(name));
    let matrix = |name: &str, shape: (usize, usize)| {
        reader.matrix(name, shape)?.ok_or_else(|| missing(name))
    };
    let linear =
        |name: String, (out, input): (usize, usize), biased: bool| -> Result<Linear, ModelError> {
            let bias_name = format!("{name}.bias");
            let bias = match biased {
                true => Some(vector(&bias_name, out)?),
                false => reader.vector(&bias_name, out)?,
            };
            Ok(Linear::new(matrix(&format!("{name}.weight"), (out, input))?, bias))
        };
    let embedding = matrix("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))?;
    // Some files hold a tied head a second time: it is not read.
    let head = match c.tie_word_embeddings {
        true => embedding.clone(),
        false => matrix("lm_head.weight", (c.vocab_size, c.hidden_size))?,
    };
    let (q_width, kv_width) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let layers = (0..c.layers)
        .map(|i| {
            let p = format!("model.layers.{i}");
            let qk_norm = |name: &str| match c.qk_norm {
                true => vector(&format!("{p}.self_attn.{name}.weight"), c.head_dim).map(Some),
                false => Ok(None),
            };
            Ok(Layer {
                input_norm: vector(&format!("{p}.input_layernorm.weight"), c.hidden_size)?,
                q: linear(format!("{p}.self_attn.q_proj"), (q_width, c.hidden_size), c.biases.qkv)?,
                k: linear(
                    format!("{p}.self_attn.k_proj"),
                    (kv_width, c.hidden_size),
                    c.biases.qkv,
                )?,
                v: linear(
                    format!("{p}.self_attn.v_proj"),
                    (kv_width, c.hidden_size),
                    c.biases.qkv,
                )?,
                o: linear(format!("{p}.self_attn.o_proj"), (c.hidden_size, q_width), c.biases.o)?,
                q_norm: qk_norm("q_norm")?,
                k_norm: qk_norm("k_norm")?,
                post_norm: vector(&format!("{p}.post_attention_layernorm.weight"), c.hidden_size)?,
                gate: linear(
                    format!("{p}.mlp.gate_proj"),
                    (c.intermediate_size, c.hidden_size),
                    c.biases.mlp,
                )?,
                up: linear(
                    format!("{p}.mlp.up_proj"),
                    (c.intermediate_size, c.hidden_size),
                    c.biases.mlp,
                )?,
                down: linear(
                    format!("{p}.mlp.down_proj"),
                    (c.hidden_size, c.intermediate_size),
                    c.biases.mlp,
                )?,
            })
        })
        .collect::<Result<Vec<_>, ModelError>>()?;
    let mut rope = RopeTable::new(c.head_dim, c.rope_theta, c.rope_scaling);
    if let Some(divisors) = reader.rope_divisors()? {
        rope.divide(&divisors);
    }
    Ok(Decoder {
        embedding,
        layers,
        final_norm: vector("model.norm.weight", c.hidden_size)?,
        head: Linear::new(head, None),
        rope,
        all_angles: Arc::default(),
        config,
    })
}

/// Weights of another reader, dequantised and put where the placement wants them.
pub(super) struct Placed<'a> {
    pub reader: &'a dyn WeightReader,
    pub placement: &'a Placement,
}

impl WeightReader for Placed<'_> {
    fn vector(&self, name: &str, len: usize) -> Result<Option<Tensor>, ModelError> {
        let Placement { device, dtype } = self.placement;
        let vector = self.reader.vector(name, len)?;
        Ok(vector.map(|vector| vector.to_dtype(*dtype)?.to_device(device)).transpose()?)
    }

    fn matrix(&self, name: &str, shape: (usize, usize)) -> Result<Option<Matrix>, ModelError> {
        let Placement { device, dtype } = self.placement;
        let Some(matrix) = self.reader.matrix(name, shape)? else { return Ok(None) };
        let dense = matrix.to_dense(&Device::Cpu)?.to_dtype(*dtype)?.to_device(device)?;
        Ok(Some(Matrix::dense(&dense)?))
    }

    fn rope_divisors(&self) -> Result<Option<Vec<f32>>, ModelError> {
        self.reader.rope_divisors()
    }
}

/// The bytes of one safetensors file: mapped from disk, or built in.
pub(super) enum FileBytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
}

impl std::ops::Deref for FileBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

/// Weights of one or several safetensors files, as their placement wants them, or quantised, as they are read.
pub(super) struct SafetensorsReader<'a> {
    /// Name to (tensor, the file it lies in).
    tensors: HashMap<String, (TensorView<'a>, &'a FileBytes)>,
    quantize: Option<Quantize>,
    placement: &'a Placement,
}

impl<'a> SafetensorsReader<'a> {
    /// `files` are (name for messages, bytes).
    pub fn new(
        files: &'a [(String, FileBytes)],
        quantize: Option<Quantize>,
        placement: &'a Placement,
    ) -> Result<Self, ModelError> {
        let mut tensors = HashMap::new();
        for (name, bytes) in files {
            let parsed = SafeTensors::deserialize(bytes).map_err(|e| ModelError::Invalid {
                file: name.clone(),
                reason: format!("not a whole safetensors file: {e}"),
            })?;
            for (tensor, view) in parsed.tensors() {
                tensors.insert(tensor, (view, bytes));
            }
        }
        Ok(Self { tensors, quantize, placement })
    }

    /// A tensor of this shape and of a type that can be read, and its file.
    fn find(
        &self,
        name: &str,
        shape: &[usize],
    ) -> Result<Option<(&TensorView<'a>, &'a FileBytes)>, ModelError> {
        let Some((view, file)) = self.tensors.get(name) else { return Ok(None) };
        if view.shape() != shape {
            return Err(ModelError::WeightShape {
                name: name.to_owned(),
                got: view.shape().to_vec(),
                want: shape.to_vec(),
            });
        }
        if !matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(ModelError::Unsupported {
                file: name.to_owned(),
                what: format!("weight type {:?}", view.dtype()),
                hint: "weights must be F32, F16 or BF16".to_owned(),
            });
        }
        Ok(Some((view, file)))
    }

    fn f32(&self, name: &str, shape: &[usize]) -> Result<Option<Pages<f32>>, ModelError> {
        /// Elements per parallel task.
        const GRAIN: usize = 1 << 18;
        let Some((view, file)) = self.find(name, shape)? else { return Ok(None) };
        let (bytes, dtype) = (view.data(), view.dtype());
        let mut values = Pages::zeroed(shape.iter().product());
        let width = bytes.len().checked_div(values.len()).unwrap_or(1).max(1);
        let parts = values.par_chunks_mut(GRAIN).zip(bytes.par_chunks(GRAIN * width));
        parts.for_each(|(to, bytes)| convert(bytes, dtype, to));
        release(file, bytes);
        Ok(Some(values))
    }

    /// A weight on another device than the CPU, copied there as it lies in the file.
    fn placed(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor>, ModelError> {
        let Some((view, file)) = self.find(name, shape)? else { return Ok(None) };
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            _ => DType::BF16,
        };
        let Placement { device, dtype: wanted } = self.placement;
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, shape, device)?;
        release(file, view.data());
        Ok(Some(tensor.to_dtype(*wanted)?))
    }
}

impl WeightReader for SafetensorsReader<'_> {
    fn vector(&self, name: &str, len: usize) -> Result<Option<Tensor>, ModelError> {
        if self.placement.is_gpu() {
            return self.placed(name, &[len]);
        }
        let Some(values) = self.f32(name, &[len])? else { return Ok(None) };
        Ok(Some(Tensor::from_slice(&values, len, &Device::Cpu)?))
    }

    fn matrix(
        &self,
        name: &str,
        (rows, columns): (usize, usize),
    ) -> Result<Option<Matrix>, ModelError> {
        if self.placement.is_gpu() {
            let placed = self.placed(name, &[rows, columns])?;
            return Ok(placed.as_ref().map(Matrix::dense).transpose()?);
        }
        let Some(quantize) = self.quantize else {
            let Some((view, file)) = self.find(name, &[rows, columns])? else { return Ok(None) };
            let (bytes, dtype) = (view.data(), view.dtype());
            let row_bytes = bytes.len() / rows.max(1);
            let matrix = Matrix::from_rows(rows, columns, |rows, to| {
                convert(&bytes[rows.start * row_bytes..rows.end * row_bytes], dtype, to);
            });
            release(file, bytes);
            return Ok(Some(matrix));
        };
        let Some(values) = self.f32(name, &[rows, columns])? else { return Ok(None) };
        let dtype = quantize.block_type(columns).ok_or_else(|| ModelError::Unsupported {
            file: name.to_owned(),
            what: format!("quantising rows of {columns} weights"),
            hint: "the width must be a multiple of 32; run without --quantize".to_owned(),
        })?;
        Ok(Some(Matrix::quantized(quantize_rows(&values, columns, dtype)?)?))
    }

    fn rope_divisors(&self) -> Result<Option<Vec<f32>>, ModelError> {
        Ok(None)
    }
}

/// Quantises groups of rows in parallel; blocks never cross rows, so the result is that of one pass.
fn quantize_rows(values: &[f32], columns: usize, dtype: GgmlDType) -> Result<QTensor, ModelError> {
    let rows = values.len() / columns;
    let group = rows.div_ceil(rayon::current_num_threads() * 4).max(1) * columns;
    let parts: Vec<Vec<u8>> = values
        .par_chunks(group)
        .map(|part| {
            let part = Tensor::from_slice(part, part.len(), &Device::Cpu)?;
            Ok(QTensor::quantize(&part, dtype)?.data()?.into_owned())
        })
        .collect::<candle_core::Result<_>>()?;
    super::gguf::qtensor(parts.concat(), &[rows, columns], dtype)
}

/// Little-endian numbers of a type that [`SafetensorsReader::find`] lets pass, as f32.
fn convert(bytes: &[u8], dtype: Dtype, to: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (o, b) in to.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Dtype::BF16 => {
            for (o, b) in to.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        _ => match bytemuck::try_cast_slice::<u8, half::f16>(bytes) {
            Ok(halves) => halves.convert_to_f32_slice(to),
            // The header's length is free, so the data may lie at an odd address.
            Err(_) => {
                for (o, b) in to.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
        },
    }
}

/// Gives the pages of converted file data back, so that a model never counts twice in memory.
fn release(file: &FileBytes, data: &[u8]) {
    #[cfg(unix)]
    if let FileBytes::Mapped(map) = file {
        let offset = data.as_ptr() as usize - map.as_ptr() as usize;
        // SAFETY: a read-only map of a file: dropped pages are read again if they are touched again.
        // A refusal by the system only costs memory.
        let _ = unsafe {
            map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, data.len())
        };
    }
    #[cfg(not(unix))]
    let _ = (file, data);
}
