//! From one file format to another.

use std::path::PathBuf;

use candle_core::DType;
use clap::{Args, ValueEnum};

use super::{read, write};
use crate::cartridge::{Cartridge, CartridgeError, Naming, TorchStyle, write_config_yaml};
use crate::cli::CliError;

#[derive(Debug, Args)]
pub struct ConvertArgs {
    input: PathBuf,
    output: PathBuf,
    /// Names of the frozen half in a .pt file: trainers of 2025-06 read `fixed`, later ones `frozen`
    #[arg(long, value_enum, default_value = "both")]
    naming: NamingArg,
    /// Containers in a .pt file; only plain lists load with torch's weights_only
    #[arg(long, value_enum, default_value = "lists")]
    container: ContainerArg,
    /// Store the tensors as f32, f16 or bf16 [default: as they are]
    #[arg(long, value_enum)]
    dtype: Option<DtypeArg>,
    /// Also write the config.yaml that Tokasaurus asks for, beside the output
    #[arg(long)]
    config_yaml: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum NamingArg {
    Frozen,
    Fixed,
    Both,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ContainerArg {
    Lists,
    ParameterLists,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DtypeArg {
    F32,
    F16,
    Bf16,
}

pub fn run(args: ConvertArgs) -> Result<(), CliError> {
    let ConvertArgs { input, output, naming, container, dtype, config_yaml } = args;
    let mut cartridge = read(&input)?;
    if let Some(dtype) = dtype {
        cartridge = retyped(&cartridge, dtype)?;
    }
    let naming = match naming {
        NamingArg::Frozen => Naming::Frozen,
        NamingArg::Fixed => Naming::Fixed,
        NamingArg::Both => Naming::Both,
    };
    let style = match container {
        ContainerArg::Lists => TorchStyle::PlainLists,
        ContainerArg::ParameterLists => TorchStyle::ParameterLists,
    };
    write(&output, &cartridge, style, naming)?;
    if config_yaml {
        write_config_yaml(&output.with_file_name("config.yaml"), &cartridge)?;
    }
    println!("{} -> {} ({})", input.display(), output.display(), cartridge.generation());
    Ok(())
}

/// The same content in another dtype is another content: it gets its own generation.
fn retyped(cartridge: &Cartridge, dtype: DtypeArg) -> Result<Cartridge, CartridgeError> {
    let dtype = match dtype {
        DtypeArg::F32 => DType::F32,
        DtypeArg::F16 => DType::F16,
        DtypeArg::Bf16 => DType::BF16,
    };
    let converted = cartridge.to(&candle_core::Device::Cpu, dtype)?;
    let provenance = cartridge.provenance().clone();
    Cartridge::new(converted.layers().to_vec(), cartridge.frozen_tokens(), provenance)
}
