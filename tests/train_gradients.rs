//! The gradient of a micro-step against PyTorch autograd, central differences, and itself computed otherwise.

mod common;
mod train_support;

use candle_core::{Device, Tensor};
use cartouche::model::{LoadOptions, ModelSource, Quantize, load_decoder};
use cartouche::train::{
    Normalizer, Pack, PrefixLayer, StepOptions, StepOutput, Targets, TrainError, evaluate,
    gradients,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use train_support::{both, fixtures, options, random_case, relative, values};

#[test]
fn loss_and_every_gradient_match_autograd_in_pytorch() {
    for fixture in fixtures() {
        let (name, decoder) = (&fixture.model.name, fixture.model.decoder());
        for (case, facts) in fixture.facts["cases"].as_object().unwrap() {
            let temperature = facts["temperature"].as_f64().unwrap() as f32;
            let want = fixture.layers(case);
            for recompute in [false, true] {
                let options = options(temperature, recompute);
                let got = gradients(&decoder, &fixture.prefix(), &fixture.pack, &options).unwrap();
                for (got, key) in [(got.loss, "loss"), (got.nll_sum, "nll_sum")] {
                    let want = facts[key].as_f64().unwrap();
                    assert!((got - want).abs() <= 1e-5 * want, "{name} {case}: {got} for {want}");
                }
                assert_eq!(got.gradients.len(), want.len());
                for (i, (got, want)) in both(&got.gradients).zip(both(&want)).enumerate() {
                    let error = relative(got, want);
                    assert!(error <= 1e-4, "{name} {case} tensor {i}: {error}");
                }
            }
        }
    }
}

#[test]
fn the_forward_alone_gives_the_same_loss_with_and_without_a_cartridge() {
    for fixture in fixtures() {
        let (decoder, pack) = (fixture.model.decoder(), &fixture.pack);
        let step = gradients(&decoder, &fixture.prefix(), pack, &options(1.0, false)).unwrap();
        let alone = evaluate(&decoder, &fixture.prefix(), pack, &options(1.0, false)).unwrap();
        assert_eq!((alone.rows, alone.entries), (step.rows, step.entries));
        assert_eq!(alone.entropy_sum, step.entropy_sum);
        assert!((alone.nll_sum - step.nll_sum).abs() <= 1e-9 * step.nll_sum);
        let bare = evaluate(&decoder, &[], pack, &options(1.0, false)).unwrap();
        for (got, key) in
            [(bare.nll_sum, "nll_sum_without_prefix"), (bare.entropy_sum, "entropy_sum")]
        {
            let want = fixture.facts[key].as_f64().unwrap();
            assert!((got - want).abs() <= 1e-5 * want.abs(), "{key}: {got} for {want}");
        }
    }
}

#[test]
fn recomputing_layers_gives_the_gradients_of_the_whole_graph() {
    for fixture in fixtures() {
        let decoder = fixture.model.decoder();
        let run = |recompute| {
            gradients(&decoder, &fixture.prefix(), &fixture.pack, &options(1.0, recompute)).unwrap()
        };
        let (whole, by_layer) = (run(false), run(true));
        assert_eq!(whole.loss, by_layer.loss);
        for (a, b) in both(&whole.gradients).zip(both(&by_layer.gradients)) {
            assert!(relative(a, b) <= 1e-6, "{}", fixture.model.name);
        }
    }
}

#[test]
fn normalising_by_entries_scales_loss_and_gradient() {
    let fixture = fixtures().remove(0);
    let decoder = fixture.model.decoder();
    let run = |normalizer| {
        let options = StepOptions { normalizer, ..StepOptions::default() };
        gradients(&decoder, &fixture.prefix(), &fixture.pack, &options).unwrap()
    };
    let (rows, entries) = (run(Normalizer::Tokens), run(Normalizer::Entries));
    assert_eq!(rows.nll_sum, entries.nll_sum);
    assert_eq!(entries.entries, fixture.pack.targets.len());
    assert_eq!(entries.loss, entries.nll_sum / entries.entries as f64);
    let factor = rows.rows as f64 / entries.entries as f64;
    for (a, b) in both(&entries.gradients).zip(both(&rows.gradients)) {
        assert!(relative(a, &(b * factor).unwrap()) <= 1e-5);
    }
}

/// Along random directions, one per tensor. The loss is in f32, so the step must not be small.
#[test]
fn gradients_are_those_of_central_differences() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for fixture in fixtures() {
        let decoder = fixture.model.decoder();
        for (p, lengths) in [(1, &[3, 1, 8][..]), (13, &[1, 17])] {
            let (prefix, pack) = random_case(&decoder, p, lengths);
            let step = gradients(&decoder, &prefix, &pack, &options(1.0, true)).unwrap();
            for at in 0..2 * prefix.len() {
                let gradient = both(&step.gradients).nth(at).unwrap();
                let noise = (0..gradient.elem_count()).map(|_| rng.random_range(-1.0f32..1.0));
                let noise =
                    Tensor::from_vec(noise.collect(), gradient.shape(), &Device::Cpu).unwrap();
                // Mostly along the gradient, so that the difference stands out of the rounding.
                let size = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>();
                let (of_gradient, of_noise) =
                    (size(gradient).unwrap().sqrt(), size(&noise).unwrap().sqrt());
                let direction = ((gradient / f64::from(of_gradient)).unwrap()
                    + (noise / f64::from(2.0 * of_noise)).unwrap())
                .unwrap();
                let moved = |by: f64| {
                    let mut prefix = prefix.clone();
                    let layer = &mut prefix[at / 2];
                    let tensor = if at % 2 == 0 { &mut layer.keys } else { &mut layer.values };
                    *tensor = (&*tensor + (&direction * by).unwrap()).unwrap();
                    evaluate(&decoder, &prefix, &pack, &options(1.0, false)).unwrap().loss
                };
                // Fourth order: the error of the step is below that of the rounding.
                let h = 0.02;
                let near = (moved(h) - moved(-h)) / (2.0 * h);
                let far = (moved(2.0 * h) - moved(-2.0 * h)) / (4.0 * h);
                let numeric = (4.0 * near - far) / 3.0;
                let along = (gradient * &direction).unwrap().sum_all().unwrap();
                let analytic = f64::from(along.to_scalar::<f32>().unwrap());
                assert!(
                    (numeric - analytic).abs() <= 2e-3 * analytic.abs() + 2e-6,
                    "{} p {p} tensor {at}: {analytic}, numerically {numeric}",
                    fixture.model.name
                );
            }
        }
    }
}

