use proptest::prelude::*;

use super::*;

fn probs(values: &[f32]) -> TopLogprobs {
    let ids: Vec<i64> = (0..).take(values.len()).collect();
    TopLogprobs::dense(&[ids], &[values.iter().map(|p| p.ln()).collect()]).unwrap()
}

#[test]
fn the_shortest_prefix_that_reaches_the_mass_is_kept() {
    let cut = |mass, top1_when_short| MassCut { min_prob_mass: mass, top1_when_short };
    let p = probs(&[0.5, 0.3, 0.15, 0.03]);
    for (mass, kept) in [(0.5, 1), (0.51, 2), (0.8, 2), (0.95, 3), (0.98, 4), (0.0, 1)] {
        assert_eq!(p.cut(cut(mass, false)).len(), kept, "{mass}");
        assert_eq!(p.cut(cut(mass, true)).len(), kept, "{mass}");
    }
    // 0.99 is never reached: the teacher's other tokens are not in the row.
    assert_eq!(p.cut(MassCut::default()).ids(), [0, 1, 2, 3]);
    assert_eq!(p.cut(cut(0.99, true)).ids(), [0]);
}

#[test]
fn entries_are_ordered_by_position_and_probability() {
    let t = TopLogprobs::flat(&[1, 0, 1], &[5, 6, 7], &[-2.0, -0.5, -0.1], Some(&[2, 4])).unwrap();
    assert_eq!(t.entries().collect::<Vec<_>>(), [(0, 6, -0.5), (1, 7, -0.1), (1, 5, -2.0)]);
    assert_eq!((t.tokens(), t.width()), (2, 4));
    let t = TopLogprobs::flat(&[1, 1], &[5, 7], &[-2.0, -0.1], None).unwrap();
    assert_eq!((t.tokens(), t.width()), (2, 2));
}

#[test]
fn fillers_are_left_out() {
    let logprobs = vec![vec![-0.1, -1000.0], vec![f32::NEG_INFINITY, -0.2]];
    let t = TopLogprobs::dense(&[vec![3, 4], vec![-1, 8]], &logprobs).unwrap();
    assert_eq!(t.entries().collect::<Vec<_>>(), [(0, 3, -0.1), (1, 8, -0.2)]);
    assert_eq!(t.width(), 2);
    let t = TopLogprobs::flat(&[0, 0], &[3, -1], &[-0.1, -0.5], None).unwrap();
    assert_eq!(t.ids(), [3]);
}

#[test]
fn contradictions_are_refused() {
    let flat = |positions: &[i64], ids: &[i64], logprobs: &[f32], shape| {
        TopLogprobs::flat(positions, ids, logprobs, shape).unwrap_err()
    };
    for (error, says) in [
        (flat(&[0], &[1, 2], &[-0.1], None), "1 token_idx, 2 token_id and 1 logprobs"),
        (flat(&[2], &[1], &[-0.1], Some(&[2, 4])), "token_idx 2 in a message of 2"),
        (flat(&[-1], &[1], &[-0.1], Some(&[2, 4])), "token_idx -1"),
        (flat(&[i64::MAX], &[1], &[-0.1], None), "shape"),
        (flat(&[0], &[1], &[-0.1], Some(&[2])), "shape [2]"),
        (flat(&[0], &[1], &[-0.1], Some(&[-2, 4])), "-2"),
        (flat(&[0], &[-2], &[-0.1], None), "token id -2"),
        (flat(&[0], &[1], &[f32::NAN], None), "NaN"),
        (flat(&[0], &[1], &[0.5], None), "0.5"),
        (flat(&[0], &[1], &[f32::INFINITY], None), "inf"),
        (TopLogprobs::dense(&[vec![1]], &[]).unwrap_err(), "1 tokens and logprobs of 0"),
        (TopLogprobs::dense(&[vec![1]], &[vec![]]).unwrap_err(), "1 ids and 0 logprobs"),
    ] {
        assert!(error.contains(says), "{error}");
    }
}

proptest! {
    #[test]
    fn a_cut_keeps_a_prefix_of_each_position_and_is_idempotent(
        rows in prop::collection::vec(prop::collection::vec(-8.0f32..0.0, 0..6), 0..5),
        mass in 0.0f64..1.0,
    ) {
        let ids: Vec<Vec<i64>> = rows.iter().map(|r| (0..).take(r.len()).collect()).collect();
        let all = TopLogprobs::dense(&ids, &rows).unwrap();
        let cut = MassCut { min_prob_mass: mass, top1_when_short: false };
        let kept = all.cut(cut);
        prop_assert_eq!(&kept.cut(cut), &kept);
        for position in 0..rows.len() as u32 {
            let of = |t: &TopLogprobs| -> Vec<_> { t.entries().filter(|e| e.0 == position).collect() };
            let (all, kept) = (of(&all), of(&kept));
            prop_assert!(all.starts_with(&kept));
            prop_assert_eq!(all.is_empty(), kept.is_empty());
            let sum = |e: &[(u32, u32, f32)]| e.iter().map(|e| f64::from(e.2).exp()).sum::<f64>();
            if kept.len() < all.len() {
                prop_assert!(sum(&kept) >= mass - 2e-6);
            }
            if let Some((_, before)) = kept.split_last() {
                prop_assert!(sum(before) < mass);
            }
        }
    }
}
