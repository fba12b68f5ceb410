//! The kernels between products and attention, run on the CPU, against their naive twins and the crate's ops.

mod kernels_support;
#[path = "kernels_layers/rope.rs"]
mod rope;

use candle_core::{Device, Tensor, Var};
use cartouche::ops;
use half::{bf16, f16};
use kernels_support::{Buffer, Library, Number, Random};

/// Calls `reference_<name>_<type>` with arguments of the given types.
#[macro_export]
macro_rules! twin {
    ($type:ty, $name:literal, $($value:expr => $kind:ty),* $(,)?) => {{
        let symbol = $crate::kernels_support::Library::of("kernels/reference/layers.cpp").symbol(&format!("reference_{}_{}", $name, <$type as $crate::kernels_support::Number>::NAME));
        // SAFETY: declared so in the reference; the buffers are as long as it says.
        let twin: extern "C" fn($($kind),*) = unsafe { std::mem::transmute(symbol) };
        twin($($value),*)
    }};
}

/// Each number within its rounding to `T` and `slack` of what it should be; NaN where that is NaN.
#[track_caller]
fn check<T: Number>(got: &[T], want: &[f64], slack: f64, case: &str) {
    assert_eq!(got.len(), want.len(), "{case}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got.to_f32());
        let most = 2.0 * T::EPSILON * want.abs() + slack;
        let fine = (got - want).abs() <= most || got.is_nan() && want.is_nan();
        assert!(fine, "{case}: number {i} is {got}, not {want} (within {most:e})");
    }
}

fn bits<T: Number>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.to_f32().to_bits()).collect()
}

fn address<T>(buffer: &Option<Buffer<T>>) -> usize {
    buffer.as_ref().map_or(0, Buffer::address)
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

/// The gradients of `vars` where `grad` is that of `out`.
fn gradients(out: &Tensor, grad: &Tensor, vars: &[&Var]) -> Vec<Vec<f64>> {
    let store = (out * grad).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|var| numbers(store.get(var).unwrap())).collect()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f64::from).collect()
}

fn rms_norm_case<T: Number>(seed: u64, rows: usize, width: usize) {
    let random = &mut Random::new(seed);
    let library = Library::of("kernels/rms_norm.cu");
    let len = rows * width;
    let with_residual = seed.is_multiple_of(2);
    let case = format!("{} [{rows}, {width}], residual {with_residual}", T::NAME);
    let (x, weight) = (random.numbers::<T>(len), random.numbers::<T>(width));
    let (side, eps) = (random.side(), 1e-5f32);
    let (x, weight) = (Buffer::of(&x, side), Buffer::of(&weight, side));
    let residual = with_residual.then(|| Buffer::of(&random.numbers::<T>(len), side));
    let sum = with_residual.then(|| Buffer::<T>::poisoned(len, side));
    let out = Buffer::<T>::poisoned(len, random.side());
    let mut want = vec![f64::NAN; len];
    let want_sum = Buffer::<T>::poisoned(len, side);
    twin!(T, "rms_norm", x.address() => usize, address(&residual) => usize, weight.address() => usize,
        want_sum.address() => usize, want.as_mut_ptr() => *mut f64, rows as i32 => i32,
        width as i32 => i32, eps => f32);
    library.launch(
        &format!("rms_norm_{}", T::NAME),
        [rows, 1, 1],
        random.seed(),
        args![&x, residual.as_ref(), &weight, sum.as_ref(), &out, width as i32, eps],
    );
    check(&out.read(), &want, 1e-6, &case);
    if let (Some(residual), Some(sum)) = (&residual, &sum) {
        assert_eq!(bits(&sum.read()), bits(&want_sum.read()), "{case}");
        // In place: the sum over the residual, the result over x.
        library.launch(
            &format!("rms_norm_{}", T::NAME),
            [rows, 1, 1],
            random.seed(),
            args![&x, Some(residual), &weight, Some(residual), &x, width as i32, eps],
        );
        assert_eq!(bits(&residual.read()), bits(&sum.read()), "{case}, in place");
        assert_eq!(bits(&x.read()), bits(&out.read()), "{case}, in place");
    }

    let grad = Buffer::of(&random.numbers::<T>(len), side);
    let add = with_residual.then(|| Buffer::of(&random.numbers::<T>(len), side));
    let dx = Buffer::<T>::poisoned(len, random.side());
    let mut want_dx = vec![f64::NAN; len];
    twin!(T, "rms_norm_backward", x.address() => usize, weight.address() => usize, grad.address() => usize,
        address(&add) => usize, want_dx.as_mut_ptr() => *mut f64, rows as i32 => i32, width as i32 => i32,
        eps => f32);
    library.launch(
        &format!("rms_norm_backward_{}", T::NAME),
        [rows, 1, 1],
        random.seed(),
        args![&x, &weight, &grad, add.as_ref(), &dx, width as i32, eps],
    );
    check(&dx.read(), &want_dx, 1e-5, &case);

    if T::NAME == "f32" && !with_residual {
        let floats =
            |buffer: &Buffer<T>| buffer.read().iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let x = Var::from_tensor(&tensor(&floats(&x), &[rows, width])).unwrap();
        let ours = ops::rms_norm(&x, &tensor(&floats(&weight), &[width]), f64::from(eps)).unwrap();
        check(&out.read(), &numbers(&ours), 2e-6, &case);
        let slopes = gradients(&ours, &tensor(&floats(&grad), &[rows, width]), &[&x]);
        check(&dx.read(), &slopes[0], 1e-5, &case);
    }
}

