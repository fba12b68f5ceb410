//! The pickle of a `.pt` file: opcodes, names, calls, shapes, strides and offsets, beside records of sound
//! numbers.

use super::{Outcome, Target, cartridges, files};
use crate::{
    pickle_ops::{self, KNOWN, NAMES},
    zip_parts::{self, Record},
};

pub const TARGET: Target = Target {
    name: "pickle",
    seeds,
    mutate: pickle_ops::mutate,
    run,
    bounds: cartridges::BOUNDS,
    needs_system: false,
};

/// Records that a pickle can point into, and their bytes.
const STORAGES: usize = 12;
const STORAGE_BYTES: usize = 320;

fn seeds() -> Vec<Vec<u8>> {
    let files = [files("cartridges/good"), files("cartridges/hostile")].concat();
    let records = files.iter().filter_map(|file| zip_parts::parse(file)).flatten();
    records.filter(|r| r.name.ends_with(b"data.pkl")).map(|r| r.data).collect()
}

fn run(pickle: &[u8]) -> Outcome {
    let mut records = vec![Record::new("x/data.pkl", pickle.to_vec())];
    // Finite in each of the three types.
    let numbers: Vec<u8> = (0..STORAGE_BYTES).map(|i| 0x30 | (i % 13) as u8).collect();
    records.extend((0..STORAGES).map(|i| Record::new(&format!("x/data/{i}"), numbers.clone())));
    let outcome = cartridges::read(&zip_parts::build(&records).0);
    if outcome.accepted {
        // Another list than the reader's own: names that it lets through are on both.
        let known = |(module, name): &(String, String)| {
            NAMES[..KNOWN].iter().any(|(m, n)| m == module && n == name)
        };
        let ops = pickle_ops::split(pickle);
        let end = ops.iter().position(|op| op.code == b'.').unwrap_or(ops.len());
        let unknown: Vec<_> = pickle_ops::globals(&ops[..end]).filter(|g| !known(g)).collect();
        assert!(unknown.is_empty(), "names that no cartridge may hold: {unknown:?}");
    }
    outcome
}
