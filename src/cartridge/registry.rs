//! Lends cartridges to requests.

use std::sync::Arc;

use super::Cartridge;

/// A guard on one generation: its memory goes with the last lease.
#[derive(Debug, Clone)]
pub struct Lease(Arc<Cartridge>);

impl std::ops::Deref for Lease {
    type Target = Cartridge;
    fn deref(&self) -> &Cartridge {
        &self.0
    }
}
