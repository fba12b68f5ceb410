//! The decoder against transformers on the same weights, with and without a KV prefix.

mod common;

use candle_core::{D, DType, Device, Result, Tensor};
use cartouche::cartridge::Lease;
use cartouche::model::{Attend, Decoder, LoadOptions, Quantize, load_decoder};

/// Attention of one sequence in plain tensor operations: an oracle for the engine's, and a second user
/// of the seam.
struct PlainAttention<'a> {
    cartridges: &'a [Lease],
}

impl Attend for PlainAttention<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (tokens, heads, head_dim) = q.dims3()?;
        let group = heads / k.dim(1)?;
        let join = |own: &Tensor, pick: fn(&cartouche::cartridge::LayerKv) -> &Tensor| {
            let mut parts: Vec<Tensor> =
                self.cartridges.iter().map(|c| pick(&c.layers()[layer]).clone()).collect();
            parts.push(own.transpose(0, 1)?);
            let all = Tensor::cat(&parts, 1)?;
            let (kv_heads, len, _) = all.dims3()?;
            all.unsqueeze(1)?
                .broadcast_as((kv_heads, group, len, head_dim))?
                .reshape((heads, len, head_dim))
        };
        let (k, v) = (join(k, |l| &l.keys)?, join(v, |l| &l.values)?);
        let prefix = k.dim(1)? - tokens;
        let visible: Vec<f32> = (0..tokens)
            .flat_map(|row| {
                (0..prefix + tokens)
                    .map(move |key| if key <= prefix + row { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        let mask = Tensor::from_vec(visible, (1, tokens, prefix + tokens), q.device())?;
        let scores = q.transpose(0, 1)?.contiguous()?.matmul(&k.t()?)?;
        let scores = (scores / (head_dim as f64).sqrt())?.broadcast_add(&mask)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        weights.matmul(&v)?.transpose(0, 1)?.contiguous()
    }
}

fn logits(decoder: &Decoder, prompt: &[u32], cartridges: &[Lease]) -> Vec<Vec<f32>> {
    let start: usize = cartridges.iter().map(|c| c.tokens()).sum();
    let positions: Vec<u32> = (start..start + prompt.len()).map(|p| p as u32).collect();
    let hidden = decoder.forward(prompt, &positions, &mut PlainAttention { cartridges }).unwrap();
    decoder.logits(&hidden).unwrap().to_vec2().unwrap()
}

/// Largest difference between the recorded rows and the last rows of ours.
fn worst_difference(ours: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let ours = &ours[ours.len() - expected.len()..];
    let pairs = ours.iter().flatten().zip(expected.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn greedy(decoder: &Decoder, prompt: &[u32], cartridges: &[Lease], len: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..len {
        let rows = logits(decoder, &tokens, cartridges);
        let last = rows.last().unwrap().iter().enumerate();
        tokens.push(last.max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32);
    }
    tokens.split_off(prompt.len())
}

#[test]
fn safetensors_models_match_transformers() {
    for fixture in common::model_fixtures(|name| !name.starts_with("gguf")) {
        let decoder = fixture.decoder();
        for case in fixture.cases() {
            let cartridges = fixture.cartridges(&case);
            let continuations = fixture.greedy(&case);
            for (i, prompt) in fixture.prompts().iter().enumerate() {
                let ours = logits(&decoder, prompt, &cartridges);
                let worst = worst_difference(&ours, &fixture.logits(&case, i));
                assert!(worst <= 1e-4, "{} {case} prompt {i}: {worst}", fixture.name);
                let got = greedy(&decoder, prompt, &cartridges, continuations[i].len());
                assert_eq!(got, continuations[i], "{} {case} prompt {i}", fixture.name);
            }
        }
    }
}

/// Size of the difference relative to the recorded logits, both as vectors.
fn relative_difference(ours: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let ours = &ours[ours.len() - expected.len()..];
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    let pairs = ours.iter().flatten().zip(expected.iter().flatten());
    norm(&mut pairs.map(|(a, b)| a - b)) / norm(&mut expected.iter().flatten().copied())
}

/// F16 weights are computed in f32 and must agree exactly. Quantised products also round activations
/// to 8 bits, in llama.cpp as in candle; a misread weight is off by the size of the logits themselves.
#[test]
fn gguf_models_match_their_dequantised_weights() {
    for fixture in common::model_fixtures(|name| name.starts_with("gguf")) {
        let decoder = fixture.decoder();
        for (i, prompt) in fixture.prompts().iter().enumerate() {
            let ours = logits(&decoder, prompt, &[]);
            let expected = fixture.logits("base", i);
            if fixture.name.ends_with("f16") {
                let worst = worst_difference(&ours, &expected);
                assert!(worst <= 1e-4, "{} prompt {i}: {worst}", fixture.name);
            }
            let relative = relative_difference(&ours, &expected);
            assert!(relative < 0.03, "{} prompt {i}: {relative}", fixture.name);
        }
    }
}

#[test]
fn weights_quantised_while_loading_stay_close() {
    for fixture in common::model_fixtures(|name| name == "qwen2" || name == "qwen3") {
        // The fixtures' rows are 32 wide, so Q4_K gives way to Q8_0, as documented.
        for quantize in [Quantize::Q8_0, Quantize::Q4K] {
            let options = LoadOptions { quantize: Some(quantize), ..LoadOptions::default() };
            let decoder = load_decoder(&fixture.source(), &options).unwrap();
            let ours = logits(&decoder, &fixture.prompts()[1], &[]);
            let relative = relative_difference(&ours, &fixture.logits("base", 1));
            assert!(relative > 0.0 && relative < 0.06, "{}: {relative}", fixture.name);
        }
    }
}

/// The cartridge of a text is the KV the decoder itself computes for it.
#[test]
fn keys_and_values_match_transformers() {
    struct Recording<'a>(PlainAttention<'a>, Vec<(Tensor, Tensor)>);
    impl Attend for Recording<'_> {
        fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
            self.1.push((k.transpose(0, 1)?, v.transpose(0, 1)?));
            self.0.attend(layer, q, k, v)
        }
    }
    for fixture in common::model_fixtures(|name| !name.starts_with("gguf")) {
        if fixture.expected["kv"].is_null() {
            continue;
        }
        let prompt = &fixture.prompts()[2];
        let positions: Vec<u32> = (0..prompt.len() as u32).collect();
        let mut recording = Recording(PlainAttention { cartridges: &[] }, Vec::new());
        fixture.decoder().forward(prompt, &positions, &mut recording).unwrap();
        for (i, (keys, values)) in recording.1.iter().enumerate() {
            for (ours, kind) in [(keys, "keys"), (values, "values")] {
                let theirs = &fixture.tensors[&format!("kv.layers.{i}.{kind}")];
                let difference = (ours - theirs).unwrap().abs().unwrap().flatten_all().unwrap();
                let worst = difference.max(0).unwrap().to_scalar::<f32>().unwrap();
                assert!(worst <= 1e-4, "{} layer {i} {kind}: {worst}", fixture.name);
            }
        }
    }
}

/// candle-transformers' own Llama, on the same files.
#[test]
fn llama_agrees_with_candle_transformers() {
    use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
    for fixture in common::model_fixtures(|name| name == "llama" || name == "llama3") {
        let json = std::fs::read(fixture.folder.join("config.json")).unwrap();
        let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        if json["rope_theta"].is_null() {
            json["rope_theta"] = json["rope_parameters"]["rope_theta"].clone();
        }
        let config: LlamaConfig = serde_json::from_value(json).unwrap();
        let config = config.into_config(false);
        let weights = fixture.folder.join("model.safetensors");
        let tensors = candle_core::safetensors::load(weights, &Device::Cpu).unwrap();
        let vars = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let llama = Llama::load(vars, &config).unwrap();
        let prompt = &fixture.prompts()[2];
        let mut cache = Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
        let input = Tensor::new(prompt.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let theirs = llama.forward(&input, 0, &mut cache).unwrap().to_vec2::<f32>().unwrap();
        let worst = worst_difference(&logits(&fixture.decoder(), prompt, &[]), &theirs);
        assert!(worst <= 1e-4, "{}: {worst}", fixture.name);
    }
}
