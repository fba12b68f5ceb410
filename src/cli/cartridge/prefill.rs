//! The exact cartridge of a document.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{write, wrong_extension};
use crate::cartridge::{Cartridge, Naming, Provenance, TorchStyle};
use crate::cli::{CliError, runtime::RuntimeOptions};
use crate::model::{self, LoadedModel};
use crate::text::{ChatTemplate, llama3_cartridge_prompt};

#[derive(Debug, Args)]
pub struct PrefillArgs {
    /// Text file that becomes the system message
    #[arg(long)]
    document: PathBuf,
    #[arg(long, short)]
    output: PathBuf,
    /// Write it even if the chat template gives requests a prompt that does not continue it
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    runtime: RuntimeOptions,
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

pub fn run(args: &PrefillArgs) -> Result<(), CliError> {
    let PrefillArgs { document, output, force, runtime } = args;
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
        if !*force {
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
