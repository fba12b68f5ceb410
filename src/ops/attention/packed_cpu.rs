//! Forward and backward of packed attention in f32: matrix products over tiles of rows.

use rayon::prelude::*;

use super::Heads;
use super::packed_plan::{Group, Plan, Tile};
use crate::ops::gemm::{Into, View, gemm};
use crate::ops::{exp_in_place, max};

pub(super) struct Inputs<'a> {
    pub plan: &'a Plan,
    pub heads: Heads,
    pub scale: f32,
    /// `[tokens, heads, head_dim]`.
    pub q: &'a [f32],
    /// `[kv_heads, prefix + tokens, head_dim]`, both.
    pub k: &'a [f32],
    pub v: &'a [f32],
}

/// One group for one KV head.
struct Task<'a> {
    inputs: &'a Inputs<'a>,
    group: &'a Group,
    kv_head: usize,
    /// Query heads that share the KV head.
    shared: usize,
    dim: usize,
    /// This KV head's keys and values, `[prefix + tokens, dim]`.
    k: &'a [f32],
    v: &'a [f32],
}

/// The output like `q`, and per task the log-sum-exp of its rows.
pub(super) fn forward(inputs: &Inputs<'_>) -> (Vec<f32>, Vec<Vec<f32>>) {
    let tasks = inputs.tasks();
    let (parts, log_sums): (Vec<_>, Vec<_>) = tasks.par_iter().map(Task::forward).unzip();
    (inputs.gathered(&tasks, &parts), log_sums)
}

/// Gradients of `q`, `k` and `v`, each like its tensor.
pub(super) fn backward(
    inputs: &Inputs<'_>,
    log_sums: &[Vec<f32>],
    out: &[f32],
    grad: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let tasks = inputs.tasks();
    let parts: Vec<Gradients> = tasks
        .par_iter()
        .zip(log_sums)
        .map(|(task, log_sums)| task.backward(log_sums, out, grad))
        .collect();
    let mut dk = vec![0f32; inputs.k.len()];
    let mut dv = vec![0f32; inputs.v.len()];
    for (task, part) in tasks.iter().zip(&parts) {
        let (prefix, dim) = (inputs.plan.prefix * task.dim, task.dim);
        let head = task.kv_head * task.k.len();
        let own = head + prefix + task.group.seen.start * dim;
        for (to, from) in [(&mut dk, &part.k), (&mut dv, &part.v)] {
            add(&mut to[head..head + prefix], &from[..prefix]);
            add(&mut to[own..own + from.len() - prefix], &from[prefix..]);
        }
    }
    let dq: Vec<Vec<f32>> = parts.into_iter().map(|part| part.q).collect();
    (inputs.gathered(&tasks, &dq), dk, dv)
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

impl Inputs<'_> {
    fn tasks(&self) -> Vec<Task<'_>> {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let head = (self.plan.prefix + self.plan.tokens) * head_dim;
        let task = |kv_head, group| Task {
            inputs: self,
            group,
            kv_head,
            shared: heads / kv_heads,
            dim: head_dim,
            k: &self.k[kv_head * head..][..head],
            v: &self.v[kv_head * head..][..head],
        };
        let groups = self.plan.groups.iter();
        groups.flat_map(|group| (0..kv_heads).map(move |kv_head| task(kv_head, group))).collect()
    }

    /// `[tokens, heads, head_dim]` from the rows of every task.
    fn gathered(&self, tasks: &[Task<'_>], parts: &[Vec<f32>]) -> Vec<f32> {
        let mut all = vec![0f32; self.q.len()];
        for (task, part) in tasks.iter().zip(parts) {
            let width = task.shared * task.dim;
            for (token, rows) in task.group.tokens.clone().zip(part.chunks_exact(width)) {
                all[task.at(token)..][..width].copy_from_slice(rows);
            }
        }
        all
    }
}

