//! Shared by the integration tests: fixtures written by `scripts/fixtures/models.py`.
#![allow(dead_code)] // each test binary uses its own part

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use cartouche::cartridge::{Cartridge, LayerKv, Lease, Provenance};
use cartouche::model::{Decoder, LoadOptions, ModelSource, Placement, load_decoder};
use serde_json::Value;

/// One folder of `tests/fixtures/models`.
pub struct ModelFixture {
    pub name: String,
    pub folder: PathBuf,
    pub expected: Value,
    pub tensors: HashMap<String, Tensor>,
}

/// Every model fixture whose name passes `filter`; never none.
pub fn model_fixtures(filter: impl Fn(&str) -> bool) -> Vec<ModelFixture> {
    // Relative, so that a test built elsewhere finds them from the root of a checkout.
    let root = PathBuf::from("tests/fixtures/models");
    let mut fixtures: Vec<_> = std::fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .filter(|entry| filter(&entry.file_name().to_string_lossy()))
        .map(|entry| {
            let folder = entry.path();
            let expected = std::fs::read(folder.join("expected.json")).unwrap();
            let tensors = folder.join("expected.safetensors");
            ModelFixture {
                name: entry.file_name().to_string_lossy().into_owned(),
                expected: serde_json::from_slice(&expected).unwrap(),
                tensors: candle_core::safetensors::load(tensors, &Device::Cpu).unwrap(),
                folder,
            }
        })
        .collect();
    fixtures.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!fixtures.is_empty());
    fixtures
}

impl ModelFixture {
    pub fn source(&self) -> ModelSource {
        let gguf = self.folder.join("model.gguf");
        match gguf.exists() {
            true => ModelSource::Gguf(gguf),
            false => ModelSource::Folder(self.folder.clone()),
        }
    }

    pub fn decoder(&self) -> Decoder {
        self.decoder_on(Placement::default())
    }

    pub fn decoder_on(&self, placement: Placement) -> Decoder {
        let options = LoadOptions { placement, ..LoadOptions::default() };
        load_decoder(&self.source(), &options).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    pub fn prompts(&self) -> Vec<Vec<u32>> {
        ids_list(&self.expected["prompts"])
    }

    /// Names of the recorded cases: `base`, `prefix5`, …
    pub fn cases(&self) -> Vec<String> {
        self.expected["cases"].as_object().unwrap().keys().cloned().collect()
    }

    pub fn greedy(&self, case: &str) -> Vec<Vec<u32>> {
        ids_list(&self.expected["cases"][case]["greedy"])
    }

    /// Logits `[rows, vocab]` of the last rows of prompt `i`.
    pub fn logits(&self, case: &str, prompt: usize) -> Vec<Vec<f32>> {
        self.tensors[&format!("{case}.{prompt}.logits")].to_vec2().unwrap()
    }

    /// The KV prefixes of a case as cartridges, in order.
    pub fn cartridges(&self, case: &str) -> Vec<Lease> {
        let prefixes = self.expected["cases"][case]["prefixes"].as_array().unwrap();
        prefixes.iter().map(|name| self.cartridge(name.as_str().unwrap())).collect()
    }

    pub fn cartridge(&self, prefix: &str) -> Lease {
        let layers = (0..)
            .map_while(|i| {
                let part = |kind| self.tensors.get(&format!("{prefix}.layers.{i}.{kind}"));
                let keys = part("keys")?.clone();
                Some(LayerKv { keys, values: part("values").unwrap().clone(), bias: None })
            })
            .collect();
        let cartridge = Cartridge::new(layers, 1, Provenance::default()).unwrap();
        Lease::detached(prefix, &cartridge).unwrap()
    }
}

fn ids_list(value: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).unwrap()
}
