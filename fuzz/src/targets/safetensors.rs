//! Cartridges in safetensors: the length, the header's JSON and the numbers. The digest is made right again
//! now and then, since a wrong one hides everything behind it.

use candle_core::{DType, Device, Tensor};
use cartouche::cartridge::{
    Cartridge, LayerKv, Provenance, read_cartridge_bytes, write_safetensors_to,
};
use rand::RngExt;
use serde_json::{Value, json};

use super::{Bounds, Linear, Target, cartridges, files};
use crate::mutate::{self, Random};

pub const TARGET: Target = Target {
    name: "safetensors",
    seeds,
    mutate,
    run: cartridges::read,
    // A tensor of the header takes some twenty bytes at least, and some hundred in memory.
    bounds: Bounds {
        memory: Linear { base: 256 << 10, per_byte: 60 },
        work: Linear { base: 4 << 20, per_byte: 400 },
    },
    needs_system: false,
};

const KEYS: [&str; 24] = [
    "__metadata__",
    "format",
    "format_version",
    "tokens",
    "frozen_tokens",
    "generation",
    "model",
    "rope_theta",
    "rope_scaling",
    "origin",
    "dtype",
    "shape",
    "data_offsets",
    "layers.0.keys",
    "layers.0.values",
    "layers.0.bias",
    "layers.1.keys",
    "layers.1.values",
    "layers.1.bias",
    "layers.2.keys",
    "layers.01.keys",
    "layers.-1.keys",
    "",
    "a",
];

fn seeds() -> Vec<Vec<u8>> {
    let written = |cartridge: &Cartridge| {
        let mut file = Vec::new();
        write_safetensors_to(&mut file, cartridge).expect("a seed");
        file
    };
    let good = files("cartridges/good");
    let good = good.iter().filter_map(|file| read_cartridge_bytes(file, "seed").ok());
    let mut seeds: Vec<_> = good.filter(|c| c.layers().len() < 4).map(|c| written(&c)).collect();
    let tensor = |dims: &[usize]| Tensor::ones(dims, DType::F32, &Device::Cpu).expect("a seed");
    let layer = |bias: Option<Tensor>| LayerKv {
        keys: tensor(&[1, 2, 4]),
        values: tensor(&[1, 2, 4]),
        bias,
    };
    let provenance = Provenance {
        model: Some("org/model".to_owned()),
        rope_theta: Some(1e6),
        rope_scaling: Some(json!({"rope_type": "llama3", "factor": 8.0})),
        origin: Some("a test".to_owned()),
    };
    let layers = vec![layer(None), layer(Some(tensor(&[1, 2])))];
    seeds.push(written(&Cartridge::new(layers, 2, provenance).expect("a seed")));
    seeds
}

fn mutate(file: &mut Vec<u8>, random: &mut Random) {
    let Some((header, numbers)) = split(file).filter(|_| random.random_range(0..8) != 0) else {
        return mutate::bytes(file, random);
    };
    let (mut header, mut numbers) = (header.to_vec(), numbers.to_vec());
    match random.random_range(0..6) {
        0 => mutate::bytes(&mut numbers, random),
        1 => change_facts(&mut header, random),
        _ => mutate::json(&mut header, &KEYS, random),
    }
    if random.random_range(0..3) != 0
        && let Some(digest) = true_digest(&header, &numbers)
        && let Ok(mut json) = serde_json::from_slice::<Value>(&header)
        && let Some(facts) = json.get_mut("__metadata__").and_then(Value::as_object_mut)
    {
        facts.insert("generation".to_owned(), digest.into());
        header = json.to_string().into_bytes();
    }
    let length = match random.random_range(0..24) {
        0 => mutate::number(random),
        _ => header.len() as u64,
    };
    *file = [&length.to_le_bytes()[..], &header, &numbers].concat();
}

/// Facts are texts; the general mutation would make other values of most.
fn change_facts(header: &mut Vec<u8>, random: &mut Random) {
    let Ok(mut json) = serde_json::from_slice::<Value>(header) else { return };
    let name = KEYS[random.random_range(1..10)];
    let fact = match random.random_range(0..5) {
        0 => mutate::number(random).to_string(),
        1 => "1".repeat(random.random_range(0..40)),
        2 => ["NaN", "inf", "-0", "1e999", "+1", " 1"][random.random_range(0..6)].to_owned(),
        3 => "[".repeat([1, 127, 128, 20_000][random.random_range(0..4)]),
        _ => json!({"rope_type": "x", "factor": mutate::number(random)}).to_string(),
    };
    if let Some(facts) = json.get_mut("__metadata__").and_then(Value::as_object_mut) {
        facts.insert(name.to_owned(), fact.into());
        *header = json.to_string().into_bytes();
    }
}

fn split(file: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = file.split_first_chunk::<8>()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

/// The digest of what the header describes, where that is a cartridge.
fn true_digest(header: &[u8], numbers: &[u8]) -> Option<String> {
    let json: Value = serde_json::from_slice(header).ok()?;
    let tensor = |name: String| -> Option<Tensor> {
        let info = json.get(name)?;
        let dims: Vec<usize> = serde_json::from_value(info.get("shape")?.clone()).ok()?;
        let (start, end): (usize, usize) =
            serde_json::from_value(info.get("data_offsets")?.clone()).ok()?;
        let dtype = match info.get("dtype")?.as_str()? {
            "F32" => DType::F32,
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            _ => return None,
        };
        let elements = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim))?;
        let bytes = numbers.get(start..end)?;
        if elements.checked_mul(dtype.size_in_bytes())? != bytes.len() {
            return None;
        }
        Tensor::from_raw_buffer(bytes, dtype, &dims, &Device::Cpu).ok()
    };
    let layers: Vec<LayerKv> = (0..8)
        .map_while(|i| {
            Some(LayerKv {
                keys: tensor(format!("layers.{i}.keys"))?,
                values: tensor(format!("layers.{i}.values"))?,
                bias: tensor(format!("layers.{i}.bias")),
            })
        })
        .collect();
    let frozen = json.get("__metadata__")?.get("frozen_tokens")?.as_str()?.parse().ok()?;
    let cartridge = Cartridge::new(layers, frozen, Provenance::default()).ok()?;
    Some(cartridge.generation().to_hex())
}
