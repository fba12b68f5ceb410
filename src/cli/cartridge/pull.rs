//! From a source into the cartridge directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;

use super::target::Target;
use crate::cartridge::{CartridgeError, folder_name, write_atomically};
use crate::cli::{CliError, sources::SourceFlags};

/// The file in which a folder says which id it is of, where its name does not.
const ID_RECORD: &str = "cartridge.id";

#[derive(Debug, Args)]
pub struct PullArgs {
    /// hf:owner/name[/file][@revision], wandb:[[entity/]project/]run[@file], or https://host/file.pt
    from: Target,
    /// Its folder is made below this one
    #[arg(long, env = "CARTOUCHE_CARTRIDGE_DIR", default_value = "cartridges")]
    cartridge_dir: PathBuf,
    /// Write into this very folder instead
    #[arg(long, conflicts_with = "only_cache")]
    to: Option<PathBuf>,
    /// Only fetch it into the disk cache, from which a server takes it by its source's name
    #[arg(long)]
    only_cache: bool,
    #[command(flatten)]
    sources: SourceFlags,
}

pub fn run(args: &PullArgs) -> Result<(), CliError> {
    let Target::Remote(source, id) = &args.from else {
        return Err(CliError::Usage(format!(
            "{}: say where from: hf:owner/name, wandb:entity/project/run or https://...",
            args.from
        )));
    };
    let mut flags = args.sources.clone();
    // Naming an address here is listing its host.
    if flags.http_source_host.is_none() {
        let host = id.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
        flags.http_source_host = (*source == crate::cartridge::Source::Http).then(|| vec![host]);
    }
    let sources = flags.open(None)?;
    sources.fetch(*source, id)?;
    let Some(record) = sources.store.record(*source, id)? else {
        return Err(CliError::Usage(format!(
            "{} left the cache at once; make it larger",
            args.from
        )));
    };
    let short = record.generation.get(..12).unwrap_or_default();
    if args.only_cache {
        println!("{}: {} tokens, generation {short}, in the disk cache", args.from, record.tokens);
        return Ok(());
    }
    let folder_of_id = folder_name(id)?;
    let (folder, is_below) = match &args.to {
        Some(folder) => (folder.clone(), false),
        None => (args.cartridge_dir.join(&folder_of_id), true),
    };
    fs::create_dir_all(&folder).map_err(|source| CliError::Io { path: folder.clone(), source })?;
    if is_below {
        claim(&folder, id, &folder_of_id)?;
    }
    let kind = if record.file.ends_with(".safetensors") { "safetensors" } else { "pt" };
    let path = folder.join(format!("cartridge.{kind}"));
    let Some(mut file) = sources.store.open(&record)? else {
        return Err(CliError::Usage(format!(
            "{} left the cache at once; make it larger",
            args.from
        )));
    };
    let write_failed = |e| CartridgeError::io("write the file", &e);
    if let Some(text) = &record.config_yaml {
        let mut text = text.as_bytes();
        write_atomically(&folder.join("config.yaml"), |to| {
            io::copy(&mut text, to).map(|_| ()).map_err(write_failed)
        })?;
    }
    write_atomically(&path, |to| io::copy(&mut file, to).map(|_| ()).map_err(write_failed))?;
    // The other format would be found first, or instead.
    let other = folder.join(if kind == "pt" { "cartridge.safetensors" } else { "cartridge.pt" });
    match fs::remove_file(&other) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(CliError::Io { path: other, source });
        }
        _ => {}
    }
    println!("{}: {} tokens, generation {short}: {}", args.from, record.tokens, path.display());
    Ok(())
}

/// Ids that are written alike share a folder: the first one keeps it.
fn claim(folder: &Path, id: &str, name: &str) -> Result<(), CliError> {
    let path = folder.join(ID_RECORD);
    let owner = fs::read_to_string(&path).ok();
    let owner = owner.or_else(|| {
        let is_used =
            folder.join("cartridge.pt").exists() || folder.join("cartridge.safetensors").exists();
        is_used.then(|| name.to_owned())
    });
    match owner {
        Some(owner) if owner != id => Err(CliError::Usage(format!(
            "{} belongs to the cartridge `{owner}`; give --to, or remove that one first",
            folder.display()
        ))),
        Some(_) => Ok(()),
        None => Ok(write_atomically(&path, |to| {
            io::Write::write_all(to, id.as_bytes())
                .map_err(|e| CartridgeError::io("write the file", &e))
        })?),
    }
}
