//! Segment attention against a softmax written out in f64.

use super::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.5f32..1.5)).collect()
}

/// Keys and values of one segment.
struct Segment {
    len: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
    bias: Option<Vec<f32>>,
    heads: Heads,
}

impl Segment {
    fn random(rng: &mut ChaCha8Rng, len: usize, biased: bool, heads: Heads) -> Self {
        let (kv, n) = (heads.kv_heads, heads.kv_heads * heads.head_dim * len);
        let bias = biased.then(|| random(rng, kv * len));
        Self { len, keys: random(rng, n), values: random(rng, n), bias, heads }
    }

    fn run(&self) -> KvRun<'_> {
        KvRun {
            keys: &self.keys,
            key_head_stride: self.heads.head_dim * self.len,
            key_stride: self.len,
            values: &self.values,
            value_head_stride: self.len * self.heads.head_dim,
            len: self.len,
            bias: self.bias.as_deref(),
        }
    }

    /// The same tokens in blocks of `size`, as a paged cache holds them.
    fn blocks(&self, size: usize) -> Vec<Segment> {
        let Heads { kv_heads, head_dim, .. } = self.heads;
        (0..self.len)
            .step_by(size)
            .map(|start| {
                let mut block = Segment {
                    len: size,
                    keys: vec![f32::NAN; kv_heads * head_dim * size],
                    values: vec![f32::NAN; kv_heads * head_dim * size],
                    bias: None,
                    heads: self.heads,
                };
                for h in 0..kv_heads {
                    for t in 0..size.min(self.len - start) {
                        for d in 0..head_dim {
                            block.keys[(h * head_dim + d) * size + t] =
                                self.keys[(h * head_dim + d) * self.len + start + t];
                            block.values[(h * size + t) * head_dim + d] =
                                self.values[(h * self.len + start + t) * head_dim + d];
                        }
                    }
                }
                block
            })
            .collect()
    }
}

/// Softmax of one query over the first `visible` tokens of each segment.
fn naive(q: &[f32], scale: f32, kv_head: usize, segments: &[(&Segment, usize)]) -> Vec<f64> {
    let mut scores = Vec::new();
    let mut values = Vec::new();
    for (segment, visible) in segments {
        let head_dim = segment.heads.head_dim;
        for t in 0..*visible {
            let key = |d: usize| segment.keys[(kv_head * head_dim + d) * segment.len + t];
            let dot: f64 = q.iter().enumerate().map(|(d, q)| f64::from(q * key(d))).sum();
            let bias = segment.bias.as_ref().map_or(0.0, |b| b[kv_head * segment.len + t]);
            scores.push(dot * f64::from(scale) + f64::from(bias));
            values.push(&segment.values[(kv_head * segment.len + t) * head_dim..][..head_dim]);
        }
    }
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![0f64; q.len()];
    for (weight, value) in weights.iter().zip(values) {
        for (o, v) in out.iter_mut().zip(value) {
            *o += weight / total * f64::from(*v);
        }
    }
    out
}

/// A sequence of the test batch: which cartridges, how many own tokens, how many of them are queries.
const BATCH: [(&[usize], usize, usize); 6] = [
    (&[0, 1], 37, 5),
    (&[], 1, 1),
    (&[0], 130, 1),
    (&[0, 1], 70, 70),
    (&[1], 64, 1),
    (&[0], 16, 1),
];

