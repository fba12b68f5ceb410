//! How far a way of asking is from the teacher, the model with the document in its prompt.
//!
//! The teacher answers greedily, and each mode is given that very answer token by token. Distributions are
//! those at temperature 1 over the whole vocabulary, so no tail has to be guessed.

use std::iter::Sum;

use crate::cartridge::Cartridge;
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::model::{Decoder, prefill};
use crate::train::dataset::{Element, MassCut};
use crate::train::{
    Journal, Lesson, Pack, Parameters, PrefixLayer, StepOptions, Targets, TeacherOptions, evaluate,
    teach,
};

/// Kullback-Leibler divergence in nats, summed over tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Divergence {
    sum: f64,
    pub tokens: usize,
}

impl Divergence {
    /// The mean. What rounding puts below 0 is 0.
    pub fn per_token(self) -> f64 {
        (self.sum / self.tokens.max(1) as f64).max(0.0)
    }
}

impl Sum for Divergence {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |a, b| Self { sum: a.sum + b.sum, tokens: a.tokens + b.tokens })
    }
}

/// The prompts of one way of asking, with what comes before them.
pub struct Prompts {
    /// A cartridge; or what all prompts begin with, computed once.
    prefix: Vec<PrefixLayer>,
    /// Tokens of each prompt that are in `prefix`.
    shared: usize,
    prompts: Vec<Vec<u32>>,
}

impl Prompts {
    pub fn new(
        runtime: &Runtime,
        cartridge: Option<&Cartridge>,
        prompts: Vec<Vec<u32>>,
    ) -> Result<Self, CliError> {
        let shared = if cartridge.is_some() { 0 } else { shared_tokens(&prompts) };
        let layers = match cartridge {
            Some(cartridge) => cartridge.layers().to_vec(),
            None if shared == 0 => Vec::new(),
            None => prefill(&runtime.decoder, &prompts[0][..shared])?,
        };
        let prefix = match layers.is_empty() {
            true => Vec::new(),
            false => Parameters::new(&layers, 0)?.prefix(runtime.decoder.device())?,
        };
        Ok(Self { prefix, shared, prompts })
    }
}

/// Tokens that all prompts begin with. Of each at least one is left over.
fn shared_tokens(prompts: &[Vec<u32>]) -> usize {
    let Some((first, others)) = prompts.split_first() else { return 0 };
    others.iter().fold(first.len().saturating_sub(1), |shared, other| {
        let equal = first.iter().zip(other).take_while(|(a, b)| a == b).count();
        shared.min(equal).min(other.len().saturating_sub(1))
    })
}

/// The teacher's answers and its distribution at each of their tokens.
pub struct Teacher<'a> {
    decoder: &'a Decoder,
    /// The teacher's sequences with its distributions as targets.
    taught: Vec<Element>,
}

impl<'a> Teacher<'a> {
    /// Answers `prompts`, which hold the document.
    pub fn answers(runtime: &'a Runtime, prompts: &Prompts) -> Result<Self, CliError> {
        let lesson = |prompt: &Vec<u32>| Lesson {
            student_prompt: prompt.clone(),
            teacher_prompt: prompt.clone(),
            answer: None,
        };
        let lessons: Vec<Lesson> = prompts.prompts.iter().map(lesson).collect();
        let options = TeacherOptions {
            top: runtime.engine.info().vocab_size,
            // Rounding may add up to more than 1 before the last entry: nothing is cut.
            cut: MassCut { min_prob_mass: f64::INFINITY, ..MassCut::default() },
            max_tokens: super::MAX_ANSWER_TOKENS,
            temperature: 0.0,
            seed: 0,
            stop_token_ids: runtime.model.eos_token_ids.clone(),
        };
        let mut in_memory = Journal::default();
        let answers = teach(&runtime.engine, &lessons, &options, &mut in_memory, || {})?;
        let taught = lessons.iter().zip(&answers).map(|(lesson, answer)| lesson.element(answer, 0));
        Ok(Self { decoder: &runtime.decoder, taught: taught.collect() })
    }

    /// From the teacher to the model with prompt `index`, over the tokens of the teacher's answer to it.
    pub fn divergence(&self, prompts: &Prompts, index: usize) -> Result<Divergence, CliError> {
        let Element { tokens, targets, supervised, .. } = &self.taught[index];
        // The row before a token predicts it.
        let prompt_tokens = supervised.first().map_or(0, |rows| rows.start as usize + 1);
        let prompt = &prompts.prompts[index][prompts.shared..];
        let tokens = [prompt, &tokens[prompt_tokens..]].concat();
        let rows = targets.rows.iter().map(|row| row + prompt.len() as u32 - prompt_tokens as u32);
        let pack = Pack {
            cu_seqlens: vec![0, tokens.len() as u32],
            tokens,
            targets: Targets { rows: rows.collect(), ..targets.clone() },
            dataset_rows: Vec::new(),
        };
        let loss = evaluate(self.decoder, &prompts.prefix, &pack, &StepOptions::default())?;
        Ok(Divergence { sum: loss.nll_sum + loss.entropy_sum, tokens: loss.rows })
    }
}
