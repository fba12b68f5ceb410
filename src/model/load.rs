//! From a model's name to a decoder with its tokenizer and chat template.

use std::str::FromStr;

use candle_core::quantized::GgmlDType;
use serde_json::{Map, Value};

use super::gguf::GgufFile;
use super::source::ModelFiles;
use super::weights::{FileBytes, Placed, Placement, SafetensorsReader, build};
use super::{Decoder, ModelConfig, ModelError, ModelSource};
use crate::text::{ChatTemplate, TextError, Tokenizer};

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
    pub placement: Placement,
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
///
/// # Errors
/// [`ModelError`] for files that are missing, broken or of a kind that would be computed wrongly.
pub fn load(source: &ModelSource, options: &LoadOptions) -> Result<LoadedModel, ModelError> {
    if options.quantize.is_some() && options.placement.is_gpu() {
        return Err(ModelError::Unsupported {
            file: source.default_name(),
            what: "--quantize on a GPU".to_owned(),
            hint: "weights are bf16 there; drop the option, or take --device cpu".to_owned(),
        });
    }
    let files = source.files()?;
    let name = options.name.clone().unwrap_or_else(|| source.default_name());
    match source.gguf(&files)? {
        Some(path) if options.quantize.is_some() => Err(ModelError::Unsupported {
            file: path.display().to_string(),
            what: "--quantize on a GGUF file".to_owned(),
            hint: "its weights are quantised as they are; drop the option".to_owned(),
        }),
        Some(path) => load_gguf(name, &GgufFile::open(&path)?, &files, &options.placement),
        None => load_safetensors(name, &files, options),
    }
}

/// A folder or repository in Hugging Face layout.
///
/// The weights are read last: from the hub, a cached `config.json` then means that every optional file
/// has been asked for.
fn load_safetensors(
    name: String,
    files: &ModelFiles,
    options: &LoadOptions,
) -> Result<LoadedModel, ModelError> {
    let tokenizer_config = read_json(files, "tokenizer_config.json")?;
    let chat_template = neighbour_template(files, &tokenizer_config)?;
    let tokenizer = files.require("tokenizer.json")?;
    let generation = read_json(files, "generation_config.json")?;
    let config_json = files.require("config.json")?;
    let config = ModelConfig::from_json(&config_json, &files.describe("config.json"))?;
    let tokenizer = parse_tokenizer(&tokenizer)?;
    let tokenizer = checked_tokenizer(tokenizer, &config, &files.describe("tokenizer.json"))?;
    // generation_config.json has the last word on end tokens, as in transformers.
    let mut eos_token_ids = read_eos_ids(&generation);
    if eos_token_ids.is_empty() {
        eos_token_ids = read_eos_ids(&parse_json(&config_json, &files.describe("config.json"))?);
    }
    eos_token_ids.extend(template_eos(&tokenizer_config, &tokenizer));
    let decoder = safetensors_decoder(files, config, options.quantize, &options.placement)?;
    Ok(assemble(name, decoder, tokenizer, chat_template, eos_token_ids))
}

/// A `.gguf` file. What it carries itself is what its weights were made with; the files beside it may
/// belong to another model, so they only fill gaps.
fn load_gguf(
    name: String,
    gguf: &GgufFile,
    files: &ModelFiles,
    placement: &Placement,
) -> Result<LoadedModel, ModelError> {
    let (tokenizer, tokenizer_file) = match gguf.tokenizer() {
        Ok(tokenizer) => (tokenizer, gguf.name().to_owned()),
        Err(unsupported @ ModelError::Unsupported { .. }) => {
            let bytes = files.read("tokenizer.json")?.ok_or(unsupported)?;
            (parse_tokenizer(&bytes)?, files.describe("tokenizer.json"))
        }
        Err(error) => return Err(error),
    };
    let tokenizer = checked_tokenizer(tokenizer, &gguf.config(), &tokenizer_file)?;
    let chat_template = match gguf_template(gguf, &tokenizer)? {
        Some(template) => Some(template),
        None => neighbour_template(files, &read_json(files, "tokenizer_config.json")?)?,
    };
    let own = ["eos", "eot", "eom"].iter().filter_map(|kind| gguf.special_token(kind));
    let mut eos_token_ids: Vec<u32> = own.collect();
    if eos_token_ids.is_empty() {
        eos_token_ids = read_eos_ids(&read_json(files, "generation_config.json")?);
    }
    if eos_token_ids.is_empty() {
        let tokenizer_config = read_json(files, "tokenizer_config.json")?;
        eos_token_ids.extend(template_eos(&tokenizer_config, &tokenizer));
    }
    let decoder = gguf_decoder(gguf, placement)?;
    Ok(assemble(name, decoder, tokenizer, chat_template, eos_token_ids))
}

