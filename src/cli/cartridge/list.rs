//! What can be named on this machine.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::target::Target;
use crate::cartridge::{FileSource, Intake, LocalFolder};
use crate::cli::{CliError, sources::SourceFlags};
use crate::limits;

#[derive(Debug, Args)]
pub struct ListArgs {
    #[arg(long, env = "CARTOUCHE_CARTRIDGE_DIR", default_value = "cartridges")]
    cartridge_dir: PathBuf,
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sources: SourceFlags,
}

pub fn run(args: &ListArgs) -> Result<(), CliError> {
    let dir = &args.cartridge_dir;
    if !dir.is_dir() {
        return Err(CliError::Usage(format!(
            "{} is not a folder; give --cartridge-dir",
            dir.display()
        )));
    }
    let local = local(&LocalFolder::new(dir.clone()));
    let cached: Vec<Value> = args
        .sources
        .open(None)?
        .store
        .records()
        .into_iter()
        .map(|(source, r)| {
            let name = Target::Remote(source, r.id.clone()).to_string();
            json!({
                "name": name, "id": r.id, "source": source, "tokens": r.tokens, "bytes": r.size,
                "generation": r.generation, "revision": r.revision,
            })
        })
        .collect();
    if args.json {
        println!("{}", json!({ "cartridges": local, "cached": cached }));
        return Ok(());
    }
    println!("{:<40} {:>8} {:>12}  generation", "id", "tokens", "bytes");
    local.iter().for_each(|entry| line(entry, "id"));
    if !cached.is_empty() {
        println!("\nfetched, in the disk cache (bytes of the file)");
        cached.iter().for_each(|entry| line(entry, "name"));
    }
    Ok(())
}

fn local(folder: &LocalFolder) -> Vec<Value> {
    let mut entries = Vec::new();
    for id in folder.list() {
        let mut intake = Intake::as_stored(limits::DEFAULT_MAX_CARTRIDGE_FILE_BYTES);
        let read = folder.read(&id, &mut intake).and_then(|_| intake.into_cartridge());
        entries.push(match read {
            Ok(cartridge) => json!({
                "id": id,
                "tokens": cartridge.tokens(),
                "bytes": cartridge.bytes(),
                "generation": cartridge.generation().to_hex(),
            }),
            Err(error) => json!({ "id": id, "error": error.to_string() }),
        });
    }
    entries
}

fn line(entry: &Value, name: &str) {
    let id = entry[name].as_str().unwrap_or_default();
    match entry["error"].as_str() {
        Some(error) => println!("{id:<40} unusable: {error}"),
        None => {
            let generation = entry["generation"].as_str().unwrap_or_default();
            println!(
                "{id:<40} {:>8} {:>12}  {}",
                entry["tokens"],
                entry["bytes"],
                generation.get(..12).unwrap_or_default()
            );
        }
    }
}
