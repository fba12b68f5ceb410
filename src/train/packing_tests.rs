use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

/// An element whose tokens are numbers of its own, so that a pack shows what it is made of. Row `r` is
/// trained on the token after it and on one more id.
fn element(index: usize, length: usize, supervised: std::ops::Range<u32>) -> Element {
    let tokens: Vec<u32> = (0..length as u32).map(|t| index as u32 * 1000 + t).collect();
    let mut targets = Targets::default();
    for row in supervised.clone() {
        targets.push(row, tokens[row as usize + 1], 0.75);
        targets.push(row, 7, 0.25);
    }
    let supervised = Some(supervised).filter(|rows| !rows.is_empty()).into_iter().collect();
    Element { tokens, targets, supervised, row: index + 1 }
}

fn packing(packed_seq_length: usize, mode: PackingMode) -> Packing {
    Packing { packed_seq_length, mode, seed: 42 }
}

fn packs(plan: &PackPlan, elements: &[Element]) -> Vec<Pack> {
    (0..plan.len()).map(|i| plan.pack(i, elements).unwrap()).collect()
}

/// What holds for every pack, whatever the mode.
fn check(pack: &Pack, pieces: &[Piece], limit: usize) -> Result<(), TestCaseError> {
    prop_assert!(pack.tokens.len() <= limit);
    prop_assert!(!pack.targets.is_empty());
    prop_assert_eq!(pack.cu_seqlens.len(), pieces.len() + 1);
    prop_assert_eq!(pack.cu_seqlens[0], 0);
    prop_assert_eq!(*pack.cu_seqlens.last().unwrap() as usize, pack.tokens.len());
    for (piece, bounds) in pieces.iter().zip(pack.cu_seqlens.windows(2)) {
        let sequence = &pack.tokens[bounds[0] as usize..bounds[1] as usize];
        prop_assert_eq!(sequence.len(), piece.tokens);
        let first = piece.element as u32 * 1000;
        prop_assert!(sequence.iter().zip(first..).all(|(token, wanted)| *token == wanted));
    }
    prop_assert!(pack.targets.rows.is_sorted());
    for (entry, &row) in pack.targets.rows.iter().enumerate() {
        // Never the last row of a sequence: the token after it is another's.
        prop_assert!(!pack.cu_seqlens.contains(&(row + 1)));
        let (id, prob) = (pack.targets.ids[entry], pack.targets.probs[entry]);
        prop_assert!(
            (id, prob) == (pack.tokens[row as usize + 1], 0.75) || (id, prob) == (7, 0.25)
        );
    }
    Ok(())
}

fn elements() -> impl Strategy<Value = Vec<Element>> {
    let one = (2usize..40).prop_flat_map(|length| {
        let rows = (0..length as u32, 0..length as u32);
        rows.prop_map(move |(a, b)| (length, a.min(b)..a.max(b)))
    });
    prop::collection::vec(one, 1..20).prop_map(|shapes| {
        let shapes = shapes.into_iter().enumerate();
        shapes.map(|(i, (length, rows))| element(i, length, rows)).collect()
    })
}

