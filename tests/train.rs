//! `cartouche train` as a user runs it, on the built-in demo: the teacher, the run, kill and resume, what can
//! be wrong.

mod train_run;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use train_run::{Run, bytes, cartouche, failed, saved, succeeded};

/// The engine reads f32 on the CPU, whatever is saved: the questions could not be asked.
#[test]
fn a_cartridge_saved_in_16_bits_is_asked_too() {
    let run = Run::new();
    for dtype in ["f16", "bf16"] {
        let more = ["--save-dtype", dtype, "--max-optimizer-steps", "1", "--limit", "2"];
        run.train(dtype, &[&more[..], &["--questions", "demo:harbour-log"]].concat());
        let asked = run.metrics(dtype).iter().any(|m| m["generate_cartridge/score"].is_number());
        assert!(asked, "{dtype}");
    }
}

/// The whole job: the teacher answers, the cartridge learns, is published, and a chat asks it what it could
/// not know before.
#[test]
fn a_trained_cartridge_answers_what_the_model_cannot() {
    let run = Run::new();
    let said = run.train(
        "run",
        &[
            "--max-optimizer-steps",
            "260",
            "--epochs",
            "100",
            "--limit",
            "440",
            "--lr-schedule",
            "cosine",
            "--questions",
            "demo:harbour-log",
            "--publish",
            "small",
        ],
    );
    assert!(said.contains("46 of cartridge (19.9 times fewer)"), "{said}");
    let metrics = run.metrics("run");
    let scores =
        |name: &str| -> Vec<f64> { metrics.iter().filter_map(|m| m[name].as_f64()).collect() };
    let (teacher, none) =
        (scores("generate_teacher/score")[0], scores("generate_no_cartridge/score")[0]);
    let student = *scores("generate_cartridge/score").last().unwrap();
    assert!(teacher > 0.95 && none < 0.3 && student > 0.6, "{teacher} {none} {student}");
    let losses = run.losses("run");
    assert!(losses[259].1 < 0.2 * losses[0].1, "{losses:?}");

    let dir = run.path("cartridges").display().to_string();
    let questions = std::fs::read(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/assets/demo/documents/harbour-log/questions.json"
    ));
    let questions: Value = serde_json::from_slice(&questions.unwrap()).unwrap();
    let known = questions["questions"].as_array().unwrap().iter();
    let known: Vec<_> = known.filter(|q| q["in_document"] == true).take(10).collect();
    let right = |more: &[&str]| {
        let is_right = |q: &&&Value| {
            let question = q["question"].as_str().unwrap();
            let args = [&["chat", "--cartridge-dir", &dir, "-q", question], more].concat();
            let answer = succeeded(cartouche(&args).output().unwrap());
            answer.trim_end() == q["answer"].as_str().unwrap()
        };
        known.iter().filter(is_right).count()
    };
    assert_eq!(right(&[]), 0);
    let right = right(&["-c", "small"]);
    assert!(right >= 5, "{right} of 10");
    assert!(run.path("run/loss.html").is_file() && run.path("run/cache_last.pt").is_file());
}

/// Killed in the middle of a checkpoint or anywhere else, a run goes on and ends with the same bits.
#[test]
fn a_killed_run_ends_with_the_very_bits_of_one_that_was_not() {
    let run = Run::new();
    let options = [
        "--max-optimizer-steps",
        "8",
        "--save-every-n-steps",
        "1",
        "--global-batch-size",
        "2",
        "--keep-last-n-saved",
        "0",
        "--epochs",
        "100",
    ];
    run.train("whole", &options);
    let mut kills = 0;
    for _ in 0..40 {
        let mut child = run
            .command("killed", &options)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Whatever it is doing once another step is saved.
        let before = saved(&run.path("killed"));
        let started = Instant::now();
        while saved(&run.path("killed")) == before && child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(120), "no step was saved");
            std::thread::sleep(Duration::from_millis(3));
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    assert!(kills >= 3, "only {kills} kills");
    run.train("killed", &options);
    for file in ["state-step8.safetensors", "cache-step8.pt", "packs.safetensors"] {
        assert!(
            bytes(&run.path("whole").join(file)) == bytes(&run.path("killed").join(file)),
            "{file}"
        );
    }
    assert_eq!(run.losses("whole"), run.losses("killed"));
}

