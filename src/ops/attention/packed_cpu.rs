//! Forward and backward of packed attention in f32: products over tiles of rows.
//!
//! The scores of a tile are `[rows, prefix + seen]`, both parts padded to whole vectors; what is padded
//! weighs nothing.

use std::borrow::Cow;

use rayon::prelude::*;

use super::Heads;
use super::packed_plan::{Group, Plan, Tile};
use super::packed_rows::{Mask, slopes, softmax, weights};
use crate::ops::product::{LANES, Left, Output, Product, Right, turn};

pub(super) struct Inputs<'a> {
    pub plan: &'a Plan,
    pub heads: Heads,
    pub scale: f32,
    /// `[queries, heads, head_dim]`.
    pub q: &'a [f32],
    /// `[tokens, kv_heads, head_dim]`, both.
    pub k: &'a [f32],
    pub v: &'a [f32],
    /// `[kv_heads, prefix, head_dim]`, both.
    pub prefix_keys: &'a [f32],
    pub prefix_values: &'a [f32],
}

/// Gradients, each laid out like its tensor.
pub(super) struct Gradients {
    /// Of keys and values.
    pub prefix: [Vec<f32>; 2],
    /// Of queries, keys and values, if they were asked for.
    pub own: Option<[Vec<f32>; 3]>,
}

/// Vectors as [`turn`] leaves them.
type Turned = Vec<[f32; LANES]>;

/// What tasks read of the prefix, for one KV head.
struct PrefixHead<'a> {
    /// `[prefix, head_dim padded]`, both.
    keys: Cow<'a, [f32]>,
    values: Cow<'a, [f32]>,
    turned_keys: Turned,
    /// The backward's only.
    turned_values: Turned,
}

/// One group for one KV head.
struct Task<'a> {
    inputs: &'a Inputs<'a>,
    group: &'a Group,
    kv_head: usize,
    prefix: &'a PrefixHead<'a>,
}

/// Of one task: `[prefix + seen, dim]`, both.
struct KvSums {
    k: Vec<f32>,
    v: Vec<f32>,
}

/// The output like `q`, and per task the log-sum-exp of its rows.
pub(super) fn forward(inputs: &Inputs<'_>) -> (Vec<f32>, Vec<Vec<f32>>) {
    let prefix = inputs.prefix(false);
    let mut out = vec![0f32; inputs.q.len()];
    let output = Output::new(&mut out, inputs.heads.head_dim, inputs.heads.head_dim);
    let tasks = inputs.tasks(&prefix);
    let log_sums = tasks.par_iter().map(|task| task.forward(output)).collect();
    (out, log_sums)
}

pub(super) fn backward(
    inputs: &Inputs<'_>,
    log_sums: &[Vec<f32>],
    out: &[f32],
    grad: &[f32],
    own: bool,
) -> Gradients {
    let Heads { kv_heads, head_dim: dim, .. } = inputs.heads;
    let prefix = inputs.prefix(true);
    let mut dq = vec![0f32; if own { inputs.q.len() } else { 0 }];
    let output = own.then(|| Output::new(&mut dq, dim, dim));
    let tasks = inputs.tasks(&prefix);
    let sums: Vec<KvSums> = tasks
        .par_iter()
        .zip(log_sums)
        .map(|(task, log_sums)| task.backward(log_sums, out, grad, output))
        .collect();
    let len = inputs.prefix_len() * dim;
    // In the order of the tasks, whichever thread computed them.
    let gathered = |of: fn(&KvSums) -> &[f32]| {
        let mut prefix = vec![0f32; kv_heads * len];
        let mut tokens = vec![0f32; if own { inputs.k.len() } else { 0 }];
        for (task, sums) in tasks.iter().zip(&sums) {
            let (from_prefix, from_own) = of(sums).split_at(len);
            add(&mut prefix[task.kv_head * len..][..len], from_prefix);
            for (token, from) in task.group.seen.clone().zip(from_own.chunks_exact(dim)) {
                add(&mut tokens[(token * kv_heads + task.kv_head) * dim..][..dim], from);
            }
        }
        (prefix, tokens)
    };
    let (prefix_keys, dk) = gathered(|sums| &sums.k);
    let (prefix_values, dv) = gathered(|sums| &sums.v);
    Gradients { prefix: [prefix_keys, prefix_values], own: own.then_some([dq, dk, dv]) }
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

fn turned(rows: &[f32], count: usize, columns: usize, row_stride: usize) -> Turned {
    let mut to = vec![[0f32; LANES]; count.div_ceil(LANES) * columns];
    turn(rows, count, columns, row_stride, &mut to);
    to
}

impl Inputs<'_> {
    fn prefix_len(&self) -> usize {
        self.prefix_keys.len() / (self.heads.kv_heads * self.heads.head_dim).max(1)
    }

    fn prefix(&self, backward: bool) -> Vec<PrefixHead<'_>> {
        let (dim, len) = (self.heads.head_dim, self.prefix_len());
        let head = |kv_head: usize| {
            let keys = &self.prefix_keys[kv_head * len * dim..][..len * dim];
            let values = &self.prefix_values[kv_head * len * dim..][..len * dim];
            PrefixHead {
                keys: padded(keys, dim),
                values: padded(values, dim),
                turned_keys: turned(keys, len, dim, dim),
                turned_values: if backward { turned(values, len, dim, dim) } else { Vec::new() },
            }
        };
        (0..self.heads.kv_heads).into_par_iter().map(head).collect()
    }

    fn tasks<'a>(&'a self, prefix: &'a [PrefixHead<'a>]) -> Vec<Task<'a>> {
        let heads = move |group| {
            let each = prefix.iter().enumerate();
            each.map(move |(kv_head, prefix)| Task { inputs: self, group, kv_head, prefix })
        };
        self.plan.groups.iter().flat_map(heads).collect()
    }
}