/// A sequence's share does not depend on its neighbours in the pack.
#[test]
fn a_pack_is_the_sum_of_its_sequences() {
    for fixture in fixtures() {
        let decoder = fixture.model.decoder();
        let (prefix, pack) = random_case(&decoder, 5, &[6, 1, 11]);
        let entries = StepOptions { normalizer: Normalizer::Entries, ..StepOptions::default() };
        let whole = gradients(&decoder, &prefix, &pack, &entries).unwrap();
        let mut nll_sum = 0.0;
        let mut sums: Option<Vec<Tensor>> = None;
        for ends in pack.cu_seqlens.windows(2) {
            let mut targets = Targets::default();
            let t = &pack.targets;
            for i in (0..t.len()).filter(|i| (ends[0]..ends[1]).contains(&t.rows[*i])) {
                targets.push(t.rows[i] - ends[0], t.ids[i], t.probs[i]);
            }
            if targets.is_empty() {
                continue;
            }
            let share = targets.len() as f64 / t.len() as f64;
            let tokens = pack.tokens[ends[0] as usize..ends[1] as usize].to_vec();
            let cu_seqlens = vec![0, tokens.len() as u32];
            let alone = Pack { cu_seqlens, tokens, targets, dataset_rows: Vec::new() };
            let step = gradients(&decoder, &prefix, &alone, &entries).unwrap();
            nll_sum += step.nll_sum;
            let parts = both(&step.gradients).map(|g| (g * share).unwrap());
            sums = Some(match sums {
                None => parts.collect(),
                Some(sums) => sums.iter().zip(parts).map(|(a, b)| (a + b).unwrap()).collect(),
            });
        }
        assert!((nll_sum - whole.nll_sum).abs() <= 1e-5 * nll_sum);
        for (sum, whole) in sums.unwrap().iter().zip(both(&whole.gradients)) {
            assert!(relative(sum, whole) <= 1e-5, "{}", fixture.model.name);
        }
    }
}

