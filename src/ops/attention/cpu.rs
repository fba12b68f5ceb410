//! Segment attention on the CPU, in f32, forward only: what serving needs.

use rayon::prelude::*;

/// Keys whose scores are held at once per query head; bounds the scratch on the stack.
const KEY_TILE: usize = 32;
/// Query heads per KV head that one pass over the keys serves at most.
const MAX_GROUP: usize = 16;

/// A run of keys and values that lie evenly spaced in memory.
///
/// Token `t` of KV head `h` starts at `h * head_stride + t * head_dim` in both slices.
#[derive(Clone, Copy)]
pub struct KvRun<'a> {
    pub keys: &'a [f32],
    pub values: &'a [f32],
    pub head_stride: usize,
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
    /// Visible to every row in full: cartridges.
    pub shared: Vec<KvRun<'a>>,
    /// The sequence's own tokens in order, the rows' own keys included.
    pub own: Vec<KvRun<'a>>,
    /// Own tokens before the first row. Row `i` sees `own_before + i + 1` of `own`.
    pub own_before: usize,
}

/// Heads and width of the packed queries `[rows, heads, head_dim]`.
#[derive(Clone, Copy)]
struct Geometry {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
}

/// `softmax(scale · q kᵀ + bias) v` per row and head over the row's visible keys.
///
/// `q` and the result are `[rows, heads, head_dim]`. `sequences` must cover all rows, in order. A query
/// head `h` uses KV head `h / (heads / kv_heads)`. The result of a row does not depend on the other rows
/// of the batch.
pub fn segment_attention(
    q: &[f32],
    (heads, kv_heads, head_dim): (usize, usize, usize),
    scale: f32,
    sequences: &[SequenceQueries<'_>],
) -> Vec<f32> {
    let geometry = Geometry { heads, kv_heads, head_dim, scale };
    let group_width = heads / kv_heads * head_dim;
    let row_sequence: Vec<usize> = sequences
        .iter()
        .enumerate()
        .flat_map(|(i, sequence)| std::iter::repeat_n(i, sequence.rows))
        .collect();
    let mut out = vec![0f32; q.len()];
    out.par_chunks_exact_mut(group_width).enumerate().for_each(|(task, out)| {
        let (row, kv_head) = (task / kv_heads, task % kv_heads);
        let sequence = &sequences[row_sequence[row]];
        let q = &q[task * group_width..][..group_width];
        attend_group(geometry, q, sequence, row - sequence.first_row, kv_head, out);
    });
    out
}

/// All query heads of one row that share a KV head.
fn attend_group(
    geometry: Geometry,
    q: &[f32],
    sequence: &SequenceQueries<'_>,
    row: usize,
    kv_head: usize,
    out: &mut [f32],
) {
    let head_dim = geometry.head_dim;
    // Groups wider than the scratch are served in several passes.
    for (q, out) in q.chunks(MAX_GROUP * head_dim).zip(out.chunks_mut(MAX_GROUP * head_dim)) {
        let mut softmax = RunningSoftmax::new(geometry, q, kv_head, out);
        for run in &sequence.shared {
            softmax.add_run(run, run.len);
        }
        let mut visible = sequence.own_before + row + 1;
        for run in &sequence.own {
            if visible == 0 {
                break;
            }
            softmax.add_run(run, visible.min(run.len));
            visible -= visible.min(run.len);
        }
        softmax.finish();
    }
}

/// Softmax-weighted sum of values over the keys seen so far, per query head of a group.
struct RunningSoftmax<'a> {
    geometry: Geometry,
    q: &'a [f32],
    kv_head: usize,
    /// Unnormalised output, `[group, head_dim]`.
    out: &'a mut [f32],
    max: [f32; MAX_GROUP],
    sum: [f32; MAX_GROUP],
    avx2: bool,
}

