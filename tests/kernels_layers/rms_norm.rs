//! Root-mean-square normalisation, with a residual, and its gradient.

use cartouche::ops;
use half::{bf16, f16};

use crate::args;
use crate::kernels_support::{Buffer, Library, Number, Random};
use crate::{bits, check, numbers, tensor, twin, wanted};

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
    let want = wanted(len);
    let want_sum = Buffer::<T>::poisoned(len, side);
    twin::<T>(
        "rms_norm",
        args![&x, residual.as_ref(), &weight, &want_sum, &want, rows as i32, width as i32, eps],
    );
    library.launch(
        &format!("rms_norm_{}", T::NAME),
        [rows, 1, 1],
        random.seed(),
        args![&x, residual.as_ref(), &weight, sum.as_ref(), &out, width as i32, eps],
    );
    check(&out.read(), &want.read(), 1e-6, &case);
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
    let want_dx = wanted(len);
    twin::<T>(
        "rms_norm_backward",
        args![&x, &weight, &grad, add.as_ref(), &want_dx, rows as i32, width as i32, eps],
    );
    library.launch(
        &format!("rms_norm_backward_{}", T::NAME),
        [rows, 1, 1],
        random.seed(),
        args![&x, &weight, &grad, add.as_ref(), &dx, width as i32, eps],
    );
    check(&dx.read(), &want_dx.read(), 1e-5, &case);
    if let Some(add) = &add {
        library.launch(
            &format!("rms_norm_backward_{}", T::NAME),
            [rows, 1, 1],
            random.seed(),
            args![&x, &weight, &grad, add, add, width as i32, eps],
        );
        assert_eq!(bits(&add.read()), bits(&dx.read()), "{case}, in place");
    }

    if T::NAME == "f32" && !with_residual {
        let floats =
            |buffer: &Buffer<T>| buffer.read().iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let (x, weight) = (tensor(&floats(&x), &[rows, width]), tensor(&floats(&weight), &[width]));
        let ours = ops::rms_norm(&x, &weight, f64::from(eps)).unwrap();
        check(&out.read(), &numbers(&ours), 2e-6, &case);
        let grad = tensor(&floats(&grad), &[rows, width]);
        let slopes = ops::rms_norm_backward(&x, &weight, f64::from(eps), &grad, None).unwrap();
        check(&dx.read(), &numbers(&slopes), 1e-5, &case);
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
