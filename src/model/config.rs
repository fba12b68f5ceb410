//! What a model is, read from a Hugging Face `config.json`.

use serde_json::Value;

use super::ModelError;
use crate::cartridge::KvShape;
use crate::ops::RopeScaling;

/// Families the decoder computes. They differ in biases, QK norms and defaults only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Architecture {
    /// From `model_type` of a `config.json` or `general.architecture` of a GGUF file.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "llama" => Some(Self::Llama),
            "mistral" => Some(Self::Mistral),
            "qwen2" => Some(Self::Qwen2),
            "qwen3" => Some(Self::Qwen3),
            _ => None,
        }
    }
}

/// Shape and constants of a decoder.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// As written in the file, for a cartridge's provenance.
    pub rope_scaling_json: Option<Value>,
    /// Positions the model may use: `max_position_embeddings`, or a smaller attention window.
    pub max_positions: usize,
    pub tie_word_embeddings: bool,
    pub qk_norm: bool,
    pub biases: Biases,
}

/// Biases a checkpoint must have. Where it says none, one that is there is used all the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Biases {
    /// Of the query, key and value projections.
    pub qkv: bool,
    /// Of the attention's output projection.
    pub o: bool,
    /// Of the three MLP projections.
    pub mlp: bool,
}

/// The trained context, cut to the sliding window: within the window full attention is the same
/// function, beyond it this decoder would not be.
pub(super) fn within_window(positions: usize, window: Option<usize>) -> usize {
    match window {
        Some(window) if window < positions => {
            tracing::warn!(
                window,
                positions,
                "sliding-window attention is not computed: context is limited to the window"
            );
            window
        }
        _ => positions,
    }
}

