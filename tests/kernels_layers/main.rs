//! The kernels between products and attention, run on the CPU, against their naive twins in f64 and against the
//! crate's operations.

#[path = "../kernels_support/mod.rs"]
mod kernels_support;

mod rms_norm;
mod rope;
mod swiglu;

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use kernels_support::{Arg, Buffer, Library, Number, Random, Side, check_one};

/// Runs the twin `reference_<name>_<type>`.
fn twin<T: Number>(name: &str, args: &[Arg]) {
    let library = Library::of("kernels/reference/layers.cpp");
    library.call(&format!("reference_{name}_{}", T::NAME), args);
}

/// Where a twin writes `len` numbers; NaN until then.
fn wanted(len: usize) -> Buffer<f64> {
    Buffer::poisoned(len, Side::Back)
}

/// Each number within its rounding to `T` and `slack` of what it should be; NaN where that is NaN.
#[track_caller]
fn check<T: Number>(got: &[T], want: &[f64], slack: f64, case: &str) {
    assert_eq!(got.len(), want.len(), "{case}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let most = 2.0 * T::EPSILON * want.abs() + slack;
        check_one(f64::from(got.to_f32()), *want, most, || format!("{case}: number {i}"));
    }
}

fn bits<T: Number>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.to_f32().to_bits()).collect()
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    doubles(&tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap())
}

fn doubles(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

fn embedding_case<T: Number>(seed: u64, tokens: usize, vocab: usize, width: usize, bad: &[i32]) {
    let random = &mut Random::new(seed);
    let mut ids: Vec<i32> = (0..tokens).map(|_| random.order(vocab)[0]).collect();
    let first_bad = tokens - bad.len().min(tokens);
    ids[first_bad..].copy_from_slice(&bad[..tokens - first_bad]);
    let table = random.numbers::<T>(vocab * width);
    let side = random.side();
    let out = Buffer::<T>::poisoned(tokens * width, random.side());
    let error = Buffer::of(&[0i32], side);
    Library::of("kernels/embedding.cu").launch(
        &format!("embedding_{}", T::NAME),
        [tokens, 1, 1],
        random.seed(),
        args![
            &Buffer::of(&ids, side),
            &Buffer::of(&table, side),
            &out,
            &error,
            vocab as i32,
            width as i32
        ],
    );
    let mut want = Vec::new();
    for id in &ids {
        match usize::try_from(*id).ok().filter(|id| *id < vocab) {
            Some(id) => want.extend(bits(&table[id * width..][..width])),
            None => want.extend(vec![0; width]),
        }
    }
    assert_eq!(bits(&out.read()), want);
    assert_eq!(error.read(), [if bad.is_empty() { 0 } else { tokens as i32 }]);
}

#[test]
fn rows_of_the_embedding_table() {
    for (seed, width) in [1, 7, 8, 96, 1024, 1032, 1033].into_iter().enumerate() {
        let seed = seed as u64;
        embedding_case::<bf16>(seed, 5, 11, width, &[]);
        embedding_case::<f16>(seed, 1, 1, width, &[]);
        embedding_case::<f32>(seed, 3, 20, width, &[]);
        embedding_case::<bf16>(seed, 6, 11, width, &[-1, 11, i32::MIN, i32::MAX]);
        embedding_case::<f32>(seed, 1, 11, width, &[1 << 20]);
    }
}
