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
mod layout;
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
mod store;
mod torch_file;
mod torch_layout;
mod torch_view;
mod torch_write;
mod validate;
mod zip_directory;

pub(crate) use artifact::digest_from_hex;
pub use artifact::{Cartridge, Generation, KvShape, LayerKv, Provenance};
pub use config_yaml::{ConfigYaml, config_yaml, read_config_yaml, write_config_yaml};
pub use error::CartridgeError;
pub(crate) use format::write_atomically;
pub use format::{read_cartridge, read_cartridge_bytes, read_cartridge_from};
pub use intake::{Intake, Keep, Outline};
pub use lease::Lease;
pub use publish::{Expect, Upload};
pub use reference::{CartridgeRef, Origin, Source};
pub use registry::{CartridgeInfo, Registry, RegistryOptions, RegistryStats, Tier};
pub use safetensors_file::{write_safetensors, write_safetensors_to};
pub use sanitize::folder_name;
pub use sources::{
    Cached, Fetch, FileSource, HttpFiles, HubId, HuggingFace, LocalFolder, Piece, Remote,
    RemoteSource, RunId, Sources, SourcesOptions, Stamp, Wandb, transfer,
};
pub use store::{Record, Store};
pub use torch_write::{Naming, TorchStyle, write_torch, write_torch_to};
pub use validate::{provenance_warnings, validate};
