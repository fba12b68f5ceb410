//! Models in one `.gguf` file, through candle's reader.

use std::borrow::Cow;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Mutex;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};

use super::config::{Biases, within_window};
use super::weights::WeightReader;
use super::{Architecture, ModelConfig, ModelError, gguf_tokenizer};
use crate::ops::{Matrix, RopeScaling};

/// An open `.gguf` file.
pub(super) struct GgufFile {
    name: String,
    content: Content,
    file: Mutex<BufReader<File>>,
    config: ModelConfig,
}

impl GgufFile {
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let name = path.display().to_string();
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let mut file = BufReader::new(File::open(path).map_err(io)?);
        let content = Content::read(&mut file).map_err(|e| ModelError::Invalid {
            file: name.clone(),
            reason: format!("not a readable GGUF file: {e}"),
        })?;
        let config = Metadata { name: &name, content: &content }.config()?;
        Ok(Self { name, content, file: Mutex::new(file), config })
    }

    /// The file's path, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn config(&self) -> ModelConfig {
        self.config.clone()
    }

    /// The tokenizer built from the file's vocabulary and merges.
    pub fn tokenizer(&self) -> Result<tokenizers::Tokenizer, ModelError> {
        gguf_tokenizer::build(&self.content, &self.name)
    }

    pub fn chat_template(&self) -> Option<&str> {
        self.string("tokenizer.chat_template")
    }

    /// Id of a special token: `bos`, `eos`, `eot`, …
    pub fn special_token(&self, kind: &str) -> Option<u32> {
        let key = format!("tokenizer.ggml.{kind}_token_id");
        self.content.metadata.get(&key).and_then(|v| v.to_u32().ok())
    }

    fn string(&self, key: &str) -> Option<&str> {
        self.content.metadata.get(key).and_then(|v| v.to_string().ok()).map(String::as_str)
    }

    fn tensor(&self, name: &str) -> Result<Option<QTensor>, ModelError> {
        if !self.content.tensor_infos.contains_key(name) {
            return Ok(None);
        }
        // A poisoned lock only means another reader failed; the file position is set by every read.
        let mut file = self.file.lock().unwrap_or_else(|e| e.into_inner());
        self.content.tensor(&mut *file, name, &Device::Cpu).map(Some).map_err(|e| {
            ModelError::Invalid { file: self.name.clone(), reason: format!("{name}: {e}") }
        })
    }

    /// Heads whose rows llama.cpp's converter interleaved, for the weights it does that to.
    fn interleaved_heads(&self, name: &str) -> Option<usize> {
        if self.config.architecture != Architecture::Llama {
            return None;
        }
        match name {
            n if n.contains("attn_q.") => Some(self.config.heads),
            n if n.contains("attn_k.") => Some(self.config.kv_heads),
            _ => None,
        }
    }
}

impl WeightReader for GgufFile {
    fn vector(&self, name: &str, len: usize) -> Result<Option<Tensor>, ModelError> {
        let name = gguf_name(name);
        let Some(tensor) = self.tensor(&name)? else { return Ok(None) };
        check_shape(&name, &tensor, &[len])?;
        let vector = tensor.dequantize(&Device::Cpu)?;
        Ok(Some(match self.interleaved_heads(&name) {
            Some(heads) => deinterleave(&vector.unsqueeze(1)?, heads)?.squeeze(1)?,
            None => vector,
        }))
    }

    fn matrix(&self, name: &str, shape: (usize, usize)) -> Result<Option<Matrix>, ModelError> {
        let name = gguf_name(name);
        let Some(tensor) = self.tensor(&name)? else { return Ok(None) };
        check_shape(&name, &tensor, &[shape.0, shape.1])?;
        let heads = self.interleaved_heads(&name);
        Ok(Some(match tensor.dtype() {
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => {
                let dense = tensor.dequantize(&Device::Cpu)?;
                Matrix::dense(&match heads {
                    Some(heads) => deinterleave(&dense, heads)?,
                    None => dense,
                })?
            }
            _ => Matrix::quantized(match heads {
                Some(heads) => deinterleave_blocks(&tensor, heads)?,
                None => tensor,
            })?,
        }))
    }

