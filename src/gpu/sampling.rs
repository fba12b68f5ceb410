//! Tokens and log-probabilities where the logits are: what the kernels `sample` and `logprobs` are given, and
//! what comes back of their results.
//!
//! The host's numbers of a call go to the device in one copy and the results come back in one. Logits stay.

use std::collections::HashMap;

use candle_core::{DType, Result, Tensor};

use super::launch::{Arg, Launch};
use super::machine::address;
use super::ops::room;
use crate::engine::{Adjustment, SampledToken, SamplingParams};

/// Tokens of a vocabulary that the kernels can tell apart.
pub const MAX_VOCAB: usize = 1 << 20;
/// Alternatives of a row that the kernel `logprobs` gives.
pub const MAX_TOP: usize = 256;
/// Added to the count of a token that the prompt has.
const IN_PROMPT: u32 = 1 << 30;
/// In place of the count of a token that must not be drawn.
const FORBIDDEN: u32 = u32::MAX;

/// What the next token of a sequence is drawn from, beside its logits.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    pub params: &'a SamplingParams,
    /// In [0, 1).
    pub uniform: f64,
    pub adjustments: &'a HashMap<u32, Adjustment>,
    /// Never drawn.
    pub forbidden: &'a [u32],
}

/// Which log-probabilities are wanted of a row.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// As [`crate::engine::token_logprobs`] takes it.
    pub temperature: f32,
    /// Alternatives, at most [`MAX_TOP`].
    pub top: usize,
}

