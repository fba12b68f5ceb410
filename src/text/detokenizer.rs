//! Text from tokens, one token at a time.
//!
//! Decoding tokens one by one is wrong: a char can span tokens, and SentencePiece decoders treat
//! the first token apart. The library's `DecodeStream` knows of both but returns an error when a
//! run of byte tokens turns out not to be UTF-8, holds a genuine U+FFFD back for ever, and has no
//! way to flush. So:
//! - byte-level vocabularies need no decoder at all: bytes are collected and whole chars released;
//! - other vocabularies decode a short window: some tokens already shown, for context, then the new
//!   ones.

use super::tokenizer::{PieceStyle, Tokenizer, byte_fallback_byte, byte_level_bytes};

/// Tokens of context kept at most. Context is cut as soon as it shows something other than white
/// space, which is all that a decoder's treatment of the beginning depends on.
const MAX_CONTEXT_TOKENS: usize = 64;
const REPLACEMENT: char = '\u{FFFD}';

/// Incremental decoder of one completion: the concatenation of every [`push`](Self::push) and of
/// [`finish`](Self::finish) is [`Tokenizer::decode`] of all the ids.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    /// Byte-level only: the bytes of a char that is not complete.
    partial: Vec<u8>,
    /// Other styles: context tokens, then tokens since the last clean boundary.
    window: Vec<u32>,
    /// Index in `window` of the first token that is not context.
    fresh: usize,
    /// Bytes of the decoded window that were released.
    released: usize,
    /// Byte tokens after `fresh` that count as shown although their run may go on; see [`Self::settle`].
    settled: usize,
}

impl Detokenizer {
    /// A decoder at the beginning of a completion. Special tokens are left out of the text when
    /// `skip_special_tokens`.
    pub fn new(tokenizer: &Tokenizer, skip_special_tokens: bool) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            skip_special_tokens,
            partial: Vec::new(),
            window: Vec::new(),
            fresh: 0,
            released: 0,
            settled: 0,
        }
    }

    /// The text that is final once `id` is known: empty while a char is incomplete.
    ///
    /// With byte fallback a run of byte tokens is released as a whole when it ends, because the
    /// decoder judges it as a whole: one bad byte turns all of the run into replacement characters.
    pub fn push(&mut self, id: u32) -> String {
        let Some(piece) = self.tokenizer.decoder_piece(id) else {
            return String::new();
        };
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return String::new();
        }
        match self.tokenizer.style() {
            PieceStyle::ByteLevel => {
                self.partial.extend(byte_level_bytes(&piece));
                let keep = incomplete_tail(&self.partial);
                let rest = self.partial.split_off(self.partial.len() - keep);
                let whole = std::mem::replace(&mut self.partial, rest);
                String::from_utf8_lossy(&whole).into_owned()
            }
            style => {
                self.window.push(id);
                let byte_run = style == PieceStyle::Spaces { byte_fallback: true }
                    && byte_fallback_byte(&piece).is_some();
                if byte_run {
                    return String::new();
                }
                self.release(style == PieceStyle::ByteLevelInChain)
            }
        }
    }

    /// Releases what [`push`](Self::push) holds back of a run of byte tokens, but an incomplete char at its
    /// end: the text so far is a prompt, which ends here, and what follows is shown apart from it.
    pub fn settle(&mut self) -> String {
        let run = &self.window[self.fresh..];
        let bytes: Option<Vec<u8>> =
            run.iter().map(|&id| byte_fallback_byte(&self.tokenizer.decoder_piece(id)?)).collect();
        // Not a run of bytes: only a char that is incomplete was held back.
        let Some(bytes) = bytes else { return String::new() };
        self.settled = bytes.len() - incomplete_tail(&bytes);
        if self.settled == 0 {
            return String::new();
        }
        let text = self.decode(&self.window[..self.fresh + self.settled]);
        let new = text.get(self.released..).unwrap_or_default().to_owned();
        self.released = self.released.max(text.len());
        new
    }

    /// What is left at the end of the completion: replacement characters for a truncated char.
    pub fn finish(&mut self) -> String {
        let bytes = std::mem::take(&mut self.partial);
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        if self.fresh < self.window.len() {
            text += &self.release(false);
        }
        text
    }

    /// Decodes the window, returns what is new in it, and makes the new tokens the context of the
    /// next.
    fn release(&mut self, hold_replacements: bool) -> String {
        let text = self.decode(&self.window);
        let end =
            if hold_replacements { text.trim_end_matches(REPLACEMENT).len() } else { text.len() };
        let new = text.get(self.settled_end(&text)..end).unwrap_or_default().to_owned();
        self.released = self.released.max(end);
        self.settled = 0;
        if end == text.len() {
            let context = self.decode(&self.window[self.fresh..]);
            if !context.trim().is_empty() || self.window.len() > MAX_CONTEXT_TOKENS {
                self.window.drain(..self.fresh);
                self.released = context.len();
            }
            self.fresh = self.window.len();
        }
        new
    }

    /// Bytes of `text`, the decoded window, that were shown: `released`, unless later bytes made the run of
    /// the settled ones bad, which gives each of them a replacement character instead.
    fn settled_end(&self, text: &str) -> usize {
        if self.settled == 0 {
            return self.released;
        }
        let shown = self.decode(&self.window[..self.fresh + self.settled]);
        if text.starts_with(&shown) {
            return self.released;
        }
        self.decode(&self.window[..self.fresh]).len() + self.settled * REPLACEMENT.len_utf8()
    }

    /// A decoder that fails (a regular expression that overruns its limits) must not end a
    /// completion: the pieces' own bytes are shown instead.
    fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, self.skip_special_tokens).unwrap_or_else(|_| {
            let bytes: Vec<u8> =
                ids.iter().flat_map(|id| self.tokenizer.token_bytes(*id)).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }
}

/// Length of the incomplete char at the end of `bytes`: one that more bytes can still make valid.
fn incomplete_tail(bytes: &[u8]) -> usize {
    let Some(last) = bytes.utf8_chunks().last() else {
        return 0;
    };
    match std::str::from_utf8(last.invalid()) {
        Err(e) if e.error_len().is_none() => last.invalid().len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incomplete_tails() {
        assert_eq!(incomplete_tail(b""), 0);
        assert_eq!(incomplete_tail(b"abc"), 0);
        assert_eq!(incomplete_tail("é".as_bytes()), 0);
        assert_eq!(incomplete_tail(&[b'a', 0xC3]), 1);
        assert_eq!(incomplete_tail(&[0xF0, 0x9F, 0x98]), 3);
        // Bad already, whatever follows: a continuation without a start, and a start that cannot
        // be.
        assert_eq!(incomplete_tail(&[0x80]), 0);
        assert_eq!(incomplete_tail(&[0xFF]), 0);
        assert_eq!(incomplete_tail(&[0xED, 0xA0]), 0);
        assert_eq!(incomplete_tail(&[0xE2, 0xF0]), 1);
    }
}
