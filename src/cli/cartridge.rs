//! `cartouche cartridge`: look into cartridge files, convert them, make exact ones.

use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use super::CliError;
use super::runtime::RuntimeOptions;
use crate::cartridge::{
    Cartridge, CartridgeError, FileSource, Intake, LocalFolder, Naming, Provenance, TorchStyle,
    read_cartridge, write_config_yaml, write_safetensors, write_torch,
};
use crate::model::LoadedModel;
use crate::text::{ChatTemplate, llama3_cartridge_prompt};
use crate::{limits, model};

/// Inspect, convert, list and make cartridges
#[derive(Debug, Args)]
pub struct CartridgeArgs {
    #[command(subcommand)]
    command: CartridgeCommand,
}

#[derive(Debug, Subcommand)]
enum CartridgeCommand {
    /// Show what a cartridge file holds; nothing in it is executed
    Inspect {
        /// A .pt file of Tokasaurus / Cartridges, or a .safetensors cartridge
        file: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Write a cartridge in another format, chosen by the output's extension (.pt or .safetensors)
    Convert {
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
    },
    /// List the cartridges below the cartridge directory
    List {
        #[arg(long, env = "CARTOUCHE_CARTRIDGE_DIR", default_value = "cartridges")]
        cartridge_dir: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Make the exact cartridge of a document: the keys and values the model computes for it
    ///
    /// Requests with it answer as if the document were their system message, without computing it again.
    /// It is as large as the document; training makes smaller ones.
    Prefill {
        /// Text file that becomes the system message
        #[arg(long)]
        document: PathBuf,
        #[arg(long, short)]
        output: PathBuf,
        /// Write it even if the chat template gives requests a prompt that does not continue it
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        runtime: Box<RuntimeOptions>,
    },
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

pub fn run(args: CartridgeArgs) -> Result<(), CliError> {
    match args.command {
        CartridgeCommand::Inspect { file, json } => inspect(&file, json),
        CartridgeCommand::Convert { input, output, naming, container, dtype, config_yaml } => {
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
        CartridgeCommand::List { cartridge_dir, json } => list(&cartridge_dir, json),
        CartridgeCommand::Prefill { document, output, force, runtime } => {
            prefill(&document, &output, force, &runtime)
        }
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

fn inspect(path: &Path, as_json: bool) -> Result<(), CliError> {
    let cartridge = read(path)?;
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
    if as_json {
        println!("{facts}");
        return Ok(());
    }
    for (name, value) in facts.as_object().unwrap_or(&Map::new()) {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        println!("{name:<14} {value}");
    }
    Ok(())
}

fn list(dir: &Path, as_json: bool) -> Result<(), CliError> {
    if !dir.is_dir() {
        return Err(CliError::Usage(format!(
            "{} is not a folder; give --cartridge-dir",
            dir.display()
        )));
    }
    let folder = LocalFolder::new(dir.to_owned());
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
    if as_json {
        println!("{}", json!({ "cartridges": entries }));
        return Ok(());
    }
    println!("{:<40} {:>8} {:>12}  generation", "id", "tokens", "bytes");
    for entry in &entries {
        let id = entry["id"].as_str().unwrap_or_default();
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
    Ok(())
}

/// Refuses an output that cannot be written before the time to compute it is spent.
fn check_output(path: &Path) -> Result<(), CliError> {
    if !matches!(path.extension().and_then(|e| e.to_str()), Some("pt" | "safetensors")) {
        return Err(wrong_extension(path));
    }
    match path.parent() {
        Some(parent) if parent != Path::new("") && !parent.is_dir() => Err(CliError::Usage(
            format!("{}: the folder {} does not exist", path.display(), parent.display()),
        )),
        _ => Ok(()),
    }
}

fn wrong_extension(path: &Path) -> CliError {
    CliError::Usage(format!("{}: the output must end in .pt or .safetensors", path.display()))
}

/// Why a request with the cartridge of `tokens`, the system message alone, would see something else than
/// one with that system message. `None` if it sees the same.
fn mismatch(
    model: &LoadedModel,
    template: &ChatTemplate,
    system: &Value,
    tokens: &[u32],
) -> Result<Option<String>, CliError> {
    let user = json!({"role": "user", "content": "Hello"});
    let whole = template.render_chat(&[system.clone(), user.clone()], true)?;
    let whole = model.tokenizer.encode(&whole, false)?;
    let Some(wanted) = whole.strip_prefix(tokens) else {
        return Ok(Some(
            "it writes a system message differently when a user's message follows (some templates put \
             it into the user's message)"
                .to_owned(),
        ));
    };
    // What the server sends beside a cartridge.
    let request = match model.is_llama3 {
        true => llama3_cartridge_prompt(&[user], true, false)?,
        false => template.render_chat(&[user], true)?,
    };
    let request = model.tokenizer.encode(&request, false)?;
    if request == wanted {
        return Ok(None);
    }
    let text = |ids: &[u32]| model.tokenizer.decode(ids, false);
    Ok(Some(match request.strip_suffix(wanted) {
        Some(extra) => {
            format!("it starts a chat that has no system message with {:?}", text(extra)?)
        }
        None => format!(
            "after the system message it writes {:?}, without one {:?}",
            text(wanted)?,
            text(&request)?
        ),
    }))
}

fn prefill(
    document: &Path,
    output: &Path,
    force: bool,
    runtime: &RuntimeOptions,
) -> Result<(), CliError> {
    check_output(output)?;
    runtime.set_threads()?;
    let text = std::fs::read_to_string(document)
        .map_err(|source| CliError::Io { path: document.to_owned(), source })?;
    let loaded = model::load(&runtime.source()?, &runtime.load_options()?)?;
    let config = loaded.decoder.config();
    let Some(template) = &loaded.chat_template else {
        return Err(CliError::Usage(format!("model {} has no chat template", loaded.name)));
    };
    let system = json!({"role": "system", "content": text.trim_end()});
    let tokens = loaded
        .tokenizer
        .encode(&template.render_chat(std::slice::from_ref(&system), false)?, false)?;
    if let Some(reason) = mismatch(&loaded, template, &system, &tokens)? {
        let message = format!(
            "requests with this cartridge would not be answered as with the document in their system \
             message, because of the chat template of {}: {reason}",
            loaded.name
        );
        if !force {
            return Err(CliError::Usage(format!("{message}; --force writes it all the same")));
        }
        tracing::warn!("{message}");
    }
    if tokens.is_empty() || tokens.len() >= config.max_positions {
        return Err(CliError::Usage(format!(
            "{} has {} tokens; the model's context is {}",
            document.display(),
            tokens.len(),
            config.max_positions
        )));
    }
    let layers = model::prefill(&loaded.decoder, &tokens)?;
    let name = document.file_name().unwrap_or_default().to_string_lossy();
    let provenance = Provenance {
        model: Some(loaded.name.clone()),
        rope_theta: Some(config.rope_theta),
        rope_scaling: config.rope_scaling_json.clone(),
        origin: Some(format!("exact keys and values of {name}")),
    };
    let cartridge = Cartridge::new(layers, 1, provenance)?;
    write(output, &cartridge, TorchStyle::PlainLists, Naming::Both)?;
    println!(
        "{} tokens, {} bytes, generation {}",
        cartridge.tokens(),
        cartridge.bytes(),
        cartridge.generation().short()
    );
    Ok(())
}