impl<'a> RunningSoftmax<'a> {
    fn new(geometry: Geometry, q: &'a [f32], kv_head: usize, out: &'a mut [f32]) -> Self {
        debug_assert_eq!(geometry.heads % geometry.kv_heads, 0);
        #[cfg(target_arch = "x86_64")]
        let avx2 = is_x86_feature_detected!("avx2");
        #[cfg(not(target_arch = "x86_64"))]
        let avx2 = false;
        Self {
            geometry,
            q,
            kv_head,
            out,
            max: [f32::NEG_INFINITY; MAX_GROUP],
            sum: [0.0; MAX_GROUP],
            avx2,
        }
    }

    /// Adds the first `visible` keys of `run`.
    fn add_run(&mut self, run: &KvRun<'_>, visible: usize) {
        let head_dim = self.geometry.head_dim;
        let base = self.kv_head * run.head_stride;
        for start in (0..visible).step_by(KEY_TILE) {
            let len = KEY_TILE.min(visible - start);
            let at = base + start * head_dim;
            let keys = &run.keys[at..][..len * head_dim];
            let values = &run.values[at..][..len * head_dim];
            let bias = run.bias.map(|bias| &bias[self.kv_head * run.len + start..][..len]);
            #[cfg(target_arch = "x86_64")]
            if self.avx2 {
                // SAFETY: the processor was asked for avx2 in `new`.
                unsafe { self.add_tile_avx2(keys, values, bias) };
                continue;
            }
            self.add_tile(keys, values, bias);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn add_tile_avx2(&mut self, keys: &[f32], values: &[f32], bias: Option<&[f32]>) {
        self.add_tile(keys, values, bias);
    }

    /// The body is compiled once per instruction set by inlining it into its callers.
    #[inline(always)]
    fn add_tile(&mut self, keys: &[f32], values: &[f32], bias: Option<&[f32]>) {
        let Geometry { head_dim, scale, .. } = self.geometry;
        let len = keys.len() / head_dim;
        let groups = self.q.chunks_exact(head_dim).zip(self.out.chunks_exact_mut(head_dim));
        for (group, (q, out)) in groups.enumerate() {
            let mut scores = [0f32; KEY_TILE];
            let mut max = self.max[group];
            for (i, key) in keys.chunks_exact(head_dim).enumerate() {
                scores[i] = dot(q, key) * scale + bias.map_or(0.0, |bias| bias[i]);
                max = max.max(scores[i]);
            }
            if max == f32::NEG_INFINITY {
                continue; // every key so far is masked out by its bias
            }
            let rescale = (self.max[group] - max).exp();
            if rescale != 1.0 {
                out.iter_mut().for_each(|o| *o *= rescale);
            }
            let mut sum = self.sum[group] * rescale;
            for (score, value) in scores[..len].iter().zip(values.chunks_exact(head_dim)) {
                let weight = (score - max).exp();
                sum += weight;
                for (o, v) in out.iter_mut().zip(value) {
                    *o += weight * v;
                }
            }
            self.max[group] = max;
            self.sum[group] = sum;
        }
    }

    fn finish(self) {
        for (out, sum) in self.out.chunks_exact_mut(self.geometry.head_dim).zip(self.sum) {
            if sum > 0.0 {
                out.iter_mut().for_each(|o| *o /= sum);
            }
        }
    }
}

/// Sum of products in sixteen independent lanes, so that the compiler can keep them in registers.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.5f32..1.5)).collect()
    }

