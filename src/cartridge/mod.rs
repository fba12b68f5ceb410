//! Cartridges: the artifact, its file formats, and the registry that lends them to requests.
//!
//! Content, not name, is identity: a [`Cartridge`] carries its [`Generation`], names point at
//! generations, and whoever uses one holds a [`Lease`] on it. Files are data from strangers:
//! nothing in them is executed, and every size they claim is checked before memory is taken.

mod artifact;
mod config_yaml;
mod digest;
mod error;
mod failures;
mod flights;
mod format;
mod host_tier;
mod intake;
mod lease;
mod lookup;
mod manage;
mod names;
mod pickle;
mod pickle_objects;
mod pickle_value;
mod publish;
mod reference;
mod registry;
mod residents;
mod safetensors_file;
mod sanitize;
mod sources;
mod staging;
mod torch_file;
mod torch_layout;
mod torch_view;
mod torch_write;
mod validate;
mod zip_directory;

pub(crate) use artifact::digest_from_hex;
pub use artifact::{Cartridge, Generation, KvShape, LayerKv, Provenance};
pub use config_yaml::{ConfigYaml, read_config_yaml, write_config_yaml};
pub use error::CartridgeError;
pub(crate) use format::write_atomically;
pub use format::{read_cartridge, read_cartridge_bytes};
pub use intake::{Intake, Keep, Outline};
pub use lease::Lease;
pub use publish::{Expect, Upload};
pub use reference::{CartridgeRef, Origin, Source};
pub use registry::{CartridgeInfo, Registry, RegistryOptions, RegistryStats, Tier};
pub use safetensors_file::write_safetensors;
pub use sanitize::folder_name;
pub use sources::{FileSource, LocalFolder, RemoteSource, Stamp};
pub use torch_write::{Naming, TorchStyle, write_torch};
pub use validate::{provenance_warnings, validate};
