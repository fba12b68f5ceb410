//! What a run is measured by and can be told: held-out loss, hard labels, given answers, another start, a
//! signal, data that cannot be learned.

mod train_run;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use cartouche::cartridge::{Cartridge, LayerKv, Provenance, read_cartridge, write_safetensors};
use cartouche::demo;
use cartouche::model::{LoadOptions, ModelSource, load_decoder};
use cartouche::train::{
    AdamOptions, Decay, Pack, Parameters, RunDir, Schedule, StepOptions, Targets, TrainError,
    Trainer, TrainerOptions, epoch_order, random,
};
use serde_json::{Value, json};
use train_run::{Run, bytes, failed, saved, succeeded};

/// Questions that can be answered, with their answers.
fn known(count: usize) -> Vec<(String, String)> {
    let questions = demo::DOCUMENTS[0].questions().unwrap().questions;
    let known = questions.into_iter().filter(|q| q.in_document).take(count);
    known.map(|q| (q.question, q.answer)).collect()
}

/// A file of conversations about [`known`] questions; `answered` says which hold their answers.
fn conversations(run: &Run, name: &str, count: usize, answered: bool) -> String {
    let line = |(question, answer): (String, String)| {
        let mut messages = vec![json!({"role": "user", "content": question})];
        if answered {
            messages.push(json!({"role": "assistant", "content": answer}));
        }
        json!({ "messages": messages }).to_string()
    };
    let lines: Vec<String> = known(count).into_iter().map(line).collect();
    let path = run.path(name);
    std::fs::write(&path, lines.join("\n")).unwrap();
    path.display().to_string()
}

fn packs(run_dir: &Path) -> Vec<Pack> {
    RunDir::open(run_dir, 0).unwrap().packs().read().unwrap()
}

/// Values of a metric with the updates they belong to.
fn values(metrics: &[Value], name: &str) -> Vec<(u64, f64)> {
    let value = |line: &Value| Some((line["train/optimizer_step"].as_u64()?, line[name].as_f64()?));
    metrics.iter().filter_map(value).collect()
}

#[test]
fn held_out_loss_is_measured_on_the_way_and_its_teacher_asked_once() {
    let run = Run::new();
    let options = |steps| {
        let mut options = vec!["--eval-conversations", "demo:harbour-log", "--eval-limit", "8"];
        options.extend(["--loss-eval-every-n-steps", "4", "--epochs", "100", "--limit", "40"]);
        options.extend(["--max-optimizer-steps", steps]);
        options
    };
    run.train("run", &options("10"));
    let metrics = run.metrics("run");
    let losses = values(&metrics, "eval_harbour-log/loss");
    let steps: Vec<u64> = losses.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [0, 4, 8, 10]);
    for (name, of) in [("perplexity", "loss"), ("macro_perplexity", "macro_loss")] {
        let of = values(&metrics, &format!("eval_harbour-log/{of}"));
        let got = values(&metrics, &format!("eval_harbour-log/{name}"));
        assert!(got.iter().zip(of).all(|(got, of)| (got.1 - of.1.exp()).abs() < 1e-9));
    }
    let kl = values(&metrics, "eval_harbour-log/kl");
    assert!(kl.iter().zip(&losses).all(|(kl, loss)| kl.1 <= loss.1), "{kl:?} {losses:?}");
    assert!(losses[3].1 < losses[0].1, "{losses:?}");
    assert!(values(&metrics, "eval_harbour-log/num_elements").iter().all(|(_, n)| *n == 8.0));

    let made = || run.path("run/eval-packs.safetensors").metadata().unwrap().modified().unwrap();
    let before = made();
    run.train("run", &options("12"));
    assert_eq!(made(), before);
    let again = values(&run.metrics("run"), "eval_harbour-log/loss");
    assert_eq!(again[..4], losses);
    assert_eq!(again[4..].iter().map(|(step, _)| *step).collect::<Vec<_>>(), [12]);
    let page = std::fs::read_to_string(run.path("run/loss.html")).unwrap();
    assert!(page.contains("loss on held-out conversations"), "{page}");
    let other: Vec<&str> =
        options("12").into_iter().map(|option| if option == "8" { "7" } else { option }).collect();
    let error = run.fails("run", &other);
    assert!(error.contains("eval-packs.safetensors") && error.contains("another"), "{error}");
}

