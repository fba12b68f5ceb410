//! What strangers can send or store, as fuzz targets: each reads bytes as the server would, and checks
//! that whatever is accepted is sound.
//!
//! One body for two drivers: `fuzz_targets/` for cargo-fuzz (nightly; coverage-guided), and the mutation
//! test of the main crate, `tests/fuzz/`, which includes these modules by path and runs on stable Rust.

pub mod mutate;
pub mod pickle_ops;
pub mod targets;
pub mod zip_parts;

pub use libfuzzer_sys;
use rand::SeedableRng;

/// The whole driver of the target that is named as its binary.
#[macro_export]
macro_rules! driver {
    () => {
        use $crate::libfuzzer_sys;
        $crate::libfuzzer_sys::fuzz_target!(|data: &[u8]| {
            $crate::targets::run(env!("CARGO_BIN_NAME"), data)
        });
        $crate::libfuzzer_sys::fuzz_mutator!(
            |data: &mut [u8], size: usize, max_size: usize, seed: u32| {
                $crate::mutated(env!("CARGO_BIN_NAME"), data, size, max_size, seed)
            }
        );
    };
}

/// Changes the first `size` bytes of `data` in place: by libFuzzer's own means, or by what the target knows
/// of its format. The new size, at most `max_size`.
pub fn mutated(name: &str, data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let target = targets::ALL.iter().find(|target| target.name == name);
    let Some(target) = target.filter(|_| !seed.is_multiple_of(3)) else {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    };
    let mut input = data[..size].to_vec();
    (target.mutate)(&mut input, &mut mutate::Random::seed_from_u64(seed.into()));
    let size = input.len().min(max_size).min(data.len());
    data[..size].copy_from_slice(&input[..size]);
    size
}