fn assemble(
    name: String,
    decoder: Decoder,
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    mut eos_token_ids: Vec<u32>,
) -> LoadedModel {
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    let is_llama3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        .iter()
        .all(|token| tokenizer.token_id(token).is_some());
    LoadedModel { name, decoder, tokenizer, chat_template, eos_token_ids, is_llama3 }
}

/// What a model says of itself; no weight is read, nor downloaded if it is no `.gguf` file.
///
/// # Errors
/// Those of [`load`].
pub fn load_config(source: &ModelSource) -> Result<ModelConfig, ModelError> {
    let files = source.files()?;
    match source.gguf(&files)? {
        Some(path) => Ok(GgufFile::open(&path)?.config()),
        None => {
            let config = files.require("config.json")?;
            ModelConfig::from_json(&config, &files.describe("config.json"))
        }
    }
}

/// The decoder alone, for tools that bring their own token ids.
pub fn load_decoder(source: &ModelSource, options: &LoadOptions) -> Result<Decoder, ModelError> {
    let files = source.files()?;
    match source.gguf(&files)? {
        Some(path) => gguf_decoder(&GgufFile::open(&path)?, &options.placement),
        None => {
            let config = files.require("config.json")?;
            let config = ModelConfig::from_json(&config, &files.describe("config.json"))?;
            safetensors_decoder(&files, config, options.quantize, &options.placement)
        }
    }
}

fn gguf_decoder(gguf: &GgufFile, placement: &Placement) -> Result<Decoder, ModelError> {
    match placement.is_gpu() {
        true => build(gguf.config(), &Placed { reader: gguf, placement }),
        false => build(gguf.config(), gguf),
    }
}

fn parse_tokenizer(json: &[u8]) -> Result<tokenizers::Tokenizer, ModelError> {
    let parsed = tokenizers::Tokenizer::from_bytes(json);
    Ok(parsed.map_err(|e| TextError::Tokenizer { reason: e.to_string() })?)
}

/// Refuses a tokenizer of another model where that shows: ids the model has no row for. A model with more
/// rows than the tokenizer has ids is common padding.
fn checked_tokenizer(
    tokenizer: tokenizers::Tokenizer,
    config: &ModelConfig,
    file: &str,
) -> Result<Tokenizer, ModelError> {
    let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
    if largest as usize >= config.vocab_size {
        return Err(ModelError::Invalid {
            file: file.to_owned(),
            reason: format!(
                "the tokenizer has ids up to {largest}, but the model's vocab_size is {}: they do not \
                 belong together",
                config.vocab_size
            ),
        });
    }
    Ok(Tokenizer::from_inner(tokenizer))
}

/// The chat template of `tokenizer_config.json` and `chat_template.jinja`.
fn neighbour_template(
    files: &ModelFiles,
    tokenizer_config: &Value,
) -> Result<Option<ChatTemplate>, ModelError> {
    let file = files.read("chat_template.jinja")?;
    let file = file.as_deref().map(String::from_utf8_lossy);
    Ok(ChatTemplate::from_config(tokenizer_config, file.as_deref())?)
}

/// The `eos_token` of a `tokenizer_config.json`.
fn template_eos(tokenizer_config: &Value, tokenizer: &Tokenizer) -> Option<u32> {
    let token = match &tokenizer_config["eos_token"] {
        Value::String(token) => token,
        token => token["content"].as_str()?,
    };
    tokenizer.token_id(token)
}

fn safetensors_decoder(
    files: &ModelFiles,
    config: ModelConfig,
    quantize: Option<Quantize>,
    placement: &Placement,
) -> Result<Decoder, ModelError> {
    let shards = safetensors_files(files)?;
    build(config, &SafetensorsReader::new(&shards, quantize, placement)?)
}

/// An optional JSON file; an empty object if the model has none of that name.
fn read_json(files: &ModelFiles, file: &str) -> Result<Value, ModelError> {
    match files.read(file)? {
        Some(bytes) => parse_json(&bytes, &files.describe(file)),
        None => Ok(Value::Object(Map::new())),
    }
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
