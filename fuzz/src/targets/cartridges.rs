//! Whole `.pt` files: the container, the pickle and the numbers change together. Also what every cartridge
//! file that is accepted must hold.

use std::io::{self, Cursor, Read, Seek, SeekFrom};

use candle_core::{DType, Tensor};
use cartouche::{
    cartridge::{
        Cartridge, CartridgeError, KvShape, Naming, TorchStyle, read_cartridge_bytes,
        read_cartridge_from, validate, write_safetensors_to, write_torch_to,
    },
    limits,
};
use rand::RngExt;
use sha2::{Digest, Sha256};

use super::{Bounds, Linear, Outcome, Target, files, one_in};
use crate::{
    mutate::{self, Random},
    pickle_ops, zip_parts,
};

pub const TARGET: Target =
    Target { name: "torch_file", seeds, mutate, run, bounds: BOUNDS, needs_system: false };

/// A stored byte is read into a cartridge at most four times, and some are written again. The zip reader keeps a directory entry of some
/// ten bytes in some hundred, and every record that is looked at is read through a buffer.
pub const BOUNDS: Bounds = Bounds {
    memory: Linear { base: 1 << 20, per_byte: 60 },
    work: Linear { base: 4 << 20, per_byte: 400 },
};

fn seeds() -> Vec<Vec<u8>> {
    [files("cartridges/good"), files("cartridges/hostile")].concat()
}

fn mutate(file: &mut Vec<u8>, random: &mut Random) {
    match random.random_range(0..8) {
        0 => mutate::bytes(file, random),
        1 | 2 => zip_parts::mutate(file, random),
        kind => {
            let Some(mut records) = zip_parts::parse(file) else {
                return mutate::bytes(file, random);
            };
            let pickle = records.iter().position(|r| r.name.ends_with(b"data.pkl"));
            match pickle {
                Some(at) if kind < 7 => pickle_ops::mutate(&mut records[at].data, random),
                _ if records.is_empty() => {}
                _ => {
                    let at = random.random_range(0..records.len());
                    mutate::bytes(&mut records[at].data, random);
                }
            }
            *file = zip_parts::build(&records).0;
        }
    }
}

fn run(file: &[u8]) -> Outcome {
    read(file)
}

/// Reads a cartridge file of either format and checks what comes out of it.
pub fn read(file: &[u8]) -> Outcome {
    let mut counted = Counted { inner: Cursor::new(file), steps: 0 };
    let read = read_cartridge_from(&mut counted, file.len() as u64, "x");
    let steps = counted.steps;
    match read {
        Ok(cartridge) => {
            check(&cartridge, file);
            let KvShape { layers, .. } = cartridge.shape();
            Outcome::accepted(format!(
                "{:?}, {} layers, frozen {}",
                cartridge.dtype(),
                layers.min(4),
                cartridge.frozen_tokens() > 0
            ))
        }
        Err(error) => {
            assert!(error.to_string().len() < 4096, "an error as long as the file");
            let code = error.code();
            Outcome::refused(format_args!("{code}: {}", reason(&error)))
        }
    }
    .after(steps)
}

fn reason(error: &CartridgeError) -> String {
    match error {
        CartridgeError::Invalid { reason, .. } => reason.clone(),
        CartridgeError::Io { reason, kind, .. } => format!("{kind:?} {reason}"),
        CartridgeError::TooLarge { what, .. } => (*what).to_owned(),
        other => other.to_string(),
    }
}

