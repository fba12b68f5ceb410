//! Segment attention on the CPU, in f32, forward only: what serving needs.

use std::collections::HashMap;
use std::ops::Range;

use rayon::prelude::*;

use super::tile::{KEY_LANES, QUERIES, Running, TILE_KEYS, TILE_VECTORS, Tile, add_tile};
use crate::ops::simd::{Lanes, dispatch};

/// Queries per task at most: their state stays in the L2 cache while the keys pass by.
const TASK_QUERIES: usize = 256;
/// Rows of one sequence per task while prefilling.
const TASK_ROWS: usize = 32;
/// Multiply-adds below which the work is cheaper than handing it to another thread.
const SERIAL_WORK: usize = 1 << 17;

/// Heads and width of the packed queries `[rows, heads, head_dim]`. A query head `h` uses KV head
/// `h / (heads / kv_heads)`.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// A run of keys and values in memory.
///
/// Keys lie transposed, so that those of neighbouring tokens fill a register: dimension `d` of token `t` of
/// KV head `h` is at `h * key_head_stride + d * key_stride + t`. Its value starts at
/// `h * value_head_stride + t * head_dim`.
#[derive(Clone, Copy)]
pub struct KvRun<'a> {
    pub keys: &'a [f32],
    pub key_head_stride: usize,
    pub key_stride: usize,
    pub values: &'a [f32],
    pub value_head_stride: usize,
    /// Tokens in this run.
    pub len: usize,
    /// Added to the scaled score of each key: `bias[h * len + t]`.
    pub bias: Option<&'a [f32]>,
}

/// Consecutive query rows of one sequence and what they may see.
pub struct SequenceQueries<'a> {
    /// First row of this sequence in the packed queries.
    pub first_row: usize,
    pub rows: usize,
    /// Visible to every row in full: cartridges. A run that several sequences name is read once for all.
    pub shared: Vec<KvRun<'a>>,
    /// The sequence's own tokens in order, the rows' own keys included. All runs but the last hold the
    /// same number of tokens, a multiple of [`KEY_LANES`].
    pub own: Vec<KvRun<'a>>,
    /// Own tokens before the first row. Row `i` sees `own_before + i + 1` of `own`.
    pub own_before: usize,
}

/// `softmax(scale · q kᵀ + bias) v` per row and head over the row's visible keys.
///
/// `q` and the result are `[rows, heads, head_dim]`. `sequences` must cover all rows, in order. Sequences
/// that name the same run are computed together where at least `group_min` of them do.
///
/// The result of a row has the same bits whatever else is in the batch, and whatever `group_min` is.
pub fn segment_attention(
    q: &[f32],
    heads: Heads,
    scale: f32,
    sequences: &[SequenceQueries<'_>],
    group_min: usize,
) -> Vec<f32> {
    let width = heads.head_dim.next_multiple_of(KEY_LANES);
    let states = q.len() / heads.head_dim;
    let mut out = vec![0f32; states * width];
    let mut max = vec![f32::NEG_INFINITY; states];
    let mut sum = vec![0f32; states];
    let pass = Pass {
        q,
        heads,
        scale,
        width,
        out: out.as_mut_ptr(),
        max: max.as_mut_ptr(),
        sum: sum.as_mut_ptr(),
    };
    let deepest = sequences.iter().map(|sequence| sequence.shared.len()).max().unwrap_or(0);
    for level in 0..deepest {
        pass.run(&Work::shared(sequences, level, group_min, heads));
    }
    pass.run(&Work::own(sequences, heads));
    for (out, sum) in out.chunks_exact_mut(width).zip(&sum) {
        if *sum != 0.0 {
            out.iter_mut().for_each(|o| *o /= sum);
        }
    }
    if width != heads.head_dim {
        out = out.chunks_exact(width).flat_map(|out| &out[..heads.head_dim]).copied().collect();
    }
    out
}

/// What one level of segments asks for.
struct Work<'a> {
    /// Rows in the order of the tasks.
    rows: Vec<usize>,
    tasks: Vec<Task<'a>>,
}

/// Rows that see the same keys, and one KV head of them.
struct Task<'a> {
    kv_head: usize,
    /// Where its rows stand in [`Work::rows`].
    rows: Range<usize>,
    runs: &'a [KvRun<'a>],
    /// `None`: the rows see all keys. Otherwise the `i`-th row sees this many and `i`.
    visible: Option<usize>,
    tokens: usize,
}

