//! A step of serving, the way the engine will run it: cartridges by the prefix kernel, own tokens by the decode
//! or the prefill kernel, all merged. Against the attention of the CPU backend, and against each sequence
//! alone, bit by bit.

use cartouche::ops::attention::{Heads, KvRun, SequenceQueries, segment_attention};
use half::bf16;

use crate::kernels_support::{Buffer, Library, Random, Shape, check_one, shape};
use crate::{BLOCK_TOKENS, Cache, args, cumulative, ints};

const SCALE: f32 = 0.25;
const PART_TOKENS: usize = 64;

/// A cartridge: `[kv_heads, tokens, dim]`, and a bias per KV head and key.
struct Cartridge {
    tokens: usize,
    keys: Vec<bf16>,
    values: Vec<bf16>,
    bias: Option<Vec<f32>>,
}

impl Cartridge {
    fn new(random: &mut Random, shape: Shape, tokens: usize, biased: bool) -> Self {
        let len = shape.kv_heads * tokens;
        Self {
            tokens,
            keys: random.numbers(len * shape.dim),
            values: random.numbers(len * shape.dim),
            bias: biased.then(|| random.numbers(len)),
        }
    }

    fn parts(&self) -> usize {
        self.tokens.div_ceil(PART_TOKENS)
    }
}

/// Of one sequence: its cartridges, own tokens before the step's rows, and the rows.
type Member = (&'static [usize], usize, usize);

fn wide(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|x| x.to_f32()).collect()
}

/// `[heads, tokens, dim]` to `[heads, dim, tokens]`.
fn transposed(keys: &[f32], tokens: usize, dim: usize) -> Vec<f32> {
    let mut to = vec![0.0; keys.len()];
    for (row, key) in keys.chunks_exact(dim).enumerate() {
        for (d, x) in key.iter().enumerate() {
            to[(row / tokens * dim + d) * tokens + row % tokens] = *x;
        }
    }
    to
}

fn on_the_cpu(
    shape: Shape,
    q: &[bf16],
    cartridges: &[Cartridge],
    cache: &Cache<bf16>,
    members: &[Member],
) -> Vec<f32> {
    let Shape { heads, kv_heads, dim } = shape;
    let keys: Vec<_> =
        cartridges.iter().map(|c| transposed(&wide(&c.keys), c.tokens, dim)).collect();
    let values: Vec<_> = cartridges.iter().map(|c| wide(&c.values)).collect();
    let (own_keys, own_values) = (wide(&cache.keys), wide(&cache.values));
    let own_keys = transposed(&own_keys, BLOCK_TOKENS, dim);
    let per_block = kv_heads * BLOCK_TOKENS * dim;
    let mut first_row = 0;
    let sequences: Vec<_> = members
        .iter()
        .enumerate()
        .map(|(sequence, &(with, before, rows))| {
            let shared = with.iter().map(|&c| KvRun {
                keys: &keys[c],
                key_head_stride: cartridges[c].tokens * dim,
                key_stride: cartridges[c].tokens,
                values: &values[c],
                value_head_stride: cartridges[c].tokens * dim,
                len: cartridges[c].tokens,
                bias: cartridges[c].bias.as_deref(),
            });
            let table = &cache.tables[sequence * cache.table_stride..];
            let blocks = (before + rows).div_ceil(BLOCK_TOKENS);
            let own = table[..blocks].iter().map(|block| {
                let at = *block as usize * per_block;
                KvRun {
                    keys: &own_keys[at..at + per_block],
                    key_head_stride: BLOCK_TOKENS * dim,
                    key_stride: BLOCK_TOKENS,
                    values: &own_values[at..at + per_block],
                    value_head_stride: BLOCK_TOKENS * dim,
                    len: BLOCK_TOKENS,
                    bias: None,
                }
            });
            first_row += rows;
            SequenceQueries {
                first_row: first_row - rows,
                rows,
                shared: shared.collect(),
                own: own.collect(),
                own_before: before,
            }
        })
        .collect();
    segment_attention(&wide(q), Heads { heads, kv_heads, head_dim: dim }, SCALE, &sequences, 2)
}