/// With all of the vocabulary as targets nothing is cut, and the exact keys and values of the document are as
/// good as the document.
#[test]
fn the_document_itself_as_the_cartridge_has_no_divergence() {
    let run = Run::new();
    let exact =
        concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo/cartridges/harbour-log.safetensors");
    let mut options = vec!["--initializer", "cartridge", "--init-cartridge", exact];
    options.extend(["--top-logprobs", "2153", "--min-prob-mass", "1", "--limit", "4"]);
    options.extend(["--eval-conversations", "demo:harbour-log", "--eval-limit", "6"]);
    options.extend(["--max-optimizer-steps", "1"]);
    run.train("run", &options);
    let kl = values(&run.metrics("run"), "eval_harbour-log/kl");
    assert!(kl[0].0 == 0 && kl[0].1.abs() < 1e-4, "{kl:?}");
    assert!(kl[1].1 > 1e-6, "an update leads away from it: {kl:?}");
}

#[test]
fn hard_labels_are_the_tokens_of_the_answers_and_are_learned() {
    let run = Run::new();
    let rows = conversations(&run, "rows.jsonl", 8, true);
    let questions: Vec<Value> = known(8)
        .into_iter()
        .map(|(q, a)| json!({"question": q, "answer": a, "in_document": true}))
        .collect();
    let questions = json!({"title": "", "refusal": "", "questions": questions}).to_string();
    std::fs::write(run.path("questions.json"), questions).unwrap();
    let questions = run.path("questions.json").display().to_string();
    let mut command = run.command("run", &["--targets", "tokens", "--questions", &questions]);
    command.args(["--epochs", "1000", "--max-optimizer-steps", "80"]);
    succeeded(with(&command, "--conversations", &rows).output().unwrap());
    for pack in packs(&run.path("run")) {
        let Targets { rows, ids, probs } = &pack.targets;
        assert!(rows.windows(2).all(|rows| rows[0] < rows[1]), "one target for each row");
        assert!(probs.iter().all(|p| *p == 1.0));
        assert!(rows.iter().zip(ids).all(|(row, id)| pack.tokens[*row as usize + 1] == *id));
    }
    let losses = run.losses("run");
    assert!(losses[79].1 < 0.1 * losses[0].1, "{losses:?}");
    let scores = values(&run.metrics("run"), "generate_cartridge/score");
    assert!(scores[0].1 < 0.5 && scores[1].1 > 0.8, "{scores:?}");
}

/// The command with another value for `option`.
fn with(command: &Command, option: &str, value: &str) -> Command {
    let mut changed = train_run::cartouche(&[]);
    let mut is_value = false;
    for arg in command.get_args() {
        changed.arg(if is_value { value.as_ref() } else { arg });
        is_value = arg == option;
    }
    changed
}

/// An answer that is given is scored; the teacher would have given the same one, so it says the same of it.
#[test]
fn given_answers_have_the_targets_of_generated_ones() {
    let run = Run::new();
    for answered in [false, true] {
        let rows = conversations(&run, "rows.jsonl", 10, answered);
        let command = run.command(&format!("answered-{answered}"), &["--max-optimizer-steps", "1"]);
        succeeded(with(&command, "--conversations", &rows).output().unwrap());
    }
    let generated = packs(&run.path("answered-false"));
    let scored = packs(&run.path("answered-true"));
    assert_eq!(generated.len(), scored.len());
    for (generated, scored) in generated.iter().zip(&scored) {
        assert_eq!(generated.tokens, scored.tokens);
        assert_eq!(generated.dataset_rows, scored.dataset_rows);
        assert_eq!(generated.targets.rows, scored.targets.rows);
        assert_eq!(generated.targets.ids, scored.targets.ids);
        for (a, b) in generated.targets.probs.iter().zip(&scored.targets.probs) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }
}

#[test]
fn a_run_starts_exactly_at_the_cartridge_it_is_given() {
    let run = Run::new();
    run.train("first", &["--max-optimizer-steps", "2", "--tokens", "20"]);
    let first = run.path("first/cache_last.pt");
    let from = first.display().to_string();
    let start = ["--initializer", "cartridge", "--max-optimizer-steps", "1", "--init-cartridge"];
    let command = run.command("second", &[&start[..], &[&from]].concat());
    // An update too small to change any number.
    succeeded(with(&command, "--lr", "1e-30").output().unwrap());
    let read = |path: &Path| read_cartridge(path, 1 << 30).unwrap();
    let (first, second) = (read(&first), read(&run.path("second/cache_last.pt")));
    assert_eq!((first.tokens(), first.generation()), (20, second.generation()));

    let zeros = Tensor::zeros((2, 5, 32), DType::F32, &Device::Cpu).unwrap();
    let layer = LayerKv { keys: zeros.clone(), values: zeros, bias: None };
    let other = Cartridge::new(vec![layer], 1, Provenance::default()).unwrap();
    let path = run.path("other.safetensors");
    write_safetensors(&path, &other).unwrap();
    let error = run.fails("third", &[&start[..], &[&path.display().to_string()]].concat());
    assert!(
        error.contains("other.safetensors` does not fit the model: it has 1 layers"),
        "{error}"
    );
    let error = run.fails("third", &start[..4]);
    assert!(error.contains("--init-cartridge"), "{error}");
}