    fn rope_divisors(&self) -> Result<Option<Vec<f32>>, ModelError> {
        let len = self.config.head_dim / 2;
        match self.vector("rope_freqs.weight", len)? {
            Some(divisors) => Ok(Some(divisors.to_vec1()?)),
            None => Ok(None),
        }
    }
}

fn check_shape(name: &str, tensor: &QTensor, want: &[usize]) -> Result<(), ModelError> {
    if tensor.shape().dims() == want {
        return Ok(());
    }
    Err(ModelError::WeightShape {
        name: name.to_owned(),
        got: tensor.shape().dims().to_vec(),
        want: want.to_vec(),
    })
}

/// A CPU tensor of quantised blocks from their bytes.
pub(super) fn qtensor(
    bytes: Vec<u8>,
    shape: &[usize],
    dtype: GgmlDType,
) -> Result<QTensor, ModelError> {
    let storage = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, dtype)?;
    Ok(QTensor::new(storage, shape.to_vec())?)
}

/// llama.cpp stores the rows of each Llama head as pairs (0, half), (1, half + 1), …; ours are the halves.
fn row_order(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let head_dim = rows / heads;
    let half = head_dim / 2;
    (0..rows).map(move |row| {
        let (head, within) = (row / head_dim, row % head_dim);
        head * head_dim + 2 * (within % half) + within / half
    })
}

fn deinterleave(dense: &Tensor, heads: usize) -> Result<Tensor, ModelError> {
    let order: Vec<u32> = row_order(dense.dim(0)?, heads).map(|row| row as u32).collect();
    Ok(dense.index_select(&Tensor::new(order, dense.device())?, 0)?)
}

fn deinterleave_blocks(tensor: &QTensor, heads: usize) -> Result<QTensor, ModelError> {
    let (rows, _) = tensor.shape().dims2()?;
    let bytes = tensor.data()?;
    let row_bytes = bytes.len() / rows;
    let ordered =
        row_order(rows, heads).flat_map(|row| &bytes[row * row_bytes..][..row_bytes]).copied();
    qtensor(ordered.collect(), tensor.shape().dims(), tensor.dtype())
}

/// The GGUF name of a Hugging Face weight; unknown names pass unchanged.
fn gguf_name(name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".to_owned(),
        "model.norm.weight" => return "output_norm.weight".to_owned(),
        "lm_head.weight" => return "output.weight".to_owned(),
        _ => {}
    }
    let Some((layer, rest)) =
        name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
    else {
        return name.to_owned();
    };
    let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
    let module = match module {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    format!("blk.{layer}.{module}.{kind}")
}

struct Metadata<'a> {
    name: &'a str,
    content: &'a Content,
}

