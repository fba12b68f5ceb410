//! What a cartridge holds.

use std::path::Path;

use clap::Args;
use serde_json::{Map, Value, json};

use super::read;
use super::target::Target;
use crate::cartridge::{Cartridge, Intake, Record, Source, Sources};
use crate::cli::{CliError, sources::SourceFlags};
use crate::limits;

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A .pt file of Tokasaurus / Cartridges, a .safetensors cartridge, or one that was fetched (hf:...,
    /// wandb:..., https://...)
    cartridge: Target,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sources: SourceFlags,
}

pub fn run(args: &InspectArgs) -> Result<(), CliError> {
    let mut facts = match &args.cartridge {
        Target::Here(path) => facts(&read(Path::new(path))?),
        Target::Remote(source, id) => {
            let (cartridge, record) = from_cache(&args.sources.open(None)?, *source, id)?;
            let mut facts = facts(&cartridge);
            facts.extend(recorded(&record));
            facts
        }
    };
    facts.retain(|_, value| !value.is_null() || args.json);
    print(&facts, args.json);
    Ok(())
}

/// A fetched cartridge, and what was recorded of it.
pub fn from_cache(
    sources: &Sources,
    source: Source,
    id: &str,
) -> Result<(Cartridge, Record), CliError> {
    let record = sources.store.record(source, id)?;
    let Some(record) = record.filter(|record| sources.store.blob(record).is_some()) else {
        let name = Target::Remote(source, id.to_owned());
        return Err(CliError::Usage(format!(
            "{name} is not in the disk cache; `cartouche cartridge pull {name}` fetches it"
        )));
    };
    let files = sources.list().into_iter().find(|(of, _)| *of == source);
    let mut intake = Intake::as_stored(limits::DEFAULT_MAX_CARTRIDGE_FILE_BYTES);
    if let Some((_, files)) = files {
        files.read(id, &mut intake)?;
    }
    Ok((intake.into_cartridge().map_err(|error| error.named(id))?, record))
}

pub fn facts(cartridge: &Cartridge) -> Map<String, Value> {
    let (shape, provenance) = (cartridge.shape(), cartridge.provenance());
    let facts = json!({
        "generation": cartridge.generation().to_hex(),
        "tokens": cartridge.tokens(),
        "frozen_tokens": cartridge.frozen_tokens(),
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "dtype": format!("{:?}", cartridge.dtype()).to_lowercase(),
        "bytes": cartridge.bytes(),
        "bias": cartridge.layers().iter().any(|l| l.bias.is_some()),
        "model": provenance.model,
        "origin": provenance.origin,
    });
    facts.as_object().cloned().unwrap_or_default()
}

pub fn recorded(record: &Record) -> Map<String, Value> {
    let milliseconds = i64::try_from(record.fetched_at).unwrap_or(i64::MAX);
    let at = chrono::DateTime::from_timestamp_millis(milliseconds);
    let facts = json!({
        "sha256": record.digest,
        "file": record.file,
        "from": record.from,
        "revision": record.revision,
        "fetched": at.map(|at| at.format("%Y-%m-%dT%H:%M:%SZ").to_string()),
    });
    facts.as_object().cloned().unwrap_or_default()
}

pub fn print(facts: &Map<String, Value>, as_json: bool) {
    if as_json {
        println!("{}", Value::Object(facts.clone()));
        return;
    }
    for (name, value) in facts {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        println!("{name:<14} {value}");
    }
}