    /// Softmax over one concatenated list of keys, in f64.
    fn naive(
        q: &[f32],
        head_dim: usize,
        scale: f32,
        kv_head: usize,
        runs: &[(KvRun<'_>, usize)],
    ) -> Vec<f64> {
        let mut scores = Vec::new();
        let mut values = Vec::new();
        for (run, visible) in runs {
            for t in 0..*visible {
                let at = kv_head * run.head_stride + t * head_dim;
                let key = &run.keys[at..at + head_dim];
                let dot: f64 = q.iter().zip(key).map(|(a, b)| f64::from(a * b)).sum();
                let bias = run.bias.map_or(0.0, |b| f64::from(b[kv_head * run.len + t]));
                scores.push(dot * f64::from(scale) + bias);
                values.push(&run.values[at..at + head_dim]);
            }
        }
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0f64; head_dim];
        for (weight, value) in weights.iter().zip(values) {
            for (o, v) in out.iter_mut().zip(value) {
                *o += weight / total * f64::from(*v);
            }
        }
        out
    }

    /// Cartridge lengths around block and tile edges, several segments, several sequences in one batch.
    #[test]
    fn equals_the_naive_softmax_over_all_segments() {
        let rng = &mut ChaCha8Rng::seed_from_u64(7);
        for (heads, kv_heads, head_dim) in [(4, 2, 16), (3, 3, 20), (40, 2, 8), (1, 1, 64)] {
            for lengths in [vec![], vec![1], vec![15, 16], vec![17, 33, 2047]] {
                let cartridges: Vec<_> = lengths
                    .iter()
                    .map(|&p| {
                        let n = kv_heads * p * head_dim;
                        (p, random(rng, n), random(rng, n), random(rng, kv_heads * p))
                    })
                    .collect();
                let own_tokens = 37;
                let own = [(); 2].map(|()| random(rng, kv_heads * own_tokens * head_dim));
                let shared: Vec<_> = cartridges
                    .iter()
                    .map(|(p, keys, values, bias)| KvRun {
                        keys,
                        values,
                        head_stride: p * head_dim,
                        len: *p,
                        bias: (p % 2 == 1).then_some(bias.as_slice()),
                    })
                    .collect();
                // The same own tokens, seen as two runs of 20 and 17.
                let half = |from: usize, len: usize| KvRun {
                    keys: &own[0][from * head_dim..],
                    values: &own[1][from * head_dim..],
                    head_stride: own_tokens * head_dim,
                    len,
                    bias: None,
                };
                let own_runs = || vec![half(0, 20), half(20, 17)];
                let sequences = [
                    SequenceQueries {
                        first_row: 0,
                        rows: 5,
                        shared: shared.clone(),
                        own: own_runs(),
                        own_before: 18,
                    },
                    SequenceQueries {
                        first_row: 5,
                        rows: 1,
                        shared: vec![],
                        own: own_runs(),
                        own_before: 0,
                    },
                ];
                let q = random(rng, 6 * heads * head_dim);
                let got = segment_attention(&q, (heads, kv_heads, head_dim), 0.3, &sequences);
                for row in 0..6 {
                    for head in 0..heads {
                        let kv_head = head / (heads / kv_heads);
                        let (shared, before) =
                            if row < 5 { (shared.as_slice(), 18 + row) } else { (&[][..], 0) };
                        let mut runs: Vec<_> = shared.iter().map(|r| (*r, r.len)).collect();
                        let visible = before + 1;
                        runs.push((half(0, 20), visible.min(20)));
                        runs.push((half(20, 17), visible.saturating_sub(20)));
                        let at = (row * heads + head) * head_dim;
                        let want = naive(&q[at..at + head_dim], head_dim, 0.3, kv_head, &runs);
                        for (g, w) in got[at..at + head_dim].iter().zip(want) {
                            assert!((f64::from(*g) - w).abs() < 1e-5, "{g} for {w}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_key_with_bias_minus_infinity_is_not_seen() {
        let keys = [1.0, 2.0];
        let values = [5.0, 7.0];
        let bias = [f32::NEG_INFINITY, 0.0];
        let run = KvRun { keys: &keys, values: &values, head_stride: 2, len: 2, bias: Some(&bias) };
        let own = KvRun { bias: None, len: 1, ..run };
        let hidden_first = SequenceQueries {
            first_row: 0,
            rows: 1,
            shared: vec![KvRun { len: 1, bias: Some(&bias[..1]), ..run }, run],
            own: vec![own],
            own_before: 0,
        };
        let got = segment_attention(&[0.0], (1, 1, 1), 1.0, &[hidden_first]);
        assert_eq!(got, [6.0]); // the mean of 7 (shared, visible) and 5 (own)
    }
}
