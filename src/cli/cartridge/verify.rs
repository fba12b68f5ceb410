//! Reads all of a cartridge, and says whether it is what it should be.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, json};

use super::inspect::{facts, from_cache, print, recorded};
use super::read;
use super::target::Target;
use crate::cartridge::{Cartridge, FileSource, Intake, LocalFolder, Piece, validate};
use crate::cli::{CliError, sources::SourceFlags};
use crate::limits;
use crate::model::{ModelSource, load_config};

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// A file, an id in the cartridge directory, or one that was fetched (hf:..., wandb:..., https://...)
    cartridge: Target,
    /// Also check that it has the shape of this model (a folder, a .gguf file, a hub id, or demo)
    #[arg(long)]
    model: Option<String>,
    #[arg(long, env = "CARTOUCHE_CARTRIDGE_DIR", default_value = "cartridges")]
    cartridge_dir: PathBuf,
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sources: SourceFlags,
}

pub fn run(args: &VerifyArgs) -> Result<(), CliError> {
    let mut told = Map::new();
    let cartridge = match &args.cartridge {
        Target::Here(name) => here(name, &args.cartridge_dir, &mut told)?,
        Target::Remote(source, id) => {
            let sources = args.sources.open(None)?;
            let known = sources.store.record(*source, id)?;
            if let Some(record) = known.filter(|record| sources.store.blob(record).is_some())
                && !sources.store.verify(&record)?
            {
                sources.store.discard(&record)?;
                return Err(CliError::Usage(format!(
                    "{}: its file in the disk cache was damaged, and is removed; \
                     `cartouche cartridge pull {}` fetches it again",
                    args.cartridge, args.cartridge
                )));
            }
            let (cartridge, record) = from_cache(&sources, *source, id)?;
            told.extend(recorded(&record));
            cartridge
        }
    };
    let shape = match &args.model {
        Some(model) => load_config(&model.parse::<ModelSource>()?)?.kv_shape(),
        None => cartridge.shape(),
    };
    validate(&cartridge, &shape).map_err(|error| error.named(&args.cartridge.to_string()))?;
    let mut facts = facts(&cartridge);
    facts.extend(told);
    facts.insert("fits".to_owned(), json!(args.model));
    facts.insert("sound".to_owned(), json!(true));
    facts.retain(|_, value| !value.is_null());
    print(&facts, args.json);
    Ok(())
}

/// A file, or else an id.
fn here(
    name: &str,
    dir: &Path,
    told: &mut Map<String, serde_json::Value>,
) -> Result<Cartridge, CliError> {
    let path = Path::new(name);
    if !path.is_file() {
        let mut intake = Intake::as_stored(limits::DEFAULT_MAX_CARTRIDGE_FILE_BYTES);
        LocalFolder::new(dir.to_owned()).read(name, &mut intake)?;
        return Ok(intake.into_cartridge().map_err(|error| error.named(name))?);
    }
    told.insert("sha256".to_owned(), json!(Piece::file(name, path)?.sha256()));
    read(path)
}