/// Draws a token from every row of `logits` `[rows, vocab]`; `None` where the row is not finite.
///
/// # Errors
/// Logits that are not f32 and contiguous or do not have as many rows; more than [`MAX_VOCAB`] tokens or
/// [`MAX_TOP`] alternatives; a failed launch.
pub fn draw(
    gpu: &dyn Launch,
    logits: &Tensor,
    rows: &[(SampleRow<'_>, Wanted)],
) -> Result<Vec<Option<SampledToken>>> {
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let mut packed = Packed::default();
    // First, so that they lie at multiples of their 8 bytes.
    let uniforms =
        packed.add(rows.iter().flat_map(|(row, _)| bytemuck::cast::<f64, [u32; 2]>(row.uniform)));
    let options = packed.add(rows.iter().flat_map(|(row, _)| {
        let p = row.params;
        let penalties = [p.repetition_penalty, p.frequency_penalty, p.presence_penalty];
        [p.temperature, p.top_p, p.min_p].into_iter().chain(penalties).map(f32::to_bits)
    }));
    let vocab = logits.dim(1)?;
    let top_ks = packed.add(rows.iter().map(|(row, _)| row.params.top_k.min(vocab) as u32));
    let mut starts = vec![0];
    let mut entries = Vec::new();
    for (row, _) in rows {
        row.add_entries(vocab, &mut entries);
        starts.push(entries.len() as u32);
    }
    let starts = packed.add(starts);
    let ids = packed.add(entries.iter().map(|entry| entry.id));
    let uses = packed.add(entries.iter().map(|entry| entry.uses));
    let biases = packed.add(entries.iter().map(|entry| entry.bias.to_bits()));
    let wanted = rows.iter().map(|(_, wanted)| *wanted).collect();
    let call = Call::new(logits, packed, wanted)?;
    let saved = room(entries.len().max(1), DType::F32, logits.device())?;
    let starts = if entries.is_empty() { Arg::from(0u64) } else { call.given(starts) };
    let args = [
        Arg::from(address(logits)?),
        call.given(uniforms),
        call.given(options),
        call.given(top_ks),
        starts,
        call.given(ids),
        call.given(uses),
        call.given(biases),
        address(&saved)?.into(),
        call.column(TOKENS),
        call.column(FLAGS),
        Arg::from(vocab as i32),
        Arg::from(vocab as i64),
    ];
    // SAFETY: the arguments of the kernel; no id is twice in a row; the tensors live until the results are read.
    unsafe { gpu.launch("sample_f32", [rows.len(), 1, 1], &args)? };
    // It writes the same flags: every adjusted logit of a finite row is finite.
    call.logprobs(gpu, logits, call.column(TOKENS))?;
    call.read(None)
}

/// Log-probabilities of `tokens[i]` in row i of `logits` `[rows, vocab]`; `None` where the row is not finite.
///
/// # Errors
/// Like [`draw`].
pub fn score(
    gpu: &dyn Launch,
    logits: &Tensor,
    tokens: &[u32],
    wanted: Wanted,
) -> Result<Vec<Option<SampledToken>>> {
    if tokens.is_empty() {
        return Ok(Vec::new());
    }
    let mut packed = Packed::default();
    let given = packed.add(tokens.iter().copied());
    let call = Call::new(logits, packed, vec![wanted; tokens.len()])?;
    call.logprobs(gpu, logits, call.given(given))?;
    call.read(Some(tokens))
}

/// What the kernel does to the logit of one token.
struct Entry {
    id: u32,
    uses: u32,
    bias: f32,
}

impl SampleRow<'_> {
    /// Every token at most once: the kernel restores each logit from what it found.
    fn add_entries(&self, vocab: usize, entries: &mut Vec<Entry>) {
        let known = |id: &u32| (*id as usize) < vocab;
        let adjusted = self.adjustments.iter().filter(|(id, _)| known(id));
        entries.extend(adjusted.map(|(id, Adjustment { bias, count, in_prompt })| {
            let uses = match self.forbidden.contains(id) {
                true => FORBIDDEN,
                false => (*count).min(IN_PROMPT - 1) + if *in_prompt { IN_PROMPT } else { 0 },
            };
            Entry { id: *id, uses, bias: *bias }
        }));
        let mut forbidden: Vec<u32> = self.forbidden.iter().copied().filter(known).collect();
        forbidden.sort_unstable();
        forbidden.dedup();
        forbidden.retain(|id| !self.adjustments.contains_key(id));
        entries.extend(forbidden.iter().map(|id| Entry { id: *id, uses: FORBIDDEN, bias: 0.0 }));
    }
}

/// Numbers of 32 bits on their way to the device.
#[derive(Default)]
struct Packed(Vec<u32>);

impl Packed {
    /// Where they begin.
    fn add(&mut self, numbers: impl IntoIterator<Item = u32>) -> usize {
        let at = self.0.len();
        self.0.extend(numbers);
        at
    }
}

/// What kernels over the rows of some logits read and write.
struct Call {
    given: Tensor,
    given_at: u64,
    temperatures: usize,
    tops: usize,
    wanted: Vec<Wanted>,
    /// Room for every row's alternatives.
    max_top: usize,
    vocab: usize,
    results: Tensor,
    results_at: u64,
}

/// Results with one number per row; ids of alternatives follow, then their log-probabilities.
const TOKENS: usize = 0;
const FLAGS: usize = 1;
const LOGPROBS: usize = 2;
const COLUMNS: usize = 3;

impl Call {
    fn new(logits: &Tensor, mut packed: Packed, wanted: Vec<Wanted>) -> Result<Self> {
        let (rows, vocab) = logits.dims2()?;
        let max_top = wanted.iter().map(|wanted| wanted.top).max().unwrap_or(0);
        if rows != wanted.len() || logits.dtype() != DType::F32 {
            candle_core::bail!("sampling: {logits:?} for {} rows of f32", wanted.len());
        }
        if vocab > MAX_VOCAB || max_top > MAX_TOP {
            candle_core::bail!(
                "sampling: {max_top} of {vocab} tokens are too many for the kernels"
            );
        }
        let temperatures = packed.add(wanted.iter().map(|wanted| wanted.temperature.to_bits()));
        let tops = packed.add(wanted.iter().map(|wanted| wanted.top as u32));
        let given = Tensor::new(packed.0.as_slice(), logits.device())?;
        let results = room(rows * (COLUMNS + 2 * max_top), DType::U32, logits.device())?;
        let (given_at, results_at) = (address(&given)?, address(&results)?);
        Ok(Self {
            given,
            given_at,
            temperatures,
            tops,
            wanted,
            max_top,
            vocab,
            results,
            results_at,
        })
    }

    fn rows(&self) -> usize {
        self.wanted.len()
    }

    /// Where what was packed at `at` lies on the device.
    fn given(&self, at: usize) -> Arg {
        Arg::from(self.given_at + 4 * at as u64)
    }

    /// Where a column of results begins; behind the last of them, the alternatives'.
    fn column(&self, column: usize) -> Arg {
        Arg::from(self.results_at + 4 * (column * self.rows()) as u64)
    }

    /// Launches the kernel for the tokens at `tokens`.
    fn logprobs(&self, gpu: &dyn Launch, logits: &Tensor, tokens: Arg) -> Result<()> {
        let vocab = self.vocab;
        let args = [
            Arg::from(address(logits)?),
            Arg::from(0u64), // every row
            tokens,
            self.given(self.temperatures),
            self.given(self.tops),
            self.column(LOGPROBS),
            self.column(COLUMNS),
            self.column(COLUMNS + self.max_top),
            self.column(FLAGS),
            Arg::from(vocab as i32),
            Arg::from(self.max_top as i32),
            Arg::from(vocab as i64),
        ];
        // SAFETY: the arguments of the kernel, for as many rows; the tensors live until the results are read.
        unsafe { gpu.launch("logprobs_f32", [self.rows(), 1, 1], &args) }
    }

    /// Waits for the results. `tokens` are those of the rows, if they are not among the results.
    fn read(self, tokens: Option<&[u32]>) -> Result<Vec<Option<SampledToken>>> {
        let numbers = self.results.to_vec1::<u32>()?;
        drop(self.given); // has been read
        let rows = self.wanted.len();
        let column = |column: usize| &numbers[column * rows..][..rows];
        let (ids, logprobs) = numbers[COLUMNS * rows..].split_at(self.max_top * rows);
        let of_row = |(row, wanted): (usize, &Wanted)| {
            let top = row * self.max_top..row * self.max_top + wanted.top.min(self.vocab);
            let top = ids[top.clone()].iter().zip(&logprobs[top]);
            let token = SampledToken {
                id: tokens.unwrap_or(column(TOKENS))[row],
                logprob: f32::from_bits(column(LOGPROBS)[row]),
                top: top.map(|(id, logprob)| (*id, f32::from_bits(*logprob))).collect(),
            };
            (column(FLAGS)[row] == 0).then_some(token)
        };
        Ok(self.wanted.iter().enumerate().map(of_row).collect())
    }
}
