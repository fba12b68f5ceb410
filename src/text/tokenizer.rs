//! The tokenizer of a model: `tokenizer.json` through the `tokenizers` library, plus what serving
//! needs and the library does not offer: the true bytes of one token.

use std::sync::Arc;

use tokenizers::DecoderWrapper;

use super::TextError;

/// How the pieces of the vocabulary stand for bytes. Read from the decoder, which is what turns
/// pieces back into text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceStyle {
    /// Every char of a piece is one byte of GPT-2's alphabet (Llama 3, Qwen, Mistral Tekken).
    ByteLevel,
    /// The same alphabet, inside a chain with other decoders: text is known only after the whole
    /// chain.
    ByteLevelInChain,
    /// U+2581 is a space; `<0xNN>` pieces are bytes when `byte_fallback` (Llama 2, Gemma).
    Spaces { byte_fallback: bool },
    /// Pieces are their own text (no decoder, or one that joins words).
    Plain,
}

impl PieceStyle {
    fn of(decoder: Option<&DecoderWrapper>) -> Self {
        let mut chain = Vec::new();
        if let Some(decoder) = decoder {
            flatten(decoder, &mut chain);
        }
        let has = |f: fn(&DecoderWrapper) -> bool| chain.iter().any(|d| f(d));
        if has(|d| matches!(d, DecoderWrapper::ByteLevel(_))) {
            return if chain.len() == 1 { Self::ByteLevel } else { Self::ByteLevelInChain };
        }
        let byte_fallback = has(|d| matches!(d, DecoderWrapper::ByteFallback(_)));
        let spaces =
            has(|d| matches!(d, DecoderWrapper::Metaspace(_) | DecoderWrapper::Replace(_)));
        if byte_fallback || spaces { Self::Spaces { byte_fallback } } else { Self::Plain }
    }
}

fn flatten<'a>(decoder: &'a DecoderWrapper, out: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(s) => s.get_decoders().iter().for_each(|d| flatten(d, out)),
        other => out.push(other),
    }
}

/// A model's tokenizer. Cloning is cheap: clones share one vocabulary.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    style: PieceStyle,
    /// Bytes of the longest token.
    longest_token: usize,
}

