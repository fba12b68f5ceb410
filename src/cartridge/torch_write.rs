//! Writes `.pt` files that `torch.load` and the stock servers and trainers read.

use std::{
    io::{Seek, Write},
    path::Path,
};

use candle_core::{DType, Tensor};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use super::{Cartridge, CartridgeError, artifact::with_bytes, format::write_atomically};

/// How the lists of tensors are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TorchStyle {
    /// Plain lists of tensors: `torch.load(weights_only=True)` reads them.
    #[default]
    PlainLists,
    /// `torch.nn.ParameterList`, as the stock trainers write. Needs `weights_only=False`, or
    /// `torch.serialization.add_safe_globals([torch.nn.ParameterList])`.
    ParameterLists,
}

/// What the frozen tokens are called: it differs between generations of the trainers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Naming {
    /// `frozen_keys`, `frozen_values`.
    Frozen,
    /// `fixed_keys`, `fixed_values`.
    Fixed,
    /// Both, over the same stored numbers: every known loader finds what it looks for.
    #[default]
    Both,
}

/// Writes a cartridge as `path`, by way of a temporary file beside it.
///
/// Without frozen tokens the frozen lists hold one tensor `[1, kv_heads, 0, head_dim]` per layer:
/// stock loaders fail on empty lists.
///
/// # Errors
/// [`CartridgeError::Invalid`] for a cartridge with a bias, for which the format has no place;
/// [`CartridgeError::Io`].
pub fn write_torch(
    path: &Path,
    cartridge: &Cartridge,
    style: TorchStyle,
    naming: Naming,
) -> Result<(), CartridgeError> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("archive");
    write_atomically(path, |file| write_torch_to(file, stem, cartridge, style, naming))
}

/// [`write_torch`] into anything that can be written to; `stem` names the folder inside of the zip.
///
/// # Errors
/// Those of [`write_torch`].
pub fn write_torch_to(
    file: impl Write + Seek,
    stem: &str,
    cartridge: &Cartridge,
    style: TorchStyle,
    naming: Naming,
) -> Result<(), CartridgeError> {
    if cartridge.layers().iter().any(|layer| layer.bias.is_some()) {
        let reason = "a .pt file cannot hold its attention bias; write safetensors";
        return Err(CartridgeError::invalid(reason));
    }
    let mut zip = ZipWriter::new(file);
    let pickled = pickle(cartridge, style, naming);
    write_record(&mut zip, &format!("{stem}/data.pkl"), pickled.len(), |zip| {
        zip.write_all(&pickled)
    })?;
    write_record(&mut zip, &format!("{stem}/byteorder"), 6, |zip| zip.write_all(b"little"))?;
    let width = cartridge.dtype().size_in_bytes();
    let (heads, row) = (cartridge.shape().kv_heads, cartridge.shape().head_dim * width);
    for (part, list) in LISTS.iter().enumerate() {
        let tokens = list.tokens(cartridge);
        let (first, count) = (tokens.start, tokens.len());
        for layer in 0..cartridge.layers().len() {
            let name = format!("{stem}/data/{}", storage_key(cartridge, part, layer));
            write_record(&mut zip, &name, heads * count * row, |zip| {
                let write = |bytes: &[u8]| {
                    bytes
                        .chunks_exact(cartridge.tokens() * row)
                        .try_for_each(|head| zip.write_all(&head[first * row..][..count * row]))
                };
                with_bytes(list.tensor(cartridge, layer), write)
                    .map_err(std::io::Error::other)
                    .flatten()
            })?;
        }
    }
    write_record(&mut zip, &format!("{stem}/version"), 2, |zip| zip.write_all(b"3\n"))?;
    zip.finish().map_err(|e| zip_failed(&e))?;
    Ok(())
}

fn write_record<W: Write + Seek>(
    zip: &mut ZipWriter<W>,
    name: &str,
    len: usize,
    write: impl FnOnce(&mut ZipWriter<W>) -> std::io::Result<()>,
) -> Result<(), CartridgeError> {
    // torch aligns payloads to 64 bytes, which lets it map them.
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .large_file(len as u64 >= u64::from(u32::MAX))
        .with_alignment(64);
    zip.start_file(name, options).map_err(|e| zip_failed(&e))?;
    write(zip).map_err(|e| CartridgeError::io("write the file", &e))
}

fn zip_failed(error: &zip::result::ZipError) -> CartridgeError {
    CartridgeError::io("write the file", &std::io::Error::other(error.to_string()))
}

/// One of the four lists of a cartridge file.
struct List {
    frozen: bool,
    keys: bool,
}

/// In the order of the stock trainers.
const LISTS: [List; 4] = [
    List { frozen: false, keys: true },
    List { frozen: false, keys: false },
    List { frozen: true, keys: true },
    List { frozen: true, keys: false },
];

impl List {
    fn tokens(&self, cartridge: &Cartridge) -> std::ops::Range<usize> {
        let frozen = cartridge.frozen_tokens();
        if self.frozen { 0..frozen } else { frozen..cartridge.tokens() }
    }