impl ModelConfig {
    pub fn kv_shape(&self) -> KvShape {
        KvShape { layers: self.layers, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Reads a `config.json`. Anything the decoder would compute wrongly is refused, not ignored.
    pub fn from_json(text: &[u8], file: &str) -> Result<Self, ModelError> {
        let json: Value = serde_json::from_slice(text)
            .map_err(|e| ModelError::Invalid { file: file.to_owned(), reason: e.to_string() })?;
        Fields { json: &json, file }.config()
    }

    /// Checks that the dimensions can be computed with at all.
    pub fn validate(self, file: &str) -> Result<Self, ModelError> {
        let invalid = |reason: String| ModelError::Invalid { file: file.to_owned(), reason };
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_positions),
        ] {
            if value == 0 || value > 1 << 28 {
                return Err(invalid(format!("{name} is {value}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(invalid(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid(format!("head_dim {} is odd", self.head_dim)));
        }
        if !(self.rms_norm_eps > 0.0 && self.rope_theta > 0.0) {
            return Err(invalid("rms_norm_eps and rope_theta must be positive".to_owned()));
        }
        Ok(self)
    }
}

struct Fields<'a> {
    json: &'a Value,
    file: &'a str,
}

impl Fields<'_> {
    fn config(&self) -> Result<ModelConfig, ModelError> {
        let model_type = self.json["model_type"].as_str().unwrap_or("(none)");
        let architecture = Architecture::from_name(model_type).ok_or_else(|| {
            self.unsupported(
                format!("model_type {model_type}"),
                "supported are llama, mistral, qwen2 and qwen3",
            )
        })?;
        if let Some(act) = self.json["hidden_act"].as_str().filter(|act| *act != "silu") {
            return Err(self.unsupported(format!("hidden_act {act}"), "only silu is"));
        }
        if self.json["quantization_config"].is_object() {
            return Err(self.unsupported(
                "quantization_config".to_owned(),
                "use the unquantised weights with --quantize, or a .gguf file",
            ));
        }
        let heads = self.required("num_attention_heads")?;
        let hidden_size = self.required("hidden_size")?;
        // transformers 5 moved theta and scaling into `rope_parameters`.
        let rope = match &self.json["rope_parameters"] {
            Value::Object(_) => &self.json["rope_parameters"],
            _ => &self.json["rope_scaling"],
        };
        let rope_theta = rope["rope_theta"]
            .as_f64()
            .or_else(|| self.json["rope_theta"].as_f64())
            .unwrap_or(10_000.0);
        let rope_scaling = self.rope_scaling(rope)?;
        let config = ModelConfig {
            architecture,
            vocab_size: self.required("vocab_size")?,
            hidden_size,
            intermediate_size: self.required("intermediate_size")?,
            layers: self.required("num_hidden_layers")?,
            heads,
            kv_heads: self.optional("num_key_value_heads")?.unwrap_or(heads),
            head_dim: match self.optional("head_dim")? {
                Some(head_dim) => head_dim,
                None => hidden_size / heads.max(1),
            },
            rms_norm_eps: self.json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            rope_scaling_json: (rope_scaling != RopeScaling::None).then(|| rope.clone()),
            max_positions: self.max_positions()?,
            tie_word_embeddings: self.json["tie_word_embeddings"].as_bool().unwrap_or(false),
            qk_norm: architecture == Architecture::Qwen3,
            biases: self.biases(architecture),
        };
        config.validate(self.file)
    }

    fn max_positions(&self) -> Result<usize, ModelError> {
        let positions = self.required("max_position_embeddings")?;
        let windowed = match self.json["use_sliding_window"].as_bool() {
            Some(used) => used,
            None => self.json["model_type"] == "mistral",
        };
        let window = self.optional("sliding_window")?.filter(|_| windowed);
        Ok(within_window(positions, window))
    }

    fn biases(&self, architecture: Architecture) -> Biases {
        let flag = |name: &str| self.json[name].as_bool().unwrap_or(false);
        let attention = match architecture {
            Architecture::Llama | Architecture::Qwen3 => flag("attention_bias"),
            Architecture::Mistral | Architecture::Qwen2 => false,
        };
        Biases {
            qkv: attention || architecture == Architecture::Qwen2,
            o: attention,
            mlp: architecture == Architecture::Llama && flag("mlp_bias"),
        }
    }

    fn rope_scaling(&self, rope: &Value) -> Result<RopeScaling, ModelError> {
        let number = |name: &str| {
            rope[name].as_f64().filter(|v| *v > 0.0).ok_or_else(|| ModelError::Invalid {
                file: self.file.to_owned(),
                reason: format!("rope scaling lacks a positive {name}"),
            })
        };
        let kind = rope["rope_type"].as_str().or_else(|| rope["type"].as_str());
        match kind {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: number("factor")? }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_positions: number("original_max_position_embeddings")?,
            }),
            Some(other) => Err(self.unsupported(
                format!("RoPE scaling {other}"),
                "supported are default, linear and llama3",
            )),
        }
    }

    fn required(&self, name: &str) -> Result<usize, ModelError> {
        self.optional(name)?.ok_or_else(|| ModelError::Invalid {
            file: self.file.to_owned(),
            reason: format!("{name} is missing"),
        })
    }

    fn optional(&self, name: &str) -> Result<Option<usize>, ModelError> {
        match &self.json[name] {
            Value::Null => Ok(None),
            value => value.as_u64().map(|v| Some(v as usize)).ok_or_else(|| ModelError::Invalid {
                file: self.file.to_owned(),
                reason: format!("{name} is {value}, not a count"),
            }),
        }
    }

    fn unsupported(&self, what: String, hint: &str) -> ModelError {
        ModelError::Unsupported { file: self.file.to_owned(), what, hint: hint.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu",
        })
    }

    fn read(json: &Value) -> Result<ModelConfig, ModelError> {
        ModelConfig::from_json(json.to_string().as_bytes(), "config.json")
    }

    #[test]
    fn reads_both_spellings_of_rope() {
        let mut old = llama();
        old["rope_theta"] = json!(5e5);
        old["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let mut new = llama();
        new["rope_parameters"] = old["rope_scaling"].clone();
        new["rope_parameters"]["rope_theta"] = json!(5e5);
        let (old, new) = (read(&old).unwrap(), read(&new).unwrap());
        assert_eq!(old.rope_theta, 5e5);
        assert_eq!((old.rope_theta, old.rope_scaling), (new.rope_theta, new.rope_scaling));
    }

    #[test]
    fn what_would_be_computed_wrongly_is_refused() {
        for (field, value) in [
            ("model_type", json!("gpt2")),
            ("hidden_act", json!("gelu")),
            ("rope_scaling", json!({"type": "yarn", "factor": 4.0})),
            ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0})),
            ("num_key_value_heads", json!(3)),
            ("num_key_value_heads", json!("2")),
            ("head_dim", json!(15)),
            ("vocab_size", json!(0)),
            ("quantization_config", json!({"quant_method": "gptq"})),
        ] {
            let mut json = llama();
            json[field] = value;
            let error = read(&json).expect_err(field).to_string();
            assert!(error.starts_with("config.json: "), "{error}");
        }
    }

    #[test]
    fn a_sliding_window_limits_the_context() {
        let mut json = llama();
        json["model_type"] = json!("mistral");
        json["sliding_window"] = json!(1024);
        assert_eq!(read(&json).unwrap().max_positions, 1024);
        json["sliding_window"] = Value::Null;
        assert_eq!(read(&json).unwrap().max_positions, 4096);
    }
}
