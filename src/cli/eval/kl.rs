//! How far a way of asking is from the teacher, the model with the document in its prompt.
//!
//! The teacher answers greedily, and each mode is given that very answer token by token. Distributions are
//! those at temperature 1 over the whole vocabulary, so no tail has to be guessed.

use std::iter::Sum;

use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::model::Decoder;
use crate::train::{
    Lesson, Pack, PrefixLayer, StepOptions, Targets, Taught, TeacherOptions, evaluate, teach,
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

/// The teacher's answers and its distribution at each of their tokens.
pub struct Teacher<'a> {
    decoder: &'a Decoder,
    taught: Vec<Taught>,
}

impl<'a> Teacher<'a> {
    /// Answers `prompts`, which hold the document.
    pub fn answers(
        runtime: &'a Runtime,
        prompts: impl Iterator<Item = Vec<u32>>,
    ) -> Result<Self, CliError> {
        let lesson = |prompt: Vec<u32>| Lesson {
            student_prompt: prompt.clone(),
            teacher_prompt: prompt,
            answer: None,
        };
        let lessons: Vec<Lesson> = prompts.map(lesson).collect();
        let options = TeacherOptions {
            top: runtime.engine.info().vocab_size,
            max_tokens: super::MAX_ANSWER_TOKENS,
            temperature: 0.0,
            seed: 0,
            stop_token_ids: runtime.model.eos_token_ids.clone(),
        };
        // Rounding may add up to more than 1 before the last entry: nothing is cut.
        let taught = teach(&runtime.engine, &lessons, &options, f32::INFINITY, || {})?;
        Ok(Self { decoder: &runtime.decoder, taught })
    }

    /// From the teacher to the model with `prompt` behind `prefix`, over the tokens of answer `index`.
    pub fn divergence(
        &self,
        index: usize,
        prompt: &[u32],
        prefix: &[PrefixLayer],
    ) -> Result<Divergence, CliError> {
        let Taught { tokens, prompt_tokens, targets } = &self.taught[index];
        let tokens = [prompt, &tokens[*prompt_tokens..]].concat();
        let rows = targets.rows.iter().map(|row| row + prompt.len() as u32 - *prompt_tokens as u32);
        let pack = Pack {
            cu_seqlens: vec![0, tokens.len() as u32],
            tokens,
            targets: Targets { rows: rows.collect(), ..targets.clone() },
            dataset_rows: Vec::new(),
        };
        let loss = evaluate(self.decoder, prefix, &pack, &StepOptions::default())?;
        Ok(Divergence { sum: loss.nll_sum + loss.entropy_sum, tokens: loss.rows })
    }
}