impl<'a> Work<'a> {
    /// The `level`-th cartridge of every sequence, for those with the same one together.
    fn shared(
        sequences: &'a [SequenceQueries<'a>],
        level: usize,
        group_min: usize,
        heads: Heads,
    ) -> Self {
        let mut groups: Vec<Vec<&'a SequenceQueries<'a>>> = Vec::new();
        let mut known = HashMap::new();
        for sequence in sequences {
            let Some(run) = sequence.shared.get(level) else { continue };
            let group = *known.entry((run.keys.as_ptr(), run.len)).or_insert(groups.len());
            match groups.get_mut(group) {
                Some(group) => group.push(sequence),
                None => groups.push(vec![sequence]),
            }
        }
        let mut work = Self { rows: Vec::new(), tasks: Vec::new() };
        for group in &groups {
            let together = if group.len() < group_min { 1 } else { group.len() };
            for group in group.chunks(together) {
                let run = &group[0].shared[level];
                work.add_group(group, run, heads);
            }
        }
        work
    }

    fn add_group(&mut self, group: &[&SequenceQueries<'_>], run: &'a KvRun<'a>, heads: Heads) {
        let first = self.rows.len();
        self.rows.extend(group.iter().flat_map(|s| s.first_row..s.first_row + s.rows));
        let end = self.rows.len();
        for start in (first..end).step_by(rows_per_task(end - first, heads)) {
            let rows = start..end.min(start + rows_per_task(end - first, heads));
            let (runs, tokens) = (std::slice::from_ref(run), run.len);
            self.tasks.extend((0..heads.kv_heads).map(|kv_head| Task {
                kv_head,
                rows: rows.clone(),
                runs,
                visible: None,
                tokens,
            }));
        }
    }

    /// Every sequence's own tokens.
    fn own(sequences: &'a [SequenceQueries<'a>], heads: Heads) -> Self {
        let mut work = Self { rows: Vec::new(), tasks: Vec::new() };
        for sequence in sequences {
            for start in (0..sequence.rows).step_by(TASK_ROWS) {
                let len = TASK_ROWS.min(sequence.rows - start);
                let rows = work.rows.len()..work.rows.len() + len;
                work.rows.extend((sequence.first_row + start..).take(len));
                let visible = sequence.own_before + start + 1;
                work.tasks.extend((0..heads.kv_heads).map(|kv_head| Task {
                    kv_head,
                    rows: rows.clone(),
                    runs: &sequence.own,
                    visible: Some(visible),
                    tokens: visible + len - 1,
                }));
            }
        }
        work
    }
}

/// As many as keep every thread busy, within what the cache holds.
fn rows_per_task(rows: usize, heads: Heads) -> usize {
    let per_row = heads.heads / heads.kv_heads;
    let most = (TASK_QUERIES / per_row).max(1);
    let parts = (2 * rayon::current_num_threads()).div_ceil(heads.kv_heads);
    let whole_batches = QUERIES.div_ceil(per_row);
    rows.div_ceil(parts).next_multiple_of(whole_batches).clamp(1, most)
}

/// One call's queries, and the running softmax of each of its rows and heads.
struct Pass<'a> {
    q: &'a [f32],
    heads: Heads,
    scale: f32,
    /// `head_dim`, rounded up to whole vectors.
    width: usize,
    /// `[rows, heads, width]`
    out: *mut f32,
    /// `[rows, heads]`
    max: *mut f32,
    sum: *mut f32,
}

// SAFETY: tasks that run at the same time have different rows or KV heads, so their states are disjoint.
unsafe impl Sync for Pass<'_> {}

impl Pass<'_> {
    fn run(&self, Work { rows, tasks }: &Work<'_>) {
        let per_row = self.heads.heads / self.heads.kv_heads * self.heads.head_dim;
        let work: usize = tasks.iter().map(|t| t.rows.len() * t.tokens * per_row).sum();
        let run = |task: &Task<'_>| run_task(self, task, &rows[task.rows.clone()]);
        match work < SERIAL_WORK {
            true => tasks.iter().for_each(run),
            false => tasks.par_iter().for_each(run),
        }
    }
}

fn run_task(pass: &Pass<'_>, task: &Task<'_>, rows: &[usize]) {
    dispatch!(run_task_with(pass: &Pass<'_>, task: &Task<'_>, rows: &[usize]))
}

#[inline(always)]
fn run_task_with<L: Lanes>(pass: &Pass<'_>, task: &Task<'_>, rows: &[usize]) {
    let Pass { heads: Heads { heads, kv_heads, head_dim }, width, .. } = *pass;
    let per_row = heads / kv_heads;
    let queries = rows.len() * per_row;
    let state = |query: usize| {
        let row = rows[query / per_row];
        row * heads + task.kv_head * per_row + query % per_row
    };
    // Per batch of queries: `[head_dim, batch]`, scaled.
    let mut packed = vec![0f32; queries * head_dim];
    let mut batches = Vec::with_capacity(queries / QUERIES + 3);
    let mut first = 0;
    while first < queries {
        let len = [QUERIES, 4, 2, 1].into_iter().find(|n| *n <= queries - first).unwrap_or(1);
        let packed = &mut packed[first * head_dim..][..len * head_dim];
        for n in 0..len {
            let q = &pass.q[state(first + n) * head_dim..][..head_dim];
            for (d, q) in q.iter().enumerate() {
                packed[d * len + n] = q * pass.scale;
            }
        }
        batches.push((first, len));
        first += len;
    }
    let mut scratch = Scratch::default();
    let mut tiles = Tiles { task, heads: pass.heads, gather: queries > QUERIES, at: 0 };
    while let Some((start, tile)) = tiles.next(&mut scratch) {
        for &(first, len) in &batches {
            let running = |n: usize| {
                let state = state(first + n);
                let visible = match task.visible {
                    None => tile.len,
                    Some(visible) => {
                        (visible + (first + n) / per_row).saturating_sub(start).min(tile.len)
                    }
                };
                // SAFETY: `state` is below the number of rows times heads.
                unsafe {
                    Running {
                        out: pass.out.add(state * width),
                        max: pass.max.add(state),
                        sum: pass.sum.add(state),
                        visible,
                    }
                }
            };
            let q = &packed[first * head_dim..][..len * head_dim];
            // SAFETY: `Tiles` makes tiles as `Tile` says; the states are this task's alone.
            unsafe {
                match len {
                    8 => add_tile::<L, 8>(&tile, q, width, &std::array::from_fn(running)),
                    4 => add_tile::<L, 4>(&tile, q, width, &std::array::from_fn(running)),
                    2 => add_tile::<L, 2>(&tile, q, width, &std::array::from_fn(running)),
                    _ => add_tile::<L, 1>(&tile, q, width, &std::array::from_fn(running)),
                }
            }
        }
    }
}

