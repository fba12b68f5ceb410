//! Adam, as `torch.optim.Adam` computes it, over f32 master copies.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Parameters;

/// Settings of [`Adam`]. The learning rate comes from the schedule.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamOptions {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Added to the gradient as `weight_decay · parameter` (L2), as torch's Adam does.
    pub weight_decay: f64,
    /// Largest L2 norm of the whole gradient; `None` does not clip, as the original trainers.
    pub max_grad_norm: Option<f64>,
}

impl Default for AdamOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, max_grad_norm: None }
    }
}

/// Running means of the gradient and of its square, tensor by tensor as the parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Adam {
    pub options: AdamOptions,
    pub first: Vec<Vec<f32>>,
    pub second: Vec<Vec<f32>>,
    /// Updates made.
    pub step: u64,
}

impl Adam {
    pub fn new(options: AdamOptions, parameters: &Parameters) -> Self {
        let zeros: Vec<Vec<f32>> =
            parameters.tensors().iter().map(|tensor| vec![0.0; tensor.len()]).collect();
        Self { options, first: zeros.clone(), second: zeros, step: 0 }
    }

    /// One update with learning rate `lr`. Frozen tokens do not move. Returns the norm of the gradient over
    /// the trainable numbers, before clipping.
    pub fn update(&mut self, parameters: &mut Parameters, gradients: &[Vec<f32>], lr: f64) -> f64 {
        let runs: Vec<_> = parameters.trainable_runs().collect();
        let squares = |tensor: &Vec<f32>| {
            let run = |run: &std::ops::Range<usize>| {
                tensor[run.clone()].iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>()
            };
            runs.iter().map(run).sum::<f64>()
        };
        let norm = gradients.iter().map(squares).sum::<f64>().sqrt();
        let scale = match self.options.max_grad_norm {
            Some(max) if norm > max => (max / (norm + 1e-6)) as f32,
            _ => 1.0,
        };
        self.step += 1;
        let AdamOptions { beta1, beta2, eps, weight_decay, .. } = self.options;
        let steps = self.step as f64;
        let step_size = (lr / (1.0 - beta1.powf(steps))) as f32;
        let second_root = (1.0 - beta2.powf(steps)).sqrt() as f32;
        // The complements are taken in f64, as torch does.
        let (rest1, rest2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
        let beta2 = beta2 as f32;
        let (eps, decay) = (eps as f32, weight_decay as f32);
        parameters
            .tensors_mut()
            .par_iter_mut()
            .zip(gradients)
            .zip(self.first.par_iter_mut().zip(&mut self.second))
            .for_each(|((values, gradient), (first, second))| {
                for i in runs.iter().cloned().flatten() {
                    let g = gradient[i] * scale + decay * values[i];
                    first[i] += rest1 * (g - first[i]);
                    second[i] = beta2 * second[i] + rest2 * g * g;
                    values[i] -= step_size * first[i] / (second[i].sqrt() / second_root + eps);
                }
            });
        norm
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cartridge::LayerKv;
    use candle_core::{Device, Tensor};

    fn parameters(frozen: usize) -> Parameters {
        let tensor = |start: f32| {
            let values: Vec<f32> = (0..12).map(|i| start + i as f32).collect();
            Tensor::from_vec(values, (2, 3, 2), &Device::Cpu).expect("a tensor")
        };
        let layer = LayerKv { keys: tensor(-3.0), values: tensor(1.0), bias: None };
        Parameters::new(&[layer], frozen).expect("valid")
    }

    /// `torch.optim.Adam([x], lr=0.1, weight_decay=0.01)` on x = [1, -2] with gradients [0.5, -1], [0.25, 2],
    /// [-1, 0.125], computed with PyTorch 2.
    #[test]
    fn equals_torch() {
        let mut p = parameters(0);
        let mut adam = Adam::new(AdamOptions { weight_decay: 0.01, ..AdamOptions::default() }, &p);
        p.tensors_mut()[0][0] = 1.0;
        p.tensors_mut()[0][1] = -2.0;
        for (a, b) in [(0.5, -1.0), (0.25, 2.0), (-1.0, 0.125)] {
            let mut gradients = vec![vec![0.0; 12]; 2];
            (gradients[0][0], gradients[0][1]) = (a, b);
            adam.update(&mut p, &gradients, 0.1);
        }
        for (got, torch) in p.tensors()[0].iter().zip([0.8258478_f32, -1.9659458]) {
            assert!((got - torch).abs() < 1e-6, "{got} for {torch}");
        }
    }

    #[test]
    fn frozen_tokens_stay_and_do_not_count_for_the_norm() {
        let mut p = parameters(1);
        let before = p.clone();
        let mut gradients = vec![vec![100.0f32; 12]; 2];
        for tensor in &mut gradients {
            p.trainable_runs().for_each(|run| tensor[run].fill(0.5));
        }
        let mut adam = Adam::new(AdamOptions::default(), &p);
        let norm = adam.update(&mut p, &gradients, 0.1);
        assert!((norm - (16.0f64 * 0.25).sqrt()).abs() < 1e-6, "{norm}");
        for (tensor, old) in p.tensors().iter().zip(before.tensors()) {
            for (i, (new, old)) in tensor.iter().zip(old).enumerate() {
                assert_eq!(new == old, i % 6 < 2, "element {i}");
            }
        }
    }

    #[test]
    fn clipping_scales_the_whole_gradient() {
        let update = |max_grad_norm, gradient: f32| {
            let mut p = parameters(0);
            let mut adam =
                Adam::new(AdamOptions { max_grad_norm, eps: 1.0, ..AdamOptions::default() }, &p);
            adam.update(&mut p, &vec![vec![gradient; 12]; 2], 0.1);
            p
        };
        let (clipped, small) = (update(Some(1.0), 10.0), update(None, 1.0 / 24f32.sqrt()));
        for (a, b) in clipped.tensors().iter().flatten().zip(small.tensors().iter().flatten()) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }
}
