//! Rotary embedding with what surrounds it: norms of heads, the paged cache, gradients.

use candle_core::Device;
use cartouche::ops::{self, RopeScaling, RopeTable};
use half::{bf16, f16};

use crate::args;
use crate::kernels_support::{Buffer, Library, Number, Random, Shape, shape};
use crate::{bits, check, numbers, tensor, twin, wanted};

const EPS: f32 = 1e-6;

struct Case<T> {
    shape: Shape,
    tokens: usize,
    /// From one token to the next; queries, keys and values of a token lie side by side if all are equal.
    strides: [usize; 3],
    q: Buffer<T>,
    k: Buffer<T>,
    v: Buffer<T>,
    norms: Option<[Buffer<T>; 2]>,
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    text: String,
}

/// The rotated queries and keys, and the cache.
struct Outputs<'a, T> {
    q: Option<&'a Buffer<T>>,
    k: Option<Buffer<T>>,
    cache: Option<[Buffer<T>; 2]>,
    error: Buffer<i32>,
}

impl<T: Number> Case<T> {
    fn new(random: &mut Random, shape: Shape, tokens: usize, norm: bool) -> Self {
        let Shape { heads, kv_heads, dim } = shape;
        let strides = [heads * dim + 4, kv_heads * dim, kv_heads * dim + 8];
        let side = random.side();
        // The last token's row ends with its numbers.
        let mut rows = |stride: usize, heads: usize| {
            let len = (tokens - 1) * stride + heads * dim;
            Buffer::of(&random.numbers::<T>(len), side)
        };
        let (q, k, v) =
            (rows(strides[0], heads), rows(strides[1], kv_heads), rows(strides[2], kv_heads));
        let norms = norm.then(|| [(); 2].map(|()| Buffer::of(&random.numbers::<T>(dim), side)));
        let positions: Vec<u32> = random.order(4000)[..tokens].iter().map(|p| *p as u32).collect();
        let table = RopeTable::new(dim, 10_000.0, RopeScaling::None);
        let (cos, sin) = table.angles(&positions, &Device::Cpu).unwrap();
        let angles = |x: candle_core::Tensor| {
            Buffer::of(&x.flatten_all().unwrap().to_vec1::<f32>().unwrap(), side)
        };
        let text = format!("{} {shape:?}, {tokens} tokens, norm {norm}", T::NAME);
        Self { shape, tokens, strides, q, k, v, norms, cos: angles(cos), sin: angles(sin), text }
    }

    fn norm(&self, which: usize) -> Option<&Buffer<T>> {
        self.norms.as_ref().map(|norms| &norms[which])
    }

    fn run(
        &self,
        outputs: &Outputs<'_, T>,
        slots: Option<&Buffer<i32>>,
        cache_slots: usize,
        seed: u64,
    ) {
        let Shape { heads, kv_heads, dim } = self.shape;
        let cache = |which: usize| outputs.cache.as_ref().map(|cache| &cache[which]);
        let kinds = if outputs.cache.is_some() { 2 } else { 1 };
        Library::of("kernels/rope.cu").launch(
            &format!("rope_{}", T::NAME),
            [(self.tokens * (heads + kinds * kv_heads)).div_ceil(4), 1, 1],
            seed,
            args![
                &self.q,
                &self.k,
                &self.v,
                self.norm(0),
                self.norm(1),
                &self.cos,
                &self.sin,
                outputs.q,
                outputs.k.as_ref(),
                cache(0),
                cache(1),
                slots,
                &outputs.error,
                self.tokens as i32,
                heads as i32,
                kv_heads as i32,
                dim as i32,
                self.strides[0] as i64,
                self.strides[1] as i64,
                self.strides[2] as i64,
                cache_slots as i32,
                EPS
            ],
        );
    }

    /// What the twin makes of the queries (0) or the keys (1).
    fn rotated(&self, which: usize) -> Vec<f64> {
        let Shape { heads, kv_heads, dim } = self.shape;
        let (x, heads) = [(&self.q, heads), (&self.k, kv_heads)][which];
        let out = wanted(self.tokens * heads * dim);
        let norm = self.norm(which);
        twin::<T>(
            "rope",
            args![
                x,
                norm,
                &self.cos,
                &self.sin,
                &out,
                self.tokens as i32,
                heads as i32,
                dim as i32,
                self.strides[which] as i64,
                EPS
            ],
        );
        out.read()
    }
}

