//! Rotary position embedding, half-split pairing (Llama, Mistral, Qwen), with Llama-3 frequency scaling.

use std::f64::consts::TAU;

use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Numbers, change_f32, contiguous_f32};
use crate::gpu::{self, machine_of};

/// How a model stretches its rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Llama 3.1 and later: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: f64,
    },
}

/// Inverse frequencies of a model, from which the angles of any positions are computed.
#[derive(Debug, Clone)]
pub struct RopeTable {
    inverse_frequencies: Vec<f32>,
}

impl RopeTable {
    /// `head_dim` must be even; `theta` is the model's `rope_theta`.
    pub fn new(head_dim: usize, theta: f64, scaling: RopeScaling) -> Self {
        let inverse_frequencies = (0..head_dim / 2)
            .map(|i| {
                let frequency = theta.powf(-((2 * i) as f64) / head_dim as f64);
                // transformers scales the f32 frequencies; at long positions the rounding is visible.
                scale_frequency(f64::from(frequency as f32), scaling) as f32
            })
            .collect();
        Self { inverse_frequencies }
    }

    /// Divides each frequency: the form in which GGUF files carry Llama-3 scaling.
    pub fn divide(&mut self, divisors: &[f32]) {
        for (frequency, divisor) in self.inverse_frequencies.iter_mut().zip(divisors) {
            *frequency /= divisor;
        }
    }

    /// Cosines and sines for `positions`, each `[positions, head_dim / 2]` f32.
    pub fn angles(&self, positions: &[u32], device: &Device) -> Result<(Tensor, Tensor)> {
        let half = self.inverse_frequencies.len();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for &position in positions {
            for frequency in &self.inverse_frequencies {
                let angle = position as f32 * frequency;
                cos.push(angle.cos());
                sin.push(angle.sin());
            }
        }
        let shape = (positions.len(), half);
        Ok((Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?))
    }
}

fn scale_frequency(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_positions,
        } => {
            let wavelength = TAU / frequency;
            if wavelength < original_max_positions / high_freq_factor {
                frequency
            } else if wavelength > original_max_positions / low_freq_factor {
                frequency / factor
            } else {
                let smooth = (original_max_positions / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

/// Rotates `x` `[tokens, heads, head_dim]` by `cos`, `sin` `[tokens, head_dim / 2]`.
pub fn apply_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    match machine_of(&x)? {
        Some(gpu) => gpu::ops::rope(&*gpu, &x, cos, sin),
        None => x.apply_op3(cos, sin, Rope),
    }
}

struct Rope;

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = contiguous_f32(self.name(), s1, l1)?;
        let cos = contiguous_f32(self.name(), s2, l2)?;
        let sin = contiguous_f32(self.name(), s3, l3)?;
        let (tokens, heads, head_dim) = l1.shape().dims3()?;
        let half = head_dim / 2;
        if l2.dims() != [tokens, half] || l3.dims() != [tokens, half] || head_dim % 2 != 0 {
            candle_core::bail!("rope: angles {:?} for input {:?}", l2.dims(), l1.dims());
        }
        let mut out = vec![0f32; x.len()];
        if out.is_empty() {
            return Ok((CpuStorage::F32(out), l1.shape().clone()));
        }
        let token_width = heads * head_dim;
        out.par_chunks_exact_mut(token_width).with_min_len(16).enumerate().for_each(|(t, out)| {
            let (cos, sin) = (&cos[t * half..][..half], &sin[t * half..][..half]);
            let x = &x[t * token_width..][..token_width];
            for (out, x) in out.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim)) {
                let (first, second) = x.split_at(half);
                let (out_first, out_second) = out.split_at_mut(half);
                for i in 0..half {
                    out_first[i] = first[i] * cos[i] - second[i] * sin[i];
                    out_second[i] = second[i] * cos[i] + first[i] * sin[i];
                }
            }
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// Takes a gradient `[tokens, heads, head_dim]` of [`apply_rope`]'s result to one of its `x`: the rotation by
/// the opposite angle. It takes the memory of `grad`, which nobody else may hold.
pub fn rope_backward(grad: Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (tokens, heads, head_dim) = grad.dims3()?;
    let half = head_dim / 2;
    let fit = |angles: &Tensor| angles.dims() == [tokens, half];
    if !fit(cos) || !fit(sin) || !head_dim.is_multiple_of(2) {
        candle_core::bail!("rope: angles {:?} for a gradient {:?}", cos.dims(), grad.dims());
    }
    if let Some(gpu) = machine_of(&grad)? {
        return gpu::backward::rope(&*gpu, grad, cos, sin);
    }
    let (cos, sin) = (Numbers::of(cos)?, Numbers::of(sin)?);
    let (cos, sin) = (&*cos, &*sin);
    let turn_back = |(t, row): (usize, &mut [f32])| {
        let (cos, sin) = (&cos[t * half..][..half], &sin[t * half..][..half]);
        for head in row.chunks_exact_mut(head_dim) {
            let (first, second) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (first[i], second[i]);
                first[i] = a * cos[i] + b * sin[i];
                second[i] = b * cos[i] - a * sin[i];
            }
        }
    };
    change_f32(&grad, |grad| {
        let rows = grad.par_chunks_exact_mut((heads * head_dim).max(1)).with_min_len(16);
        rows.enumerate().for_each(turn_back);
        Ok(())
    })?;
    Ok(grad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    #[test]
    fn value_and_gradient_match_candles_slow_rope() -> Result<()> {
        let dev = Device::Cpu;
        let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, (6, 4, 16), &dev)?)?;
        let table = RopeTable::new(16, 10_000.0, RopeScaling::None);
        let (cos, sin) = table.angles(&[3, 4, 5, 900, 901, 0], &dev)?;
        let ours = apply_rope(&x, &cos, &sin)?;
        // candle takes [batch, heads, tokens, head_dim].
        let theirs = candle_nn::rotary_emb::rope_slow(
            &x.transpose(0, 1)?.unsqueeze(0)?.contiguous()?,
            &cos,
            &sin,
        )?
        .squeeze(0)?
        .transpose(0, 1)?;
        let up = Tensor::randn(0f32, 1f32, (6, 4, 16), &dev)?;
        crate::ops::tests::assert_close(&ours, &theirs, 1e-5);
        let theirs = (theirs * &up)?.sum_all()?.backward()?;
        let grad = rope_backward(up, &cos, &sin)?;
        crate::ops::tests::assert_close(&grad, theirs.get(&x).unwrap(), 1e-5);
        Ok(())
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_divides_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 8192.0,
        };
        assert_eq!(scale_frequency(1.0, scaling), 1.0);
        assert_eq!(scale_frequency(1e-5, scaling), 1e-5 / 8.0);
        let middle = scale_frequency(TAU / 4000.0, scaling);
        assert!(middle < TAU / 4000.0 && middle > TAU / 4000.0 / 8.0);
    }
}
