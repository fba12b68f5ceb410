//! Weights that must be there, weights that must not be read, and real Q4_K.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use cartouche::model::{
    Attend, Decoder, LoadOptions, ModelError, ModelSource, Quantize, load_decoder,
};
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

const HIDDEN: usize = 256;
const VOCAB: usize = 64;

fn config(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 128, "tie_word_embeddings": false,
    })
}

/// Random weights of one layer, all biases included.
fn weights() -> HashMap<String, Tensor> {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let mut tensor = |shape: &[usize], scale: f32, mean: f32| {
        let len: usize = shape.iter().product();
        let values: Vec<f32> =
            (0..len).map(|_| mean + scale * (random.random::<f32>() * 2.0 - 1.0)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let mut all = HashMap::new();
    for (name, out, input) in [
        ("self_attn.q_proj", 256, HIDDEN),
        ("self_attn.k_proj", 128, HIDDEN),
        ("self_attn.v_proj", 128, HIDDEN),
        ("self_attn.o_proj", HIDDEN, 256),
        ("mlp.gate_proj", 512, HIDDEN),
        ("mlp.up_proj", 512, HIDDEN),
        ("mlp.down_proj", HIDDEN, 512),
    ] {
        all.insert(format!("model.layers.0.{name}.weight"), tensor(&[out, input], 0.1, 0.0));
        all.insert(format!("model.layers.0.{name}.bias"), tensor(&[out], 0.1, 0.0));
    }
    for name in ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"] {
        all.insert(format!("model.{name}.weight"), tensor(&[HIDDEN], 0.2, 1.0));
    }
    all.insert("model.embed_tokens.weight".to_owned(), tensor(&[VOCAB, HIDDEN], 1.0, 0.0));
    all.insert("lm_head.weight".to_owned(), tensor(&[VOCAB, HIDDEN], 0.1, 0.0));
    all
}

fn decoder(
    folder: &Path,
    config: &Value,
    weights: &HashMap<String, Tensor>,
    quantize: Option<Quantize>,
) -> std::result::Result<Decoder, ModelError> {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    candle_core::safetensors::save(weights, folder.join("model.safetensors")).unwrap();
    let options = LoadOptions { quantize, ..LoadOptions::default() };
    load_decoder(&ModelSource::Folder(folder.to_owned()), &options)
}

/// Every token sees itself alone: enough to pass all matrices.
struct Itself;

impl Attend for Itself {
    fn attend(&mut self, _layer: usize, q: &Tensor, _k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (tokens, kv_heads, head_dim) = v.dims3()?;
        let group = q.dim(1)? / kv_heads;
        let v = v.unsqueeze(2)?.broadcast_as((tokens, kv_heads, group, head_dim))?;
        v.reshape((tokens, kv_heads * group, head_dim))
    }
}

fn logits(decoder: &Decoder) -> Vec<f32> {
    let tokens: Vec<u32> = (0..16).collect();
    let hidden = decoder.forward(&tokens, &tokens, &mut Itself).unwrap();
    decoder.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn biases_the_architecture_has_must_be_in_the_file() {
    let llama = |flag: &str| {
        let mut config = config("llama");
        config[flag] = json!(true);
        config
    };
    let folder = tempfile::tempdir().unwrap();
    for (config, name, required) in [
        (config("qwen2"), "self_attn.q_proj", true),
        (config("qwen2"), "self_attn.k_proj", true),
        (config("qwen2"), "self_attn.v_proj", true),
        (config("qwen2"), "self_attn.o_proj", false),
        (llama("attention_bias"), "self_attn.v_proj", true),
        (llama("attention_bias"), "self_attn.o_proj", true),
        (llama("attention_bias"), "mlp.up_proj", false),
        (llama("mlp_bias"), "mlp.down_proj", true),
        (llama("mlp_bias"), "self_attn.q_proj", false),
        (config("mistral"), "self_attn.q_proj", false),
    ] {
        let mut weights = weights();
        let bias = format!("model.layers.0.{name}.bias");
        weights.remove(&bias).unwrap();
        let built = decoder(folder.path(), &config, &weights, None);
        match (built, required) {
            (Ok(_), false) => {}
            (Err(ModelError::MissingWeight { name }), true) => assert_eq!(name, bias),
            (built, _) => panic!("{} without {bias}: {:?}", config["model_type"], built.err()),
        }
    }
}

/// A second copy of a tied head used to be converted, then dropped: one of the wrong type shows it is read.
#[test]
fn a_tied_head_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut weights = weights();
    let unreadable = Tensor::zeros((VOCAB, HIDDEN), DType::F64, &Device::Cpu).unwrap();
    weights.insert("lm_head.weight".to_owned(), unreadable);
    let mut config = config("llama");
    decoder(folder.path(), &config, &weights, None).expect_err("it is read when it is not tied");
    config["tie_word_embeddings"] = json!(true);
    decoder(folder.path(), &config, &weights, None).unwrap();
}

/// 4-bit blocks of uniform weights are off by about 4 % each; a misread block is off by the values.
#[test]
fn rows_of_256_are_really_quantised_to_four_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (config, weights) = (config("llama"), weights());
    let dense = decoder(folder.path(), &config, &weights, None).unwrap();
    let quantised = decoder(folder.path(), &config, &weights, Some(Quantize::Q4K)).unwrap();
    // 4.5 bits per weight of 32; Q8_0 would be 8.5.
    let ratio = quantised.weight_bytes() as f64 / dense.weight_bytes() as f64;
    assert!((0.13..0.16).contains(&ratio), "{ratio}");
    let (dense, quantised) = (logits(&dense), logits(&quantised));
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    let difference = norm(&mut dense.iter().zip(&quantised).map(|(a, b)| a - b));
    let relative = difference / norm(&mut dense.iter().copied());
    assert!(relative > 0.005 && relative < 0.2, "{relative}");
}
