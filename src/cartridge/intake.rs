//! Takes a cartridge in while it is read: the sizes first, then one tensor at a time.
//!
//! A file says what it holds before any number of it is read, so whoever asked can refuse it or
//! make room first, and no more than the kept tensors and the one at hand is ever in memory.

use candle_core::{DType, Device, Tensor};

use super::{
    Cartridge, CartridgeError, Generation, KvShape, LayerKv, Provenance, artifact::TENSORS,
    digest::ContentDigest, validate::check_tensor_finite,
};
use crate::limits;

/// What a file says it holds. Readers make sure that all its tensors agree with it before the first
/// is read.
#[derive(Debug, Clone, PartialEq)]
pub struct Outline {
    pub shape: KvShape,
    /// All tokens, frozen ones included.
    pub tokens: usize,
    pub frozen_tokens: usize,
    /// Type of keys and values in the file.
    pub dtype: DType,
    /// For each layer whether it has a bias.
    pub biases: Vec<bool>,
    /// Bytes that reading takes for a while, beyond the tensors and about one layer: only files
    /// whose tensors share storages, or use small parts of them, need any.
    pub scratch_bytes: u64,
}

impl Outline {
    /// The outline of layers that agree with the first; [`Intake`] finds the ones that do not.
    pub(super) fn of(layers: &[LayerKv], frozen_tokens: usize) -> Result<Self, CartridgeError> {
        let first = layers.first().ok_or_else(|| CartridgeError::invalid("it has no layers"))?;
        let biases = layers.iter().map(|layer| layer.bias.is_some()).collect();
        Self::from_first(first.keys.dims(), first.keys.dtype(), frozen_tokens, biases)
    }

    /// From the keys of the first layer.
    ///
    /// # Errors
    /// [`CartridgeError::Invalid`] or [`CartridgeError::TooLarge`] for sizes that no cartridge has.
    pub(super) fn from_first(
        dims: &[usize],
        dtype: DType,
        frozen_tokens: usize,
        biases: Vec<bool>,
    ) -> Result<Self, CartridgeError> {
        let &[kv_heads, tokens, head_dim] = dims else {
            return Err(CartridgeError::invalid(format!(
                "layer 0 keys: expected [kv_heads, tokens, head_dim], found {dims:?}"
            )));
        };
        let shape = KvShape { layers: biases.len(), kv_heads, head_dim };
        let scratch_bytes = 0;
        let outline = Self { shape, tokens, frozen_tokens, dtype, biases, scratch_bytes };
        outline.check()?;
        Ok(outline)
    }

    fn check(&self) -> Result<(), CartridgeError> {
        let KvShape { layers, kv_heads, head_dim } = self.shape;
        let (tokens, frozen) = (self.tokens, self.frozen_tokens);
        if layers > limits::MAX_CARTRIDGE_LAYERS {
            let limit = limits::MAX_CARTRIDGE_LAYERS as u64;
            return Err(CartridgeError::too_large("layers", layers as u64, limit));
        }
        if tokens > limits::MAX_CARTRIDGE_TOKENS {
            let limit = limits::MAX_CARTRIDGE_TOKENS as u64;
            return Err(CartridgeError::too_large("tokens", tokens as u64, limit));
        }
        if layers == 0 {
            return Err(CartridgeError::invalid("it has no layers"));
        }
        if kv_heads == 0 || tokens == 0 || head_dim == 0 {
            let sizes = format!("{kv_heads} KV heads, {tokens} tokens, head size {head_dim}");
            return Err(CartridgeError::invalid(format!("empty: {sizes}")));
        }
        if frozen > tokens {
            let reason = format!("{frozen} frozen tokens of {tokens} tokens");
            return Err(CartridgeError::invalid(reason));
        }
        if !matches!(self.dtype, DType::F16 | DType::BF16 | DType::F32) {
            let reason = format!("layer 0 keys: {:?}; cartridges are f16, bf16 or f32", self.dtype);
            return Err(CartridgeError::invalid(reason));
        }
        Ok(())
    }

    /// Memory the tensors take with keys and values as `dtype`.
    pub fn bytes_as(&self, dtype: DType) -> u64 {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let product = |sizes: [usize; 4]| {
            sizes.iter().fold(1u64, |product, size| product.saturating_mul(*size as u64))
        };
        let biases = self.biases.iter().filter(|bias| **bias).count();
        let layers = product([2 * self.shape.layers, kv_heads, self.tokens, head_dim]);
        layers.saturating_mul(dtype.size_in_bytes() as u64).saturating_add(product([
            biases,
            kv_heads,
            self.tokens,
            4,
        ]))
    }

