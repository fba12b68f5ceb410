//! Our own file format: safetensors with the facts about the cartridge in the header.
//!
//! Tensors `layers.{i}.keys`, `layers.{i}.values` and, where there is one, `layers.{i}.bias`,
//! shaped as in [`LayerKv`]. Metadata strings: `format`, `format_version`, `tokens`,
//! `frozen_tokens`, `generation` (checked on reading), and the optional `model`, `rope_theta`,
//! `rope_scaling`, `origin`.

use std::{collections::HashMap, io::Write, path::Path};

use candle_core::{DType, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use super::{
    Cartridge, CartridgeError, LayerKv, Provenance,
    artifact::{tensor_from_bytes, with_bytes},
    format::write_atomically,
};
use crate::limits;

const FORMAT: &str = "cartouche.cartridge";
const FORMAT_VERSION: &str = "1";

/// Reads a whole file.
pub(super) fn read(bytes: &[u8]) -> Result<Cartridge, CartridgeError> {
    let header = bytes.first_chunk().map(|length| u64::from_le_bytes(*length));
    let header =
        header.ok_or_else(|| CartridgeError::invalid("shorter than a safetensors header"))?;
    if header > limits::MAX_SAFETENSORS_HEADER_BYTES {
        let reason = "neither a torch zip nor safetensors (its header would be too long)";
        return Err(CartridgeError::invalid(reason));
    }
    let broken = |e| CartridgeError::invalid(format!("safetensors: {e}"));
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
    let facts = metadata.metadata().as_ref().ok_or_else(|| CartridgeError::invalid(NOT_OURS))?;
    if facts.get("format").map(String::as_str) != Some(FORMAT) {
        return Err(CartridgeError::invalid(NOT_OURS));
    }
    match facts.get("format_version").map(String::as_str) {
        Some(FORMAT_VERSION) => {}
        version => {
            let reason = format!("format version {version:?}; this build reads {FORMAT_VERSION}");
            return Err(CartridgeError::invalid(reason));
        }
    }
    let frozen = number(facts, "frozen_tokens")?;
    let tokens = number(facts, "tokens")?;
    let cartridge = Cartridge::new(layers(&tensors)?, frozen, provenance(facts)?)?;
    if cartridge.tokens() != tokens {
        let have = cartridge.tokens();
        return Err(CartridgeError::invalid(format!(
            "its header says {tokens} tokens, its tensors have {have}"
        )));
    }
    let claimed = facts.get("generation").map(String::as_str).unwrap_or_default();
    let actual = cartridge.generation();
    if claimed != actual.to_hex() {
        let claimed: String = claimed.chars().take(12).collect();
        let actual = actual.short();
        return Err(CartridgeError::invalid(format!(
            "its content has the digest {actual}..., its header says {claimed}..."
        )));
    }
    Ok(cartridge)
}

const NOT_OURS: &str = "safetensors, but no cartridge: the header has no `format` = \
                        `cartouche.cartridge`";

fn number(facts: &HashMap<String, String>, name: &str) -> Result<usize, CartridgeError> {
    let text = facts.get(name).map(String::as_str).unwrap_or_default();
    text.parse()
        .map_err(|_| CartridgeError::invalid(format!("its header has no number as `{name}`")))
}

fn provenance(facts: &HashMap<String, String>) -> Result<Provenance, CartridgeError> {
    let bad = |name| CartridgeError::invalid(format!("its header has a malformed `{name}`"));
    let rope_theta = facts.get("rope_theta").map(|text| text.parse()).transpose();
    let rope_scaling = facts.get("rope_scaling").map(|text| serde_json::from_str(text)).transpose();
    Ok(Provenance {
        model: facts.get("model").cloned(),
        rope_theta: rope_theta.map_err(|_| bad("rope_theta"))?,
        rope_scaling: rope_scaling.map_err(|_| bad("rope_scaling"))?,
        origin: facts.get("origin").cloned(),
    })
}

fn layers(tensors: &SafeTensors<'_>) -> Result<Vec<LayerKv>, CartridgeError> {
    let find = |layer: usize, name: &str| tensors.tensor(&tensor_name(layer, name)).ok();
    let count = (0..=limits::MAX_CARTRIDGE_LAYERS).take_while(|i| find(*i, "keys").is_some());
    let mut layers = Vec::with_capacity(count.count());
    let mut used = 0;
    while let Some(keys) = find(layers.len(), "keys").filter(|_| layers.len() < layers.capacity()) {
        let layer = layers.len();
        let missing = || CartridgeError::invalid(format!("layer {layer}: values are missing"));
        let values = find(layer, "values").ok_or_else(missing)?;
        let bias = find(layer, "bias");
        used += 2 + usize::from(bias.is_some());
        layers.push(LayerKv {
            keys: tensor(&keys)?,
            values: tensor(&values)?,
            bias: bias.as_ref().map(tensor).transpose()?,
        });
    }
    if used != tensors.len() {
        let extra = tensors.len() - used;
        let reason = format!("{extra} tensors belong to no layer of 0..{}", layers.len());
        return Err(CartridgeError::invalid(reason));
    }
    Ok(layers)
}

fn tensor_name(layer: usize, name: &str) -> String {
    format!("layers.{layer}.{name}")
}

fn tensor(view: &safetensors::tensor::TensorView<'_>) -> Result<Tensor, CartridgeError> {
    let dtype = match view.dtype() {
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F32 => DType::F32,
        other => {
            let reason = format!("a tensor of type {other:?}; cartridges are f16, bf16 or f32");
            return Err(CartridgeError::invalid(reason));
        }
    };
    // The crate checked that the shape agrees with the bytes that are there.
    tensor_from_bytes(dtype, view.shape(), |out| {
        if out.len() != view.data().len() {
            return Err(CartridgeError::invalid("a tensor's shape disagrees with its bytes"));
        }
        out.copy_from_slice(view.data());
        Ok(())
    })
}

/// Writes a cartridge as `path`, by way of a temporary file beside it. Equal cartridges give equal
/// files.
///
/// The digest in the header is that of the tensors as they are now. It differs from
/// [`Cartridge::generation`] if they were converted to another type since they were read.
///
/// # Errors
/// [`CartridgeError::Io`].
pub fn write_safetensors(path: &Path, cartridge: &Cartridge) -> Result<(), CartridgeError> {
    let header = header(cartridge)?;
    write_atomically(path, |file| {
        let failed = |e| CartridgeError::io("write the file", &e);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        file.write_all(&header).map_err(failed)?;
        for tensor in cartridge.layers().iter().flat_map(LayerKv::tensors) {
            with_bytes(tensor, |bytes| file.write_all(bytes))?.map_err(failed)?;
        }
        Ok(())
    })
}

fn header(cartridge: &Cartridge) -> Result<Vec<u8>, CartridgeError> {
    let provenance = cartridge.provenance();
    let mut facts = Map::new();
    let mut fact = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            facts.insert(name.to_owned(), Value::String(value));
        }
    };
    fact("format", Some(FORMAT.to_owned()));
    fact("format_version", Some(FORMAT_VERSION.to_owned()));
    fact("tokens", Some(cartridge.tokens().to_string()));
    fact("frozen_tokens", Some(cartridge.frozen_tokens().to_string()));
    fact("generation", Some(cartridge.present_generation()?.to_hex()));
    fact("model", provenance.model.clone());
    fact("rope_theta", provenance.rope_theta.map(|theta| theta.to_string()));
    fact("rope_scaling", provenance.rope_scaling.as_ref().map(Value::to_string));
    fact("origin", provenance.origin.clone());
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), Value::Object(facts));
    let mut start = 0;
    for (i, layer) in cartridge.layers().iter().enumerate() {
        for (tensor, name) in layer.tensors().zip(["keys", "values", "bias"]) {
            let end = start + tensor.elem_count() * tensor.dtype().size_in_bytes();
            let dtype = tensor.dtype().as_str().to_uppercase();
            let entry = json!({
                "dtype": dtype, "shape": tensor.dims(), "data_offsets": [start, end]
            });
            header.insert(tensor_name(i, name), entry);
            start = end;
        }
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Padding makes the numbers start at a multiple of 8 bytes, so that a mapped file can be used
    // in place.
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}