proptest! {
    #[test]
    fn pad_keeps_every_token_that_fits_a_pack_once(all in elements(), limit in 2usize..60) {
        let Ok(plan) = PackPlan::new(&all, &packing(limit, PackingMode::Pad)) else {
            prop_assert!(all.iter().all(|e| !e.is_supervised_within(limit)));
            return Ok(());
        };
        let mut seen = HashSet::new();
        for (index, pack) in packs(&plan, &all).iter().enumerate() {
            let pieces = plan.pieces(index).unwrap();
            check(pack, pieces, limit)?;
            for piece in pieces {
                prop_assert!(seen.insert(piece.element));
                prop_assert_eq!(piece.tokens, all[piece.element].tokens.len().min(limit));
            }
            let targets: usize = pieces
                .iter()
                .map(|p| all[p.element].targets.rows.iter().filter(|r| **r as usize + 1 < p.tokens).count())
                .sum();
            prop_assert_eq!(pack.targets.len(), targets);
        }
        let learnable = |e: &&Element| e.is_supervised_within(limit);
        prop_assert_eq!(seen.len(), all.iter().filter(learnable).count());
        prop_assert_eq!(plan.dropped, all.len() - seen.len());
        let cut = seen.iter().filter(|i| all[**i].tokens.len() > limit).count();
        prop_assert_eq!(plan.cut, cut);
    }

    #[test]
    fn truncate_fills_packs_and_cuts_at_their_end(all in elements(), limit in 2usize..60) {
        let Ok(plan) = PackPlan::new(&all, &packing(limit, PackingMode::Truncate)) else {
            prop_assert!(all.iter().all(|e| !e.is_supervised_within(limit)));
            return Ok(());
        };
        let mut seen = HashSet::new();
        for (index, pack) in packs(&plan, &all).iter().enumerate() {
            let pieces = plan.pieces(index).unwrap();
            check(pack, pieces, limit)?;
            let (_, before) = pieces.split_last().unwrap();
            for piece in pieces {
                prop_assert!(seen.insert(piece.element));
            }
            // Only the last piece of a pack is cut, and then the pack is full.
            prop_assert!(before.iter().all(|p| p.tokens == all[p.element].tokens.len()));
            let last = pieces[pieces.len() - 1];
            if last.tokens < all[last.element].tokens.len() {
                prop_assert_eq!(pack.tokens.len(), limit);
            }
        }
        prop_assert_eq!(seen.len() + plan.dropped, all.len());
    }

    #[test]
    fn an_epoch_order_is_a_permutation_that_does_not_change(
        seed: u64, epoch: u64, packs in 0usize..50,
    ) {
        let order = epoch_order(seed, epoch, packs);
        prop_assert_eq!(&order, &epoch_order(seed, epoch, packs));
        let mut sorted = order;
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..packs).collect::<Vec<_>>());
    }
}

#[test]
fn packs_are_fixed_by_the_seed_and_epochs_differ() {
    let all: Vec<Element> = (0..50).map(|i| element(i, 10, 2..9)).collect();
    let plan = |seed| PackPlan::new(&all, &Packing { seed, ..packing(32, PackingMode::Pad) });
    assert_eq!(plan(1), plan(1));
    assert_ne!(plan(1), plan(2));
    assert_eq!(plan(1).unwrap().len(), 17);
    assert_ne!(epoch_order(1, 0, 17), epoch_order(1, 1, 17));
    assert_ne!(epoch_order(1, 0, 17), epoch_order(2, 0, 17));
}

/// A target at the first token beyond a cut would read the logits of the last row that is left.
#[test]
fn a_target_just_beyond_a_cut_is_dropped() {
    let all = [element(0, 10, 4..9)];
    let plan = PackPlan::new(&all, &packing(7, PackingMode::Pad)).unwrap();
    let pack = plan.pack(0, &all).unwrap();
    assert_eq!(pack.tokens, [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(pack.targets.rows, [4, 4, 5, 5]);
    assert_eq!((plan.cut, plan.dropped), (1, 0));
    let none = PackPlan::new(&all, &packing(5, PackingMode::Pad)).unwrap_err();
    assert_eq!(none, PackingError::NothingLeft { elements: 1, packed_seq_length: 5 });
    assert_eq!(PackPlan::new(&all, &packing(6, PackingMode::Pad)).unwrap().cut, 1);
}

/// With an online teacher the targets come after the plan.
#[test]
fn elements_that_wait_for_a_teacher_are_packed() {
    let mut all = [element(0, 10, 4..9), element(1, 10, 0..0)];
    all[0].targets = Targets::default();
    let plan = PackPlan::new(&all, &packing(32, PackingMode::Pad)).unwrap();
    assert_eq!(plan.pieces(0).unwrap(), [Piece { element: 0, tokens: 10 }]);
    assert_eq!(plan.dropped, 1);
}

#[test]
fn what_cannot_be_packed_is_said() {
    let all = [element(0, 10, 4..9)];
    for length in [0, 1, MAX_ELEMENT_TOKENS + 1] {
        let e = PackPlan::new(&all, &packing(length, PackingMode::Pad)).unwrap_err();
        assert_eq!(e, PackingError::Length(length));
    }
    let e = PackPlan::new(&[], &packing(8, PackingMode::Pad)).unwrap_err();
    assert_eq!(e, PackingError::NoElements);
}
