//! `cartouche train`: learn a cartridge for a document, evaluate it, publish it.

pub(super) mod conversations;
pub(super) mod data_options;
pub(super) mod document;
mod evaluation;
mod held_out;
mod learn;
pub(super) mod lessons;
pub(super) mod options;
mod report;
mod stop;
mod study;

use std::path::PathBuf;

use candle_core::{DType, Device};
use clap::Args;

use self::conversations::Conversations;
use self::data_options::DataFlags;
use self::document::Document;
use self::evaluation::Evaluation;
use self::held_out::HeldOutPacks;
use self::learn::Course;
use self::options::{Start, TrainFlags, usage};
use super::CliError;
use super::config::ConfigFile;
use super::runtime::{Runtime, RuntimeOptions};
use crate::cartridge::{
    Cartridge, LayerKv, Provenance, read_cartridge, validate, write_config_yaml, write_safetensors,
};
use crate::limits;
use crate::train::{self, Parameters, RunDir, Trainer};

/// Learn a small cartridge that answers like a long document
///
/// The model itself is the teacher: it asks itself questions about the document (or takes yours, with
/// --conversations), answers them with the document in its prompt, and the cartridge learns to answer alike
/// without it. A run that was stopped goes on where it was.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cartouche train --model ./instruct-model --document notes.txt --publish notes
  cartouche train --document demo:harbour-log --conversations demo:harbour-log \\
    --questions demo:harbour-log --publish harbour-small")]
pub struct TrainArgs {
    /// YAML file with any of the options below, written with _ for - (flags win)
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    data: DataFlags,
    #[command(flatten)]
    train: TrainFlags,
    #[command(flatten)]
    runtime: RuntimeOptions,
}

pub fn run(args: TrainArgs) -> Result<(), CliError> {
    let file = ConfigFile::read(args.config.as_deref())?;
    let known = [
        serde_json::to_value(RuntimeOptions::default()),
        serde_json::to_value(DataFlags::default()),
        serde_json::to_value(TrainFlags::default()),
    ];
    file.check_keys(&known.map(|value| value.unwrap_or_default()))?;
    let flags: TrainFlags = file.complete(&args.train)?;
    let options: RuntimeOptions = file.complete(&args.runtime)?;
    let data: DataFlags = file.complete(&args.data)?;
    // Wrong values are told before the model is loaded.
    flags.trainer(1, data.seed())?;
    data.check()?;
    let from = data.document()?;
    options.set_threads()?;
    train::keep_freed_memory();
    let runtime = options.start()?;
    let document = Document::read(&runtime, from)?;
    let run_dir =
        flags.run_dir.clone().unwrap_or_else(|| PathBuf::from("runs").join(&document.name));
    let run_dir = RunDir::open(&run_dir, flags.keep_last_n_saved.unwrap_or(2))?;
    let max_tokens = data.answer_tokens()?;
    let questions = flags.questions.as_deref();
    let questions = questions.map(|from| Evaluation::read(&runtime, &document, from, max_tokens));
    let course = Course {
        runtime: &runtime,
        flags: &flags,
        run_dir: &run_dir,
        facts: facts(&runtime, &document),
        questions: questions.transpose()?,
        held_out: HeldOutPacks::prepare(&runtime, &document, &data, &flags, &run_dir)?,
    };
    let mut trainer = trainer(&runtime, &document, &data, &flags, &run_dir)?;
    if run_dir.resume(&mut trainer)? {
        println!("going on after update {}", trainer.position().step);
    }
    let cartridge = course.run(&mut trainer)?;
    trainer.check_weights()?;
    if let Some(id) = &flags.publish {
        let dir = options.cartridge_dir.unwrap_or_else(|| PathBuf::from("cartridges"));
        publish(&dir, id, &cartridge)?;
    }
    Ok(())
}

/// The run as it begins: its packs and its start.
fn trainer(
    runtime: &Runtime,
    document: &Document,
    data: &DataFlags,
    flags: &TrainFlags,
    run_dir: &RunDir,
) -> Result<Trainer, CliError> {
    let conversations = Conversations::to_learn(data);
    let file = run_dir.packs();
    let packs = lessons::packs(runtime, document, &conversations, (data, flags), &file)?;
    let is_resumed = !run_dir.saved_steps()?.is_empty();
    let start = start(runtime, document, flags, data.seed(), is_resumed)?;
    let frozen = flags.num_frozen_tokens.unwrap_or(1);
    let parameters = Parameters::new(&start, frozen)?;
    println!(
        "{}: {} tokens of document, {} of cartridge ({:.1} times fewer); {} packs, {} supervised tokens",
        document.name,
        document.tokens.len(),
        parameters.tokens(),
        document.tokens.len() as f64 / parameters.tokens() as f64,
        packs.len(),
        packs.iter().map(|pack| pack.targets.supervised_rows()).sum::<usize>(),
    );
    let options = flags.trainer(packs.len(), data.seed())?;
    Ok(Trainer::new(runtime.decoder.clone(), parameters, packs, options)?)
}

/// What a run begins with. One that `is_resumed` takes its numbers from the checkpoint: here it gets only
/// their shape.
fn start(
    runtime: &Runtime,
    document: &Document,
    flags: &TrainFlags,
    seed: u64,
    is_resumed: bool,
) -> Result<Vec<LayerKv>, CliError> {
    let tokens = flags.tokens.unwrap_or_else(|| document.tokens.len().div_ceil(20).max(2));
    let decoder = &runtime.decoder;
    Ok(match flags.initializer.unwrap_or_default() {
        Start::Text if is_resumed => train::random(decoder.config().kv_shape(), tokens, 0.0, 0)?,
        Start::Text => train::from_text(decoder, &document.tokens, document.closing, tokens)?,
        Start::Random => {
            let scale = flags.init_scale.unwrap_or(1.0);
            train::random(decoder.config().kv_shape(), tokens, scale, seed)?
        }
        Start::Cartridge => {
            let path = flags.init_cartridge.as_deref().ok_or_else(|| {
                usage("--initializer cartridge needs --init-cartridge FILE".to_owned())
            })?;
            let cartridge = read_cartridge(path, limits::DEFAULT_MAX_CARTRIDGE_FILE_BYTES)?;
            let shape = decoder.config().kv_shape();
            validate(&cartridge, &shape).map_err(|e| e.named(&path.display().to_string()))?;
            cartridge.to(&Device::Cpu, DType::F32)?.layers().to_vec()
        }
    })
}

fn facts(runtime: &Runtime, document: &Document) -> Provenance {
    let config = runtime.decoder.config();
    Provenance {
        model: Some(runtime.model.name.clone()),
        rope_theta: Some(config.rope_theta),
        rope_scaling: config.rope_scaling_json.clone(),
        origin: Some(format!("trained on {}", document.name)),
    }
}

/// Writes the cartridge where a server looks for `id`. The file is replaced as a whole.
fn publish(dir: &std::path::Path, id: &str, cartridge: &Cartridge) -> Result<(), CliError> {
    let folder = dir.join(crate::cartridge::folder_name(id)?);
    std::fs::create_dir_all(&folder)
        .map_err(|source| CliError::Io { path: folder.clone(), source })?;
    write_config_yaml(&folder.join("config.yaml"), cartridge)?;
    let path = folder.join("cartridge.safetensors");
    write_safetensors(&path, cartridge)?;
    println!("published as {id}: {}", path.display());
    Ok(())
}
