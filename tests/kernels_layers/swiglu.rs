//! The gated activation and its gradients.

use cartouche::ops;
use half::{bf16, f16};

use crate::args;
use crate::kernels_support::{Buffer, Library, Number, Random};
use crate::{bits, check, numbers, tensor, twin, wanted};

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
    // Where the gates and the `up`s of a buffer begin.
    let parts = |base: usize, bytes: usize| (base as u64, (base + up_at * bytes) as u64);
    let (gate, up) = parts(inputs.address(), size_of::<T>());
    let out = Buffer::<T>::poisoned(rows * width, random.side());
    let want = wanted(rows * width);
    twin::<T>("swiglu", args![gate, up, &want, rows as i32, width as i32, stride as i64]);
    let grid = [rows, width.div_ceil(2048), 1];
    library.launch(
        &format!("swiglu_{}", T::NAME),
        grid,
        random.seed(),
        args![gate, up, &out, width as i32, stride as i64],
    );
    check(&out.read(), &want.read(), 2e-5, &case);

    let grad = Buffer::of(&random.numbers::<T>(rows * width), side);
    let slopes = Buffer::<T>::poisoned(2 * rows * width, random.side());
    let want = wanted(2 * rows * width);
    let (want_gate, want_up) = parts(want.address(), size_of::<f64>());
    twin::<T>(
        "swiglu_backward",
        args![gate, up, &grad, want_gate, want_up, rows as i32, width as i32, stride as i64],
    );
    let backward = |slopes: &Buffer<T>, seed| {
        let (d_gate, d_up) = parts(slopes.address(), size_of::<T>());
        let (width, stride) = (width as i32, stride as i64);
        library.launch(
            &format!("swiglu_backward_{}", T::NAME),
            grid,
            seed,
            args![gate, up, &grad, d_gate, d_up, width, stride],
        );
    };
    backward(&slopes, random.seed());
    check(&slopes.read(), &want.read(), 2e-5, &case);
    backward(&inputs, random.seed()); // in place
    assert_eq!(bits(&inputs.read()), bits(&slopes.read()), "{case}");

    if T::NAME == "f32" && !packed {
        let both: Vec<f32> = both.iter().map(|x| x.to_f32()).collect();
        let half = |values: &[f32]| tensor(values, &[rows, width]);
        let (gate, up) = (half(&both[..up_at]), half(&both[up_at..]));
        let ours = ops::swiglu(&gate, &up).unwrap();
        check(&out.read(), &numbers(&ours), 2e-5, &case);
        let grad: Vec<f32> = grad.read().iter().map(|x| x.to_f32()).collect();
        let (d_gate, d_up) = ops::swiglu_backward(&gate, &up, half(&grad)).unwrap();
        let want = [numbers(&d_gate), numbers(&d_up)].concat();
        check(&slopes.read(), &want, 2e-5, &case);
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
