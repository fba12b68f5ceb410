//! Asking: what a user could want to know, written by the model itself.

use std::collections::HashSet;
use std::ops::Range;

use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::clean::{Unusable, clean, sameness};
use super::error::Tally;
use super::seeds::draw;
use super::{ChunkSizes, Chunks, Purpose, Seed, SeedKind, SelfStudyError, random};
use crate::engine::{
    EngineError, EngineHandle, Event, FinishReason, GenerateRequest, LogprobOptions, Priority,
    SamplingParams, TokenStream,
};
use crate::limits::MAX_SELF_STUDY_SAMPLES;
use crate::text::{ChatTemplate, TemplateRequest, TextError, Tokenizer};
use crate::train::Journal;
use crate::train::in_flight::side_by_side;

/// Tries of one conversation, each with another seed prompt and other random numbers.
const ATTEMPTS: u32 = 3;

/// How a document is studied.
#[derive(Debug, Clone)]
pub struct SelfStudyOptions {
    /// Conversations to begin.
    pub samples: usize,
    /// Consecutive conversations about the same chunk, which is computed once for them.
    pub per_chunk: usize,
    pub chunk: ChunkSizes,
    pub seeds: Vec<Seed>,
    /// Of a message.
    pub max_tokens: usize,
    pub temperature: f32,
    pub seed: u64,
}

/// The model that asks.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    pub engine: &'a EngineHandle,
    pub tokenizer: &'a Tokenizer,
    pub template: &'a ChatTemplate,
    pub stop_token_ids: &'a [u32],
}

/// What a user could ask about a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    pub text: String,
    pub kind: SeedKind,
    pub seed_prompt: String,
    /// The bytes of the document it was asked about.
    pub chunk: Range<usize>,
}

/// What the model wrote, as it wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draft {
    pub text: String,
    /// Whether it came to an end by itself.
    pub is_finished: bool,
}

/// Questions about `document`, in the order of their numbers; numbers without a usable one are left out.
/// Those `journal` knows are not asked again; `done` is called for each message.
///
/// # Errors
/// [`SelfStudyError`] for options out of range, prompts that do not fit the model's context, and when fewer
/// than half of the conversations came to a question.
pub fn ask(
    asker: Asker<'_>,
    document: &str,
    options: &SelfStudyOptions,
    journal: &mut Journal,
    mut done: impl FnMut(),
) -> Result<Vec<Question>, SelfStudyError> {
    if !(1..=MAX_SELF_STUDY_SAMPLES).contains(&options.samples) {
        return Err(SelfStudyError::Samples(options.samples));
    }
    if options.per_chunk == 0 {
        return Err(SelfStudyError::PerChunk);
    }
    let chunks = Chunks::new(document, asker.tokenizer, options.chunk, options.seed)?;
    let study = Study { asker, document, options, chunks };
    let mut kept: Vec<Option<Question>> = vec![None; options.samples];
    let mut seen = HashSet::new();
    let (mut tally, mut wrote) = (Tally::default(), None);
    let mut open: Vec<usize> = (0..options.samples).collect();
    for attempt in 0..ATTEMPTS {
        study.write(attempt, &open, journal, &mut done)?;
        let mut again = Vec::new();
        for &index in &open {
            let Some(draft) = journal.draft(attempt, index) else { continue };
            let left_out = match clean(&draft.text, draft.is_finished) {
                Ok(text) if seen.insert(sameness(text)) => {
                    kept[index] = Some(study.question(index, attempt, text)?);
                    continue;
                }
                Ok(_) => &mut tally.repeated,
                Err(Unusable::Short) => &mut tally.short,
                Err(Unusable::Unfinished) => &mut tally.unfinished,
            };
            *left_out += 1;
            wrote.get_or_insert_with(|| draft.text.chars().take(80).collect());
            again.push(index);
        }
        open = again;
        // Further tries would not get there.
        if (options.samples - open.len()) * 8 < options.samples {
            break;
        }
    }
    let samples = options.samples;
    let questions: Vec<Question> = kept.into_iter().flatten().collect();
    if questions.len() * 2 < samples {
        // It would come to the same, and stand in the way of other options.
        journal.remove()?;
        return Err(SelfStudyError::TooFew { samples, kept: questions.len(), tally, wrote });
    }
    Ok(questions)
}

