//! Cartridges: the artifact, its file formats, and the registry that lends them to requests.
//!
//! Content, not name, is identity: a [`Cartridge`] carries its [`Generation`], names point at generations,
//! and whoever uses one holds a [`Lease`] on it.

mod artifact;
mod reference;

pub use artifact::{Cartridge, Generation, KvShape, LayerKv, Provenance};
pub use reference::{CartridgeRef, Source};
mod registry;
pub use registry::Lease;
