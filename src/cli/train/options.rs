//! The options of `cartouche train`, as flags and as lines of its YAML file.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::cli::CliError;
use crate::train::{
    AdamOptions, Decay, Normalizer, PackingMode, Schedule, StepOptions, TrainerOptions,
};

/// Where learning starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// The exact keys and values of the document's first tokens
    #[default]
    Text,
    /// Normal random numbers
    Random,
    /// An existing cartridge
    Cartridge,
}

/// What the student learns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetsArg {
    /// The teacher's distribution after each token of its answers
    #[default]
    Logits,
    /// The answers' tokens themselves
    Tokens,
}

/// Type the checkpoints are stored in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveDtype {
    #[default]
    F32,
    F16,
    /// As the original trainers store them
    Bf16,
}

/// Declares options that a flag or a line of the file may set; neither sets them to begin with.
macro_rules! flags {
    ($(#[$outer:meta])* $heading:literal $struct:ident { $($(#[$meta:meta])* $name:ident: $type:ty,)* }) => {
        $(#[$outer])*
        #[derive(Debug, Default, Args, Serialize, Deserialize)]
        #[command(next_help_heading = $heading)]
        pub struct $struct { $($(#[$meta])* #[arg(long)] pub $name: Option<$type>,)* }
    };
}
pub(super) use flags;

flags! {
    /// How a cartridge learns, and where it goes.
    "Training"
    TrainFlags {
    /// Held-out conversations to measure the loss on: .jsonl or .parquet, or `demo:NAME` for the demo's
    /// held-out questions. The same teacher answers or scores them, once
    eval_conversations: String,
    /// Held-out conversations to take at most, from the beginning [default: all]
    eval_limit: usize,
    /// Held-out questions with exact answers, a JSON file like those of the demo, or `demo:NAME`
    questions: String,
    /// Tokens of the cartridge [default: a twentieth of the document's]
    tokens: usize,
    /// Leading tokens that stay as they are: the attention sink [default: 1]
    num_frozen_tokens: usize,
    /// Where learning starts [default: text]
    initializer: Start,
    /// Standard deviation of random numbers to start from [default: 1, as the original trainers]
    #[arg(value_parser = finite::<f32>)]
    init_scale: f32,
    /// Cartridge file to start from, with --initializer cartridge
    init_cartridge: PathBuf,
    /// Learn the teacher's distributions or its tokens [default: logits]
    targets: TargetsArg,
    /// Tokens of a pack [default: 2048]
    packed_seq_length: usize,
    /// What to do with a sequence that does not fit a pack any more [default: pad]
    packing_mode: PackingMode,
    /// Packs per update [default: 1]
    global_batch_size: usize,
    /// Times the data is gone through [default: 5]
    epochs: u64,
    /// Updates at most [default: as the epochs give]
    max_optimizer_steps: u64,
    /// Learning rate [default: 2e-2]
    #[arg(value_parser = finite::<f64>)]
    lr: f64,
    /// How it falls after the warm-up [default: constant]
    lr_schedule: Decay,
    /// Updates over which it rises [default: 0]
    warmup_steps: u64,
    /// Where it rises from [default: 0]
    #[arg(value_parser = finite::<f64>)]
    warmup_min_lr: f64,
    /// Where it falls to, as a fraction of --lr [default: 0.1]
    #[arg(value_parser = finite::<f64>)]
    alpha_f: f64,
    /// Learning rates as the original trainers' schedules give them: one update late, the first at --lr
    /// [default: false]
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    parity_schedule: bool,
    /// Weight decay as torch's Adam has it [default: 0]
    #[arg(value_parser = finite::<f64>)]
    weight_decay: f64,
    /// Clip the gradient to this norm [default: not]
    #[arg(value_parser = finite::<f64>)]
    max_grad_norm: f64,
    /// Divide the loss of a pack by its supervised tokens, or by its entries as the original trainer
    /// [default: tokens]
    loss_normalizer: Normalizer,
    /// Temperature of the student's distribution [default: 1]
    #[arg(value_parser = finite::<f32>)]
    loss_temperature: f32,
    /// Keep one layer's activations in memory instead of all and compute the others again
    /// [default: false]
    recompute: bool,
    /// Folder of the run; a run that was begun there goes on [default: runs/ and the document's name]
    run_dir: PathBuf,
    /// Updates between checkpoints [default: 100]
    save_every_n_steps: u64,
    /// Checkpoints kept; 0 keeps all [default: 2]
    keep_last_n_saved: usize,
    /// Type of the stored cartridge [default: f32]
    save_dtype: SaveDtype,
    /// Updates between measurements with --eval-conversations; 0: only before and after [default: 0]
    loss_eval_every_n_steps: u64,
    /// Updates between evaluations with --questions; 0: only before and after [default: 0]
    generate_eval_every_n_steps: u64,
    /// Id to publish the cartridge under in --cartridge-dir; a running server takes it up
    publish: String,
    }
}

impl TrainFlags {
    pub fn trainer(&self, packs: usize, seed: u64) -> Result<TrainerOptions, CliError> {
        let global_batch_size =
            at_least_1("global_batch_size", self.global_batch_size.unwrap_or(1))?;
        let epochs = self.epochs.unwrap_or(5);
        let by_epochs = epochs.saturating_mul(packs as u64) / global_batch_size as u64;
        let max_steps = self.max_optimizer_steps.unwrap_or(by_epochs).min(by_epochs);
        let adam = AdamOptions::default();
        Ok(TrainerOptions {
            schedule: Schedule {
                lr: positive("lr", self.lr.unwrap_or(2e-2))?,
                decay: self.lr_schedule.unwrap_or_default(),
                warmup_steps: self.warmup_steps.unwrap_or(0),
                warmup_min_lr: self.warmup_min_lr.unwrap_or(0.0),
                alpha_f: self.alpha_f.unwrap_or(0.1),
                max_steps,
                parity: self.parity_schedule.unwrap_or(false),
            },
            adam: AdamOptions {
                weight_decay: self.weight_decay.unwrap_or(adam.weight_decay),
                max_grad_norm: self.max_grad_norm.or(adam.max_grad_norm),
                ..adam
            },
            global_batch_size,
            step: self.step()?,
            seed,
        })
    }

    pub fn step(&self) -> Result<StepOptions, CliError> {
        let temperature =
            positive("loss_temperature", f64::from(self.loss_temperature.unwrap_or(1.0)))?;
        Ok(StepOptions {
            normalizer: self.loss_normalizer.unwrap_or_default(),
            temperature: temperature as f32,
            recompute: self.recompute.unwrap_or(false),
        })
    }
}

/// A number that is neither infinite nor NaN: a YAML file could not hold those either.
pub fn finite<T: FromStr + Into<f64> + Copy>(text: &str) -> Result<T, String> {
    match text.parse::<T>() {
        Ok(number) if number.into().is_finite() => Ok(number),
        _ => Err("must be a number".to_owned()),
    }
}

pub fn usage(message: String) -> CliError {
    CliError::Usage(message)
}

pub fn at_least_1(name: &str, value: usize) -> Result<usize, CliError> {
    if value == 0 { Err(usage(format!("{name} must be at least 1"))) } else { Ok(value) }
}

fn positive(name: &str, value: f64) -> Result<f64, CliError> {
    match value.is_finite() && value > 0.0 {
        true => Ok(value),
        false => Err(usage(format!("{name} {value} must be above 0"))),
    }
}
