//! The options of `cartouche train` and `cartouche synthesize` that decide what is learned from.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::options::{at_least_1, finite, flags, usage};
use crate::cli::CliError;
use crate::train::TeacherOptions;
use crate::train::dataset::MassCut;
use crate::train::self_study::{ChunkSizes, SeedKind, SelfStudyOptions, own_seeds};

/// What of the document the teacher has in its prompt when it answers questions of self-study.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherContext {
    Document,
    /// The part the question was asked about
    Chunk,
}

flags! {
    /// What is learned from: the document, the questions, the teacher's answers.
    "Data"
    DataFlags {
    /// Text file the cartridge is to stand for, or `demo:NAME` for a document of the demo model
    document: String,
    /// Questions or conversations: .jsonl or .parquet, or `demo:NAME`. The teacher answers what has no
    /// answer and scores what has no log-probabilities [default: the model asks itself: self-study]
    conversations: String,
    /// Conversations of the file to take at most, from the beginning [default: all]
    limit: usize,
    /// Self-study: conversations to make [default: 512]
    num_samples: usize,
    /// Self-study: conversations in a row about one chunk of the document, which is computed once for them
    /// [default: 8]
    conversations_per_chunk: usize,
    /// Self-study: tokens of a chunk at least [default: 512, or --max-tokens-per-chunk]
    min_tokens_per_chunk: usize,
    /// Self-study: tokens of a chunk at most [default: 1024, or --min-tokens-per-chunk]
    max_tokens_per_chunk: usize,
    /// Self-study: what to ask for, separated by commas [default: all]
    #[arg(value_enum, value_delimiter = ',')]
    seed_kinds: Vec<SeedKind>,
    /// Self-study: file of seed prompts of your own, one on each line: instructions to write a user's
    /// message about the text above
    seed_prompts: PathBuf,
    /// Self-study: tokens of a question at most [default: 512]
    question_tokens: usize,
    /// Self-study: temperature of the questions [default: 0.6]
    #[arg(value_parser = finite::<f32>)]
    question_temperature: f32,
    /// Self-study: what the teacher has in its prompt when it answers [default: the document if it fits the
    /// model's context, else the chunk]
    teacher_context: TeacherContext,
    /// Keep the likeliest tokens of each position up to this probability [default: 0.99]
    #[arg(value_parser = finite::<f32>)]
    min_prob_mass: f32,
    /// Alternatives per token the teacher gives at most [default: 20]
    top_logprobs: usize,
    /// Tokens of an answer of the teacher at most [default: 256]
    answer_tokens: usize,
    /// Temperature of the teacher's answers [default: 0]
    #[arg(value_parser = finite::<f32>)]
    answer_temperature: f32,
    /// Of all that is drawn: questions, answers, the order of the data, random starts [default: 42]
    seed: u64,
    }
}

impl DataFlags {
    pub fn document(&self) -> Result<&str, CliError> {
        let missing = || usage("--document: which text is the cartridge to stand for?".to_owned());
        self.document.as_deref().ok_or_else(missing)
    }

    /// Refuses options that would have no effect.
    pub fn check(&self) -> Result<(), CliError> {
        let of_study = [
            ("num-samples", self.num_samples.is_some()),
            ("conversations-per-chunk", self.conversations_per_chunk.is_some()),
            ("min-tokens-per-chunk", self.min_tokens_per_chunk.is_some()),
            ("max-tokens-per-chunk", self.max_tokens_per_chunk.is_some()),
            ("seed-kinds", self.seed_kinds.is_some()),
            ("seed-prompts", self.seed_prompts.is_some()),
            ("question-tokens", self.question_tokens.is_some()),
            ("question-temperature", self.question_temperature.is_some()),
            ("teacher-context", self.teacher_context.is_some()),
        ];
        if self.conversations.is_none() {
            return match self.limit {
                None => Ok(()),
                Some(_) => Err(usage(
                    "--limit is of the conversations of a file; without one, --num-samples says how many to \
                     make"
                        .to_owned(),
                )),
            };
        }
        match of_study.iter().find(|(_, is_set)| *is_set) {
            None => Ok(()),
            Some((name, _)) => Err(usage(format!(
                "--{name} is of self-study; leave out --conversations to have the model ask"
            ))),
        }
    }

    pub fn self_study(&self) -> Result<SelfStudyOptions, CliError> {
        let (min, max) = (self.min_tokens_per_chunk, self.max_tokens_per_chunk);
        let own = self.seed_prompts.as_deref().map(own_seeds).transpose()?;
        let kinds = match &self.seed_kinds {
            Some(kinds) => kinds.clone(),
            None => {
                let own = own.is_some().then_some(SeedKind::Own);
                SeedKind::BUILT_IN.into_iter().chain(own).collect()
            }
        };
        if own.is_some() != kinds.contains(&SeedKind::Own) {
            return Err(usage(
                "--seed-kinds own and --seed-prompts FILE need each other".to_owned(),
            ));
        }
        let own = own.unwrap_or_default();
        let seeds = kinds.into_iter().flat_map(|kind| match kind {
            SeedKind::Own => own.clone(),
            kind => kind.seeds(),
        });
        let temperature = self.question_temperature.unwrap_or(0.6);
        Ok(SelfStudyOptions {
            samples: self.num_samples.unwrap_or(512),
            per_chunk: self.conversations_per_chunk.unwrap_or(8),
            chunk: ChunkSizes {
                min: min.unwrap_or(max.map_or(512, |max| max.min(512))),
                max: max.unwrap_or(min.map_or(1024, |min| min.max(1024))),
            },
            seeds: seeds.collect(),
            max_tokens: at_least_1("question_tokens", self.question_tokens.unwrap_or(512))?,
            temperature: not_negative("question_temperature", temperature)?,
            seed: self.seed(),
        })
    }

    pub fn teacher(&self, stop_token_ids: &[u32]) -> Result<TeacherOptions, CliError> {
        let temperature = self.answer_temperature.unwrap_or(0.0);
        Ok(TeacherOptions {
            top: at_least_1("top_logprobs", self.top_logprobs.unwrap_or(20))?,
            cut: self.cut()?,
            max_tokens: self.answer_tokens()?,
            temperature: not_negative("answer_temperature", temperature)?,
            seed: self.seed(),
            stop_token_ids: stop_token_ids.to_vec(),
        })
    }

    pub fn answer_tokens(&self) -> Result<usize, CliError> {
        at_least_1("answer_tokens", self.answer_tokens.unwrap_or(256))
    }

    pub fn cut(&self) -> Result<MassCut, CliError> {
        let mass = self.min_prob_mass.unwrap_or(0.99);
        match mass > 0.0 && mass <= 1.0 {
            true => Ok(MassCut { min_prob_mass: f64::from(mass), ..MassCut::default() }),
            false => Err(usage(format!("min_prob_mass {mass} must be above 0 and at most 1"))),
        }
    }

    pub fn seed(&self) -> u64 {
        self.seed.unwrap_or(42)
    }
}

fn not_negative(name: &str, value: f32) -> Result<f32, CliError> {
    match value.is_finite() && value >= 0.0 {
        true => Ok(value),
        false => Err(usage(format!("{name} {value} must be 0 or more"))),
    }
}
