//! The teacher: the same model with the document in its prompt. It answers and says how likely it found
//! each token and its alternatives.

use serde::{Deserialize, Serialize};

use super::dataset::{Element, MassCut, TopLogprobs};
use super::in_flight::side_by_side;
use super::{Journal, Targets, TrainError};
use crate::engine::{
    EngineError, EngineHandle, Event, GenerateRequest, LogprobOptions, Priority, SampledToken,
    SamplingParams, TokenStream,
};

/// How the teacher answers.
#[derive(Debug, Clone)]
pub struct TeacherOptions {
    /// Alternatives per token, at most; the paper uses 20.
    pub top: usize,
    /// Which of them are kept.
    pub cut: MassCut,
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

/// An answer with the teacher's distribution at each of its tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    /// The end token included, if the teacher came to it.
    pub token_ids: Vec<u32>,
    /// Positions are indices into `token_ids`.
    pub top_logprobs: TopLogprobs,
}

/// Has all `lessons` answered or scored, side by side. Those `journal` knows are not asked again, the others
/// go into it one by one; `done` is called for each.
///
/// # Errors
/// [`TrainError::Teacher`] as the engine says, e.g. for a document that does not fit the context;
/// [`TrainError::Io`] of the journal.
pub fn teach(
    engine: &EngineHandle,
    lessons: &[Lesson],
    options: &TeacherOptions,
    journal: &mut Journal,
    mut done: impl FnMut(),
) -> Result<Vec<Answered>, TrainError> {
    let missing: Vec<usize> =
        (0..lessons.len()).filter(|&index| journal.answer(index).is_none()).collect();
    (missing.len()..lessons.len()).for_each(|_| done());
    let requests =
        missing.into_iter().map(|index| (index, request(&lessons[index], index, options)));
    let read = async |index: usize, stream| {
        let tokens = match &lessons[index].answer {
            Some(answer) => scored(stream, answer.len()).await?,
            None => generated(stream).await?,
        };
        answered(&tokens, options.cut)
    };
    side_by_side(engine, requests, read, |index, answer| {
        journal.add_answer(index, answer)?;
        done();
        Ok(())
    })?;
    Ok((0..lessons.len()).filter_map(|index| journal.answer(index).cloned()).collect())
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
        cache_salt: None,
    }
}

async fn generated(mut stream: TokenStream) -> Result<Vec<SampledToken>, EngineError> {
    let mut answer = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::Token { token, .. } => answer.push(token),
            Event::Failed(error) => return Err(error),
            Event::PromptDone { .. } | Event::Finished { .. } => {}
        }
    }
    Ok(answer)
}

/// The log-probabilities of the last `len` prompt tokens.
async fn scored(mut stream: TokenStream, len: usize) -> Result<Vec<SampledToken>, EngineError> {
    let mut scored = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::PromptDone { logprobs, .. } => {
                let start = logprobs.len() - len.min(logprobs.len());
                scored = logprobs.into_iter().skip(start).flatten().collect();
            }
            Event::Failed(error) => return Err(error),
            Event::Token { .. } | Event::Finished { .. } => {}
        }
    }
    Ok(scored)
}

fn answered(tokens: &[SampledToken], cut: MassCut) -> Result<Answered, EngineError> {
    let split =
        |token: &SampledToken| token.top.iter().map(|&(id, lp)| (i64::from(id), lp)).unzip();
    let (ids, logprobs): (Vec<_>, Vec<_>) = tokens.iter().map(split).unzip();
    let top = TopLogprobs::dense(&ids, &logprobs);
    let top = top.map_err(|reason| EngineError::Internal(format!("a distribution {reason}")))?;
    let token_ids = tokens.iter().map(|token| token.id).collect();
    Ok(Answered { token_ids, top_logprobs: top.cut(cut) })
}

impl Lesson {
    /// The student's sequence with the teacher's distributions as its targets.
    pub fn element(&self, answer: &Answered, row: usize) -> Element {
        let prompt = &self.student_prompt;
        // The row before a token predicts it; a prompt is never empty.
        let begin = prompt.len().saturating_sub(1) as u32;
        let mut targets = Targets::default();
        for (position, id, logprob) in answer.top_logprobs.entries() {
            targets.push(begin + position, id, logprob.exp());
        }
        let supervised = begin..begin + answer.token_ids.len() as u32;
        let tokens = [&prompt[..], &answer.token_ids].concat();
        Element { tokens, targets, supervised: vec![supervised], row }
    }
}