/// Ctrl-C, then SIGTERM: each time the running update is saved, and the end has the bits of a run without
/// either.
#[cfg(unix)]
#[test]
fn a_run_stopped_by_signals_goes_on_to_the_same_bits() {
    let run = Run::new();
    let options =
        ["--max-optimizer-steps", "30", "--epochs", "1000", "--save-every-n-steps", "1000"];
    run.train("whole", &options);
    for (signal, code, saves) in [(libc::SIGINT, 130, 1), (libc::SIGTERM, 143, 2)] {
        let mut child = run
            .command("stopped", &options)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let metrics = run.path("stopped/metrics.jsonl");
        let updates = || std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count());
        let (before, started) = (updates(), Instant::now());
        while updates() < before + 3 {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            assert!(started.elapsed() < Duration::from_secs(120), "no update was made");
            std::thread::sleep(Duration::from_millis(2));
        }
        // SAFETY: a signal to a child of this process that was not waited for.
        assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        let said = failed(output);
        assert!(said.contains("stopped after update ") && said.contains("same command"), "{said}");
        assert_eq!(saved(&run.path("stopped")), saves);
    }
    assert!(run.train("stopped", &options).contains("going on after update"));
    for file in ["state-step30.safetensors", "cache-step30.pt", "packs.safetensors"] {
        let [whole, stopped] = ["whole", "stopped"].map(|dir| bytes(&run.path(dir).join(file)));
        assert!(whole == stopped, "{file}");
    }
    assert_eq!(run.losses("whole"), run.losses("stopped"));
}

/// A teacher's probability that is not a number: the run names the row it came from, and what was saved
/// before can be gone on from.
#[test]
fn a_loss_that_is_not_finite_names_the_row_of_the_dataset() {
    const SEED: u64 = 3;
    let sequence = |pack: &mut Pack, dataset_row, prob| {
        let begin = pack.tokens.len() as u32;
        pack.tokens.extend([10, 11, 12, 13]);
        pack.cu_seqlens.push(begin + 4);
        pack.targets.push(begin + 2, 13, prob);
        pack.dataset_rows.push(dataset_row);
    };
    let poisoned = epoch_order(SEED, 0, 3)[2];
    let packs: Vec<Pack> = (0..3)
        .map(|i| {
            let mut pack = Pack {
                tokens: Vec::new(),
                cu_seqlens: vec![0],
                targets: Targets::default(),
                dataset_rows: Vec::new(),
            };
            sequence(&mut pack, 10 * i + 1, 0.9);
            sequence(&mut pack, 10 * i + 2, if i as usize == poisoned { f32::NAN } else { 0.9 });
            pack
        })
        .collect();
    let decoder = load_decoder(&ModelSource::Demo, &LoadOptions::default()).unwrap();
    let trainer = || {
        let start = random(decoder.config().kv_shape(), 4, 0.1, SEED).unwrap();
        let schedule = Schedule {
            lr: 0.01,
            decay: Decay::Constant,
            warmup_steps: 0,
            warmup_min_lr: 0.0,
            alpha_f: 0.1,
            max_steps: 9,
            parity: false,
        };
        let options = TrainerOptions {
            schedule,
            adam: AdamOptions::default(),
            global_batch_size: 1,
            step: StepOptions::default(),
            seed: SEED,
        };
        let parameters = Parameters::new(&start, 1).unwrap();
        Trainer::new(decoder.clone(), parameters, packs.clone(), options).unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let run_dir = RunDir::open(dir.path(), 0).unwrap();
    let mut first = trainer();
    let error = loop {
        match first.step() {
            Ok(_) => run_dir.save(&first, DType::F32, Provenance::default()).unwrap(),
            Err(error) => break error,
        };
    };
    let said = error.to_string();
    let row = 10 * poisoned as u32 + 2;
    assert!(
        said.contains(&format!("update 2, pack {poisoned}, row {row} of the dataset")),
        "{said}"
    );
    let TrainError::AtStep { dataset_rows, .. } = error else { panic!("{said}") };
    assert_eq!(dataset_rows, [row]);
    assert_eq!(run_dir.saved_steps().unwrap(), [1, 2]);
    let mut again = trainer();
    assert!(run_dir.resume(&mut again).unwrap());
    assert_eq!(again.parameters(), first.parameters());
    let said = first.measure(&packs).unwrap_err().to_string();
    assert!(said.contains(&format!("held-out conversations, row {row} of the dataset")), "{said}");
}
