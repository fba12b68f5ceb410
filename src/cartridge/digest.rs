//! The digest that identifies a cartridge, taken while its tensors pass by.

use sha2::{Digest, Sha256};

use super::{CartridgeError, Generation, Outline, artifact::with_bytes};
use candle_core::Tensor;

/// Changes when the layout of the digested bytes does, so that old digests can never be taken for
/// new ones.
const DIGEST_HEADER: &[u8] = b"cartouche cartridge v1\0";

/// SHA-256 over a header (sizes, type, frozen tokens, which layers have a bias; little-endian u64
/// each) and every layer's keys, values and bias as little-endian bytes in canonical order.
#[derive(Clone)]
pub(super) struct ContentDigest(Sha256);

impl ContentDigest {
    pub fn new(outline: &Outline) -> Self {
        let (shape, tokens) = (outline.shape, outline.tokens);
        let mut hash = Sha256::new();
        hash.update(DIGEST_HEADER);
        for size in [shape.layers, shape.kv_heads, tokens, shape.head_dim, outline.frozen_tokens] {
            hash.update((size as u64).to_le_bytes());
        }
        hash.update(outline.dtype.as_str().as_bytes());
        hash.update([0]);
        for bias in &outline.biases {
            hash.update([u8::from(*bias)]);
        }
        Self(hash)
    }

    pub fn update(&mut self, tensor: &Tensor) -> Result<(), CartridgeError> {
        with_bytes(tensor, |bytes| self.0.update(bytes))
    }

    pub fn finish(self) -> Generation {
        Generation(self.0.finalize().into())
    }
}
