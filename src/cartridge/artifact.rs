//! The cartridge itself: immutable keys and values per layer, and the digest that identifies them.

use std::fmt;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use serde::{Deserialize, Serialize};

use super::{CartridgeError, Outline, digest::ContentDigest, intake::Intake};
use crate::gpu::is_gpu;

/// SHA-256 of a cartridge's content: its identity, whatever it is called and wherever it came from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub [u8; 32]);

impl Generation {
    /// 64 lower-case hexadecimal digits.
    pub fn to_hex(&self) -> String {
        self.to_string()
    }

    /// From what [`Self::to_hex`] gives, in either case; `None` for anything else.
    pub fn from_hex(text: &str) -> Option<Self> {
        digest_from_hex(text).map(Self)
    }

    /// The first 12 hexadecimal digits, for logs and lists.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

/// The bytes of a SHA-256 written as 64 hexadecimal digits.
pub(crate) fn digest_from_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.bytes().map(|byte| char::from(byte).to_digit(16));
    let digits = digits.collect::<Option<Vec<_>>>().filter(|digits| digits.len() == 64)?;
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
    Some(bytes)
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Generation({})", self.short())
    }
}

impl Serialize for Generation {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Keys and values of one layer.
#[derive(Debug, Clone)]
pub struct LayerKv {
    /// `[kv_heads, tokens, head_dim]`, after RoPE (and after QK norm where the model has one).
    pub keys: Tensor,
    /// `[kv_heads, tokens, head_dim]`.
    pub values: Tensor,
    /// `[kv_heads, tokens]` f32, added to the scaled attention score of each key.
    pub bias: Option<Tensor>,
}

/// What a model and a cartridge must agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// Facts about how a cartridge was made. Advisory: only the tensors decide what is computed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Model the cartridge was made for, as its maker named it.
    pub model: Option<String>,
    pub rope_theta: Option<f64>,
    /// RoPE scaling as in the model's `config.json`.
    pub rope_scaling: Option<serde_json::Value>,
    /// One line of free text: document, training run, tool.
    pub origin: Option<String>,
}

/// An immutable cartridge. Leading `frozen_tokens` were not trained (the attention sink).
#[derive(Debug, Clone)]
pub struct Cartridge {
    layers: Vec<LayerKv>,
    shape: KvShape,
    tokens: usize,
    dtype: DType,
    frozen_tokens: usize,
    provenance: Provenance,
    generation: Generation,
}

impl Cartridge {
    /// Checks that all layers agree and computes the generation.
    ///
    /// Tensors that are not contiguous are copied: attention reads rows one after the other.
    ///
    /// Keys and values are `[kv_heads, tokens, head_dim]`, of one floating-point type (f16, bf16,
    /// f32) over all layers; a bias is `[kv_heads, tokens]` f32. Whether numbers are finite is
    /// checked by [`super::validate`], not here.
    ///
    /// # Errors
    /// [`CartridgeError::Invalid`] names the layer and tensor that disagrees;
    /// [`CartridgeError::TooLarge`] the limit that was passed.
    pub fn new(
        layers: Vec<LayerKv>,
        frozen_tokens: usize,
        provenance: Provenance,
    ) -> Result<Self, CartridgeError> {
        let mut intake = Intake::as_stored(u64::MAX);
        intake.begin(Outline::of(&layers, frozen_tokens)?, provenance)?;
        for tensor in layers.iter().flat_map(LayerKv::tensors) {
            intake.tensor(tensor)?;
        }
        intake.into_cartridge()
    }

    /// Layers that an [`Intake`] checked, as `dtype`.
    pub(super) fn from_parts(
        layers: Vec<LayerKv>,
        outline: &Outline,
        dtype: DType,
        provenance: Provenance,
        generation: Generation,
    ) -> Self {
        let Outline { shape, tokens, frozen_tokens, .. } = *outline;
        Self { layers, shape, tokens, dtype, frozen_tokens, provenance, generation }
    }

    pub fn layers(&self) -> &[LayerKv] {
        &self.layers
    }