#[test]
fn gradients_pass_through_quantised_weights() {
    for fixture in fixtures().into_iter().filter(|f| ["qwen2", "qwen3"].contains(&&*f.model.name)) {
        let load = LoadOptions { quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
        let decoder = load_decoder(&fixture.model.source(), &load).unwrap();
        let got =
            gradients(&decoder, &fixture.prefix(), &fixture.pack, &options(1.0, true)).unwrap();
        for (got, want) in both(&got.gradients).zip(both(&fixture.layers("plain"))) {
            let error = relative(got, want);
            assert!(error > 0.0 && error < 0.1, "{}: {error}", fixture.model.name);
        }
    }
}

/// What resuming exactly on another machine rests on.
#[test]
fn a_step_has_the_same_bits_whatever_the_number_of_threads() {
    let decoder = load_decoder(&ModelSource::Demo, &LoadOptions::default()).unwrap();
    let (prefix, pack) = random_case(&decoder, 9, &[12, 130, 600, 1]);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let step = pool.install(|| gradients(&decoder, &prefix, &pack, &options(1.0, false)));
        let step = step.unwrap();
        (step.loss, both(&step.gradients).map(values).collect::<Vec<_>>())
    };
    assert_eq!(run(1), run(3));
}

/// Invariant 8, as far as a step is concerned.
#[test]
fn a_step_leaves_the_model_and_the_cartridge_as_they_were() {
    let decoder = load_decoder(&ModelSource::Demo, &LoadOptions::default()).unwrap();
    let (prefix, pack) = random_case(&decoder, 9, &[12, 30]);
    let all = |prefix: &[PrefixLayer]| -> Vec<Vec<f32>> {
        prefix.iter().flat_map(|l| [values(&l.keys), values(&l.values)]).collect()
    };
    // Every weight has a part in these; the same bits mean the same weights.
    let loss_bits = || {
        let loss = evaluate(&decoder, &prefix, &pack, &options(1.0, false)).unwrap();
        loss.nll_sum.to_bits()
    };
    let before = (all(&prefix), loss_bits());
    let run = |recompute| -> StepOutput {
        gradients(&decoder, &prefix, &pack, &options(1.0, recompute)).unwrap()
    };
    let first = run(true);
    run(false);
    let second = run(true);
    assert_eq!(before, (all(&prefix), loss_bits()));
    assert_eq!(first.loss, second.loss);
    for (a, b) in both(&first.gradients).zip(both(&second.gradients)) {
        assert_eq!(values(a), values(b), "the same step twice gives the same bits");
    }
}

#[test]
fn what_cannot_be_computed_is_refused_and_named() {
    let decoder = load_decoder(&ModelSource::Demo, &LoadOptions::default()).unwrap();
    let (prefix, pack) = random_case(&decoder, 4, &[5, 6]);
    let vocab = decoder.config().vocab_size as u32;
    let run = |prefix: &[PrefixLayer], pack: &Pack| {
        gradients(&decoder, prefix, pack, &StepOptions::default()).unwrap_err()
    };
    type Change = fn(&mut Pack, u32);
    let changes: [(&str, Change); 9] = [
        ("cu_seqlens", |pack, _| pack.cu_seqlens[2] = 10),
        ("cu_seqlens", |pack, _| pack.cu_seqlens.clear()),
        ("no token", |pack, _| pack.cu_seqlens.insert(1, 5)),
        ("token id", |pack, vocab| pack.tokens[3] = vocab),
        ("target id", |pack, vocab| pack.targets.ids[1] = vocab),
        ("row 11", |pack, _| *pack.targets.rows.last_mut().unwrap() = 11),
        ("ascend", |pack, _| pack.targets.rows.reverse()),
        ("no target", |pack, _| pack.targets = Targets::default()),
        ("probabilities", |pack, _| pack.targets.probs.truncate(1)),
    ];
    for (says, change) in changes {
        let mut pack = pack.clone();
        change(&mut pack, vocab);
        let error = run(&prefix, &pack);
        assert!(matches!(error, TrainError::Pack { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    let mut short = prefix.clone();
    short[1].values = short[1].values.narrow(1, 0, 3).unwrap();
    for prefix in [&prefix[..1], &short, &[]] {
        let error = run(prefix, &pack);
        assert!(matches!(error, TrainError::Prefix { .. }), "{error}");
    }
    let mut nan = pack.clone();
    let entry = nan.targets.rows.iter().position(|row| *row >= 4).unwrap();
    nan.targets.probs[entry] = f32::NAN;
    match run(&prefix, &nan) {
        TrainError::NonFiniteLoss { row } => assert_eq!(row, nan.targets.rows[entry] as usize),
        error => panic!("{error}"),
    }
    for temperature in [0.0, -1.0, f32::NAN] {
        let options = options(temperature, false);
        let error = gradients(&decoder, &prefix, &pack, &options).unwrap_err();
        assert!(matches!(error, TrainError::Temperature { .. }), "{error}");
    }
}
