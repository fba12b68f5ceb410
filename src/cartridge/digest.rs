//! The digest that identifies a cartridge, taken while its tensors pass by.

use std::{
    sync::mpsc::{SyncSender, sync_channel},
    thread::{Builder, JoinHandle},
};

use sha2::{Digest, Sha256};

use super::{CartridgeError, Generation, Outline, artifact::with_bytes};
use candle_core::Tensor;

/// Changes when the layout of the digested bytes does, so that old digests can never be taken for
/// new ones.
const DIGEST_HEADER: &[u8] = b"cartouche cartridge v1\0";

/// SHA-256 over a header (sizes, type, frozen tokens, which layers have a bias; little-endian u64
/// each) and every layer's keys, values and bias as little-endian bytes in canonical order.
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

/// Below, starting a thread is not worth it.
const BESIDE_BYTES: u64 = 4 << 20;
/// Tensors that wait for the other thread, beyond the one it works on.
const WAITING: usize = 1;

/// The digest of what passes by, taken on another thread while this one reads and converts.
pub(super) enum Digesting {
    Here(ContentDigest),
    Beside(SyncSender<Tensor>, JoinHandle<Result<ContentDigest, CartridgeError>>),
}

impl Digesting {
    pub fn new(outline: &Outline) -> Self {
        if outline.bytes_as(outline.dtype) < BESIDE_BYTES {
            return Self::Here(ContentDigest::new(outline));
        }
        let (sender, tensors) = sync_channel::<Tensor>(WAITING);
        let mut digest = ContentDigest::new(outline);
        let digested = move || {
            tensors.iter().try_for_each(|tensor| digest.update(&tensor))?;
            Ok(digest)
        };
        match Builder::new().name("cartridge-digest".to_owned()).spawn(digested) {
            Ok(thread) => Self::Beside(sender, thread),
            Err(_) => Self::Here(ContentDigest::new(outline)),
        }
    }

    pub fn update(&mut self, tensor: &Tensor) -> Result<(), CartridgeError> {
        match self {
            Self::Here(digest) => digest.update(tensor),
            Self::Beside(sender, _) => {
                // If the other thread ended early, its error comes with the end.
                let _ = sender.send(tensor.clone());
                Ok(())
            }
        }
    }

    pub fn finish(self) -> Result<Generation, CartridgeError> {
        match self {
            Self::Here(digest) => Ok(digest.finish()),
            Self::Beside(sender, thread) => {
                drop(sender);
                let panicked = |_| Err(CartridgeError::invalid("its digest could not be taken"));
                thread.join().unwrap_or_else(panicked).map(ContentDigest::finish)
            }
        }
    }
}
