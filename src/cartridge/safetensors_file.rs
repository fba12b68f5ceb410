//! Our own file format: safetensors with the facts about the cartridge in the header.
//!
//! Tensors `layers.{i}.keys`, `layers.{i}.values` and, where there is one, `layers.{i}.bias`,
//! shaped as in [`LayerKv`]. Metadata strings: `format`, `format_version`, `tokens`,
//! `frozen_tokens`, `generation` (checked on reading), and the optional `model`, `rope_theta`,
//! `rope_scaling`, `origin`.

use std::{
    collections::HashMap,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use candle_core::{DType, Tensor};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde_json::{Map, Value, json};

use super::{
    Cartridge, CartridgeError, Intake, LayerKv, Outline, Provenance,
    artifact::{TENSORS, tensor_from_bytes, with_bytes},
    format::write_atomically,
};
use crate::limits;

const FORMAT: &str = "cartouche.cartridge";
const FORMAT_VERSION: &str = "1";
/// The length of the header comes first.
const LENGTH_BYTES: u64 = 8;

/// Reads a file of `len` bytes: the header, and once `intake` admits it one tensor at a time.
pub(super) fn read(
    mut source: impl Read + Seek,
    len: u64,
    intake: &mut Intake<'_>,
) -> Result<(), CartridgeError> {
    let header = read_header(&mut source, len)?;
    let start = LENGTH_BYTES + header.len() as u64;
    // Deserializing checks that shapes agree with byte ranges, and that these leave no gaps.
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|e| CartridgeError::invalid(format!("safetensors: {e}")))?;
    drop(header);
    if start + metadata.data_len() as u64 != len {
        let (have, need) = (len - start, metadata.data_len());
        let reason = format!("safetensors: {have} bytes after the header, which says {need}");
        return Err(CartridgeError::invalid(reason));
    }
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
    let layers = layers(&metadata)?;
    let outline = outline(&layers, frozen)?;
    if outline.tokens != tokens {
        let have = outline.tokens;
        return Err(CartridgeError::invalid(format!(
            "its header says {tokens} tokens, its tensors have {have}"
        )));
    }
    intake.begin(outline, provenance(facts)?)?;
    for info in layers.iter().flatten() {
        intake.tensor(&read_tensor(&mut source, start, info)?)?;
    }
    let claimed = facts.get("generation").map(String::as_str).unwrap_or_default();
    let actual = intake.end()?;
    if claimed != actual.to_hex() {
        let claimed: String = claimed.chars().take(12).collect();
        let actual = actual.short();
        return Err(CartridgeError::invalid(format!(
            "its content has the digest {actual}..., its header says {claimed}..."
        )));
    }
    Ok(())
}