struct Study<'a> {
    asker: Asker<'a>,
    document: &'a str,
    options: &'a SelfStudyOptions,
    chunks: Chunks<'a>,
}

impl Study<'_> {
    /// Has the messages of the conversations `open` written, into the journal.
    fn write(
        &self,
        attempt: u32,
        open: &[usize],
        journal: &mut Journal,
        done: &mut impl FnMut(),
    ) -> Result<(), SelfStudyError> {
        let missing: Vec<usize> =
            open.iter().copied().filter(|&i| journal.draft(attempt, i).is_none()).collect();
        (missing.len()..open.len()).for_each(|_| done());
        let requests = missing.iter().map(|&index| Ok((index, self.request(index, attempt)?)));
        // All prompts are tried before the first is computed.
        let requests: Vec<_> = requests.collect::<Result<_, SelfStudyError>>()?;
        let read = async |_, stream| self.draft(stream).await;
        side_by_side(self.asker.engine, requests, read, |index, draft| {
            journal.add_draft(attempt, index, draft)?;
            done();
            Ok(())
        })?;
        Ok(())
    }

    fn request(&self, index: usize, attempt: u32) -> Result<GenerateRequest, SelfStudyError> {
        let Asker { engine, tokenizer, template, stop_token_ids } = self.asker;
        let chunk = self.chunks.chunk(index / self.options.per_chunk)?;
        let seed = self.seed(index, attempt)?;
        let messages = [
            json!({"role": "system", "content": self.document[chunk.bytes].trim()}),
            json!({"role": "user", "content": seed.text}),
        ];
        // A message is to be written, not thought about; templates that do not know it ignore it.
        let kwargs = Map::from_iter([("enable_thinking".to_owned(), Value::Bool(false))]);
        let text = template.render(&TemplateRequest {
            messages: &messages,
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: &kwargs,
        })?;
        let prompt = tokenizer.encode(&text, false)?;
        let max_tokens = self.options.max_tokens;
        let limit = engine.info().max_context.min(engine.info().kv_tokens);
        if prompt.len() + max_tokens > limit {
            return Err(SelfStudyError::TooLong { prompt: prompt.len(), max_tokens, limit });
        }
        let sampling_seed = random(self.options.seed, Purpose::Sampling, index, attempt).next_u64();
        Ok(GenerateRequest {
            prompt,
            cartridges: Vec::new(),
            n: 1,
            sampling: SamplingParams {
                temperature: self.options.temperature,
                max_tokens,
                seed: Some(sampling_seed),
                ..SamplingParams::default()
            },
            stop_token_ids: stop_token_ids.to_vec(),
            logprobs: LogprobOptions::default(),
            priority: Priority::Batch,
            cache_salt: None,
        })
    }

    fn seed(&self, index: usize, attempt: u32) -> Result<&Seed, SelfStudyError> {
        let SelfStudyOptions { seeds, seed, .. } = self.options;
        draw(seeds, *seed, index, attempt).ok_or(SelfStudyError::NoSeeds)
    }

    async fn draft(&self, mut stream: TokenStream) -> Result<Draft, EngineError> {
        let (mut ids, mut is_finished) = (Vec::new(), false);
        while let Some(event) = stream.next().await {
            match event {
                Event::Token { token, .. } => ids.push(token.id),
                // The last token may be the end at the very limit.
                Event::Finished { reason, .. } => {
                    let stop = self.asker.stop_token_ids;
                    let ended = ids.last().is_some_and(|id| stop.contains(id));
                    is_finished = reason == FinishReason::Stop || ended;
                }
                Event::Failed(error) => return Err(error),
                Event::PromptDone { .. } => {}
            }
        }
        let text = self.asker.tokenizer.decode(&ids, true);
        let text = text.map_err(|e: TextError| EngineError::Internal(e.to_string()))?;
        Ok(Draft { text, is_finished })
    }

    fn question(&self, index: usize, attempt: u32, text: &str) -> Result<Question, SelfStudyError> {
        let seed = self.seed(index, attempt)?;
        Ok(Question {
            text: text.to_owned(),
            kind: seed.kind,
            seed_prompt: seed.text.clone(),
            chunk: self.chunks.chunk(index / self.options.per_chunk)?.bytes,
        })
    }
}