/// Widths around a vector, a warp's and a block's share; odd ones.
#[test]
fn norms_and_their_gradients() {
    let shapes =
        [(1, 1), (2, 7), (1, 8), (3, 64), (5, 97), (2, 2048), (1, 2056), (1, 2049), (2, 5003)];
    for (i, (rows, width)) in shapes.into_iter().enumerate() {
        for seed in [2 * i as u64, 2 * i as u64 + 1] {
            rms_norm_case::<bf16>(seed, rows, width);
            rms_norm_case::<f16>(seed, rows, width);
            rms_norm_case::<f32>(seed, rows, width);
        }
    }
}

fn swiglu_case<T: Number>(seed: u64, rows: usize, width: usize, packed: bool) {
    let random = &mut Random::new(seed);
    let library = Library::of("kernels/swiglu.cu");
    let case = format!("{} [{rows}, {width}], packed {packed}", T::NAME);
    // Packed: each row is gate, then up.
    let stride = if packed { 2 * width } else { width };
    let scaled = |random: &mut Random, len| -> Vec<T> {
        random.numbers::<f32>(len).into_iter().map(|x| T::of(x * 6.0)).collect()
    };
    let both = scaled(random, 2 * rows * width);
    let side = random.side();
    let inputs = Buffer::of(&both, side);
    let up_at = if packed { width } else { rows * width };
    let part = |base: usize, at: usize, bytes: usize| (base + at * bytes) as u64;
    let size = size_of::<T>();
    let (gate, up) = (inputs.address(), part(inputs.address(), up_at, size) as usize);
    let out = Buffer::<T>::poisoned(rows * width, random.side());
    let mut want = vec![f64::NAN; rows * width];
    twin!(T, "swiglu", gate => usize, up => usize, want.as_mut_ptr() => *mut f64, rows as i32 => i32,
        width as i32 => i32, stride as i64 => i64);
    let grid = [rows, width.div_ceil(2048), 1];
    library.launch(
        &format!("swiglu_{}", T::NAME),
        grid,
        random.seed(),
        args![gate as u64, up as u64, &out, width as i32, stride as i64],
    );
    check(&out.read(), &want, 2e-6, &case);

    let grad = Buffer::of(&random.numbers::<T>(rows * width), side);
    let slopes = Buffer::<T>::poisoned(2 * rows * width, random.side());
    let mut want = vec![f64::NAN; 2 * rows * width];
    let want_up = want[up_at..].as_mut_ptr();
    twin!(T, "swiglu_backward", gate => usize, up => usize, grad.address() => usize,
        want.as_mut_ptr() => *mut f64, want_up => *mut f64, rows as i32 => i32, width as i32 => i32,
        stride as i64 => i64);
    let backward = |d_gate: usize, seed| {
        let d_up = part(d_gate, up_at, size);
        let (width, stride) = (width as i32, stride as i64);
        library.launch(
            &format!("swiglu_backward_{}", T::NAME),
            grid,
            seed,
            args![gate as u64, up as u64, &grad, d_gate as u64, d_up, width, stride],
        );
    };
    backward(slopes.address(), random.seed());
    check(&slopes.read(), &want, 2e-5, &case);
    backward(inputs.address(), random.seed()); // in place
    assert_eq!(bits(&inputs.read()), bits(&slopes.read()), "{case}");

    if T::NAME == "f32" && !packed {
        let both: Vec<f32> = both.iter().map(|x| x.to_f32()).collect();
        let var = |values: &[f32]| Var::from_tensor(&tensor(values, &[rows, width])).unwrap();
        let (gate, up) = (var(&both[..up_at]), var(&both[up_at..]));
        let ours = ops::swiglu(&gate, &up).unwrap();
        check(&out.read(), &numbers(&ours), 1e-5, &case);
        let grad: Vec<f32> = grad.read().iter().map(|x| x.to_f32()).collect();
        let ours = gradients(&ours, &tensor(&grad, &[rows, width]), &[&gate, &up]);
        check(&slopes.read(), &ours.concat(), 2e-5, &case);
    }
}

#[test]
fn gated_activations_and_their_gradients() {
    let shapes = [(1, 1), (3, 7), (1, 8), (2, 96), (2, 2047), (2, 2048), (1, 2056), (1, 4100)];
    for (i, (rows, width)) in shapes.into_iter().enumerate() {
        for packed in [false, true] {
            let seed = 100 + 2 * i as u64 + u64::from(packed);
            // The second half of an odd packed row begins nowhere near a multiple of 16 bytes.
            swiglu_case::<bf16>(seed, rows, width, packed);
            swiglu_case::<f16>(seed, rows, width, packed);
            swiglu_case::<f32>(seed, rows, width, packed);
        }
    }
}

/// exp overflows on the one side and vanishes on the other; neither may give NaN.
#[test]
fn gated_activation_of_huge_gates() {
    let gates = [-3e38f32, -1000.0, -89.0, -88.0, 88.0, 1000.0, 3e38, 0.0];
    let (gate, up) = (Buffer::of(&gates, Random::new(0).side()), Random::new(1).side());
    let up = Buffer::of(&[1f32; 8], up);
    let out = Buffer::<f32>::poisoned(8, Random::new(2).side());
    Library::of("kernels/swiglu.cu").launch(
        "swiglu_f32",
        [1; 3],
        3,
        args![&gate, &up, &out, 8i32, 8i64],
    );
    for (got, gate) in out.read().into_iter().zip(gates) {
        let want = f64::from(gate) / (1.0 + (-f64::from(gate)).exp());
        assert!((f64::from(got) - want).abs() <= 1e-6 * want.abs() + 1e-30, "{got} for {gate}");
    }
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
