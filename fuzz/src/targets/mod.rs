//! The targets: what each reads, where its inputs start from, and what it may cost.

pub mod cartridge_ids;
pub mod cartridges;
pub mod config_yaml;
pub mod datasets;
pub mod pickle;
pub mod requests;
pub mod routes;
pub mod safetensors;
pub mod streams;
pub mod template_source;
pub mod templates;
pub mod zip;

use std::{fs, path::PathBuf};

use crate::mutate::Random;

/// One thing that strangers can write.
#[derive(Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    /// Real inputs, from `tests/fixtures`.
    pub seeds: fn() -> Vec<Vec<u8>>,
    pub mutate: fn(&mut Vec<u8>, &mut Random),
    /// Reads one input as the server would. Panics when what it accepts is not sound.
    pub run: fn(&[u8]) -> Outcome,
    pub bounds: Bounds,
    /// Opens files or threads of its own, so that it cannot run where the system forbids them.
    pub needs_system: bool,
}

/// What one input may cost; `per_byte` counts bytes of the input.
#[derive(Clone, Copy)]
pub struct Bounds {
    /// Bytes in memory at a time.
    pub memory: Linear,
    /// Bytes allocated in all, freed ones included, and [`Outcome::steps`]: a measure of time that no
    /// other load on the machine changes.
    pub work: Linear,
}

#[derive(Clone, Copy)]
pub struct Linear {
    pub base: u64,
    pub per_byte: u64,
}

impl Linear {
    pub fn at(self, len: usize) -> u64 {
        self.base + self.per_byte * len as u64
    }
}

/// What became of one input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub accepted: bool,
    /// Which way through the code it took, as far as results tell: an error without what it quotes.
    pub kind: String,
    /// Work that allocations do not show: bytes read, pieces decoded.
    pub steps: u64,
}

impl Outcome {
    pub fn accepted(kind: impl Into<String>) -> Self {
        Self { accepted: true, kind: kind.into(), steps: 0 }
    }

    pub fn refused(error: impl std::fmt::Display) -> Self {
        Self { accepted: false, kind: without_quotes(&error.to_string()), steps: 0 }
    }

    pub fn after(self, steps: u64) -> Self {
        Self { steps, ..self }
    }
}

/// An error message without numbers and quoted text, which would make every one of them different.
fn without_quotes(message: &str) -> String {
    let mut out = String::new();
    let mut quote = None;
    for c in message.chars().take(400) {
        match (c, quote) {
            (c, Some(end)) if c == end => quote = None,
            (_, Some(_)) => {}
            ('`' | '"', None) => quote = Some(c),
            ('[', None) => {
                out.push_str("[]");
                quote = Some(']');
            }
            ('0'..='9', None) if out.ends_with('#') => {}
            ('0'..='9', None) => out.push('#'),
            (c, None) => out.push(c),
        }
    }
    out.chars().filter(|c| c.is_ascii()).take(100).collect()
}

/// Every target, under the name that cargo-fuzz knows it by.
#[allow(dead_code, reason = "for the drivers of cargo-fuzz")]
pub const ALL: [Target; 14] = [
    pickle::TARGET,
    zip::TARGET,
    cartridges::TARGET,
    safetensors::TARGET,
    config_yaml::TARGET,
    cartridge_ids::TARGET,
    requests::CHAT,
    requests::COMPLETION,
    routes::TARGET,
    templates::TARGET,
    template_source::TARGET,
    streams::TARGET,
    datasets::JSON_LINES,
    datasets::PARQUET,
];

/// Runs one input of the target of this name: what a driver of cargo-fuzz is.
#[allow(dead_code, reason = "for the drivers of cargo-fuzz")]
pub fn run(name: &str, data: &[u8]) {
    let target = ALL.iter().find(|target| target.name == name).expect("a target of this name");
    (target.run)(data);
}

/// A folder of `tests/fixtures`, from the root of the repository or from `fuzz/`.
pub fn fixtures(folder: &str) -> PathBuf {
    ["tests/fixtures", "../tests/fixtures"]
        .into_iter()
        .map(|root| PathBuf::from(root).join(folder))
        .find(|path| path.is_dir())
        .expect("run from the repository or from fuzz/")
}

/// All files of a folder of fixtures, in the order of their names.
pub fn files(folder: &str) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(fixtures(folder)).expect("fixtures");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("fixture").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| fs::read(path).expect("fixture")).collect()
}

/// One in `n`, by content and not by chance, so that an input does the same each time.
pub fn one_in(n: u64, data: &[u8]) -> bool {
    let hash = data.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    (hash >> 32).is_multiple_of(n)
}
