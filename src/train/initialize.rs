//! Where learning starts.

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::TrainError;
use crate::cartridge::{KvShape, LayerKv};
use crate::model::{self, Decoder};

/// The exact keys and values of the first `tokens` tokens of `prompt`, a chat that begins with the text as
/// its system message. The last `closing` tokens of the prompt, those that end the message, take the place
/// of the last of them where the prompt is longer.
///
/// The best start of the three in the ablation of arXiv 2506.06266 (LongHealth: 55.3% against 29.9% from
/// random vectors).
///
/// # Errors
/// [`TrainError::Invalid`] for a text that is shorter than the cartridge, or a cartridge too small for the
/// closing tokens.
pub fn from_text(
    decoder: &Decoder,
    prompt: &[u32],
    closing: usize,
    tokens: usize,
) -> Result<Vec<LayerKv>, TrainError> {
    if prompt.len() < tokens {
        return Err(TrainError::Invalid(format!(
            "the text has {} tokens, the cartridge is to have {tokens}; a text that short is better given \
             in the prompt, or train fewer tokens",
            prompt.len()
        )));
    }
    if tokens <= closing {
        return Err(TrainError::Invalid(format!(
            "a cartridge of {tokens} tokens has no room for the {closing} that end a system message"
        )));
    }
    let mut chosen = prompt[..tokens - closing].to_vec();
    chosen.extend_from_slice(&prompt[prompt.len() - closing..]);
    Ok(model::prefill(decoder, &chosen)?)
}

/// Normal random numbers with standard deviation `scale`; the original trainers use 1.
pub fn random(
    shape: KvShape,
    tokens: usize,
    scale: f32,
    seed: u64,
) -> Result<Vec<LayerKv>, TrainError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let dims = (shape.kv_heads, tokens, shape.head_dim);
    let mut tensor = || {
        let count = shape.kv_heads * tokens * shape.head_dim;
        let values: Vec<f32> = (0..count).map(|_| normal(&mut rng) * scale).collect();
        Tensor::from_vec(values, dims, &Device::Cpu)
    };
    (0..shape.layers)
        .map(|_| Ok(LayerKv { keys: tensor()?, values: tensor()?, bias: None }))
        .collect()
}

/// A standard normal number (Box and Muller).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let mut uniform = || ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), std::f64::consts::TAU * uniform());
    (radius * angle.cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_vectors_have_the_scale_and_follow_the_seed() {
        let shape = KvShape { layers: 2, kv_heads: 2, head_dim: 64 };
        let flat = |scale, seed| -> Vec<f32> {
            let layers = random(shape, 100, scale, seed).expect("tensors");
            layers
                .iter()
                .flat_map(|l| l.keys.flatten_all().unwrap().to_vec1::<f32>().unwrap())
                .collect()
        };
        let values = flat(0.5, 1);
        let n = values.len() as f32;
        let mean = values.iter().sum::<f32>() / n;
        let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n).sqrt();
        assert!(mean.abs() < 0.01 && (deviation - 0.5).abs() < 0.01, "{mean} {deviation}");
        assert_eq!(values, flat(0.5, 1));
        assert_ne!(values, flat(0.5, 2));
    }
}
