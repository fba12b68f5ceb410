//! Single draws whose outcome is known.

use cartouche::engine::SamplingParams;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::kernels_support::{Random, gpu_index};
use crate::{Entry, IN_PROMPT, Row, logits, sample};

/// Every option by itself, where exact weights leave no room for rounding.
#[test]
fn each_truncation_keeps_exactly_the_right_tokens() {
    // Weights of 2^-k: 1/2, 1/4, 1/8, 1/8 in shuffled places; logits are exact multiples of ln 2 to f32.
    let logits: Vec<f32> =
        [3f32, 1.0, 3.0, 2.0].iter().map(|k| -k * std::f32::consts::LN_2).collect();
    let draws = 64;
    // Between the decisions on a GPU, whose exponential may be a unit in the last place off; here on them.
    let first = if gpu_index().is_some() { 0.5 } else { 0.0 };
    let seen = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = SamplingParams::default();
        change(&mut params);
        let rows: Vec<Row> = (0..draws)
            .map(|i| Row::new(logits.clone(), &params, (first + i as f64) / draws as f64))
            .collect();
        let tokens = sample(&rows, 4, &mut Random::new(1)).tokens;
        let counts: Vec<usize> =
            (0..4).map(|id| tokens.iter().filter(|t| **t == id).count()).collect();
        assert!(tokens.is_sorted(), "ids ascend with the uniform number");
        counts
    };
    assert_eq!(seen(&|_| ()), [8, 32, 8, 16]);
    assert_eq!(seen(&|p| p.top_k = 2)[0] + seen(&|p| p.top_k = 2)[2], 0);
    // Of equals the lower id stays.
    assert_eq!(
        seen(&|p| p.top_k = 3).iter().map(|c| usize::from(*c > 0)).collect::<Vec<_>>(),
        [1, 1, 0, 1]
    );
    assert_eq!(
        seen(&|p| p.top_p = 0.7).iter().map(|c| usize::from(*c > 0)).collect::<Vec<_>>(),
        [0, 1, 0, 1]
    );
    assert_eq!(seen(&|p| p.top_p = 0.49), [0, 64, 0, 0]);
    assert_eq!(
        seen(&|p| p.min_p = 0.3).iter().map(|c| usize::from(*c > 0)).collect::<Vec<_>>(),
        [0, 1, 0, 1]
    );
    assert_eq!(seen(&|p| p.min_p = 2.0), [0, 64, 0, 0]); // keeps nothing: the likeliest
    assert_eq!(seen(&|p| p.temperature = 0.0), [0, 64, 0, 0]);
    assert_eq!(seen(&|p| p.temperature = 1e-40), [0, 64, 0, 0]);
}

#[test]
fn equal_logits_of_both_zeroes_and_the_ends_of_the_uniform_numbers() {
    for vocab in [1usize, 3, 130, 5000] {
        let mut logits = vec![0f32; vocab];
        logits[0] = -0.0;
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let rows = [
            Row::new(logits.clone(), &greedy, 0.5),
            Row::new(logits.clone(), &SamplingParams::default(), 0.0),
            Row::new(logits.clone(), &SamplingParams::default(), 1.0 - f64::EPSILON / 2.0),
            Row::new(
                logits.clone(),
                &SamplingParams { top_k: 1, ..SamplingParams::default() },
                0.9,
            ),
            // Half of them: by id, as all weigh the same.
            Row::new(
                logits.clone(),
                &SamplingParams { top_p: 0.5, ..SamplingParams::default() },
                0.999_999,
            ),
        ];
        let tokens = sample(&rows, vocab, &mut Random::new(vocab as u64)).tokens;
        assert_eq!(tokens, [0, 0, vocab as i32 - 1, 0, vocab.div_ceil(2) as i32 - 1]);
    }
}

/// Of every row that is not finite, wherever the number stands, and if its token is banned or adjusted.
#[test]
fn rows_that_are_not_finite_are_reported_and_leave_the_others_alone() {
    let rng = &mut ChaCha8Rng::seed_from_u64(9);
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let vocab = 1031;
    let fine = Row::new(logits(rng, vocab), &SamplingParams::default(), 0.3);
    let mut rows = Vec::new();
    for (i, at) in [0, 5, 127, 512, 1030].into_iter().enumerate() {
        for (kind, bad) in bad.into_iter().enumerate() {
            let mut row = fine.clone();
            row.logits[at] = bad;
            row.options[0] = [1.0, 0.0][kind % 2];
            row.options[3] = 1.5;
            let uses = [-1, 3, 0, IN_PROMPT][i % 4];
            row.entries.insert(at as i32, Entry { uses, bias: 1.0 });
            rows.extend([row, fine.clone()]);
        }
    }
    let want = sample(&[fine], 1032, &mut Random::new(9)).twin[0].0;
    let drawn = sample(&rows, 1032, &mut Random::new(9));
    for (tokens, flags) in drawn.tokens.chunks(2).zip(drawn.flags.chunks(2)) {
        assert_eq!((tokens, flags), (&[-1, want][..], &[1, 0][..]));
    }
}

#[test]
fn a_row_whose_every_token_is_banned_gives_the_first() {
    let mut row = Row::new(vec![1.0, 2.0], &SamplingParams::default(), 0.9);
    row.entries = (0..2).map(|id| (id, Entry { uses: -1, bias: 0.0 })).collect();
    let drawn = sample(&[row], 2, &mut Random::new(0));
    assert_eq!((drawn.tokens, drawn.flags), (vec![0], vec![0]));
}
