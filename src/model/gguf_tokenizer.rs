//! The tokenizer inside a GGUF file: byte-level BPE, put together as its `tokenizer.json` would be.
//!
//! GGUF stores vocabulary and merges, but only the *name* of the way text is split before merging. A wrong
//! split gives other tokens without any error, so names outside of [`Scheme::of`] are refused.

use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::ModelError;

const HINT: &str = "put the model's tokenizer.json beside the .gguf file";

/// Llama 3 (Meta's `tokenizer.json`): up to three digits together.
const SPLIT_LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Qwen2 to Qwen3: digits one by one.
const SPLIT_QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Mistral Nemo: words also end where lower case meets upper case.
const SPLIT_TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// What a value of `tokenizer.ggml.pre` stands for; the names and defaults are llama.cpp's.
struct Scheme {
    split: &'static str,
    /// A piece that is a whole vocabulary entry skips the merges.
    ignore_merges: bool,
    /// Whether a BOS goes in front where the file does not say.
    add_bos: bool,
    nfc: bool,
}

impl Scheme {
    fn of(pre: &str) -> Option<Self> {
        let llama3 = Self { split: SPLIT_LLAMA3, ignore_merges: true, add_bos: true, nfc: false };
        Some(match pre {
            "llama-bpe" | "llama3" | "llama-v3" => llama3,
            "smaug-bpe" => Self { ignore_merges: false, add_bos: false, ..llama3 },
            "tekken" => Self { split: SPLIT_TEKKEN, ..llama3 },
            "qwen2" => Self { split: SPLIT_QWEN2, ignore_merges: false, add_bos: false, nfc: true },
            _ => return None,
        })
    }
}

/// llama.cpp's `token_type` of special tokens, and of added tokens that are plain text.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Builds the tokenizer that `content` describes.
///
/// # Errors
/// [`ModelError::Unsupported`] for a kind that is not known exactly, [`ModelError::Invalid`] for metadata
/// that contradicts itself.
pub(super) fn build(content: &Content, file: &str) -> Result<Tokenizer, ModelError> {
    Reader { content, file }.tokenizer()
}

struct Reader<'a> {
    content: &'a Content,
    file: &'a str,
}

impl Reader<'_> {
    fn tokenizer(&self) -> Result<Tokenizer, ModelError> {
        let model = self.text("model").unwrap_or("(none)");
        if model != "gpt2" {
            return Err(self.unsupported(format!("its tokenizer (tokenizer.ggml.model {model})")));
        }
        let pre = self.text("pre").unwrap_or("(none)");
        let scheme = Scheme::of(pre)
            .ok_or_else(|| self.unsupported(format!("its tokenizer (tokenizer.ggml.pre {pre})")))?;
        let tokens = self.texts("tokens")?;
        let merges = self
            .texts("merges")?
            .into_iter()
            .map(|merge| match merge.split_once(' ') {
                Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
                None => Err(self.invalid(format!("{merge:?} is not a merge of two tokens"))),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let vocabulary = tokens.iter().zip(0u32..).map(|(token, id)| ((*token).to_owned(), id));
        let bpe = BPE::builder()
            .vocab_and_merges(vocabulary.collect::<tokenizers::models::bpe::Vocab>(), merges)
            .ignore_merges(scheme.ignore_merges)
            .build()
            .map_err(|e| self.invalid(e))?;
        let mut tokenizer = Tokenizer::new(bpe);
        if scheme.nfc {
            tokenizer.with_normalizer(Some(NFC)).map_err(|e| self.invalid(e))?;
        }
        let pattern = SplitPattern::Regex(scheme.split.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|e| self.invalid(e))?;
        let bytes = ByteLevel::new(false, false, false);
        tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
        tokenizer.with_decoder(Some(bytes));
        self.add_tokens(&mut tokenizer, &tokens)?;
        if let Some(front) = self.front(scheme.add_bos, &tokens)? {
            tokenizer.with_post_processor(Some(front));
        }
        Ok(tokenizer)
    }

    /// Makes control and user-defined tokens match before the text is split.
    fn add_tokens(&self, tokenizer: &mut Tokenizer, tokens: &[&str]) -> Result<(), ModelError> {
        let Some(types) = self.value("token_type") else { return Ok(()) };
        let types = types.to_vec().map_err(|e| self.invalid(e))?;
        if types.len() != tokens.len() {
            return Err(self.invalid(format!(
                "{} token types for {} tokens",
                types.len(),
                tokens.len()
            )));
        }
        let added = types.iter().zip(tokens).filter_map(|(kind, token)| {
            let kind = integer(kind)?;
            matches!(kind, CONTROL | USER_DEFINED)
                .then(|| AddedToken::from(*token, kind == CONTROL).normalized(false))
        });
        tokenizer.add_tokens(added).map_err(|e| self.invalid(e))?;
        Ok(())
    }

    /// What puts the BOS in front of a text that asks for special tokens.
    fn front(
        &self,
        default: bool,
        tokens: &[&str],
    ) -> Result<Option<TemplateProcessing>, ModelError> {
        let asked = match self.value("add_bos_token") {
            Some(value) => value.to_bool().map_err(|e| self.invalid(e))?,
            None => default,
        };
        let id = self.value("bos_token_id").and_then(integer);
        let (true, Some(id)) = (asked, id) else { return Ok(None) };
        let bos = u32::try_from(id).ok().and_then(|id| Some((id, tokens.get(id as usize)?)));
        let (id, token) =
            bos.ok_or_else(|| self.invalid(format!("bos_token_id {id} is not in tokens")))?;
        // "bos" names the token inside this template only.
        let bos = SpecialToken::new("bos".to_owned(), vec![id], vec![(*token).to_owned()])
            .map_err(|e| self.invalid(e))?;
        let template = TemplateProcessing::builder()
            .try_single("bos $A")
            .map_err(|e| self.invalid(e))?
            .special_tokens(vec![bos])
            .build()
            .map_err(|e| self.invalid(e))?;
        Ok(Some(template))
    }

    fn value(&self, name: &str) -> Option<&Value> {
        self.content.metadata.get(&format!("tokenizer.ggml.{name}"))
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.value(name).and_then(|v| v.to_string().ok()).map(String::as_str)
    }

    fn texts(&self, name: &str) -> Result<Vec<&str>, ModelError> {
        let list = self.value(name).and_then(|v| v.to_vec().ok());
        list.and_then(|list| list.iter().map(|v| Some(v.to_string().ok()?.as_str())).collect())
            .ok_or_else(|| self.invalid(format!("{name} is missing or not a list of texts")))
    }

    fn unsupported(&self, what: String) -> ModelError {
        ModelError::Unsupported { file: self.file.to_owned(), what, hint: HINT.to_owned() }
    }

    fn invalid(&self, reason: impl std::fmt::Display) -> ModelError {
        ModelError::Invalid {
            file: self.file.to_owned(),
            reason: format!("tokenizer metadata: {reason}"),
        }
    }
}

/// An integer of any of GGUF's widths.
fn integer(value: &Value) -> Option<i64> {
    Some(match value {
        Value::U8(v) => i64::from(*v),
        Value::I8(v) => i64::from(*v),
        Value::U16(v) => i64::from(*v),
        Value::I16(v) => i64::from(*v),
        Value::U32(v) => i64::from(*v),
        Value::I32(v) => i64::from(*v),
        Value::I64(v) => *v,
        Value::U64(v) => i64::try_from(*v).ok()?,
        _ => return None,
    })
}