fn rope_case<T: Number>(seed: u64, shape: Shape, tokens: usize) {
    let random = &mut Random::new(seed);
    let norm = seed.is_multiple_of(2);
    let case = Case::<T>::new(random, shape, tokens, norm);
    let Shape { heads, kv_heads, dim } = shape;
    // Blocks in random order, tokens from slot 5 on across their edges; every seventh is not stored.
    let blocks = (tokens + 5).div_ceil(16) + 1;
    let order = random.order(blocks);
    let slots: Vec<i32> = (5..tokens + 5)
        .map(|t| if t % 7 == 6 { -1 } else { order[t / 16] * 16 + (t % 16) as i32 })
        .collect();
    let side = random.side();
    let cache_len = blocks * kv_heads * 16 * dim;
    let poisoned = |len| Buffer::<T>::poisoned(len, side);
    let q = poisoned(tokens * heads * dim);
    let outputs = Outputs {
        q: Some(&q),
        k: (!seed.is_multiple_of(3)).then(|| poisoned(tokens * kv_heads * dim)),
        cache: (seed % 3 != 1).then(|| [(); 2].map(|()| poisoned(cache_len))),
        error: Buffer::of(&[0], side),
    };
    let slot_ids = outputs.cache.as_ref().map(|_| Buffer::of(&slots, side));
    case.run(&outputs, slot_ids.as_ref(), blocks * 16, random.seed());
    assert_eq!(outputs.error.read(), [0]);
    check(&q.read(), &case.rotated(0), 1e-6, &case.text);
    let keys = case.rotated(1);
    if let Some(k) = &outputs.k {
        check(&k.read(), &keys, 1e-6, &case.text);
    }
    if let Some([k_cache, v_cache]) = &outputs.cache {
        let values = case.v.read();
        let mut want = [vec![f64::NAN; cache_len], vec![f64::NAN; cache_len]];
        for (t, slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let (block, at) = (*slot as usize / 16, *slot as usize % 16);
            for head in 0..kv_heads {
                let to = ((block * kv_heads + head) * 16 + at) * dim;
                want[0][to..to + dim].copy_from_slice(&keys[(t * kv_heads + head) * dim..][..dim]);
                for (i, to) in want[1][to..to + dim].iter_mut().enumerate() {
                    *to = f64::from(values[t * case.strides[2] + head * dim + i].to_f32());
                }
            }
        }
        check(&k_cache.read(), &want[0], 1e-6, &case.text);
        check(&v_cache.read(), &want[1], 0.0, &case.text);
    }
}

#[test]
fn rotation_into_the_paged_cache() {
    let shapes = [
        shape(1, 1, 4),
        shape(4, 2, 12),
        shape(3, 1, 64),
        shape(4, 4, 96),
        shape(5, 1, 128),
        shape(2, 1, 256),
    ];
    let mut seed = 0;
    for shape in shapes {
        for tokens in [1, 3, 37] {
            // Six in a row cover with and without norm, contiguous keys, cache.
            for _ in 0..2 {
                seed += 1;
                rope_case::<bf16>(seed, shape, tokens);
                rope_case::<f32>(seed, shape, tokens);
                rope_case::<f16>(seed, shape, tokens);
            }
        }
    }
}

