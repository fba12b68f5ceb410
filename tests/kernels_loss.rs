//! The distillation loss of logits, run on the CPU, against its naive twin and the crate's own.

mod kernels_support;

use cartouche::train::row_loss;
use half::bf16;
use kernels_support::{Buffer, Library, Number, Random, Side, check_one};

struct Case<T> {
    vocab: usize,
    /// `[rows, vocab]`.
    logits: Vec<T>,
    /// (id, p) of each row.
    targets: Vec<Vec<(usize, f32)>>,
    scale: f32,
    unit: f32,
}

#[derive(PartialEq)]
struct Output<T> {
    losses: Vec<f32>,
    logits: Vec<T>,
}

impl<T: Number> Case<T> {
    /// Of `counts` target entries in each row, ids at random, the second one twice.
    fn new(vocab: usize, counts: &[usize], scale: f32, spread: f32, random: &mut Random) -> Self {
        let logits = random.numbers::<f32>(counts.len() * vocab);
        let logits = logits.into_iter().map(|x| T::of(x * spread)).collect();
        let mut row = |count: usize| {
            let probs = random.numbers::<f32>(count);
            let ids = random.order(vocab);
            let entry = |(i, p): (usize, f32)| {
                let id = ids[if i == 2 { 1 } else { i } % vocab] as usize;
                (id, (p.abs() + 0.01) / count as f32)
            };
            probs.into_iter().enumerate().map(entry).collect()
        };
        let targets = counts.iter().map(|count| row(*count)).collect();
        Self { vocab, logits, targets, scale, unit: scale / 3.0 }
    }

    /// Where each row's entries start, ids, probabilities. The first row's are not the first there are.
    fn entries(&self) -> (Vec<i32>, Vec<i32>, Vec<f32>) {
        let (mut starts, mut ids, mut probs) = (vec![2], vec![-1, -1], vec![f32::NAN; 2]);
        for row in &self.targets {
            ids.extend(row.iter().map(|(id, _)| *id as i32));
            probs.extend(row.iter().map(|(_, p)| *p));
            starts.push(ids.len() as i32);
        }
        (starts, ids, probs)
    }

    fn run(&self, gradient: bool, order: u64) -> Output<T> {
        let random = &mut Random::new(order);
        let (starts, ids, probs) = self.entries();
        let logits = Buffer::of(&self.logits, random.side());
        let losses = Buffer::<f32>::poisoned(self.targets.len(), random.side());
        let slopes = gradient.then(|| Buffer::<f32>::poisoned(ids.len(), random.side()));
        Library::of("kernels/distillation_loss.cu").launch(
            &format!("distillation_loss_{}", T::NAME),
            [self.targets.len(), 1, 1],
            order,
            args![
                &logits,
                &Buffer::of(&starts, random.side()),
                &Buffer::of(&ids, random.side()),
                &Buffer::of(&probs, random.side()),
                &losses,
                slopes.as_ref(),
                self.vocab as i32,
                self.scale,
                self.unit,
                gradient as i32,
            ],
        );
        if let Some(slopes) = slopes {
            slopes.read();
        }
        Output { losses: losses.read(), logits: logits.read() }
    }

    /// f32 sums over the vocabulary, exponents of at most 128 in powers of two, one rounding to T.
    fn check(&self, order: u64) {
        let case = format!("{} of {}, scale {}", T::NAME, self.vocab, self.scale);
        let (starts, ids, probs) = self.entries();
        let poisoned = |len| Buffer::<f64>::poisoned(len, Side::Back);
        let (losses, gradient) = (poisoned(self.targets.len()), poisoned(self.logits.len()));
        let size = poisoned(self.logits.len());
        Library::of("kernels/reference/distillation_loss.cpp").call(
            &format!("reference_distillation_loss_{}", T::NAME),
            args![
                &Buffer::of(&self.logits, Side::Back),
                &Buffer::of(&starts, Side::Back),
                &Buffer::of(&ids, Side::Back),
                &Buffer::of(&probs, Side::Back),
                &losses,
                &gradient,
                &size,
                self.targets.len() as i32,
                self.vocab as i32,
                self.scale,
                self.unit,
            ],
        );
        let (losses, gradient, size) = (losses.read(), gradient.read(), size.read());
        let got = self.run(true, order);
        for (row, (got, want)) in got.losses.iter().zip(&losses).enumerate() {
            check_one(f64::from(*got), *want, 3e-6 + 3e-6 * want, || format!("{case}: loss {row}"));
        }
        let slopes = got.logits.iter().zip(gradient.iter().zip(&size));
        for (i, (got, (want, size))) in slopes.enumerate() {
            let most = 2.0 * T::EPSILON * want.abs() + 2e-5 * size + 1e-37;
            let at = (i / self.vocab, i % self.vocab);
            check_one(f64::from(got.to_f32()), *want, most, || format!("{case}: slope {at:?}"));
        }
        self.check_crate(&got, &case);
        let loss_only = self.run(false, order + 1);
        assert!(loss_only.losses == got.losses, "{case}: other losses without the gradient");
        let same = |a: &T, b: &T| a.to_f32().to_bits() == b.to_f32().to_bits();
        let unchanged = loss_only.logits.iter().zip(&self.logits).all(|(a, b)| same(a, b));
        assert!(unchanged, "{case}: logits changed without the gradient");
    }