fn read_header(source: &mut impl Read, len: u64) -> Result<Vec<u8>, CartridgeError> {
    let failed = |e| CartridgeError::io("read the file", &e);
    if len < LENGTH_BYTES {
        return Err(CartridgeError::invalid("shorter than a safetensors header"));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    source.read_exact(&mut length).map_err(failed)?;
    let length = u64::from_le_bytes(length);
    if length > limits::MAX_SAFETENSORS_HEADER_BYTES {
        let reason = "neither a torch zip nor safetensors (its header would be too long)";
        return Err(CartridgeError::invalid(reason));
    }
    if length > len - LENGTH_BYTES {
        return Err(CartridgeError::invalid("safetensors: the file ends within its header"));
    }
    let mut header = vec![0; length as usize];
    source.read_exact(&mut header).map_err(failed)?;
    Ok(header)
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
    let fact = |name: &str| facts.get(name).map(|text| bounded(text)).transpose();
    let rope_theta = fact("rope_theta")?.map(str::parse::<f64>).transpose();
    let rope_scaling = fact("rope_scaling")?.map(serde_json::from_str).transpose();
    Ok(Provenance {
        model: fact("model")?.map(str::to_owned),
        rope_theta: match rope_theta {
            Ok(None) => None,
            Ok(Some(theta)) if theta.is_finite() => Some(theta),
            _ => return Err(bad("rope_theta")),
        },
        rope_scaling: rope_scaling.map_err(|_| bad("rope_scaling"))?,
        origin: fact("origin")?.map(str::to_owned),
    })
}

/// Facts stay in memory with the cartridge, outside of what its tensors are counted for.
fn bounded(fact: &str) -> Result<&str, CartridgeError> {
    if fact.len() > limits::MAX_CARTRIDGE_FACT_BYTES {
        let (size, limit) = (fact.len() as u64, limits::MAX_CARTRIDGE_FACT_BYTES as u64);
        return Err(CartridgeError::too_large("bytes in a fact of its header", size, limit));
    }
    Ok(fact)
}

/// For each layer where its keys, values and, where there is one, bias lie.
fn layers(metadata: &Metadata) -> Result<Vec<Vec<&TensorInfo>>, CartridgeError> {
    let find = |layer: usize, name: &str| metadata.info(&tensor_name(layer, name));
    let mut layers = Vec::new();
    let mut used = 0;
    while let Some(keys) = find(layers.len(), "keys") {
        let layer = layers.len();
        let missing = || CartridgeError::invalid(format!("layer {layer}: values are missing"));
        let values = find(layer, "values").ok_or_else(missing)?;
        let tensors: Vec<_> = [keys, values].into_iter().chain(find(layer, "bias")).collect();
        used += tensors.len();
        layers.push(tensors);
    }
    let all = metadata.offset_keys().len();
    if used != all {
        let reason = format!("{} tensors belong to no layer of 0..{}", all - used, layers.len());
        return Err(CartridgeError::invalid(reason));
    }
    Ok(layers)
}

/// What the tensors hold, all of which agree.
fn outline(layers: &[Vec<&TensorInfo>], frozen: usize) -> Result<Outline, CartridgeError> {
    let first = layers.first().and_then(|tensors| tensors.first());
    let first = first.ok_or_else(|| CartridgeError::invalid("it has no layers"))?;
    let biases = layers.iter().map(|tensors| tensors.len() > 2).collect();
    let outline = Outline::from_first(&first.shape, element_type(first)?, frozen, biases)?;
    for (i, tensors) in layers.iter().enumerate() {
        for (info, name) in tensors.iter().zip(TENSORS) {
            outline.check_tensor(i, name, &info.shape, element_type(info)?)?;
        }
    }
    Ok(outline)
}

fn tensor_name(layer: usize, name: &str) -> String {
    format!("layers.{layer}.{name}")
}

fn element_type(info: &TensorInfo) -> Result<DType, CartridgeError> {
    match info.dtype {
        Dtype::F16 => Ok(DType::F16),
        Dtype::BF16 => Ok(DType::BF16),
        Dtype::F32 => Ok(DType::F32),
        other => {
            let reason = format!("a tensor of type {other:?}; cartridges are f16, bf16 or f32");
            Err(CartridgeError::invalid(reason))
        }
    }
}

/// Reads the numbers of one tensor; `start` is where the numbers begin in the file.
fn read_tensor(
    source: &mut (impl Read + Seek),
    start: u64,
    info: &TensorInfo,
) -> Result<Tensor, CartridgeError> {
    let failed = |e| CartridgeError::io("read the file", &e);
    tensor_from_bytes(element_type(info)?, &info.shape, |out| {
        let at = start + info.data_offsets.0 as u64;
        source.seek(SeekFrom::Start(at)).map_err(failed)?;
        source.read_exact(out).map_err(failed)
    })
}

/// Writes a cartridge as `path`, by way of a temporary file beside it. Equal cartridges give equal
/// files.
///
/// The digest in the header is that of the tensors as they are now. It differs from
/// [`Cartridge::generation`] if they were converted to another type since they were read.
///
/// # Errors
/// [`CartridgeError::TooLarge`] for a fact about its making that no reader would take;
/// [`CartridgeError::Io`].
pub fn write_safetensors(path: &Path, cartridge: &Cartridge) -> Result<(), CartridgeError> {
    write_atomically(path, |file| write_safetensors_to(file, cartridge))
}

/// [`write_safetensors`] into anything that can be written to.
///
/// # Errors
/// Those of [`write_safetensors`].
pub fn write_safetensors_to(
    out: &mut impl Write,
    cartridge: &Cartridge,
) -> Result<(), CartridgeError> {
    let header = header(cartridge)?;
    let failed = |e| CartridgeError::io("write the file", &e);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(&header).map_err(failed)?;
    for tensor in cartridge.layers().iter().flat_map(LayerKv::tensors) {
        with_bytes(tensor, |bytes| out.write_all(bytes))?.map_err(failed)?;
    }
    Ok(())
}

fn header(cartridge: &Cartridge) -> Result<Vec<u8>, CartridgeError> {
    let provenance = cartridge.provenance();
    let mut facts = Map::new();
    let mut fact = |name: &str, value: Option<String>| -> Result<(), CartridgeError> {
        if let Some(value) = value {
            bounded(&value)?;
            facts.insert(name.to_owned(), Value::String(value));
        }
        Ok(())
    };
    fact("format", Some(FORMAT.to_owned()))?;
    fact("format_version", Some(FORMAT_VERSION.to_owned()))?;
    fact("tokens", Some(cartridge.tokens().to_string()))?;
    fact("frozen_tokens", Some(cartridge.frozen_tokens().to_string()))?;
    fact("generation", Some(cartridge.present_generation()?.to_hex()))?;
    fact("model", provenance.model.clone())?;
    fact("rope_theta", provenance.rope_theta.map(|theta| theta.to_string()))?;
    fact("rope_scaling", provenance.rope_scaling.as_ref().map(Value::to_string))?;
    fact("origin", provenance.origin.clone())?;
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), Value::Object(facts));
    let mut start = 0;
    for (i, layer) in cartridge.layers().iter().enumerate() {
        for (tensor, name) in layer.tensors().zip(TENSORS) {
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