/// `[rows, heads, dim]`, from kernels only. `decode`: every sequence has one row.
fn by_kernels(
    random: &mut Random,
    shape: Shape,
    q: &[bf16],
    cartridges: &[Cartridge],
    cache: &Cache<bf16>,
    members: &[Member],
    decode: bool,
) -> Vec<bf16> {
    let Shape { heads, kv_heads, dim } = shape;
    let lengths: Vec<_> = members.iter().map(|member| member.2).collect();
    let rows: usize = lengths.iter().sum();
    // How many slots each row needs: the parts of its cartridges, then of its own tokens.
    let mut counts = Vec::new();
    for &(with, before, len) in members {
        let own = if decode { (before + len).div_ceil(PART_TOKENS) } else { 1 };
        let all = with.iter().map(|&c| cartridges[c].parts()).sum::<usize>() + own;
        counts.extend(std::iter::repeat_n(all, len));
    }
    let first = cumulative(&counts);
    let slots = *first.last().unwrap() as usize;
    let mut next = first[..rows].to_vec();
    let parts = Buffer::<f32>::poisoned(slots * heads * dim, random.side());
    let lse = Buffer::<f32>::poisoned(slots * heads, random.side());
    let q = Buffer::of(q, random.side());
    for (index, cartridge) in cartridges.iter().enumerate() {
        let mut row_ids = Vec::new();
        let mut row = 0;
        for (with, _, len) in members {
            if with.contains(&index) {
                row_ids.extend((row..row + len).map(|row| row as i32));
            }
            row += len;
        }
        if row_ids.is_empty() {
            continue;
        }
        let slot_ids: Vec<i32> = row_ids.iter().map(|row| next[*row as usize]).collect();
        row_ids.iter().for_each(|row| next[*row as usize] += cartridge.parts() as i32);
        let buffers = [&cartridge.keys, &cartridge.values].map(|x| Buffer::of(x, random.side()));
        let bias = cartridge.bias.as_ref().map(|bias| Buffer::of(bias, random.side()));
        let (ids, slot_ids) =
            (Buffer::of(&row_ids, random.side()), Buffer::of(&slot_ids, random.side()));
        Library::of("kernels/attention_prefix.cu").launch(
            &format!("attention_prefix_bf16_d{dim}"),
            [cartridge.parts(), (row_ids.len() * heads / kv_heads).div_ceil(64), kv_heads],
            random.seed(),
            args![
                &q,
                &buffers[0],
                &buffers[1],
                bias.as_ref(),
                &ids,
                &slot_ids,
                &parts,
                &lse,
                row_ids.len() as i32,
                heads as i32,
                kv_heads as i32,
                cartridge.tokens as i32,
                (cartridge.tokens * dim) as i64,
                PART_TOKENS as i32,
                SCALE,
            ],
        );
    }
    let (k, v, tables) = cache.buffers(random);
    let slot_ids = Buffer::of(&next, random.side());
    if decode {
        let lengths: Vec<_> = members.iter().map(|(_, before, rows)| before + rows).collect();
        let longest = lengths.iter().max().unwrap().div_ceil(PART_TOKENS);
        let lengths = Buffer::of(&ints(&lengths), random.side());
        Library::of("kernels/attention_decode.cu").launch(
            &format!("attention_decode_bf16_d{dim}"),
            [longest, members.len(), kv_heads * (heads / kv_heads).div_ceil(16)],
            random.seed(),
            args![
                &q,
                &k,
                &v,
                &tables,
                &lengths,
                None::<&Buffer<i32>>,
                &slot_ids,
                &parts,
                &lse,
                heads as i32,
                kv_heads as i32,
                cache.table_stride as i32,
                PART_TOKENS as i32,
                SCALE,
            ],
        );
    } else {
        let before: Vec<_> = members.iter().map(|member| member.1).collect();
        let before = Buffer::of(&ints(&before), random.side());
        let cu_seqlens = Buffer::of(&cumulative(&lengths), random.side());
        let longest = lengths.iter().max().unwrap();
        Library::of("kernels/attention_prefill.cu").launch(
            &format!("attention_prefill_bf16_d{dim}"),
            [(longest * heads / kv_heads).div_ceil(64), kv_heads, members.len()],
            random.seed(),
            args![
                &q,
                &k,
                &v,
                &tables,
                &cu_seqlens,
                &before,
                &slot_ids,
                &parts,
                &lse,
                heads as i32,
                kv_heads as i32,
                cache.table_stride as i32,
                SCALE,
            ],
        );
    }
    let first = Buffer::of(&first, random.side());
    let out = Buffer::<bf16>::poisoned(rows * heads * dim, random.side());
    let none = None::<&Buffer<i32>>;
    Library::of("kernels/attention_merge.cu").launch(
        "attention_merge_bf16",
        [rows, heads.div_ceil(4), 1],
        random.seed(),
        args![&parts, &lse, &first, none, &out, None::<&Buffer<f32>>, heads as i32, dim as i32],
    );
    out.read()
}

