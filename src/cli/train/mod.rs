//! `cartouche train`: learn a cartridge for a document, evaluate it, publish it.

pub(super) mod data_options;
pub(super) mod document;
mod evaluation;
pub(super) mod lessons;
pub(super) mod options;
mod report;
mod study;

use std::path::PathBuf;

use candle_core::{DType, Device};
use clap::Args;

use self::data_options::DataFlags;
use self::evaluation::{Answerer, Evaluation};
use self::lessons::Document;
use self::options::{SaveDtype, Start, TrainFlags, usage};
use self::report::Report;
use super::CliError;
use super::config::ConfigFile;
use super::runtime::{Runtime, RuntimeOptions};
use crate::cartridge::{
    Cartridge, LayerKv, Provenance, read_cartridge, write_config_yaml, write_safetensors,
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
    let (flags, options) = (file.complete(&args.train)?, file.complete(&args.runtime)?);
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
    let mut trainer = trainer(&runtime, &document, &data, &flags, &run_dir)?;
    if run_dir.resume(&mut trainer)? {
        println!("going on after update {}", trainer.position().step);
    }
    let cartridge = learn(&runtime, &document, &data, &flags, &run_dir, &mut trainer)?;
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
    let packs = lessons::packs(runtime, document, data, flags, run_dir)?;
    let start = start(runtime, document, flags, data.seed())?;
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

fn start(
    runtime: &Runtime,
    document: &Document,
    flags: &TrainFlags,
    seed: u64,
) -> Result<Vec<LayerKv>, CliError> {
    let tokens = flags.tokens.unwrap_or_else(|| document.tokens.len().div_ceil(20).max(2));
    let decoder = &runtime.decoder;
    Ok(match flags.initializer.unwrap_or_default() {
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
            cartridge.to(&Device::Cpu, DType::F32)?.layers().to_vec()
        }
    })
}

/// Trains to the end, saving and evaluating on the way.
fn learn(
    runtime: &Runtime,
    document: &Document,
    data: &DataFlags,
    flags: &TrainFlags,
    run_dir: &RunDir,
    trainer: &mut Trainer,
) -> Result<Cartridge, CliError> {
    let dtype = match flags.save_dtype.unwrap_or_default() {
        SaveDtype::F32 => DType::F32,
        SaveDtype::F16 => DType::F16,
        SaveDtype::Bf16 => DType::BF16,
    };
    let facts = facts(runtime, document);
    let mut report = Report::open(run_dir.path(), trainer.position().step, trainer.max_steps())?;
    let max_tokens = data.answer_tokens()?;
    let evaluation = flags.questions.as_deref();
    let evaluation =
        evaluation.map(|from| Evaluation::read(runtime, document, from, max_tokens)).transpose()?;
    if let Some(evaluation) = &evaluation {
        for (name, who) in [("teacher", Answerer::Teacher), ("no cartridge", Answerer::NoCartridge)]
        {
            score(runtime, evaluation, name, who, trainer.position().step, &mut report)?;
        }
    }
    let every = |n: Option<u64>, default| n.unwrap_or(default).max(1);
    let save_every = every(flags.save_every_n_steps, 100);
    let evaluate_every = flags.generate_eval_every_n_steps.unwrap_or(0);
    let cartridge = |trainer: &Trainer| trainer.parameters().cartridge(dtype, facts.clone());
    let score_now = |trainer: &Trainer, report: &mut Report| match &evaluation {
        Some(evaluation) => {
            let (step, cartridge) = (trainer.position().step, cartridge(trainer)?);
            let who = Answerer::Student(&cartridge);
            score(runtime, evaluation, "cartridge", who, step, report)
        }
        None => Ok(()),
    };
    score_now(trainer, &mut report)?;
    while !trainer.is_done() {
        let step = trainer.step()?;
        report.step(&step)?;
        let step = step.position.step;
        if step % save_every == 0 || trainer.is_done() {
            run_dir.save(trainer, dtype, facts.clone())?;
        }
        if trainer.is_done() || (evaluate_every > 0 && step % evaluate_every == 0) {
            score_now(trainer, &mut report)?;
        }
    }
    report.finish()?;
    let cartridge = cartridge(trainer)?;
    println!(
        "{} updates; {} ({} tokens, {} bytes, generation {})",
        trainer.position().step,
        run_dir.path().join("cache_last.pt").display(),
        cartridge.tokens(),
        cartridge.bytes(),
        cartridge.generation().short()
    );
    Ok(cartridge)
}

fn score(
    runtime: &Runtime,
    evaluation: &Evaluation,
    name: &str,
    who: Answerer<'_>,
    step: u64,
    report: &mut Report,
) -> Result<(), CliError> {
    let score = evaluation.score(runtime, who)?;
    report.say(&format!("update {step:>5}  {name:<12}  {:5.1}% exact answers", 100.0 * score));
    report.write(&Evaluation::metrics(step, who, score))
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
