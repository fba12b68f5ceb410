//! From a model's name to a decoder with its tokenizer and chat template.

use std::str::FromStr;

use candle_core::quantized::GgmlDType;
use serde_json::{Map, Value};

use super::gguf::GgufFile;
use super::source::ModelFiles;
use super::weights::{FileBytes, SafetensorsReader, build};
use super::{Decoder, ModelConfig, ModelError, ModelSource};
use crate::text::{ChatTemplate, Tokenizer};

/// Block formats weights can be quantised to while they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantize {
    Q8_0,
    Q4K,
}

impl FromStr for Quantize {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "q8_0" => Ok(Self::Q8_0),
            "q4_k" => Ok(Self::Q4K),
            other => Err(format!("{other} is not one of q8_0, q4_k")),
        }
    }
}

impl Quantize {
    /// The block format for rows of `width` weights. Q4_K needs multiples of 256 and gives way to Q8_0
    /// below that, which needs multiples of 32; `None` if neither fits.
    pub(super) fn block_type(self, width: usize) -> Option<GgmlDType> {
        match self {
            Self::Q4K if width.is_multiple_of(256) => Some(GgmlDType::Q4K),
            _ if width.is_multiple_of(32) => Some(GgmlDType::Q8_0),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Quantise matrices of a safetensors model; a GGUF model keeps the formats of its file.
    pub quantize: Option<Quantize>,
    /// Name to serve the model under instead of [`ModelSource::default_name`].
    pub name: Option<String>,
}

/// Everything a server needs to know of one model.
#[derive(Debug)]
pub struct LoadedModel {
    pub name: String,
    pub decoder: Decoder,
    pub tokenizer: Tokenizer,
    pub chat_template: Option<ChatTemplate>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Whether prompts are written in the Llama-3 format, which has its own form beside a cartridge.
    pub is_llama3: bool,
}

/// Finds, reads and builds a model.
pub fn load(source: &ModelSource, options: &LoadOptions) -> Result<LoadedModel, ModelError> {
    let files = source.files()?;
    let name = options.name.clone().unwrap_or_else(|| source.default_name());
    let tokenizer_json = |file: &str| match files.read(file)? {
        Some(bytes) => parse_json(&bytes, &files.describe(file)),
        None => Ok(Value::Object(Map::new())),
    };
    let tokenizer_config = tokenizer_json("tokenizer_config.json")?;
    let template_file = files.read("chat_template.jinja")?;
    let template_file = template_file.as_deref().map(String::from_utf8_lossy);
    let mut chat_template = ChatTemplate::from_config(&tokenizer_config, template_file.as_deref())?;

    let (decoder, tokenizer, mut eos_token_ids) = match source {
        ModelSource::Gguf(path) => {
            if options.quantize.is_some() {
                return Err(ModelError::Unsupported {
                    file: path.display().to_string(),
                    what: "--quantize on a GGUF file".to_owned(),
                    hint: "its weights are quantised as they are; drop the option".to_owned(),
                });
            }
            let gguf = GgufFile::open(path)?;
            let tokenizer = match files.read("tokenizer.json")? {
                Some(bytes) => Tokenizer::from_bytes(&bytes)?,
                None => Tokenizer::from_inner(gguf.tokenizer()?),
            };
            if chat_template.is_none() {
                chat_template = gguf_template(&gguf, &tokenizer)?;
            }
            let eos = ["eos", "eot", "eom"].iter().filter_map(|kind| gguf.special_token(kind));
            (build(gguf.config(), &gguf)?, tokenizer, eos.collect())
        }
        _ => {
            let tokenizer = Tokenizer::from_bytes(&files.require("tokenizer.json")?)?;
            let decoder = safetensors_decoder(&files, options.quantize)?;
            let json = parse_json(&files.require("config.json")?, "config.json")?;
            (decoder, tokenizer, read_eos_ids(&json))
        }
    };
    // generation_config.json has the last word on end tokens, as in transformers.
    if let Some(bytes) = files.read("generation_config.json")? {
        let json = parse_json(&bytes, &files.describe("generation_config.json"))?;
        let ids = read_eos_ids(&json);
        if !ids.is_empty() {
            eos_token_ids = ids;
        }
    }
    let template_eos = match &tokenizer_config["eos_token"] {
        Value::String(token) => Some(token.as_str()),
        token => token["content"].as_str(),
    };
    eos_token_ids.extend(template_eos.and_then(|token| tokenizer.token_id(token)));
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    let is_llama3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        .iter()
        .all(|token| tokenizer.token_id(token).is_some());
    Ok(LoadedModel { name, decoder, tokenizer, chat_template, eos_token_ids, is_llama3 })
}

/// The decoder alone, for tools that bring their own token ids.
pub fn load_decoder(
    source: &ModelSource,
    quantize: Option<Quantize>,
) -> Result<Decoder, ModelError> {
    match source {
        ModelSource::Gguf(path) => {
            let gguf = GgufFile::open(path)?;
            build(gguf.config(), &gguf)
        }
        _ => safetensors_decoder(&source.files()?, quantize),
    }
}

fn safetensors_decoder(
    files: &ModelFiles,
    quantize: Option<Quantize>,
) -> Result<Decoder, ModelError> {
    let file = "config.json";
    let config = ModelConfig::from_json(&files.require(file)?, &files.describe(file))?;
    let shards = safetensors_files(files)?;
    build(config, &SafetensorsReader::new(&shards, quantize)?)
}

fn parse_json(bytes: &[u8], file: &str) -> Result<Value, ModelError> {
    serde_json::from_slice(bytes)
        .map_err(|e| ModelError::Invalid { file: file.to_owned(), reason: e.to_string() })
}

/// `eos_token_id` is a number or a list of numbers.
fn read_eos_ids(json: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match &json["eos_token_id"] {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}

/// The chat template inside a GGUF file, with the special tokens it may print.
fn gguf_template(
    gguf: &GgufFile,
    tokenizer: &Tokenizer,
) -> Result<Option<ChatTemplate>, ModelError> {
    let Some(source) = gguf.chat_template() else { return Ok(None) };
    let mut tokens = Map::new();
    for (variable, kind) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown")] {
        if let Some(id) = gguf.special_token(kind) {
            tokens.insert(variable.to_owned(), tokenizer.token_string(id).into());
        }
    }
    Ok(Some(ChatTemplate::new(source, tokens)?))
}

/// The weight files: one `model.safetensors`, or the shards its index names.
fn safetensors_files(files: &ModelFiles) -> Result<Vec<(String, FileBytes)>, ModelError> {
    const INDEX: &str = "model.safetensors.index.json";
    if let Some(bytes) = files.map("model.safetensors")? {
        return Ok(vec![(files.describe("model.safetensors"), bytes)]);
    }
    let Some(index) = files.read(INDEX)? else {
        return Err(ModelError::Invalid {
            file: files.describe("model.safetensors"),
            reason: format!("neither this file nor {INDEX} exists"),
        });
    };
    let index = parse_json(&index, &files.describe(INDEX))?;
    let invalid = |reason: String| ModelError::Invalid { file: files.describe(INDEX), reason };
    let map = index["weight_map"].as_object();
    let map = map.ok_or_else(|| invalid("weight_map is missing".to_owned()))?;
    let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .map(|name| {
            if name.contains(['/', '\\']) || name.starts_with('.') {
                return Err(invalid(format!("shard name {name} is not a plain file name")));
            }
            let bytes = files.map(name)?;
            let bytes = bytes.ok_or_else(|| invalid(format!("shard {name} is missing")))?;
            Ok((files.describe(name), bytes))
        })
        .collect()
}
