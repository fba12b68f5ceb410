//! From this machine to the hub or to Weights & Biases.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::card::{Training, card};
use super::inspect::facts;
use super::read;
use super::target::Target;
use crate::cartridge::{
    HuggingFace, Piece, Source, Wandb, config_yaml, transfer::Transfer, validate,
};
use crate::cli::{CliError, sources::SourceFlags};

#[derive(Debug, Args)]
pub struct PushArgs {
    /// A cartridge file, or the folder of a training run (its cartridge.*, else its last checkpoint)
    cartridge: PathBuf,
    /// hf:owner/name[@revision] or wandb:[[entity/]project/]run
    to: Target,
    /// Folder of the training run, whose numbers go into the README [default: that of the file]
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// If the repository is made now, only those with access see it
    #[arg(long)]
    private: bool,
    /// Of the commit
    #[arg(long, default_value = "Publish a cartridge")]
    message: String,
    /// Write the README to standard output and publish nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    sources: SourceFlags,
}

pub fn run(args: &PushArgs) -> Result<(), CliError> {
    let path = file_of(&args.cartridge)?;
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    // What nobody could use is not published.
    let cartridge = read(&path)?;
    validate(&cartridge, &cartridge.shape()).map_err(|e| e.named(&path.display().to_string()))?;
    let kind = match path.extension().is_some_and(|extension| extension == "safetensors") {
        true => "safetensors",
        false => "pt",
    };
    let name = format!("cartridge.{kind}");
    let file = Piece::file(&name, &path)?;
    let training = Training::read(args.run_dir.as_deref().unwrap_or(&folder));
    let readme = card(&args.to, &cartridge, (&name, file.sha256()), training.as_ref());
    if args.dry_run {
        print!("{readme}");
        return Ok(());
    }
    let config = match fs::read_to_string(folder.join("config.yaml")) {
        Ok(text) => text,
        Err(_) => config_yaml(&cartridge)?,
    };
    let config = Piece::text("config.yaml", config);
    let readme = Piece::text("README.md", readme);
    let options = args.sources.options(None)?;
    let transfer = Transfer::new(options.times);
    let at = match &args.to {
        Target::Remote(Source::Huggingface, id) => {
            let hub = HuggingFace::from_env(&options.hub_hosts, options.offline);
            let hub = hub.map_err(CliError::Usage)?;
            hub.push(id, &[file, config, readme], (&args.message, args.private), &transfer)?
        }
        Target::Remote(Source::Wandb, id) => {
            let wandb = Wandb::from_env(options.offline).map_err(CliError::Usage)?;
            // The server writes a config.yaml of its own from these.
            let facts = json!({
                "kv_cache_initializer": {
                    "max_tokens": cartridge.tokens(),
                    "num_frozen_tokens": cartridge.frozen_tokens(),
                },
                "model": {"pretrained_model_name_or_path": cartridge.provenance().model},
                "cartridge": facts(&cartridge),
            });
            let summary =
                training.map_or(Value::Object(Default::default()), |t| Value::Object(t.last));
            wandb.push(id, &[file, config, readme], (&facts, &summary), &transfer)?
        }
        _ => {
            return Err(CliError::Usage(format!(
                "{}: say where to: hf:owner/name or wandb:entity/project/run",
                args.to
            )));
        }
    };
    println!("published {} as {}: {at}", path.display(), args.to);
    println!("generation {}", cartridge.generation());
    Ok(())
}

/// The cartridge of a run: its published one, or its checkpoint of the most updates.
fn file_of(path: &Path) -> Result<PathBuf, CliError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let named = ["cartridge.pt", "cartridge.safetensors"].map(|name| path.join(name));
    if let Some(file) = named.into_iter().find(|file| file.is_file()) {
        return Ok(file);
    }
    let entries =
        fs::read_dir(path).map_err(|source| CliError::Io { path: path.to_owned(), source })?;
    let step =
        |name: &str| name.strip_prefix("cache-step")?.strip_suffix(".pt")?.parse::<u64>().ok();
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let newest = names.filter(|name| step(name).is_some()).max_by_key(|name| step(name));
    newest.map(|name| path.join(name)).ok_or_else(|| {
        CliError::Usage(format!("{} holds no cartridge file; name one", path.display()))
    })
}