impl Tokenizer {
    /// Reads the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] when it is not JSON of that format.
    pub fn from_bytes(json: &[u8]) -> Result<Self, TextError> {
        let inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| TextError::Tokenizer { reason: e.to_string() })?;
        Ok(Self::from_inner(inner))
    }

    /// Wraps a tokenizer built by other means (from GGUF metadata).
    ///
    /// Truncation and padding stored in the file are dropped, as transformers does: they belong to
    /// a training script, and a server must not shorten a prompt in silence.
    pub fn from_inner(mut inner: tokenizers::Tokenizer) -> Self {
        // Only a set truncation can be refused; clearing it cannot fail.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let style = PieceStyle::of(inner.get_decoder());
        let mut tokenizer = Self { inner: Arc::new(inner), style, longest_token: 0 };
        let ids = tokenizer.inner.get_vocab(true).into_values();
        tokenizer.longest_token =
            ids.map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or_default();
        tokenizer
    }

    /// Token ids of `text`. Special tokens written out in the text become their ids; with
    /// `add_special_tokens` the post-processor adds its own (BOS).
    ///
    /// # Errors
    /// [`TextError::Encode`] when the model has no token for a piece (no unknown token, no bytes).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        self.encode_counting(text, add_special_tokens).map(|(ids, _)| ids)
    }

    /// [`Self::encode`], and how many of the first ids the post-processor added: they stand for none of
    /// the text.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_counting(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<(Vec<u32>, usize), TextError> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|e| TextError::Encode { reason: e.to_string() })?;
        let added = encoding.get_special_tokens_mask().iter().take_while(|m| **m == 1).count();
        Ok((encoding.get_ids().to_vec(), added))
    }

    /// Where each token of `text` begins, in bytes, ascending. A char of several tokens begins them all.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn token_starts(&self, text: &str) -> Result<Vec<usize>, TextError> {
        let encoding = self
            .inner
            .encode(text, false)
            .map_err(|e| TextError::Encode { reason: e.to_string() })?;
        let mut last = 0;
        let ascending = encoding.get_offsets().iter().map(|&(start, _)| {
            last = start.max(last);
            last
        });
        Ok(ascending.collect())
    }

    /// A text of more bytes than this has more than `tokens` tokens, whatever it says: a way to refuse it
    /// without tokenising it. `None` when the vocabulary does not hold every byte, since then one unknown
    /// token can stand for any length of text.
    pub fn max_text_bytes(&self, tokens: usize) -> Option<usize> {
        let complete = matches!(
            self.style,
            PieceStyle::ByteLevel
                | PieceStyle::ByteLevelInChain
                | PieceStyle::Spaces { byte_fallback: true }
        );
        // Composing chars (NFC) makes a text shorter, by less than this.
        let shrink = if self.inner.get_normalizer().is_some() { 4 } else { 1 };
        complete.then(|| tokens.saturating_mul(self.longest_token).saturating_mul(shrink))
    }

    /// Text of `ids`. Ids outside the vocabulary are left out, as are special tokens when
    /// `skip_special_tokens`; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`TextError::Decode`] when the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TextError> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|e| TextError::Decode { reason: e.to_string() })
    }

    /// The raw vocabulary piece (`Ġthe`, `▁the`, `<|eot_id|>`), or `<UNK_{id}>` when there is none
    /// (Tokasaurus' form).
    pub fn token_string(&self, id: u32) -> String {
        match self.added(id) {
            Some(content) => content.to_owned(),
            None => self.inner.id_to_token(id).unwrap_or_else(|| format!("<UNK_{id}>")),
        }
    }

    /// The bytes the token stands for, not always UTF-8 on their own: the byte-level alphabet is
    /// decoded, `<0xNN>` is that byte, U+2581 is a space, an added token is its text. Empty for an
    /// unknown id.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        if let Some(content) = self.added(id) {
            return content.as_bytes().to_vec();
        }
        let Some(piece) = self.inner.id_to_token(id) else {
            return Vec::new();
        };
        match self.style {
            PieceStyle::ByteLevel | PieceStyle::ByteLevelInChain => byte_level_bytes(&piece),
            PieceStyle::Spaces { byte_fallback } => match byte_fallback_byte(&piece) {
                Some(byte) if byte_fallback => vec![byte],
                _ => piece.replace('\u{2581}', " ").into_bytes(),
            },
            PieceStyle::Plain => piece.into_bytes(),
        }
    }

    /// Whether `id` is a special (control) token: one that `skip_special_tokens` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        let vocabulary = self.inner.get_added_vocabulary();
        self.inner.id_to_token(id).is_some_and(|piece| vocabulary.is_special_token(&piece))
    }

    /// The id of a vocabulary piece or added token, by its exact text.
    pub fn token_id(&self, piece: &str) -> Option<u32> {
        self.inner.token_to_id(piece)
    }

    /// Number of tokens, added ones included. A model's logits can be wider (padding).
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub(super) fn style(&self) -> PieceStyle {
        self.style
    }

    /// The piece as the decoder receives it (for an added token this can differ from its content).
    pub(super) fn decoder_piece(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    fn added(&self, id: u32) -> Option<&str> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).map(|token| token.content.as_str())
    }
}

/// Bytes of a piece in GPT-2's byte alphabet. A piece with a char outside of it is plain text: the
/// library's decoder makes the same exception.
pub(super) fn byte_level_bytes(piece: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = piece.chars().map(byte_of_char).collect();
    bytes.unwrap_or_else(|| piece.as_bytes().to_vec())
}

/// The inverse of GPT-2's table: printable bytes stand for themselves, the 68 others for U+0100 on.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    let byte = match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The byte of a `<0xNN>` piece.
pub(super) fn byte_fallback_byte(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let bytes: Vec<u8> =
            (0..0x200).filter_map(char::from_u32).filter_map(byte_of_char).collect();
        assert_eq!(bytes.len(), 256);
        assert_eq!(bytes.iter().collect::<HashSet<_>>().len(), 256);
        assert_eq!(byte_level_bytes("Ġthe"), b" the");
        assert_eq!(byte_level_bytes("Ċ"), b"\n");
        assert_eq!(byte_level_bytes("ðŁ"), [0xF0, 0x9F]);
        // A char outside the alphabet makes the whole piece plain text.
        assert_eq!(byte_level_bytes("a b"), b"a b");
    }

    #[test]
    fn byte_pieces() {
        assert_eq!(byte_fallback_byte("<0x0A>"), Some(b'\n'));
        assert_eq!(byte_fallback_byte("<0xff>"), Some(0xFF));
        assert_eq!(byte_fallback_byte("<0xfff>"), None);
        assert_eq!(byte_fallback_byte("<0x+1>"), Some(1), "as the library's decoder reads it");
        assert_eq!(byte_fallback_byte("0x0A"), None);
    }

    #[test]
    fn a_broken_file_is_an_error() {
        let e = Tokenizer::from_bytes(b"{}").unwrap_err();
        assert!(matches!(e, TextError::Tokenizer { .. }), "{e}");
    }
}