fn check(shape: Shape, members: &[Member], decode: bool, seed: u64) {
    let random = &mut Random::new(seed);
    let cartridges = [(17, false), (131, true), (64, false)]
        .map(|(tokens, biased)| Cartridge::new(random, shape, tokens, biased));
    let lengths: Vec<_> = members.iter().map(|(_, before, rows)| before + rows).collect();
    let cache = Cache::<bf16>::new(random, shape, &lengths);
    let rows: usize = members.iter().map(|member| member.2).sum();
    let q = random.numbers::<bf16>(rows * shape.heads * shape.dim);
    let want = on_the_cpu(shape, &q, &cartridges, &cache, members);
    let got = by_kernels(random, shape, &q, &cartridges, &cache, members, decode);
    let (width, mut first_row) = (shape.heads * shape.dim, 0);
    for (sequence, member) in members.iter().enumerate() {
        let table = cache.tables[sequence * cache.table_stride..][..cache.table_stride].to_vec();
        let own = Cache { tables: table, ..cache.clone() };
        let rows = first_row * width..(first_row + member.2) * width;
        let q = &q[rows.clone()];
        let alone = by_kernels(random, shape, q, &cartridges, &own, &[*member], decode);
        let bits = |values: &[bf16]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&got[rows]), bits(&alone), "{shape:?}: sequence {sequence} alone");
        first_row += member.2;
    }
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let most = 4e-3 + 4e-3 * f64::from(want.abs());
        check_one(f64::from(got.to_f32()), f64::from(want), most, || {
            format!("{shape:?}: out[{i}]")
        });
    }
}

#[test]
fn a_decode_step_agrees_with_the_cpu_backend() {
    let members: [Member; 5] =
        [(&[0, 1], 36, 1), (&[], 0, 1), (&[1], 130, 1), (&[2, 1], 15, 1), (&[0], 63, 1)];
    for (seed, (heads, kv_heads, dim)) in (1..).zip([(4, 2, 64), (8, 1, 32), (2, 2, 128)]) {
        check(shape(heads, kv_heads, dim), &members, true, seed);
    }
}

#[test]
fn a_prefill_step_agrees_with_the_cpu_backend() {
    let members: [Member; 4] = [(&[0, 1], 32, 5), (&[], 0, 1), (&[1], 0, 70), (&[2, 1], 15, 18)];
    for (seed, (heads, kv_heads, dim)) in (10..).zip([(4, 2, 64), (8, 1, 32)]) {
        check(shape(heads, kv_heads, dim), &members, false, seed);
    }
}