    /// All tokens, frozen ones included. Prompt positions start after them.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Leading tokens that were not trained.
    pub fn frozen_tokens(&self) -> usize {
        self.frozen_tokens
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Type of keys and values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Memory the tensors take in their present type.
    pub fn bytes(&self) -> u64 {
        self.bytes_as(self.dtype)
    }

    /// Memory the tensors would take as `dtype`.
    pub fn bytes_as(&self, dtype: DType) -> u64 {
        let KvShape { layers, kv_heads, head_dim } = self.shape;
        let elements = 2 * layers * kv_heads * self.tokens * head_dim;
        let biases = self.layers.iter().filter(|layer| layer.bias.is_some()).count();
        (elements * dtype.size_in_bytes() + biases * kv_heads * self.tokens * 4) as u64
    }

    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// The same tensors with other facts about their making.
    pub fn with_provenance(self, provenance: Provenance) -> Self {
        Self { provenance, ..self }
    }

    /// Digest of the content as it was made or read. [`Self::to`] does not change it.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The cartridge on another device or in another type. It keeps its generation: identity is
    /// that of the stored content, not of what a device makes of it. Tensors that need no change
    /// are shared.
    pub fn to(&self, device: &Device, dtype: DType) -> Result<Self, CartridgeError> {
        let moved = |t: &Tensor, dtype| t.to_device(device).and_then(|t| t.to_dtype(dtype));
        let layers = self.layers.iter().map(|layer| {
            Ok(LayerKv {
                keys: moved(&layer.keys, dtype)?,
                values: moved(&layer.values, dtype)?,
                bias: layer.bias.as_ref().map(|bias| moved(bias, DType::F32)).transpose()?,
            })
        });
        let layers =
            layers.collect::<candle_core::Result<_>>().map_err(|e| CartridgeError::tensor(&e))?;
        Ok(Self { layers, dtype, provenance: self.provenance.clone(), ..*self })
    }

    /// The same numbers as attention on their device reads them. On the CPU that is with the keys of each
    /// head transposed in memory, so that those of neighbouring tokens lie together; on a GPU as they are
    /// stored. Shapes stay the same; only strides change.
    pub fn for_attention(&self) -> Result<Self, CartridgeError> {
        let transposed = |keys: &Tensor| match is_gpu(keys.device(), keys.dtype()) {
            false => keys.transpose(1, 2)?.contiguous()?.transpose(1, 2),
            true => keys.contiguous(),
        };
        let layers = self
            .layers
            .iter()
            .map(|layer| Ok(LayerKv { keys: transposed(&layer.keys)?, ..layer.clone() }))
            .collect::<candle_core::Result<_>>()
            .map_err(|e| CartridgeError::tensor(&e))?;
        Ok(Self { layers, provenance: self.provenance.clone(), ..*self })
    }

    /// The same content in other tensors, which must hold it: for measuring what it costs to read it from
    /// several places.
    pub(crate) fn in_tensors(&self, layers: Vec<LayerKv>) -> Self {
        Self { layers, provenance: self.provenance.clone(), ..*self }
    }

    /// Whether [`Self::for_attention`] was applied.
    pub fn is_for_attention(&self) -> bool {
        let is_laid_out = |keys: &Tensor| match is_gpu(keys.device(), keys.dtype()) {
            false => keys.transpose(1, 2).is_ok_and(|k| k.is_contiguous()),
            true => keys.is_contiguous(),
        };
        self.layers.iter().all(|layer| is_laid_out(&layer.keys))
    }

    /// The digest of the tensors as they are now; differs from [`Self::generation`] after a change
    /// of type.
    pub(super) fn present_generation(&self) -> Result<Generation, CartridgeError> {
        let mut digest = ContentDigest::new(&Outline::of(&self.layers, self.frozen_tokens)?);
        self.layers.iter().flat_map(LayerKv::tensors).try_for_each(|t| digest.update(t))?;
        Ok(digest.finish())
    }
}

/// The tensors of a layer in canonical order.
pub(super) const TENSORS: [&str; 3] = ["keys", "values", "bias"];

impl LayerKv {
    /// Keys, values and, where there is one, the bias.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.keys, &self.values].into_iter().chain(&self.bias)
    }
}

#[cfg(target_endian = "big")]
compile_error!("cartridge files and digests are little-endian; byte swapping is not written");

/// Lends the elements of a tensor as little-endian bytes in row-major order, copying only what is
/// not contiguous or not in host memory.
pub(super) fn with_bytes<T>(
    tensor: &Tensor,
    use_bytes: impl FnOnce(&[u8]) -> T,
) -> Result<T, CartridgeError> {
    let flat = tensor
        .to_device(&Device::Cpu)
        .and_then(|t| t.contiguous())
        .map_err(|e| CartridgeError::tensor(&e))?;
    let (storage, layout) = flat.storage_and_layout();
    let range = layout.contiguous_offsets().map(|(start, end)| start..end);
    let bytes = match (&*storage, range) {
        (Storage::Cpu(CpuStorage::F32(data)), Some(range)) => bytemuck::cast_slice(&data[range]),
        (Storage::Cpu(CpuStorage::F16(data)), Some(range)) => bytemuck::cast_slice(&data[range]),
        (Storage::Cpu(CpuStorage::BF16(data)), Some(range)) => bytemuck::cast_slice(&data[range]),
        _ => {
            return Err(CartridgeError::invalid("a tensor is not f16, bf16 or f32 in memory"));
        }
    };
    Ok(use_bytes(bytes))
}

/// A tensor in host memory from little-endian bytes; `fill` writes all `elements × size` of them.
pub(super) fn tensor_from_bytes(
    dtype: DType,
    dims: &[usize],
    fill: impl FnOnce(&mut [u8]) -> Result<(), CartridgeError>,
) -> Result<Tensor, CartridgeError> {
    fn build<T: candle_core::WithDType + bytemuck::Pod>(
        dims: &[usize],
        fill: impl FnOnce(&mut [u8]) -> Result<(), CartridgeError>,
    ) -> Result<Tensor, CartridgeError> {
        let mut data = vec![T::zeroed(); dims.iter().product()];
        fill(bytemuck::cast_slice_mut(&mut data))?;
        Tensor::from_vec(data, dims, &Device::Cpu).map_err(|e| CartridgeError::tensor(&e))
    }
    match dtype {
        DType::F32 => build::<f32>(dims, fill),
        DType::F16 => build::<half::f16>(dims, fill),
        DType::BF16 => build::<half::bf16>(dims, fill),
        other => Err(CartridgeError::invalid(format!("type {other:?}; need f16, bf16 or f32"))),
    }
}
