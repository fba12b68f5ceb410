//! Hostile input, by the hundred thousand: the targets of `fuzz/` under seeded mutation, on stable Rust.
//!
//! Each input may neither panic nor take more memory or work than the target allows for its length, and the
//! targets check that what is accepted is sound. Where the system can forbid it, the thread that reads an
//! input can open no file, start no process and reach no network (`sandbox.rs`).
//!
//! `CARTOUCHE_FUZZ_INPUTS` is the number of inputs for each target, `CARTOUCHE_FUZZ_SEED` another course,
//! `CARTOUCHE_FUZZ_REPORT` a folder for a line about each target (`scripts/fuzz.py` makes the report of them),
//! `CARTOUCHE_FUZZ_REPLAY` a file that is run as the only input. An input that fails is written to
//! `target/tmp/fuzz/`, made smaller; of one that ends the process, `<target>.current` holds the bytes.

mod count;
mod runner;
mod sandbox;

#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/pickle_ops.rs"]
mod pickle_ops;
#[path = "../../fuzz/src/targets/mod.rs"]
mod targets;
#[path = "../../fuzz/src/zip_parts.rs"]
mod zip_parts;

use runner::fuzz;
use targets::*;

#[test]
fn pickle() {
    fuzz(pickle::TARGET);
}

#[test]
fn zip() {
    fuzz(zip::TARGET);
}

#[test]
fn torch_file() {
    fuzz(cartridges::TARGET);
}

#[test]
fn safetensors() {
    fuzz(safetensors::TARGET);
}

#[test]
fn config_yaml() {
    fuzz(config_yaml::TARGET);
}

#[test]
fn cartridge_ids() {
    fuzz(cartridge_ids::TARGET);
}

#[test]
fn chat_request() {
    fuzz(requests::CHAT);
}

#[test]
fn completion_request() {
    fuzz(requests::COMPLETION);
}

#[test]
fn routes() {
    fuzz(routes::TARGET);
    routes::check_nothing_left();
}

#[test]
fn template_messages() {
    fuzz(templates::TARGET);
}

#[test]
fn template_source() {
    fuzz(template_source::TARGET);
}

#[test]
fn detokenizer_and_stops() {
    fuzz(streams::TARGET);
}

#[test]
fn dataset_jsonl() {
    fuzz(datasets::JSON_LINES);
}

#[test]
fn dataset_parquet() {
    fuzz(datasets::PARQUET);
}
