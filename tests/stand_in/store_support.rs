//! Cartridges to deliver, and sources over a cache in a temporary folder.

use std::{path::Path, sync::Arc, time::Duration};

use candle_core::{Device, Tensor};
use cartouche::cartridge::{
    Cached, Cartridge, CartridgeError, FileSource, HuggingFace, Intake, LayerKv, Naming,
    Provenance, Store, TorchStyle,
    transfer::{Hosts, TimeLimits, Transfer},
    write_safetensors, write_torch,
};

use super::hub::Hub;

/// Bytes of the largest cartridge the sources here take.
pub const MAX_BYTES: u64 = 1 << 20;

/// A cartridge of a few kilobytes; each seed has another content.
pub fn cartridge(seed: f32) -> Cartridge {
    let tensor = |add: f32| Tensor::full(seed + add, (2, 16, 8), &Device::Cpu).unwrap();
    let layer = |i: u8| LayerKv { keys: tensor(i.into()), values: tensor(0.5), bias: None };
    Cartridge::new(vec![layer(0), layer(1)], 1, Provenance::default()).unwrap()
}

pub fn torch_bytes(seed: f32) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cartridge.pt");
    write_torch(&path, &cartridge(seed), TorchStyle::PlainLists, Naming::Both).unwrap();
    std::fs::read(path).unwrap()
}

pub fn safetensors_bytes(seed: f32) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cartridge.safetensors");
    write_safetensors(&path, &cartridge(seed)).unwrap();
    std::fs::read(path).unwrap()
}

/// Short limits, so that what hangs is found out soon.
pub fn times() -> TimeLimits {
    TimeLimits {
        connect: Duration::from_secs(5),
        idle: Duration::from_millis(300),
        total: Duration::from_secs(20),
    }
}

pub fn store(dir: &Path) -> Arc<Store> {
    Arc::new(Store::new(dir.to_owned(), 1 << 30))
}

/// The hub, as seen by one process whose cache is in `dir`.
pub fn hub_source(hub: &Hub, dir: &Path, token: Option<&str>) -> Cached<HuggingFace> {
    hub_source_within(hub, store(dir), token, times())
}

pub fn hub_source_within(
    hub: &Hub,
    store: Arc<Store>,
    token: Option<&str>,
    times: TimeLimits,
) -> Cached<HuggingFace> {
    let hosts = Hosts::new([hub.cdn.url.as_str()]).unwrap();
    let remote = HuggingFace::new(&hub.api.url, token, hosts, false).unwrap();
    Cached::new(remote, Transfer::new(times), store, MAX_BYTES)
}

/// Reads what a source holds of an id.
pub fn read(source: &impl FileSource, id: &str) -> Result<Cartridge, CartridgeError> {
    let mut intake = Intake::as_stored(MAX_BYTES);
    source.read(id, &mut intake)?;
    intake.into_cartridge()
}
