//! The container of `.pt` files: names, sizes, offsets, flags and end records, around sound content.

use super::{Outcome, Target, cartridges, files};
use crate::zip_parts;

pub const TARGET: Target = Target {
    name: "zip",
    seeds: || files("cartridges/good"),
    mutate: zip_parts::mutate,
    run,
    bounds: cartridges::BOUNDS,
    needs_system: false,
};

fn run(file: &[u8]) -> Outcome {
    // Without its first bytes it would be taken for safetensors.
    if file.starts_with(b"PK\x03\x04") {
        return cartridges::read(file);
    }
    let mut zip = b"PK\x03\x04".to_vec();
    zip.extend(file.get(4..).unwrap_or_default());
    cartridges::read(&zip)
}