#[test]
fn rotation_in_place_and_equal_to_the_op() {
    for dim in [8, 64, 128] {
        let random = &mut Random::new(dim as u64);
        let mut case = Case::<f32>::new(random, shape(3, 2, dim), 5, false);
        // Of a plain [tokens, heads, D].
        case.strides = [3 * dim, 2 * dim, 2 * dim];
        case.q = Buffer::of(&random.numbers::<f32>(15 * dim), random.side());
        let before = case.q.read();
        let len = case.q.read().len();
        let out = Buffer::poisoned(len, random.side());
        let apart =
            Outputs { q: Some(&out), k: None, cache: None, error: Buffer::of(&[0], random.side()) };
        case.run(&apart, None, 0, 7);
        let angles = |buffer: &Buffer<f32>| tensor(&buffer.read(), &[5, dim / 2]);
        let (cos, sin) = (angles(&case.cos), angles(&case.sin));
        let x = tensor(&before, &[5, 3, dim]);
        let ours = ops::apply_rope(&x, &cos, &sin).unwrap();
        let rotated = out.read();
        check(&rotated, &numbers(&ours), 1e-6, &case.text);

        let grad = Buffer::of(&random.numbers::<f32>(len), random.side());
        let slopes = tensor(&grad.read(), &[5, 3, dim]);
        let slopes = ops::rope_backward(slopes, &cos, &sin).unwrap();
        backward::<f32>(&case, &grad, &case.q, None, &grad, 3); // in place
        check(&grad.read(), &numbers(&slopes), 1e-6, &case.text);

        // Over the queries themselves.
        let inside = Outputs { q: Some(&case.q), ..apart };
        case.run(&inside, None, 0, 11);
        assert_eq!(bits(&case.q.read()), bits(&rotated), "{}", case.text);
    }
}

fn backward<T: Number>(
    case: &Case<T>,
    grad: &Buffer<T>,
    x: &Buffer<T>,
    norm: Option<&Buffer<T>>,
    dx: &Buffer<T>,
    seed: u64,
) {
    let Shape { heads, dim, .. } = case.shape;
    Library::of("kernels/rope.cu").launch(
        &format!("rope_backward_{}", T::NAME),
        [(case.tokens * heads).div_ceil(4), 1, 1],
        seed,
        args![
            grad,
            norm.map(|_| x),
            norm,
            &case.cos,
            &case.sin,
            dx,
            case.tokens as i32,
            heads as i32,
            dim as i32,
            case.strides[0] as i64,
            EPS
        ],
    );
}

fn backward_case<T: Number>(seed: u64, shape: Shape, tokens: usize) {
    let random = &mut Random::new(seed);
    let case = Case::<T>::new(random, shape, tokens, seed.is_multiple_of(2));
    let len = tokens * shape.heads * shape.dim;
    let grad = Buffer::of(&random.numbers::<T>(len), random.side());
    let dx = Buffer::<T>::poisoned(len, random.side());
    backward(&case, &grad, &case.q, case.norm(0), &dx, random.seed());
    let want = wanted(len);
    let (x, norm) = (&case.q, case.norm(0));
    twin::<T>(
        "rope_backward",
        args![
            &grad,
            x,
            norm,
            &case.cos,
            &case.sin,
            &want,
            tokens as i32,
            shape.heads as i32,
            shape.dim as i32,
            case.strides[0] as i64,
            EPS
        ],
    );
    check(&dx.read(), &want.read(), 1e-5, &case.text);
}

#[test]
fn gradients_through_rotation_and_norm() {
    for (i, dim) in [4, 16, 68, 96, 128, 256].into_iter().enumerate() {
        for (tokens, heads) in [(1, 1), (3, 5), (9, 2)] {
            for seed in [2 * i as u64, 2 * i as u64 + 1] {
                backward_case::<bf16>(seed, shape(heads, 1, dim), tokens);
                backward_case::<f16>(seed, shape(heads, 1, dim), tokens);
                backward_case::<f32>(seed, shape(heads, 1, dim), tokens);
            }
        }
    }
}

#[test]
fn tokens_with_wild_slots_are_reported_and_not_stored() {
    let random = &mut Random::new(5);
    for wild in [32, -2, i32::MIN, i32::MAX] {
        let case = Case::<bf16>::new(random, shape(2, 1, 16), 4, false);
        let outputs = Outputs {
            q: None,
            k: None,
            cache: Some([(); 2].map(|()| Buffer::poisoned(2 * 16 * 16, random.side()))),
            error: Buffer::of(&[0], random.side()),
        };
        let slots = Buffer::of(&[-1, 31, wild, -1], random.side());
        case.run(&outputs, Some(&slots), 32, random.seed());
        assert_eq!(outputs.error.read(), [3]);
        for cache in outputs.cache.as_ref().unwrap() {
            let stored = cache.read().iter().filter(|x| !x.is_nan()).count();
            assert_eq!(stored, 16);
        }
    }
}