/// Whatever the file was: sizes within the limits and in proportion to it, tensors that agree, the right
/// digest, an honest verdict on its numbers, and the same again after writing.
fn check(cartridge: &Cartridge, file: &[u8]) {
    let KvShape { layers, kv_heads, head_dim } = cartridge.shape();
    let (tokens, frozen) = (cartridge.tokens(), cartridge.frozen_tokens());
    assert!(layers > 0 && kv_heads > 0 && head_dim > 0 && tokens > 0 && frozen <= tokens);
    assert!(layers <= limits::MAX_CARTRIDGE_LAYERS && tokens <= limits::MAX_CARTRIDGE_TOKENS);
    assert_eq!(cartridge.layers().len(), layers);
    assert!(cartridge.bytes() <= 4 * file.len() as u64, "a small file stands for a lot of memory");
    let dims = [kv_heads, tokens, head_dim];
    let (mut finite, mut bytes) = (true, 0);
    for layer in cartridge.layers() {
        for tensor in [&layer.keys, &layer.values] {
            assert_eq!((tensor.dims(), tensor.dtype()), (&dims[..], cartridge.dtype()));
            finite &= is_finite(tensor);
            bytes += tensor.elem_count() * tensor.dtype().size_in_bytes();
        }
        if let Some(bias) = &layer.bias {
            assert_eq!((bias.dims(), bias.dtype()), (&dims[..2], DType::F32));
            finite &= is_finite(bias);
            bytes += bias.elem_count() * 4;
        }
    }
    assert_eq!(cartridge.bytes(), bytes as u64);
    assert_eq!(validate(cartridge, &cartridge.shape()).is_ok(), finite);
    let other = KvShape { head_dim: head_dim + 1, ..cartridge.shape() };
    assert!(validate(cartridge, &other).is_err());
    assert_eq!(cartridge.generation().0, digest(cartridge), "its digest is of something else");
    if one_in(4, file) {
        round_trip(cartridge);
    }
}

fn is_finite(tensor: &Tensor) -> bool {
    let numbers = tensor.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1::<f32>());
    numbers.expect("a tensor of numbers").iter().all(|number| number.is_finite())
}

/// The identity of a cartridge as `cartridge/digest.rs` documents it, computed from what is in memory.
pub fn digest(cartridge: &Cartridge) -> [u8; 32] {
    let KvShape { layers, kv_heads, head_dim } = cartridge.shape();
    let mut hash = Sha256::new();
    hash.update(b"cartouche cartridge v1\0");
    for size in [layers, kv_heads, cartridge.tokens(), head_dim, cartridge.frozen_tokens()] {
        hash.update((size as u64).to_le_bytes());
    }
    hash.update(cartridge.dtype().as_str());
    hash.update([0]);
    for layer in cartridge.layers() {
        hash.update([u8::from(layer.bias.is_some())]);
    }
    for layer in cartridge.layers() {
        for tensor in [&layer.keys, &layer.values].into_iter().chain(&layer.bias) {
            hash.update(raw(tensor));
        }
    }
    hash.finalize().into()
}

/// The numbers as a safetensors file holds them.
fn raw(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.flatten_all().expect("a tensor of numbers");
    match tensor.dtype() {
        DType::F32 => {
            flat.to_vec1::<f32>().map(|v| v.iter().flat_map(|n| n.to_le_bytes()).collect())
        }
        DType::F16 => {
            flat.to_vec1::<half::f16>().map(|v| v.iter().flat_map(|n| n.to_le_bytes()).collect())
        }
        _ => flat.to_vec1::<half::bf16>().map(|v| v.iter().flat_map(|n| n.to_le_bytes()).collect()),
    }
    .expect("numbers")
}

fn round_trip(cartridge: &Cartridge) {
    let mut written = Vec::new();
    write_safetensors_to(&mut written, cartridge).expect("what was read can be written");
    let again = read_cartridge_bytes(&written, "again").expect("what was written can be read");
    assert_eq!(again.generation(), cartridge.generation());
    assert_eq!(again.provenance(), cartridge.provenance());
    if cartridge.layers().iter().any(|layer| layer.bias.is_some()) {
        return;
    }
    for style in [TorchStyle::PlainLists, TorchStyle::ParameterLists] {
        let mut written = Cursor::new(Vec::new());
        write_torch_to(&mut written, "x", cartridge, style, Naming::Both).expect("can be written");
        let again = read_cartridge_bytes(written.get_ref(), "again").expect("can be read");
        assert_eq!(again.generation(), cartridge.generation());
    }
}

/// Counts what is asked of a file: bytes read, and calls.
struct Counted<R> {
    inner: R,
    steps: u64,
}

/// A call of the system costs about as much as copying so many bytes.
const CALL: u64 = 64;

impl<R: Read> Read for &mut Counted<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(out)?;
        self.steps += count as u64 + CALL;
        Ok(count)
    }
}

impl<R: Seek> Seek for &mut Counted<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.steps += CALL;
        self.inner.seek(to)
    }
}