    fn check_crate(&self, got: &Output<T>, case: &str) {
        let rows = self.logits.chunks_exact(self.vocab).zip(got.logits.chunks_exact(self.vocab));
        for (row, (targets, (logits, got_slopes))) in self.targets.iter().zip(rows).enumerate() {
            if targets.is_empty() {
                continue; // the crate has no such rows
            }
            let mut slopes: Vec<f32> = logits.iter().map(|x| x.to_f32()).collect();
            let entries = targets.iter().copied();
            let want = row_loss(&mut slopes, entries, self.scale, Some(f64::from(self.unit)));
            let loss = f64::from(got.losses[row]);
            assert!((loss - want).abs() <= 1e-5 * (1.0 + want), "{case}: {loss}, the crate {want}");
            for (got, want) in got_slopes.iter().zip(&slopes) {
                let most = 2.0 * T::EPSILON as f32 * want.abs() + 1e-5 * self.unit;
                assert!(
                    (got.to_f32() - want).abs() <= most,
                    "{case}: {}, the crate {want}",
                    got.to_f32()
                );
            }
        }
    }
}

/// Rows begin at every offset from a multiple of 16 bytes; rows of less than that, too.
#[test]
fn losses_and_gradients_of_odd_vocabularies() {
    let random = &mut Random::new(1);
    for vocab in [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 511, 513, 4096, 4099, 8225] {
        for scale in [1.0, 0.5, 1.7] {
            let counts = [1, 0, 4, 20, 0, 3, 700, 5, 9];
            Case::<bf16>::new(vocab, &counts, scale, 4.0, random).check(random.seed());
            Case::<f32>::new(vocab, &counts[..6], scale, 4.0, random).check(random.seed());
        }
    }
}

#[test]
fn losses_and_gradients_of_large_vocabularies() {
    let random = &mut Random::new(2);
    for vocab in [128_256, 151_936, 152_063] {
        Case::<bf16>::new(vocab, &[20, 0, 1], 1.0, 8.0, random).check(random.seed());
        Case::<f32>::new(vocab, &[20, 3], 0.7, 8.0, random).check(random.seed());
    }
}

#[test]
fn logits_far_from_zero_and_apart() {
    let random = &mut Random::new(3);
    for shift in [-30_000.0, 0.0, 30_000.0] {
        for spread in [0.0, 1.0, 40.0] {
            let mut case = Case::<f32>::new(777, &[3, 5], 1.0, spread, random);
            case.logits.iter_mut().for_each(|x| *x += shift);
            case.check(random.seed());
        }
    }
}

#[test]
fn masked_tokens_get_no_weight() {
    let random = &mut Random::new(4);
    for vocab in [33, 5000] {
        let mut case = Case::<bf16>::new(vocab, &[4, 4], 1.0, 4.0, random);
        let kept: Vec<usize> = case.targets.iter().flatten().map(|(id, _)| *id).collect();
        for (i, logit) in case.logits.iter_mut().enumerate() {
            if !kept.contains(&(i % vocab)) && i % vocab != vocab / 2 {
                *logit = bf16::NEG_INFINITY;
            }
        }
        case.check(random.seed());
    }
}

/// Each row has one defect; its neighbours keep their bits.
#[test]
fn rows_that_are_not_finite_are_reported_and_spoil_no_other() {
    let random = &mut Random::new(5);
    let vocab = 3001;
    let counts = [4; 8];
    let mut case = Case::<bf16>::new(vocab, &counts, 1.0, 4.0, random);
    case.targets[7].clear();
    let sound = case.run(true, 0);
    let at = |row: usize, id: usize| row * vocab + id;
    let target = |row: usize| at(row, case.targets[row][0].0);
    let other =
        (0..vocab).find(|id| case.targets[2].iter().all(|(target, _)| target != id)).unwrap();
    let mut logits = case.logits.clone();
    logits[target(0)] = bf16::NAN;
    logits[target(1)] = bf16::NEG_INFINITY;
    logits[at(2, other)] = bf16::NAN;
    logits[at(3, vocab - 1)] = bf16::INFINITY;
    logits[at(4, 0)..at(5, 0)].fill(bf16::NEG_INFINITY);
    logits[at(5, 0)..at(6, 0)].fill(bf16::NAN);
    logits[at(7, 0)..].fill(bf16::NAN);
    case.logits = logits;
    for gradient in [true, false] {
        let got = case.run(gradient, random.seed());
        for row in 0..6 {
            assert!(!got.losses[row].is_finite(), "row {row}");
        }
        assert_eq!(got.losses[6..], [sound.losses[6], 0.0]);
        if gradient {
            assert!(got.logits[at(6, 0)..] == sound.logits[at(6, 0)..]);
            assert!(got.logits[at(7, 0)..].iter().all(|x| x.to_f32() == 0.0));
        }
    }
}

#[test]
fn the_bits_do_not_depend_on_the_order_of_threads() {
    let case = Case::<bf16>::new(9001, &[700, 0, 20], 1.3, 6.0, &mut Random::new(6));
    let first = case.run(true, 0);
    for order in 1..6 {
        assert!(case.run(true, order) == first, "order {order}");
    }
}
