//! The attention kernels, run on the CPU, against their naive twins in f64 and against the operations of the
//! CPU backend.

#[path = "../kernels_support/mod.rs"]
mod kernels_support;

mod decode;
mod merge;
mod packed;
mod prefill;
mod prefix;
mod serving;

use kernels_support::{Buffer, Library, Number, Random, Shape};

/// Every head dimension there is a kernel for.
const DIMS: [usize; 6] = [16, 32, 64, 96, 128, 256];
const BLOCK_TOKENS: usize = 16;

fn twin() -> Library {
    Library::of("kernels/reference/attention.cpp")
}

/// A layer of the paged cache: the blocks of all sequences in random order, everything that no sequence owns NaN.
#[derive(Clone)]
struct Cache<T> {
    keys: Vec<T>,
    values: Vec<T>,
    /// `[sequences, table_stride]`; entries behind a sequence's last block are not block numbers.
    tables: Vec<i32>,
    table_stride: usize,
    shape: Shape,
}

impl<T: Number> Cache<T> {
    fn new(random: &mut Random, shape: Shape, lengths: &[usize]) -> Self {
        let Shape { kv_heads, dim, .. } = shape;
        let blocks = |len: &usize| len.div_ceil(BLOCK_TOKENS);
        let count = lengths.iter().map(blocks).sum::<usize>() + 2;
        let table_stride = lengths.iter().map(blocks).max().unwrap() + 1;
        let nan = vec![T::of(f32::NAN); count * kv_heads * BLOCK_TOKENS * dim];
        let tables = vec![i32::MAX; lengths.len() * table_stride];
        let mut cache = Self { keys: nan.clone(), values: nan, tables, table_stride, shape };
        let mut free = random.order(count).into_iter();
        for (sequence, length) in lengths.iter().enumerate() {
            for block in 0..blocks(length) {
                cache.tables[sequence * table_stride + block] = free.next().unwrap();
            }
            for t in 0..*length {
                for head in 0..kv_heads {
                    let at = cache.at(sequence, t, head);
                    cache.keys[at..at + dim].copy_from_slice(&random.numbers(dim));
                    cache.values[at..at + dim].copy_from_slice(&random.numbers(dim));
                }
            }
        }
        cache
    }

    /// Where the key of token `t` starts.
    fn at(&self, sequence: usize, t: usize, head: usize) -> usize {
        let block = self.tables[sequence * self.table_stride + t / BLOCK_TOKENS] as usize;
        let row = (block * self.shape.kv_heads + head) * BLOCK_TOKENS + t % BLOCK_TOKENS;
        row * self.shape.dim
    }

    /// Keys, values and tables.
    fn buffers(&self, random: &mut Random) -> (Buffer<T>, Buffer<T>, Buffer<i32>) {
        let side = random.side();
        let tables = Buffer::of(&self.tables, random.side());
        (Buffer::of(&self.keys, side), Buffer::of(&self.values, side), tables)
    }
}

fn ints(values: &[usize]) -> Vec<i32> {
    values.iter().map(|value| *value as i32).collect()
}

/// `0, a, a + b, ...`
fn cumulative(lengths: &[usize]) -> Vec<i32> {
    let mut total = 0;
    let mut sums = vec![0];
    for length in lengths {
        total += *length as i32;
        sums.push(total);
    }
    sums
}
