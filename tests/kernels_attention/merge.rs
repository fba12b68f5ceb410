//! The merge of partial results against its twin.

use half::{bf16, f16};

use crate::kernels_support::{Buffer, Library, Number, Random, check_one};
use crate::{args, cumulative, twin};

fn check<T: Number>(counts: &[usize], heads: usize, dim: usize, seed: u64) {
    let random = &mut Random::new(seed);
    let (rows, slots) = (counts.len(), counts.iter().sum::<usize>());
    let mut parts = random.numbers::<f32>(slots * heads * dim);
    let mut lse: Vec<f32> = random.numbers(slots * heads);
    for (i, lse) in lse.iter_mut().enumerate() {
        match i % 7 {
            // An empty part, whose result must not even be looked at.
            3 => {
                *lse = f32::NEG_INFINITY;
                parts[i * dim..(i + 1) * dim].fill(f32::NAN);
            }
            4 => *lse *= 100.0, // so far from the others that e to it overflows
            _ => {}
        }
    }
    let (parts, lse) = (Buffer::of(&parts, random.side()), Buffer::of(&lse, random.side()));
    let first = Buffer::of(&cumulative(counts), random.side());
    let row_ids = Buffer::of(&random.order(rows + 1)[..rows], random.side());
    let elements = (rows + 1) * heads;
    let out = Buffer::<T>::poisoned(elements * dim, random.side());
    let out_lse = Buffer::<f32>::poisoned(elements, random.side());
    Library::of("kernels/attention_merge.cu").launch(
        &format!("attention_merge_{}", T::NAME),
        [rows, heads.div_ceil(4), 1],
        random.seed(),
        args![&parts, &lse, &first, &row_ids, &out, &out_lse, heads as i32, dim as i32],
    );
    let want = Buffer::<f64>::poisoned(elements * dim, random.side());
    let want_lse = Buffer::<f64>::poisoned(elements, random.side());
    twin().call(
        "reference_attention_merge",
        args![
            &parts,
            &lse,
            &first,
            &row_ids,
            &want,
            &want_lse,
            rows as i32,
            heads as i32,
            dim as i32
        ],
    );
    let case = |i| format!("{counts:?} parts, {heads} heads of {dim}: {i}");
    for (i, (got, want)) in out.read().iter().zip(want.read()).enumerate() {
        let most = 1e-5 + 2.0 * T::EPSILON * want.abs();
        check_one(f64::from(got.to_f32()), want, most, || case(i));
    }
    for (i, (got, want)) in out_lse.read().iter().zip(want_lse.read()).enumerate() {
        check_one(f64::from(*got), want, 1e-5 + 1e-6 * want.abs(), || case(i));
    }
}

#[test]
fn merges_any_number_of_parts_empty_ones_too() {
    check::<bf16>(&[1, 0, 3, 2, 17], 4, 64, 1);
    check::<f16>(&[2, 2], 3, 96, 2);
    check::<f32>(&[1, 5, 0], 1, 16, 3);
    check::<f32>(&[40, 1], 7, 256, 4);
}