#[test]
fn old_checkpoints_are_forgotten_and_other_options_are_not_the_same_run() {
    let run = Run::new();
    let steps =
        ["--max-optimizer-steps", "5", "--save-every-n-steps", "1", "--keep-last-n-saved", "2"];
    run.train("run", &steps);
    let mut names: Vec<String> = std::fs::read_dir(run.path("run"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("step"))
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["cache-step4.pt", "cache-step5.pt", "state-step4.safetensors", "state-step5.safetensors"]
    );
    let last = std::fs::read_link(run.path("run/cache_last.pt")).unwrap();
    assert_eq!(last, Path::new("cache-step5.pt"));
    let error = run.fails("run", &[&steps[..], &["--max-grad-norm", "1"]].concat());
    assert!(
        error.contains("state-step5.safetensors") && error.contains("other options"),
        "{error}"
    );
    let error = run.fails("run", &[&steps[..], &["--limit", "59"]].concat());
    assert!(error.contains("packs.safetensors") && error.contains("another document"), "{error}");
    let error = run.fails("other", &["--global-batch-size", "1000"]);
    assert!(error.contains("not a single update"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved() {
    let run = Run::new();
    let steps =
        ["--save-every-n-steps", "1", "--max-optimizer-steps", "9", "--initializer", "random"];
    let error = run.fails("run", &[&steps[..], &["--init-scale", "3e38"]].concat());
    assert!(error.contains("update 0, pack ") && error.contains("not finite"), "{error}");
    assert!(error.contains(", row ") && error.contains(" of the dataset"), "{error}");
    assert_eq!(saved(&run.path("run")), 0);
}

/// The file system refuses to take more: the run ends with the path and the reason, and the checkpoint that
/// was there can still be resumed from.
#[cfg(unix)]
#[test]
fn a_full_disk_while_saving_loses_nothing() {
    let run = Run::new();
    let steps = ["--save-every-n-steps", "1", "--keep-last-n-saved", "0", "--max-optimizer-steps"];
    run.train("run", &[&steps[..], &["2"], &["--lr-schedule", "constant"]].concat());
    let before = bytes(&run.path("run/state-step2.safetensors"));
    // No file may grow beyond 64 KiB: the signal is ignored, so that writes fail as on a full disk.
    let more = [&steps[..], &["3"], &["--lr-schedule", "constant"]].concat();
    let command = run.command("run", &more);
    let mut limited = Command::new("bash");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$@\"", "bash"]);
    limited.arg(command.get_program()).args(command.get_args());
    let error = failed(limited.output().unwrap());
    assert!(error.contains("write") && error.contains("update 3 cannot be saved in "), "{error}");
    assert!(error.contains("saved after update 2 is as it was"), "{error}");
    assert!(bytes(&run.path("run/state-step2.safetensors")) == before);
    assert!(!run.path("run/state-step3.safetensors").exists());
    assert!(run.train("run", &more).contains("going on after update 2"));
}

#[test]
fn what_is_wrong_with_options_and_data_is_said_in_one_line() {
    let run = Run::new();
    let write = |name: &str, text: &str| {
        std::fs::write(run.path(name), text).unwrap();
        run.path(name).display().to_string()
    };
    let config = write("wrong.yaml", "learning_rate: 1\n");
    let error = run.fails("run", &["--config", &config]);
    assert!(error.contains("unknown key `learning_rate`") && error.contains("lr"), "{error}");
    for (rows, said) in [
        ("", "no conversations"),
        ("{\"messages\": []}\n", "row 1"),
        ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"Hello\"}]}\n", "row 1"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}\nnothing\n", "row 2"),
    ] {
        let rows = write("rows.jsonl", rows);
        let error = failed(
            cartouche(&[
                "train",
                "--document",
                "demo:harbour-log",
                "--conversations",
                &rows,
                "--run-dir",
            ])
            .arg(run.path("run"))
            .output()
            .unwrap(),
        );
        assert!(error.contains(said) && error.contains("rows.jsonl"), "{error}");
    }
    assert!(run.fails("run", &["--tokens", "1"]).contains("1 tokens"));
    assert!(run.fails("run", &["--tokens", "100000"]).contains("100000"));
    assert!(run.fails("run", &["--lr", "0"]).contains("lr"));
}
