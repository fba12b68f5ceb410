//! Writes what each target starts from as a corpus for cargo-fuzz: `fuzz/corpus/<target>/seed-<n>`, made of
//! `tests/fixtures`. Run from the root of the repository: `cargo run --manifest-path fuzz/Cargo.toml --bin seeds`.

use std::{fs, io, path::Path};

use cartouche_fuzz::targets::ALL;

fn main() -> io::Result<()> {
    for target in ALL {
        let folder = Path::new("fuzz/corpus").join(target.name);
        fs::create_dir_all(&folder)?;
        let seeds = (target.seeds)();
        for (i, seed) in seeds.iter().enumerate() {
            fs::write(folder.join(format!("seed-{i}")), seed)?;
        }
        println!("{}: {} seeds", target.name, seeds.len());
    }
    Ok(())
}
