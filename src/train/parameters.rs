//! The numbers that are learned: keys and values of a cartridge, in f32.

use candle_core::{DType, Device, Tensor};

use super::step::PrefixLayer;
use super::{TrainError, TrainError::Candle};
use crate::cartridge::{Cartridge, KvShape, LayerKv, Provenance};

/// Keys and values of all layers, the leading `frozen` tokens of which stay as they are.
///
/// Each tensor is `[kv_heads, tokens, head_dim]`; in [`Self::tensors`] a layer's keys come before its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    shape: KvShape,
    tokens: usize,
    frozen: usize,
    tensors: Vec<Vec<f32>>,
}

impl Parameters {
    /// From what [`super::initialize`] or a checkpoint gives.
    ///
    /// # Errors
    /// [`TrainError::Invalid`] when nothing would be left to train, or tensors disagree in shape.
    pub fn new(layers: &[LayerKv], frozen: usize) -> Result<Self, TrainError> {
        let invalid = |reason: String| TrainError::Invalid(reason);
        let first = layers.first().ok_or_else(|| invalid("a cartridge needs layers".to_owned()))?;
        let (kv_heads, tokens, head_dim) = first.keys.dims3()?;
        if tokens <= frozen {
            return Err(invalid(format!(
                "{tokens} tokens of which {frozen} are frozen: nothing is left to train"
            )));
        }
        let mut tensors = Vec::with_capacity(2 * layers.len());
        for tensor in layers.iter().flat_map(|layer| [&layer.keys, &layer.values]) {
            if tensor.dims3()? != (kv_heads, tokens, head_dim) {
                return Err(invalid(format!("tensors of several shapes: {:?}", tensor.dims())));
            }
            let tensor = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            tensors.push(tensor.contiguous()?.flatten_all()?.to_vec1()?);
        }
        if layers.iter().any(|layer| layer.bias.is_some()) {
            return Err(invalid(
                "a cartridge with an attention bias cannot be trained on".to_owned(),
            ));
        }
        let shape = KvShape { layers: layers.len(), kv_heads, head_dim };
        Ok(Self { shape, tokens, frozen, tensors })
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// All tokens, frozen ones included.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn frozen(&self) -> usize {
        self.frozen
    }

    /// Numbers that are learned.
    pub fn trainable(&self) -> usize {
        let KvShape { layers, kv_heads, head_dim } = self.shape;
        2 * layers * kv_heads * (self.tokens - self.frozen) * head_dim
    }

    pub fn tensors(&self) -> &[Vec<f32>] {
        &self.tensors
    }

    pub fn tensors_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.tensors
    }

    /// Calls `f` with each run of trainable numbers of a tensor: a head's, without its frozen tokens.
    pub fn trainable_runs(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let (tokens, frozen, dim) = (self.tokens, self.frozen, self.shape.head_dim);
        let runs = move |head| (head * tokens + frozen) * dim..(head + 1) * tokens * dim;
        (0..self.shape.kv_heads).map(runs)
    }

    /// As the training step takes them.
    pub fn prefix(&self, device: &Device) -> Result<Vec<PrefixLayer>, TrainError> {
        self.layers(device)?
            .into_iter()
            .map(|layer| Ok(PrefixLayer { keys: layer.keys, values: layer.values }))
            .collect()
    }

    /// The cartridge these numbers are now, stored as `dtype`.
    pub fn cartridge(&self, dtype: DType, facts: Provenance) -> Result<Cartridge, TrainError> {
        let mut layers = self.layers(&Device::Cpu)?;
        for layer in &mut layers {
            layer.keys = layer.keys.to_dtype(dtype)?;
            layer.values = layer.values.to_dtype(dtype)?;
        }
        Ok(Cartridge::new(layers, self.frozen, facts)?)
    }

    fn layers(&self, device: &Device) -> Result<Vec<LayerKv>, TrainError> {
        let shape = (self.shape.kv_heads, self.tokens, self.shape.head_dim);
        let tensor = |values: &Vec<f32>| Tensor::from_slice(values, shape, device).map_err(Candle);
        self.tensors
            .chunks_exact(2)
            .map(|pair| {
                Ok(LayerKv { keys: tensor(&pair[0])?, values: tensor(&pair[1])?, bias: None })
            })
            .collect()
    }
}
