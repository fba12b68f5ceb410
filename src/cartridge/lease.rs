//! The guard through which everything else uses a cartridge.

use std::{ops::Deref, sync::Arc};

use super::{Cartridge, CartridgeError};

/// A guard on one generation, under the id it was asked for. The registry never evicts a generation
/// that is lent; memory goes with the last lease (and the registry's own hold). Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Lease {
    id: Arc<str>,
    cartridge: Arc<Cartridge>,
}

impl Lease {
    pub(super) fn new(id: &str, cartridge: Arc<Cartridge>) -> Self {
        Self { id: id.into(), cartridge }
    }

    /// A lease that no registry knows of, for tests and tools.
    ///
    /// # Errors
    /// Only if memory runs out or a tensor is broken.
    pub fn detached(id: &str, cartridge: &Cartridge) -> Result<Self, CartridgeError> {
        Ok(Self::new(id, Arc::new(cartridge.for_attention()?)))
    }

    /// The id of the request, as the client wrote it.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Deref for Lease {
    type Target = Cartridge;

    fn deref(&self) -> &Cartridge {
        &self.cartridge
    }
}
