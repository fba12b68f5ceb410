//! `cartouche cartridge`: look into cartridges, convert them, make exact ones, and move them between files,
//! the Hugging Face hub and Weights & Biases.

mod card;
mod convert;
mod inspect;
mod list;
mod prefill;
mod pull;
mod push;
mod rm;
mod target;
mod verify;

use std::path::Path;

use clap::{Args, Subcommand};

use super::CliError;
use crate::cartridge::{
    Cartridge, Naming, TorchStyle, read_cartridge, write_safetensors, write_torch,
};
use crate::limits;

/// Inspect, convert, make, publish and fetch cartridges
#[derive(Debug, Args)]
pub struct CartridgeArgs {
    #[command(subcommand)]
    command: CartridgeCommand,
}

#[derive(Debug, Subcommand)]
enum CartridgeCommand {
    /// Show what a cartridge holds; nothing in it is executed
    Inspect(inspect::InspectArgs),
    /// Write a cartridge in another format, chosen by the output's extension (.pt or .safetensors)
    Convert(convert::ConvertArgs),
    /// List the cartridges below the cartridge directory, and those fetched from elsewhere
    List(list::ListArgs),
    /// Make the exact cartridge of a document: the keys and values the model computes for it
    ///
    /// Requests with it answer as if the document were their system message, without computing it again.
    /// It is as large as the document; training makes smaller ones.
    Prefill(Box<prefill::PrefillArgs>),
    /// Publish a cartridge: hf:owner/name[@revision] or wandb:entity/project/run
    ///
    /// Uploads the file, its config.yaml and a README with the numbers of its training. Needs HF_TOKEN or
    /// WANDB_API_KEY.
    Push(push::PushArgs),
    /// Fetch a cartridge into the cartridge directory: hf:owner/name[@revision], wandb:entity/project/run, or
    /// https://host/file.pt of a listed host
    Pull(pull::PullArgs),
    /// Read all of a cartridge and check it: numbers, digest, what was recorded of it, the shape of a model
    Verify(verify::VerifyArgs),
    /// Remove a cartridge from the cartridge directory (by its id) or from the disk cache (hf:..., wandb:...,
    /// https://...); nothing is removed where it was fetched from
    Rm(rm::RmArgs),
}

pub fn run(args: CartridgeArgs) -> Result<(), CliError> {
    match args.command {
        CartridgeCommand::Inspect(args) => inspect::run(&args),
        CartridgeCommand::Convert(args) => convert::run(args),
        CartridgeCommand::List(args) => list::run(&args),
        CartridgeCommand::Prefill(args) => prefill::run(&args),
        CartridgeCommand::Push(args) => push::run(&args),
        CartridgeCommand::Pull(args) => pull::run(&args),
        CartridgeCommand::Verify(args) => verify::run(&args),
        CartridgeCommand::Rm(args) => rm::run(&args),
    }
}

fn read(path: &Path) -> Result<Cartridge, CliError> {
    Ok(read_cartridge(path, limits::DEFAULT_MAX_CARTRIDGE_FILE_BYTES)?)
}

fn write(
    path: &Path,
    cartridge: &Cartridge,
    style: TorchStyle,
    naming: Naming,
) -> Result<(), CliError> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("pt") => Ok(write_torch(path, cartridge, style, naming)?),
        Some("safetensors") => Ok(write_safetensors(path, cartridge)?),
        _ => Err(wrong_extension(path)),
    }
}

fn wrong_extension(path: &Path) -> CliError {
    CliError::Usage(format!("{}: the output must end in .pt or .safetensors", path.display()))
}