    /// Checks one tensor; `name` is one of `keys`, `values`, `bias`.
    pub(super) fn check_tensor(
        &self,
        layer: usize,
        name: &str,
        have: &[usize],
        kind: DType,
    ) -> Result<(), CartridgeError> {
        let dims = [self.shape.kv_heads, self.tokens, self.shape.head_dim];
        let (dims, dtype) = match name {
            "bias" => (&dims[..2], DType::F32),
            _ => (&dims[..], self.dtype),
        };
        if have != dims {
            let reason = format!("layer {layer} {name}: shape {have:?}, expected {dims:?}");
            return Err(CartridgeError::invalid(reason));
        }
        if kind != dtype {
            let reason = format!("layer {layer} {name}: type {kind:?}, expected {dtype:?}");
            return Err(CartridgeError::invalid(reason));
        }
        Ok(())
    }

    /// Which tensors come in which order: layer by layer keys, values and, where there is one, the
    /// bias.
    fn places(&self) -> impl Iterator<Item = (usize, &'static str)> {
        let layers = self.biases.iter().enumerate();
        layers.flat_map(|(i, bias)| {
            TENSORS.into_iter().take(2 + usize::from(*bias)).map(move |n| (i, n))
        })
    }
}

/// What is done with the numbers of a file.
#[derive(Debug, Clone)]
pub enum Keep {
    /// Kept as they are in the file; whether they are finite is for [`super::validate`] to say.
    AsStored,
    /// Checked to be finite, and converted one by one.
    As(Device, DType),
    /// The same, but each is dropped at once: there is no room.
    Checked(Device, DType),
    /// Only digested: there is no room, but the content may be in memory already.
    Nothing,
}

type Admit<'a> = Box<dyn FnMut(&Outline) -> Result<Keep, CartridgeError> + 'a>;

/// One cartridge on its way in. A reader calls [`Self::begin`], then [`Self::tensor`] for each
/// tensor in order, then [`Self::end`].
pub struct Intake<'a> {
    max_bytes: u64,
    admit: Admit<'a>,
    taking: Option<Taking>,
}

struct Taking {
    outline: Outline,
    keep: Keep,
    provenance: Provenance,
    digest: ContentDigest,
    /// Of a cartridge that knows what it is; its content is not digested again.
    known: Option<Generation>,
    /// Places still to come, the next one last.
    places: Vec<(usize, &'static str)>,
    kept: Vec<Tensor>,
}

impl<'a> Intake<'a> {
    /// `admit` sees the outline before any number is read, and refuses it or says what to keep.
    pub fn new(
        max_bytes: u64,
        admit: impl FnMut(&Outline) -> Result<Keep, CartridgeError> + 'a,
    ) -> Self {
        Self { max_bytes, admit: Box::new(admit), taking: None }
    }

    /// Takes in whatever is a cartridge, as it is.
    pub fn as_stored(max_bytes: u64) -> Self {
        Self::new(max_bytes, |_| Ok(Keep::AsStored))
    }

    /// Nothing of a larger file is read.
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Announces what follows.
    ///
    /// # Errors
    /// Those of whoever asked for the cartridge, and sizes that no cartridge has.
    pub fn begin(
        &mut self,
        outline: Outline,
        provenance: Provenance,
    ) -> Result<(), CartridgeError> {
        outline.check()?;
        let keep = (self.admit)(&outline)?;
        let digest = ContentDigest::new(&outline);
        let mut places: Vec<_> = outline.places().collect();
        places.reverse();
        let kept = Vec::new();
        let known = None;
        self.taking = Some(Taking { outline, keep, provenance, digest, known, places, kept });
        Ok(())
    }