/// Rows of `dim` in whole vectors.
fn padded(rows: &[f32], dim: usize) -> Cow<'_, [f32]> {
    match dim.is_multiple_of(LANES) {
        true => Cow::Borrowed(rows),
        false => {
            let pad = |row: &[f32]| [row, &vec![0f32; dim.next_multiple_of(LANES) - dim]].concat();
            Cow::Owned(rows.chunks_exact(dim).flat_map(pad).collect())
        }
    }
}

impl Task<'_> {
    /// Writes the output's rows, each of one token and head.
    fn forward(&self, output: Output<'_>) -> Vec<f32> {
        let (plan, shared) = (self.inputs.plan, self.shared());
        let mut log_sums = vec![0f32; self.group.queries.len() * shared];
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        let (mut scores, mut out, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        for tile in &plan.tiles[self.group.tiles.clone()] {
            let mask = self.mask(tile, true);
            self.gather_queries(self.inputs.q, tile, self.inputs.scale, &mut q);
            self.gather_own(self.inputs.k, tile, &mut k);
            self.gather_own(self.inputs.v, tile, &mut v);
            self.products_with(&q, &self.prefix.turned_keys, &k, &mask, &mut scores);
            shares.resize(mask.rows(), 0.0);
            softmax(&mut scores, &mask, &mut log_sums[self.rows_of(tile)], &mut shares);
            self.times_keys(&scores, &self.prefix.values, &v, &mask, &mut out);
            let rows = out.chunks_exact(self.width()).zip(&shares).enumerate();
            for (row, (from, share)) in rows {
                // SAFETY: these queries and heads are this task's alone.
                let to = unsafe { output.row(self.row_at(tile, row)) };
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from * share);
            }
        }
        log_sums
    }

    /// Writes the rows of the queries' gradient, if there is a place for them; else what only that of the
    /// own tokens needs is left out, too.
    fn backward(
        &self,
        log_sums: &[f32],
        out: &[f32],
        grad: &[f32],
        output: Option<Output<'_>>,
    ) -> KvSums {
        let (dim, plan, scale) = (self.inputs.heads.head_dim, self.inputs.plan, self.inputs.scale);
        let own = output.is_some();
        let len = self.inputs.prefix_len() + if own { self.group.seen.len() } else { 0 };
        let mut sums = KvSums { k: vec![0f32; len * dim], v: vec![0f32; len * dim] };
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        let (mut probs, mut scores, mut to_q) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tile_out, mut tile_grad) = (Vec::new(), Vec::new());
        for tile in &plan.tiles[self.group.tiles.clone()] {
            let mask = self.mask(tile, own);
            self.gather_queries(self.inputs.q, tile, scale, &mut q);
            self.gather_queries(out, tile, 1.0, &mut tile_out);
            self.gather_queries(grad, tile, 1.0, &mut tile_grad);
            if own {
                self.gather_own(self.inputs.k, tile, &mut k);
                self.gather_own(self.inputs.v, tile, &mut v);
            }
            self.products_with(&q, &self.prefix.turned_keys, &k, &mask, &mut probs);
            weights(&mut probs, &mask, &log_sums[self.rows_of(tile)]);
            self.add_to_keys(&probs, &tile_grad, tile, &mask, &mut sums.v);
            self.products_with(&tile_grad, &self.prefix.turned_values, &v, &mask, &mut scores);
            slopes(&mut scores, &probs, &tile_out, &tile_grad, mask.rows());
            self.add_to_keys(&scores, &q, tile, &mask, &mut sums.k);
            let Some(output) = output else { continue };
            self.times_keys(&scores, &self.prefix.keys, &k, &mask, &mut to_q);
            for (row, from) in to_q.chunks_exact(self.width()).enumerate() {
                // SAFETY: these queries and heads are this task's alone.
                let to = unsafe { output.row(self.row_at(tile, row)) };
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from * scale);
            }
        }
        sums
    }

    /// Query heads that share the KV head.
    fn shared(&self) -> usize {
        self.inputs.heads.heads / self.inputs.heads.kv_heads
    }

    /// A head in whole vectors.
    fn width(&self) -> usize {
        self.inputs.heads.head_dim.next_multiple_of(LANES)
    }

    fn mask(&self, tile: &Tile, own: bool) -> Mask {
        let visible = tile.queries.clone().map(|query| self.inputs.plan.visible(tile, query));
        Mask {
            prefix: self.inputs.prefix_len(),
            own: if own { tile.seen.len() } else { 0 },
            visible: visible.flat_map(|keys| std::iter::repeat_n(keys, self.shared())).collect(),
        }
    }

    /// Rows of a tile within the task: query by query, its heads side by side.
    fn rows_of(&self, tile: &Tile) -> std::ops::Range<usize> {
        let (start, shared) = (self.group.queries.start, self.shared());
        (tile.queries.start - start) * shared..(tile.queries.end - start) * shared
    }

    /// Where row `row` of a tile is among the rows of a tensor like `q`.
    fn row_at(&self, tile: &Tile, row: usize) -> usize {
        let (query, head) = (tile.queries.start + row / self.shared(), row % self.shared());
        query * self.inputs.heads.heads + self.kv_head * self.shared() + head
    }

    /// The tile's rows of a tensor like `q`, times `factor`: `[rows, width]`.
    fn gather_queries(&self, from: &[f32], tile: &Tile, factor: f32, to: &mut Vec<f32>) {
        let (dim, width) = (self.inputs.heads.head_dim, self.width());
        let rows = tile.queries.len() * self.shared();
        to.resize(rows * width, 0.0);
        for (row, to) in to.chunks_exact_mut(width).enumerate() {
            let from = &from[self.row_at(tile, row) * dim..][..dim];
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from * factor);
            to[dim..].fill(0.0);
        }
    }

    /// The tokens that the tile sees of a tensor like `k`: `[seen, width]`.
    fn gather_own(&self, from: &[f32], tile: &Tile, to: &mut Vec<f32>) {
        let (dim, width) = (self.inputs.heads.head_dim, self.width());
        to.resize(tile.seen.len() * width, 0.0);
        for (token, to) in tile.seen.clone().zip(to.chunks_exact_mut(width)) {
            let at = (token * self.inputs.heads.kv_heads + self.kv_head) * dim;
            to[..dim].copy_from_slice(&from[at..at + dim]);
            to[dim..].fill(0.0);
        }
    }

    /// `rows · keysᵀ`, or the same with values: `[rows, width of the mask]`.
    fn products_with(
        &self,
        rows: &[f32],
        prefix: &[[f32; LANES]],
        own: &[f32],
        mask: &Mask,
        to: &mut Vec<f32>,
    ) {
        let (dim, width) = (self.inputs.heads.head_dim, self.width());
        to.resize(mask.rows() * mask.width(), 0.0);
        let own = turned(own, mask.own, dim, width);
        for (tiles, first_column) in [(prefix, 0), (&own, mask.own_start())] {
            let product = Product {
                left: Left::rows(rows, width),
                right: Right::tiles(tiles, dim),
                rows: mask.rows(),
                depth: dim,
                tiles: tiles.len() / dim,
                output: Output::new(to, mask.width(), mask.width()),
                first_row: 0,
                first_column,
                add: false,
            };
            // SAFETY: this task's own memory.
            unsafe { product.compute() };
        }
    }

    /// `weights · keys`, or the same with values: `[rows, width of a head]`.
    fn times_keys(
        &self,
        weights: &[f32],
        prefix: &[f32],
        own: &[f32],
        mask: &Mask,
        to: &mut Vec<f32>,
    ) {
        let width = self.width();
        to.resize(mask.rows() * width, 0.0);
        for (keys, start, depth) in [(prefix, 0, mask.prefix), (own, mask.own_start(), mask.own)] {
            let product = Product {
                left: Left::rows(&weights[start..], mask.width()),
                right: Right::rows(keys, width),
                rows: mask.rows(),
                depth,
                tiles: width / LANES,
                output: Output::new(to, width, width),
                first_row: 0,
                first_column: 0,
                add: start > 0,
            };
            // SAFETY: this task's own memory.
            unsafe { product.compute() };
        }
    }

    /// Adds `weightsᵀ · rows` to what the task has summed for the keys the tile sees.
    fn add_to_keys(
        &self,
        weights: &[f32],
        rows: &[f32],
        tile: &Tile,
        mask: &Mask,
        sums: &mut [f32],
    ) {
        let (dim, width) = (self.inputs.heads.head_dim, self.width());
        let own = mask.prefix + tile.seen.start - self.group.seen.start;
        for (start, keys, first_row) in [(0, mask.prefix, 0), (mask.own_start(), mask.own, own)] {
            let product = Product {
                left: Left::columns(&weights[start..], mask.width()),
                right: Right::rows(rows, width),
                rows: keys,
                depth: mask.rows(),
                tiles: width / LANES,
                output: Output::new(sums, dim, dim),
                first_row,
                first_column: 0,
                add: true,
            };
            // SAFETY: this task's own memory.
            unsafe { product.compute() };
        }
    }
}