/// Room for a tile whose keys or values cannot be read in place.
#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// The keys of a task, tile by tile.
struct Tiles<'a> {
    task: &'a Task<'a>,
    heads: Heads,
    /// Copy strided keys together: worth it when many queries read them.
    gather: bool,
    /// Tokens passed.
    at: usize,
}

impl Tiles<'_> {
    /// The next tile and the token it starts with.
    fn next(&mut self, scratch: &mut Scratch) -> Option<(usize, Tile)> {
        let start = self.at;
        let len = TILE_KEYS.min(self.task.tokens - start);
        if len == 0 {
            return None;
        }
        self.at += len;
        let per_run = self.task.runs[0].len.max(1);
        let first = &self.task.runs[start / per_run];
        let mut tile = Tile {
            keys: [std::ptr::null(); TILE_VECTORS],
            key_stride: first.key_stride,
            values: [std::ptr::null(); TILE_VECTORS],
            value_stride: self.heads.head_dim,
            len,
            bias: std::ptr::null(),
        };
        if let Some(bias) = first.bias {
            // Only a cartridge has a bias, and a cartridge is one run.
            tile.bias = bias[self.task.kv_head * first.len + start..][..len].as_ptr();
        }
        let mut in_place = self.heads.head_dim.is_multiple_of(KEY_LANES);
        for (group, token) in (start..start + len).step_by(KEY_LANES).enumerate() {
            let (run, within) = (&self.task.runs[token / per_run], token % per_run);
            let key = self.task.kv_head * run.key_head_stride + within;
            let last = key + (self.heads.head_dim - 1) * run.key_stride + KEY_LANES;
            in_place &= last <= run.keys.len() && run.key_stride == tile.key_stride;
            tile.keys[group] = run.keys[key..].as_ptr();
            let value = self.task.kv_head * run.value_head_stride + within * self.heads.head_dim;
            tile.values[group] = run.values[value..].as_ptr();
        }
        let strided = tile.key_stride > TILE_KEYS;
        if !in_place || (self.gather && strided) {
            self.copy(&mut tile, start, per_run, in_place, scratch);
        }
        Some((start, tile))
    }

    /// Replaces a tile by a copy in whole vectors, padded with zeroes.
    fn copy(
        &self,
        tile: &mut Tile,
        start: usize,
        per_run: usize,
        values_in_place: bool,
        scratch: &mut Scratch,
    ) {
        let head_dim = self.heads.head_dim;
        let width = head_dim.next_multiple_of(KEY_LANES);
        scratch.keys.resize(head_dim * TILE_KEYS, 0.0);
        scratch.values.resize(TILE_KEYS * width, 0.0);
        for (group, token) in (start..start + tile.len).step_by(KEY_LANES).enumerate() {
            let (run, within) = (&self.task.runs[token / per_run], token % per_run);
            let len = KEY_LANES.min(start + tile.len - token);
            let key = self.task.kv_head * run.key_head_stride + within;
            for d in 0..head_dim {
                let from = &run.keys[key + d * run.key_stride..][..len];
                scratch.keys[d * TILE_KEYS + group * KEY_LANES..][..len].copy_from_slice(from);
            }
            tile.keys[group] = scratch.keys[group * KEY_LANES..].as_ptr();
            if !values_in_place {
                let value = self.task.kv_head * run.value_head_stride + within * head_dim;
                for t in 0..len {
                    let from = &run.values[value + t * head_dim..][..head_dim];
                    let to = (group * KEY_LANES + t) * width;
                    scratch.values[to..][..head_dim].copy_from_slice(from);
                }
                tile.values[group] = scratch.values[group * KEY_LANES * width..].as_ptr();
            }
        }
        tile.key_stride = TILE_KEYS;
        if !values_in_place {
            tile.value_stride = width;
        }
    }
}
