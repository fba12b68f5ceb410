//! Parts of a document that fit a prompt.

use std::ops::Range;

use rand::Rng;

use super::{Purpose, SelfStudyError, random};
use crate::text::{TextError, Tokenizer};

/// Tokens of a chunk, of which a document that is shorter as a whole may have fewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSizes {
    pub min: usize,
    pub max: usize,
}

/// A part of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Of the document's bytes.
    pub bytes: Range<usize>,
    /// Tokens of its text on its own.
    pub tokens: usize,
}

/// Draws chunks of one document. Their centres lie evenly over it, however many are drawn.
#[derive(Debug)]
pub struct Chunks<'a> {
    document: &'a str,
    tokenizer: &'a Tokenizer,
    /// Where each token begins, in bytes, and the end of the last.
    starts: Vec<usize>,
    sizes: ChunkSizes,
    seed: u64,
}

impl<'a> Chunks<'a> {
    /// # Errors
    /// [`SelfStudyError::ChunkSizes`]; the tokenizer's.
    pub fn new(
        document: &'a str,
        tokenizer: &'a Tokenizer,
        sizes: ChunkSizes,
        seed: u64,
    ) -> Result<Self, SelfStudyError> {
        if sizes.min == 0 || sizes.max < sizes.min {
            return Err(SelfStudyError::ChunkSizes { min: sizes.min, max: sizes.max });
        }
        let mut starts = tokenizer.token_starts(document)?;
        starts.push(document.len());
        Ok(Self { document, tokenizer, starts, sizes, seed })
    }

    /// Chunk `index`: the same whenever it is asked for. It begins and ends with a line if there is one near,
    /// else with a token.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn chunk(&self, index: usize) -> Result<Chunk, TextError> {
        let tokens = self.starts.len() - 1;
        let mut random = random(self.seed, Purpose::Chunk, index, 0);
        let span = (self.sizes.max - self.sizes.min) as u64 + 1;
        let wanted = self.sizes.min + (random.next_u64() % span) as usize;
        let range = if tokens <= wanted { 0..tokens } else { self.lines(index, wanted) };
        self.within(range)
    }

    /// About `wanted` tokens, fewer than the document has.
    fn lines(&self, index: usize, wanted: usize) -> Range<usize> {
        let tokens = self.starts.len() - 1;
        // Multiples of the golden ratio, modulo 1, fill the interval evenly.
        let offset = random(self.seed, Purpose::Chunk, 0, 1).next_u64();
        let at = offset.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let centre = ((u128::from(at) * tokens as u128) >> 64) as usize;
        let begin = centre.saturating_sub(wanted / 2).min(tokens - wanted);
        let last = begin == tokens - wanted;
        let near = begin.saturating_sub(wanted / 4)..=begin;
        let begin = near.rev().find(|&token| self.begins_line(token)).unwrap_or(begin);
        // The end of the document, which no later chunk would have.
        if last && tokens - begin <= self.sizes.max {
            return begin..tokens;
        }
        let end = begin + wanted;
        let least = begin + self.sizes.min.max(wanted / 2);
        let most = (begin + self.sizes.max).min(tokens);
        let mut near = (least..=end).rev().chain(end..=most);
        let end = near.find(|&token| self.begins_line(token)).unwrap_or(end);
        begin..end
    }

    fn begins_line(&self, token: usize) -> bool {
        let at = self.starts[token];
        at == 0 || at == self.document.len() || self.document.as_bytes()[at - 1] == b'\n'
    }

    /// Where the char begins in which `token` begins.
    fn char_at(&self, token: usize) -> usize {
        let at = self.starts[token];
        (0..=at).rev().find(|&at| self.document.is_char_boundary(at)).unwrap_or(0)
    }

    /// The text of these tokens, less its last ones if it has more tokens on its own than a chunk may have.
    fn within(&self, mut range: Range<usize>) -> Result<Chunk, TextError> {
        loop {
            let bytes = self.char_at(range.start)..self.char_at(range.end);
            let tokens = self.tokenizer.encode(&self.document[bytes.clone()], false)?.len();
            let excess = tokens.saturating_sub(self.sizes.max);
            if excess == 0 || range.len() <= 1 {
                return Ok(Chunk { bytes, tokens });
            }
            range.end -= excess.min(range.len() - 1);
        }
    }
}

#[cfg(test)]
#[path = "chunk_tests.rs"]
mod tests;
