//! The teacher: the same model with the whole document in its prompt. It answers and says how likely it
//! found each token and its alternatives.

use std::collections::VecDeque;

use super::{Targets, TrainError};
use crate::engine::{
    EngineHandle, Event, GenerateRequest, LogprobOptions, Priority, SampledToken, SamplingParams,
    TokenStream,
};

/// Requests on their way at once: enough to fill a step, few enough for any queue.
const IN_FLIGHT: usize = 32;

/// How the teacher answers.
#[derive(Debug, Clone)]
pub struct TeacherOptions {
    /// Alternatives per token, at most; the paper uses 20.
    pub top: usize,
    pub max_tokens: usize,
    /// Of the answers; their log-probabilities are always those at temperature 1.
    pub temperature: f32,
    pub seed: u64,
    pub stop_token_ids: Vec<u32>,
}

/// What the teacher is asked.
#[derive(Debug, Clone)]
pub struct Lesson {
    /// With the document.
    pub teacher_prompt: Vec<u32>,
    /// Without: what a request with the cartridge will send.
    pub student_prompt: Vec<u32>,
    /// A known answer, to be scored only.
    pub answer: Option<Vec<u32>>,
}

/// A student's sequence with the teacher's distribution after each token of the answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Taught {
    pub tokens: Vec<u32>,
    /// Tokens before the answer.
    pub prompt_tokens: usize,
    pub targets: Targets,
}

/// Has all `lessons` answered or scored, side by side; `done` is called after each. Entries beyond
/// `min_prob_mass` of a position are left out.
///
/// # Errors
/// [`TrainError::Teacher`] as the engine says, e.g. for a document that does not fit the context.
pub fn teach(
    engine: &EngineHandle,
    lessons: &[Lesson],
    options: &TeacherOptions,
    min_prob_mass: f32,
    mut done: impl FnMut(),
) -> Result<Vec<Taught>, TrainError> {
    let mut taught = Vec::with_capacity(lessons.len());
    let mut running: VecDeque<(usize, TokenStream)> = VecDeque::new();
    let mut next = 0;
    while taught.len() < lessons.len() {
        while next < lessons.len() && running.len() < IN_FLIGHT {
            running.push_back((next, engine.submit(request(&lessons[next], next, options))?));
            next += 1;
        }
        let Some((index, stream)) = running.pop_front() else { break };
        let lesson = &lessons[index];
        let answer = match &lesson.answer {
            Some(answer) => scored(stream, answer.len())?,
            None => generated(stream)?,
        };
        taught.push(lesson.taught(&answer, min_prob_mass));
        done();
    }
    Ok(taught)
}

fn request(lesson: &Lesson, index: usize, options: &TeacherOptions) -> GenerateRequest {
    let (mut prompt, mut max_tokens) = (lesson.teacher_prompt.clone(), options.max_tokens);
    let mut logprobs =
        LogprobOptions { top: options.top, prompt_top: None, ignore_temperature: true };
    if let Some(answer) = &lesson.answer {
        prompt.extend_from_slice(answer);
        (max_tokens, logprobs.prompt_top) = (0, Some(options.top));
    }
    GenerateRequest {
        prompt,
        cartridges: Vec::new(),
        n: 1,
        sampling: SamplingParams {
            temperature: options.temperature,
            max_tokens,
            seed: Some(options.seed.wrapping_add(index as u64)),
            ..SamplingParams::default()
        },
        stop_token_ids: options.stop_token_ids.clone(),
        logprobs,
        priority: Priority::Batch,
    }
}

fn generated(mut stream: TokenStream) -> Result<Vec<SampledToken>, TrainError> {
    let mut answer = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Token { token, .. } => answer.push(token),
            Event::Failed(error) => return Err(error.into()),
            Event::PromptDone { .. } | Event::Finished { .. } => {}
        }
    }
    Ok(answer)
}

/// The log-probabilities of the last `len` prompt tokens.
fn scored(mut stream: TokenStream, len: usize) -> Result<Vec<SampledToken>, TrainError> {
    let mut scored = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::PromptDone { logprobs, .. } => {
                let start = logprobs.len() - len.min(logprobs.len());
                scored = logprobs.into_iter().skip(start).flatten().collect();
            }
            Event::Failed(error) => return Err(error.into()),
            Event::Token { .. } | Event::Finished { .. } => {}
        }
    }
    Ok(scored)
}

impl Lesson {
    fn taught(&self, answer: &[SampledToken], min_prob_mass: f32) -> Taught {
        let mut tokens = self.student_prompt.clone();
        let mut targets = Targets::default();
        for token in answer {
            // The row before predicts this token.
            let row = tokens.len().saturating_sub(1) as u32;
            let mut mass = 0.0;
            for (id, logprob) in &token.top {
                if mass >= min_prob_mass {
                    break;
                }
                let prob = logprob.exp();
                targets.push(row, *id, prob);
                mass += prob;
            }
            tokens.push(token.id);
        }
        Taught { tokens, prompt_tokens: self.student_prompt.len(), targets }
    }
}
