//! What tests of the training step compute: the recorded cases, random ones, and how far two gradients are apart.
#![allow(dead_code)] // each test binary uses its own part

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use cartouche::model::Decoder;
use cartouche::train::{Pack, PrefixLayer, StepOptions, Targets};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::common::{self, ModelFixture};

/// What `scripts/fixtures/train_gradients.py` wrote for one model.
pub struct TrainFixture {
    pub model: ModelFixture,
    pub facts: Value,
    tensors: HashMap<String, Tensor>,
    pub pack: Pack,
}

pub fn fixtures() -> Vec<TrainFixture> {
    let root = PathBuf::from("tests/fixtures/train");
    let facts = |name: &str| root.join(format!("{name}.json"));
    let models = common::model_fixtures(|name| facts(name).exists());
    assert!(models.len() >= 6, "one for each architecture");
    let fixture = |model: ModelFixture| {
        let json = std::fs::read(facts(&model.name)).unwrap();
        let tensors = root.join(format!("{}.safetensors", model.name));
        let facts: Value = serde_json::from_slice(&json).unwrap();
        let tensors = candle_core::safetensors::load(tensors, &Device::Cpu).unwrap();
        TrainFixture { pack: pack(&facts), facts, tensors, model }
    };
    models.into_iter().map(fixture).collect()
}

fn pack(facts: &Value) -> Pack {
    let sequences: Vec<Vec<u32>> = serde_json::from_value(facts["sequences"].clone()).unwrap();
    let mut cu_seqlens = vec![0];
    for sequence in &sequences {
        cu_seqlens.push(cu_seqlens.last().unwrap() + sequence.len() as u32);
    }
    let mut targets = Targets::default();
    let entries: Vec<(u32, u32, f32)> = serde_json::from_value(facts["targets"].clone()).unwrap();
    entries.into_iter().for_each(|(row, id, p)| targets.push(row, id, p));
    Pack { tokens: sequences.concat(), cu_seqlens, targets, dataset_rows: Vec::new() }
}

impl TrainFixture {
    pub fn layers(&self, kind: &str) -> Vec<(Tensor, Tensor)> {
        let tensor = |i, part| self.tensors.get(&format!("{kind}.layers.{i}.{part}")).cloned();
        (0..).map_while(|i| Some((tensor(i, "keys")?, tensor(i, "values")?))).collect()
    }

    pub fn prefix(&self) -> Vec<PrefixLayer> {
        to_prefix(&self.layers("prefix"))
    }
}

fn to_prefix(layers: &[(Tensor, Tensor)]) -> Vec<PrefixLayer> {
    layers
        .iter()
        .map(|(keys, values)| PrefixLayer { keys: keys.clone(), values: values.clone() })
        .collect()
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Size of the difference relative to `want`, both as vectors.
pub fn relative(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let (got, want) = (values(got), values(want));
    let difference: f64 = got.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
    (difference / want.iter().map(|v| square(*v)).sum::<f64>()).sqrt()
}

pub fn both(gradients: &[(Tensor, Tensor)]) -> impl Iterator<Item = &Tensor> {
    gradients.iter().flat_map(|(keys, values)| [keys, values])
}

pub fn options(temperature: f32, recompute: bool) -> StepOptions {
    StepOptions { temperature, recompute, ..StepOptions::default() }
}

/// Random sequences of the given lengths behind a random prefix of `p` tokens.
pub fn random_case(decoder: &Decoder, p: usize, lengths: &[u32]) -> (Vec<PrefixLayer>, Pack) {
    let config = decoder.config();
    let mut rng = ChaCha8Rng::seed_from_u64(p as u64);
    let mut cu_seqlens = vec![0];
    lengths.iter().for_each(|len| cu_seqlens.push(cu_seqlens.last().unwrap() + len));
    let tokens = *cu_seqlens.last().unwrap();
    let mut targets = Targets::default();
    for row in 0..tokens {
        for _ in 0..rng.random_range(0..3) {
            let id = rng.random_range(0..config.vocab_size as u32);
            targets.push(row, id, rng.random_range(0.1..0.5));
        }
    }
    let tokens = (0..tokens).map(|_| rng.random_range(0..config.vocab_size as u32)).collect();
    let shape = (config.kv_heads, p, config.head_dim);
    let mut random = || {
        let len = shape.0 * shape.1 * shape.2;
        let values: Vec<f32> = (0..len).map(|_| rng.random_range(-1.5..1.5)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let prefix = (0..config.layers).map(|_| PrefixLayer { keys: random(), values: random() });
    (prefix.collect(), Pack { tokens, cu_seqlens, targets, dataset_rows: Vec::new() })
}