/// Of one task: `q` `[tokens, shared, dim]`, `k` and `v` `[prefix + seen, dim]`.
struct Gradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Task<'_> {
    fn forward(&self) -> (Vec<f32>, Vec<f32>) {
        let rows = self.group.tokens.len() * self.shared;
        let mut out = vec![0f32; rows * self.dim];
        let mut log_sums = Vec::with_capacity(rows);
        let (mut q, mut scores) = (Vec::new(), Vec::new());
        for tile in self.tiles() {
            self.gather(self.inputs.q, tile, self.inputs.scale, &mut q);
            self.scores(tile, &q, &mut scores);
            let width = self.inputs.plan.width(tile);
            let own = self.rows_of(tile);
            for row in scores.chunks_exact_mut(width) {
                let largest = max(row);
                let sum = exp_in_place(row, largest, 1.0);
                log_sums.push((f64::from(largest) + sum.ln()) as f32);
                let inverse = (1.0 / sum) as f32;
                row.iter_mut().for_each(|weight| *weight *= inverse);
            }
            let to = &mut out[own.start * self.dim..own.end * self.dim];
            self.times_keys(tile, &scores, self.v, 1.0, to);
        }
        (out, log_sums)
    }

    fn backward(&self, log_sums: &[f32], out: &[f32], grad: &[f32]) -> Gradients {
        let (dim, plan, scale) = (self.dim, self.inputs.plan, self.inputs.scale);
        let seen = plan.prefix + self.group.seen.len();
        let mut sums = Gradients {
            q: vec![0f32; self.group.tokens.len() * self.shared * dim],
            k: vec![0f32; seen * dim],
            v: vec![0f32; seen * dim],
        };
        let (mut q, mut weights, mut slopes) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tile_out, mut tile_grad) = (Vec::new(), Vec::new());
        for tile in self.tiles() {
            let (rows, width) = (self.rows_of(tile), plan.width(tile));
            self.gather(self.inputs.q, tile, scale, &mut q);
            self.gather(out, tile, 1.0, &mut tile_out);
            self.gather(grad, tile, 1.0, &mut tile_grad);
            self.scores(tile, &q, &mut weights);
            for (row, log_sum) in weights.chunks_exact_mut(width).zip(&log_sums[rows.clone()]) {
                exp_in_place(row, *log_sum, 1.0);
            }
            self.add_to_keys(tile, &weights, &tile_grad, &mut sums.v);
            // Slopes of the scores: weight · (grad · value − grad · out).
            self.products_with(tile, &tile_grad, self.v, &mut slopes);
            let each = slopes.chunks_exact_mut(width).zip(weights.chunks_exact(width));
            let states = tile_out.chunks_exact(dim).zip(tile_grad.chunks_exact(dim));
            for ((slopes, weights), (out, grad)) in each.zip(states) {
                let mean: f32 = out.iter().zip(grad).map(|(out, grad)| out * grad).sum();
                for (slope, weight) in slopes.iter_mut().zip(weights) {
                    *slope = weight * (*slope - mean);
                }
            }
            self.add_to_keys(tile, &slopes, &q, &mut sums.k);
            let to = &mut sums.q[rows.start * dim..rows.end * dim];
            self.times_keys(tile, &slopes, self.k, scale, to);
        }
        sums
    }

    fn tiles(&self) -> &[Tile] {
        &self.inputs.plan.tiles[self.group.tiles.clone()]
    }

    /// Where the heads of this task start in a tensor like `q`.
    fn at(&self, token: usize) -> usize {
        (token * self.inputs.heads.heads + self.kv_head * self.shared) * self.dim
    }

    /// Rows of a tile within the task: token by token, its heads side by side.
    fn rows_of(&self, tile: &Tile) -> std::ops::Range<usize> {
        let start = self.group.tokens.start;
        (tile.tokens.start - start) * self.shared..(tile.tokens.end - start) * self.shared
    }

    /// The tile's rows of a tensor like `q`, times `factor`.
    fn gather(&self, from: &[f32], tile: &Tile, factor: f32, to: &mut Vec<f32>) {
        to.clear();
        for token in tile.tokens.clone() {
            let rows = &from[self.at(token)..][..self.shared * self.dim];
            to.extend(rows.iter().map(|value| value * factor));
        }
    }

    /// The rows of `matrix` `[prefix + tokens, dim]` that the tile sees: of the prefix, and its own.
    fn parts<'a>(&self, tile: &Tile, matrix: &'a [f32]) -> [View<'a>; 2] {
        let (prefix, dim) = (self.inputs.plan.prefix, self.dim);
        let own = tile.tokens.end - tile.sequence;
        let first = (prefix + tile.sequence) * dim;
        [
            View::rows(&matrix[..prefix * dim], prefix, dim, dim),
            View::rows(&matrix[first..first + own * dim], own, dim, dim),
        ]
    }

    /// `rows · matrixᵀ`: `[rows, width]`.
    fn products_with(&self, tile: &Tile, rows: &[f32], matrix: &[f32], to: &mut Vec<f32>) {
        let (count, width) = (rows.len() / self.dim, self.inputs.plan.width(tile));
        to.resize(count * width, 0.0);
        let left = View::rows(rows, count, self.dim, self.dim);
        let [prefix, own] = self.parts(tile, matrix);
        gemm(to, width, Into::Replace, left, prefix.t(), 1.0);
        gemm(&mut to[self.inputs.plan.prefix..], width, Into::Replace, left, own.t(), 1.0);
    }

    /// Scores of the tile's rows, negative infinity for keys they may not see.
    fn scores(&self, tile: &Tile, q: &[f32], to: &mut Vec<f32>) {
        self.products_with(tile, q, self.k, to);
        let width = self.inputs.plan.width(tile);
        let tokens = tile.tokens.len();
        for (row, scores) in to.chunks_exact_mut(width).enumerate() {
            let later = tokens - 1 - row / self.shared;
            scores[width - later..].fill(f32::NEG_INFINITY);
        }
    }

    /// `factor · weights · matrix`, with `weights` `[rows, width]`.
    fn times_keys(
        &self,
        tile: &Tile,
        weights: &[f32],
        matrix: &[f32],
        factor: f32,
        to: &mut [f32],
    ) {
        let (width, at) = (self.inputs.plan.width(tile), self.inputs.plan.prefix);
        let rows = weights.len() / width;
        let [prefix, own] = self.parts(tile, matrix);
        gemm(to, self.dim, Into::Replace, View::rows(weights, rows, at, width), prefix, factor);
        let weights = View::rows(&weights[at..], rows, width - at, width);
        gemm(to, self.dim, Into::Add, weights, own, factor);
    }

    /// Adds `weightsᵀ · rows` to what the task has summed for the keys the tile sees.
    fn add_to_keys(&self, tile: &Tile, weights: &[f32], rows: &[f32], sums: &mut [f32]) {
        let (width, at, dim) = (self.inputs.plan.width(tile), self.inputs.plan.prefix, self.dim);
        let count = rows.len() / dim;
        let right = View::rows(rows, count, dim, dim);
        gemm(sums, dim, Into::Add, View::rows(weights, count, at, width).t(), right, 1.0);
        let own = (at + tile.sequence - self.group.seen.start) * dim;
        let weights = View::rows(&weights[at..], count, width - at, width);
        gemm(&mut sums[own..], dim, Into::Add, weights.t(), right, 1.0);
    }
}