    /// The next tensor: digested, checked, converted and kept, as was asked for.
    ///
    /// # Errors
    /// [`CartridgeError::Invalid`] names the layer and tensor that is not as announced.
    pub fn tensor(&mut self, tensor: &Tensor) -> Result<(), CartridgeError> {
        let taking = self.taking.as_mut().ok_or_else(not_announced)?;
        let (layer, name) = taking.places.pop().ok_or_else(not_announced)?;
        taking.outline.check_tensor(layer, name, tensor.dims(), tensor.dtype())?;
        // Attention reads rows one after the other; it would fail for all that share a step.
        let tensor = tensor.contiguous().map_err(|e| CartridgeError::tensor(&e))?;
        if taking.known.is_none() {
            taking.digest.update(&tensor)?;
        }
        let kept = match &taking.keep {
            Keep::Nothing => return Ok(()),
            Keep::AsStored => tensor,
            Keep::As(device, dtype) | Keep::Checked(device, dtype) => {
                check_tensor_finite(layer, name, &tensor)?;
                let dtype = if name == "bias" { DType::F32 } else { *dtype };
                let moved = tensor.to_device(device).and_then(|t| t.to_dtype(dtype));
                let moved = moved.map_err(|e| CartridgeError::tensor(&e))?;
                // Numbers beyond the range of a narrower type become infinite.
                if dtype != tensor.dtype() && dtype != DType::F32 {
                    check_tensor_finite(layer, name, &moved)?;
                }
                moved
            }
        };
        if !matches!(taking.keep, Keep::Checked(..)) {
            taking.kept.push(kept);
        }
        Ok(())
    }

    /// The digest of all that was announced.
    ///
    /// # Errors
    /// [`CartridgeError::Invalid`] if some of it did not come.
    pub fn end(&mut self) -> Result<Generation, CartridgeError> {
        let taking = self.taking.as_ref().ok_or_else(not_announced)?;
        match taking.places.last() {
            None => Ok(taking.known.unwrap_or_else(|| taking.digest.clone().finish())),
            Some((i, name)) => {
                Err(CartridgeError::invalid(format!("layer {i}: {name} are missing")))
            }
        }
    }

    /// Takes in a cartridge that is in memory. It keeps its generation, also if it was converted.
    ///
    /// # Errors
    /// Those of the three steps.
    pub fn take(&mut self, cartridge: &Cartridge) -> Result<Generation, CartridgeError> {
        let outline = Outline::of(cartridge.layers(), cartridge.frozen_tokens())?;
        self.begin(outline, cartridge.provenance().clone())?;
        if let Some(taking) = &mut self.taking {
            taking.known = Some(cartridge.generation());
        }
        for tensor in cartridge.layers().iter().flat_map(LayerKv::tensors) {
            self.tensor(tensor)?;
        }
        self.end()
    }

    /// Once begun: all tokens, and the facts about the making, which may be completed.
    pub(super) fn facts(&mut self) -> Option<(usize, &mut Provenance)> {
        let taking = self.taking.as_mut()?;
        Some((taking.outline.tokens, &mut taking.provenance))
    }

    /// Once begun: all tokens, the frozen ones, and the facts about the making.
    pub(super) fn outline_facts(&self) -> Option<(usize, usize, &Provenance)> {
        let Taking { outline, provenance, .. } = self.taking.as_ref()?;
        Some((outline.tokens, outline.frozen_tokens, provenance))
    }

    /// The digest and, unless nothing was to be kept, the cartridge.
    pub(super) fn finish(mut self) -> Result<(Generation, Option<Cartridge>), CartridgeError> {
        let generation = self.end()?;
        let taking = self.taking.take().ok_or_else(not_announced)?;
        let Taking { outline, keep, provenance, kept, .. } = taking;
        let dtype = match keep {
            Keep::Nothing | Keep::Checked(..) => return Ok((generation, None)),
            Keep::AsStored => outline.dtype,
            Keep::As(_, dtype) => dtype,
        };
        let mut kept = kept.into_iter();
        let mut next = || kept.next().ok_or_else(not_announced);
        let mut layers = Vec::with_capacity(outline.biases.len());
        for bias in &outline.biases {
            let (keys, values) = (next()?, next()?);
            layers.push(LayerKv { keys, values, bias: bias.then(&mut next).transpose()? });
        }
        let cartridge = Cartridge::from_parts(layers, &outline, dtype, provenance, generation);
        Ok((generation, Some(cartridge)))
    }

    /// The cartridge, where it was to be kept.
    ///
    /// # Errors
    /// [`CartridgeError::Invalid`] if it was not, or is not complete.
    pub fn into_cartridge(self) -> Result<Cartridge, CartridgeError> {
        self.finish()?.1.ok_or_else(not_announced)
    }
}

/// A reader that does not keep to the order of the three steps.
fn not_announced() -> CartridgeError {
    CartridgeError::invalid("its reader delivered other tensors than it announced")
}