    fn tensor<'a>(&self, cartridge: &'a Cartridge, layer: usize) -> &'a Tensor {
        let layer = &cartridge.layers()[layer];
        if self.keys { &layer.keys } else { &layer.values }
    }

    fn names(&self, naming: Naming) -> Vec<&'static str> {
        match (self.frozen, self.keys, naming) {
            (false, true, _) => vec!["trainable_keys"],
            (false, false, _) => vec!["trainable_values"],
            (true, true, Naming::Frozen) => vec!["frozen_keys"],
            (true, false, Naming::Frozen) => vec!["frozen_values"],
            (true, true, Naming::Fixed) => vec!["fixed_keys"],
            (true, false, Naming::Fixed) => vec!["fixed_values"],
            (true, true, Naming::Both) => vec!["frozen_keys", "fixed_keys"],
            (true, false, Naming::Both) => vec!["frozen_values", "fixed_values"],
        }
    }
}

fn storage_key(cartridge: &Cartridge, part: usize, layer: usize) -> usize {
    part * cartridge.layers().len() + layer
}

fn pickle(cartridge: &Cartridge, style: TorchStyle, naming: Naming) -> Vec<u8> {
    let mut out = Pickler { out: vec![0x80, 2], cartridge };
    out.op(b"}(");
    for (part, list) in LISTS.iter().enumerate() {
        for name in list.names(naming) {
            out.text(name);
            match style {
                TorchStyle::PlainLists => out.plain_list(part, list),
                TorchStyle::ParameterLists => out.parameter_list(part, list),
            }
        }
    }
    out.op(b"u.");
    out.out
}

/// Emits protocol 2, the one `torch.save` uses.
struct Pickler<'a> {
    out: Vec<u8>,
    cartridge: &'a Cartridge,
}

impl Pickler<'_> {
    fn op(&mut self, opcodes: &[u8]) {
        self.out.extend_from_slice(opcodes);
    }

    fn text(&mut self, text: &str) {
        self.op(b"X");
        self.op(&(text.len() as u32).to_le_bytes());
        self.op(text.as_bytes());
    }

    fn int(&mut self, number: usize) {
        match i32::try_from(number) {
            Ok(small) => {
                self.op(b"J");
                self.op(&small.to_le_bytes());
            }
            Err(_) => {
                // LONG1 of nine bytes: the last one keeps the number positive.
                self.op(&[0x8a, 9]);
                self.op(&(number as u64).to_le_bytes());
                self.op(&[0]);
            }
        }
    }

    fn ints(&mut self, numbers: &[usize]) {
        self.op(b"(");
        numbers.iter().for_each(|number| self.int(*number));
        self.op(b"t");
    }

    fn bool(&mut self, value: bool) {
        self.op(if value { &[0x88] } else { &[0x89] });
    }

    fn ordered_dict(&mut self) {
        self.op(b"ccollections\nOrderedDict\n)R");
    }

    fn tensor(&mut self, part: usize, list: &List, layer: usize, requires_grad: bool) {
        let shape = self.cartridge.shape();
        let (heads, tokens) = (shape.kv_heads, list.tokens(self.cartridge).len());
        let size = [1, heads, tokens, shape.head_dim];
        self.op(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.op(match self.cartridge.dtype() {
            DType::BF16 => b"ctorch\nBFloat16Storage\n".as_slice(),
            DType::F16 => b"ctorch\nHalfStorage\n",
            // `Cartridge::new` admits no other type.
            _ => b"ctorch\nFloatStorage\n",
        });
        self.text(&storage_key(self.cartridge, part, layer).to_string());
        self.text("cpu");
        self.int(size.iter().product());
        self.op(b"tQ");
        self.int(0);
        self.ints(&size);
        self.ints(&[heads * tokens * size[3], tokens * size[3], size[3], 1]);
        self.bool(requires_grad);
        self.ordered_dict();
        self.op(b"tR");
    }

    fn plain_list(&mut self, part: usize, list: &List) {
        self.op(b"](");
        for layer in 0..self.cartridge.layers().len() {
            self.tensor(part, list, layer, false);
        }
        self.op(b"e");
    }

    /// The state dict has the least that torch accepts (without `_modules` or `_size` it does not).
    fn parameter_list(&mut self, part: usize, list: &List) {
        let layers = self.cartridge.layers().len();
        self.op(b"ctorch.nn.modules.container\nParameterList\n)\x81}(");
        self.text("training");
        self.bool(true);
        self.text("_parameters");
        self.op(b"}(");
        for layer in 0..layers {
            self.text(&layer.to_string());
            self.op(b"ctorch._utils\n_rebuild_parameter\n(");
            self.tensor(part, list, layer, !list.frozen);
            self.bool(!list.frozen);
            self.ordered_dict();
            self.op(b"tR");
        }
        self.op(b"u");
        for name in ["_buffers", "_modules"] {
            self.text(name);
            self.op(b"}");
        }
        self.text("_size");
        self.int(layers);
        self.op(b"ub");
    }
}