/// Cartridge lengths around lanes and tiles, several segments, prefill and decode in one batch; alone, with
/// and without grouping.
#[test]
fn equals_the_naive_softmax_and_does_not_depend_on_the_batch() {
    let rng = &mut ChaCha8Rng::seed_from_u64(7);
    for (heads, kv_heads, head_dim) in [(4, 2, 16), (3, 3, 20), (40, 2, 8), (1, 1, 1), (8, 2, 64)] {
        let heads = Heads { heads, kv_heads, head_dim };
        for lengths in [[1, 15], [16, 17], [63, 64], [65, 1031]] {
            let cartridges = lengths.map(|len| Segment::random(rng, len, len % 2 == 1, heads));
            let own: Vec<_> =
                BATCH.map(|(_, len, _)| Segment::random(rng, len, false, heads)).into();
            let blocks: Vec<_> = own.iter().map(|own| own.blocks(KEY_LANES)).collect();
            let sequence = |i: usize, first_row: usize| SequenceQueries {
                first_row,
                rows: BATCH[i].2,
                shared: BATCH[i].0.iter().map(|c| cartridges[*c].run()).collect(),
                own: blocks[i].iter().map(Segment::run).collect(),
                own_before: BATCH[i].1 - BATCH[i].2,
            };
            let mut first_row = 0;
            let batch: Vec<_> = (0..BATCH.len())
                .map(|i| {
                    first_row += BATCH[i].2;
                    sequence(i, first_row - BATCH[i].2)
                })
                .collect();
            let width = heads.heads * head_dim;
            let q = random(rng, first_row * width);
            let got = segment_attention(&q, heads, 0.3, &batch, 2);
            assert_eq!(got, segment_attention(&q, heads, 0.3, &batch, usize::MAX), "ungrouped");
            for (i, in_batch) in batch.iter().enumerate() {
                let rows = in_batch.first_row * width..(in_batch.first_row + in_batch.rows) * width;
                let alone = segment_attention(&q[rows.clone()], heads, 0.3, &[sequence(i, 0)], 2);
                assert_eq!(got[rows], alone, "sequence {i} alone");
                for row in 0..in_batch.rows {
                    let mut seen: Vec<_> =
                        BATCH[i].0.iter().map(|c| (&cartridges[*c], lengths[*c])).collect();
                    seen.push((&own[i], in_batch.own_before + row + 1));
                    for head in 0..heads.heads {
                        let at = ((in_batch.first_row + row) * heads.heads + head) * head_dim;
                        let kv_head = head / (heads.heads / kv_heads);
                        let want = naive(&q[at..at + head_dim], 0.3, kv_head, &seen);
                        for (g, w) in got[at..at + head_dim].iter().zip(want) {
                            assert!((f64::from(*g) - w).abs() < 2e-5, "{g} for {w}");
                        }
                    }
                }
            }
        }
    }
}

/// Slots after the last token hold what earlier owners left, not-a-number at worst.
#[test]
fn what_lies_behind_the_last_token_of_a_block_is_not_read() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 16 };
    let own = Segment::random(&mut ChaCha8Rng::seed_from_u64(1), 19, false, heads);
    let blocks = own.blocks(KEY_LANES);
    let sequence = SequenceQueries {
        first_row: 0,
        rows: 1,
        shared: vec![],
        own: blocks.iter().map(Segment::run).collect(),
        own_before: 18,
    };
    let out = segment_attention(&[1.0; 32], heads, 1.0, &[sequence], 2);
    assert!(out.iter().all(|o| o.is_finite()));
}

#[test]
fn a_key_with_bias_minus_infinity_is_not_seen() {
    let heads = Heads { heads: 1, kv_heads: 1, head_dim: 1 };
    let (keys, values) = (vec![1.0, 2.0], vec![5.0, 7.0]);
    let segment = |bias: Option<Vec<f32>>| Segment {
        len: 2,
        keys: keys.clone(),
        values: values.clone(),
        bias,
        heads,
    };
    let hidden = segment(Some(vec![f32::NEG_INFINITY; 2]));
    let half = segment(Some(vec![f32::NEG_INFINITY, 0.0]));
    let own = segment(None);
    let sequence = SequenceQueries {
        first_row: 0,
        rows: 1,
        shared: vec![hidden.run(), half.run()],
        own: vec![own.run()],
        own_before: 0,
    };
    let got = segment_attention(&[0.0], heads, 1.0, &[sequence], 2);
    assert_eq!(got, [6.0]); // the mean of 7 (shared, visible) and 5 (own)
}
