//! Log-probabilities of drawn tokens and of the likeliest.

use cartouche::engine::token_logprobs;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::kernels_support::{Buffer, Library, Random, Side, check_one};
use crate::{args, laid_out, logits};

/// Alternatives the kernel can give.
const MAX_TOP: usize = 256;

struct Logprobs {
    chosen: Vec<f32>,
    ids: Vec<i32>,
    logprobs: Vec<f32>,
    flags: Vec<i32>,
}

/// One row per request: (row, token, temperature, alternatives).
fn logprobs(
    rows: &[Vec<f32>],
    stride: usize,
    requests: &[(usize, i32, f32, usize)],
    max_top: usize,
    random: &mut Random,
) -> Logprobs {
    let side = random.side();
    let vocab = rows[0].len();
    let slices: Vec<&[f32]> = rows.iter().map(|row| &row[..]).collect();
    let in_order = requests.iter().enumerate().all(|(i, request)| request.0 == i);
    let row_ids: Vec<i32> = requests.iter().map(|request| request.0 as i32).collect();
    let row_ids = (!in_order).then(|| Buffer::of(&row_ids, side));
    let ints = |values: Vec<i32>| Buffer::of(&values, side);
    let temperatures: Vec<f32> = requests.iter().map(|request| request.2).collect();
    let (chosen, flags) = (
        Buffer::<f32>::poisoned(requests.len(), random.side()),
        Buffer::<i32>::poisoned(requests.len(), random.side()),
    );
    let ids = Buffer::<i32>::poisoned(requests.len() * max_top, random.side());
    let values = Buffer::<f32>::poisoned(requests.len() * max_top, random.side());
    Library::of("kernels/logprobs.cu").launch(
        "logprobs_f32",
        [requests.len(), 1, 1],
        random.seed(),
        args![
            &laid_out(&slices, stride, side),
            row_ids.as_ref(),
            &ints(requests.iter().map(|request| request.1).collect()),
            &Buffer::of(&temperatures, side),
            &ints(requests.iter().map(|request| request.3 as i32).collect()),
            &chosen,
            &ids,
            &values,
            &flags,
            vocab as i32,
            max_top as i32,
            stride as i64
        ],
    );
    Logprobs {
        chosen: chosen.read(),
        ids: ids.read(),
        logprobs: values.read(),
        flags: flags.read(),
    }
}

fn logprob_case(seed: u64, vocab: usize, count: usize) {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let random = &mut Random::new(seed);
    let rows: Vec<Vec<f32>> = (0..count).map(|_| logits(rng, vocab)).collect();
    let max_top = [0, 1, 20, 64, MAX_TOP][rng.random_range(0..5)];
    let shuffled = rng.random_bool(0.5);
    let requests: Vec<_> = (0..count)
        .map(|i| {
            let row = if shuffled { rng.random_range(0..count) } else { i };
            let token = rng.random_range(-1..vocab as i32 + 1);
            let temperature = [0.0, 0.5, 1.0, 2.0][rng.random_range(0..4)];
            (row, token, temperature, rng.random_range(0..=max_top))
        })
        .collect();
    let stride = if shuffled { vocab.next_multiple_of(4) } else { vocab };
    let got = logprobs(&rows, stride, &requests, max_top, random);
    let twin = Library::of("kernels/reference/sampling.cpp");
    for (i, (row, token, temperature, top)) in requests.iter().copied().enumerate() {
        let case = format!("vocab {vocab}, seed {seed}, result {i}, {top} of {max_top}");
        let close = |got: f32, want: f64| {
            check_one(f64::from(got), want, 1e-5 + 3e-7 * want.abs(), || case.clone());
        };
        let kept = top.min(vocab);
        let chosen = Buffer::<f64>::poisoned(1, Side::Back);
        let ids = Buffer::<i32>::poisoned(kept, Side::Back);
        let values = Buffer::<f64>::poisoned(kept, Side::Back);
        let logits = Buffer::of(&rows[row], Side::Back);
        let (vocab, top_i32) = (vocab as i32, top as i32);
        twin.call(
            "reference_logprobs",
            args![&logits, vocab, token, temperature, top_i32, &chosen, &ids, &values],
        );
        let (ids, values) = (ids.read(), values.read());
        let engine = token_logprobs(&rows[row], token as u32, temperature, top);
        assert_eq!(got.flags[i], 0, "{case}");
        close(got.chosen[i], chosen.read()[0]);
        close(got.chosen[i], f64::from(engine.logprob));
        let (got_ids, rest) = got.ids[i * max_top..][..max_top].split_at(kept);
        assert_eq!(got_ids, ids, "{case}");
        assert!(rest.iter().all(|id| *id == -1), "{case}");
        let (got_values, rest) = got.logprobs[i * max_top..][..max_top].split_at(kept);
        assert!(rest.iter().all(|x| *x == f32::NEG_INFINITY), "{case}");
        assert_eq!(engine.top.len(), kept, "{case}");
        for (j, got) in got_values.iter().enumerate() {
            close(*got, values[j]);
            assert_eq!(engine.top[j].0 as i32, ids[j], "{case}");
            close(*got, f64::from(engine.top[j].1));
        }
    }
}

#[test]
fn log_probabilities_and_the_likeliest_tokens() {
    for (i, vocab) in [1, 2, 19, 127, 128, 129, 255, 257, 1000, 4097].into_iter().enumerate() {
        for seed in 0..4 {
            logprob_case(200 + 10 * i as u64 + seed, vocab, 8);
        }
    }
    logprob_case(300, 128_256, 2);
    logprob_case(301, 262_143, 2);
}

#[test]
fn log_probabilities_of_rows_that_are_not_finite() {
    let mut rows = vec![vec![1.0f32, 0.0, 0.0]; 4];
    rows[0][0] = f32::NAN;
    rows[1][1] = f32::INFINITY;
    rows[2][2] = f32::NEG_INFINITY;
    let requests = [(0, 0, 1.0, 2), (1, 0, 1.0, 2), (2, 0, 1.0, 2), (3, 0, 1.0, 2)];
    let got = logprobs(&rows, 3, &requests, 4, &mut Random::new(4));
    assert_eq!(got.flags, [1, 1, 1, 0]);
    assert!(got.chosen[..3].iter().all(|x| x.is_nan()) && got.chosen[3].is_finite());
    assert_eq!(got.ids[..12], [-1; 12]);
    assert_eq!(got.ids[12..], [0, 1, -1, -1]);
    assert!(got.logprobs[..12].iter().all(|x| x.is_nan()));
}