impl Metadata<'_> {
    fn config(&self) -> Result<ModelConfig, ModelError> {
        let arch = self
            .content
            .metadata
            .get("general.architecture")
            .and_then(|v| v.to_string().ok())
            .map_or("(none)", String::as_str);
        // llama.cpp converts Mistral to its `llama`; a file that says `mistral` is of unknown origin.
        let architecture = Architecture::from_name(arch)
            .filter(|architecture| *architecture != Architecture::Mistral)
            .ok_or_else(|| {
                self.unsupported(
                    format!("GGUF architecture {arch}"),
                    "supported are llama (Mistral too), qwen2 and qwen3",
                )
            })?;
        let key = |name: &str| format!("{arch}.{name}");
        if let Some(experts) = self.count(&key("expert_count")).filter(|count| *count > 0) {
            return Err(self.unsupported(
                format!("a mixture of {experts} experts"),
                "use a dense model of that family",
            ));
        }
        let hidden_size = self.required(&key("embedding_length"))?;
        let heads = self.required(&key("attention.head_count"))?;
        let rope_scaling = match self.string(&key("rope.scaling.type")) {
            None | Some("none") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear {
                factor: self.float(&key("rope.scaling.factor")).unwrap_or(1.0),
            },
            Some(other) => {
                return Err(self.unsupported(
                    format!("RoPE scaling {other}"),
                    "supported are none, linear and frequency factors",
                ));
            }
        };
        let tokens = self.content.metadata.get("tokenizer.ggml.tokens");
        let vocab_size = match self.count(&key("vocab_size")) {
            Some(size) => size,
            None => tokens.and_then(|t| t.to_vec().ok()).map_or(0, Vec::len),
        };
        let head_dim = match self.count(&key("attention.key_length")) {
            Some(head_dim) => head_dim,
            None => hidden_size / heads.max(1),
        };
        let rotated = self.count(&key("rope.dimension_count")).unwrap_or(head_dim);
        if rotated != head_dim {
            return Err(self.unsupported(
                format!("rotating {rotated} of {head_dim} dimensions per head"),
                "all of them must be",
            ));
        }
        let config = ModelConfig {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: self.required(&key("feed_forward_length"))?,
            layers: self.required(&key("block_count"))?,
            heads,
            kv_heads: self.count(&key("attention.head_count_kv")).unwrap_or(heads),
            head_dim,
            rms_norm_eps: self.float(&key("attention.layer_norm_rms_epsilon")).unwrap_or(1e-6),
            rope_theta: self.float(&key("rope.freq_base")).unwrap_or(10_000.0),
            rope_scaling,
            rope_scaling_json: None,
            max_positions: within_window(
                self.required(&key("context_length"))?,
                self.count(&key("attention.sliding_window")).filter(|window| *window > 0),
            ),
            tie_word_embeddings: !self.content.tensor_infos.contains_key("output.weight"),
            qk_norm: architecture == Architecture::Qwen3,
            // GGUF has no flag for the biases of a Llama: they are used where the file has them.
            biases: Biases { qkv: architecture == Architecture::Qwen2, ..Biases::default() },
        };
        config.validate(self.name)
    }

    fn unsupported(&self, what: String, hint: &str) -> ModelError {
        ModelError::Unsupported { file: self.name.to_owned(), what, hint: hint.to_owned() }
    }

    fn required(&self, key: &str) -> Result<usize, ModelError> {
        self.count(key).ok_or_else(|| ModelError::Invalid {
            file: self.name.to_owned(),
            reason: format!("metadata {key} is missing or not a count"),
        })
    }

    fn count(&self, key: &str) -> Option<usize> {
        match self.content.metadata.get(key)? {
            Value::U64(v) => usize::try_from(*v).ok(),
            Value::I32(v) => usize::try_from(*v).ok(),
            Value::I64(v) => usize::try_from(*v).ok(),
            value => value.to_u32().ok().map(|v| v as usize),
        }
    }

    fn float(&self, key: &str) -> Option<f64> {
        let value = self.content.metadata.get(key)?;
        value.to_f32().map(f64::from).or_else(|_| value.to_f64()).ok()
    }

    fn string(&self, key: &str) -> Option<&str> {
        self.content.metadata.get(key).and_then(|v| v.to_string().ok()).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_llama_cpp() {
        for (ours, gguf) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("rope_freqs.weight", "rope_freqs.weight"),
        ] {
            assert_eq!(gguf_name(ours), gguf);
        }
    }

    #[test]
    fn row_order_undoes_llama_cpps_interleaving() {
        // The converter's permutation: reshape(heads, 2, half).swapaxes(1, 2).
        let (heads, half) = (2, 3);
        let converted: Vec<usize> = (0..heads)
            .flat_map(|h| (0..half).flat_map(move |j| (0..2).map(move |s| (h * 2 + s) * half + j)))
            .collect();
        let restored: Vec<usize> = row_order(12, heads).map(|row| converted[row]).collect();
        assert_eq!(restored, (0..12).collect::<Vec<_>>());
    }
}
