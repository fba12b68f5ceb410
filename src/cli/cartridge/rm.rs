//! Takes a cartridge off this machine.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use clap::Args;

use super::target::Target;
use crate::cartridge::{FileSource, LocalFolder, folder_name};
use crate::cli::{CliError, sources::SourceFlags};

#[derive(Debug, Args)]
pub struct RmArgs {
    /// An id in the cartridge directory, or one that was fetched (hf:..., wandb:..., https://...)
    cartridge: Target,
    #[arg(long, env = "CARTOUCHE_CARTRIDGE_DIR", default_value = "cartridges")]
    cartridge_dir: PathBuf,
    #[command(flatten)]
    sources: SourceFlags,
}

pub fn run(args: &RmArgs) -> Result<(), CliError> {
    let absent = || CliError::Usage(format!("{} is not on this machine", args.cartridge));
    match &args.cartridge {
        Target::Remote(source, id) => {
            if !args.sources.open(None)?.store.remove(*source, id)? {
                return Err(absent());
            }
        }
        Target::Here(id) => {
            // Looks who the folder belongs to.
            let there = LocalFolder::new(args.cartridge_dir.clone()).stamp(id)?;
            there.ok_or_else(absent)?;
            let folder = args.cartridge_dir.join(folder_name(id)?);
            let files = ["cartridge.pt", "cartridge.safetensors", "config.yaml", "cartridge.id"];
            let mut removed = 0;
            for (i, file) in files.iter().enumerate() {
                // Of a training run nothing is taken: its checkpoints are not copies.
                if i == 2 && removed == 0 {
                    return Err(CliError::Usage(format!(
                        "{} holds no cartridge.pt or .safetensors but another's files, as a training run \
                         does; remove the folder by hand",
                        folder.display()
                    )));
                }
                match fs::remove_file(folder.join(file)) {
                    Ok(()) => removed += 1,
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(source) => return Err(CliError::Io { path: folder.join(file), source }),
                }
            }
            // Stays if there is more in it.
            let _ = fs::remove_dir(&folder);
        }
    }
    println!("removed {}", args.cartridge);
    Ok(())
}
