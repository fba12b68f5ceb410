//! `cartouche train` as a user runs it, on the built-in demo: the teacher, the run, kill and resume, what can
//! be wrong.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn cartouche(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
    // Nothing from the machine of whoever runs the tests.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARTOUCHE_")) {
        command.env_remove(name);
    }
    command.args(args);
    command
}

/// A run of its own below a folder that goes away.
struct Run {
    dir: tempfile::TempDir,
}

impl Run {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, run_dir: &str, more: &[&str]) -> Command {
        let mut command = cartouche(&["train", "--document", "demo:harbour-log"]);
        command.args(["--conversations", "demo:harbour-log", "--packed-seq-length", "512"]);
        command.args(["--answer-tokens", "16", "--lr", "0.2"]).args(more);
        if !more.contains(&"--limit") {
            command.args(["--limit", "60"]);
        }
        command.arg("--run-dir").arg(self.path(run_dir));
        command.arg("--cartridge-dir").arg(self.path("cartridges"));
        command
    }

    fn train(&self, run_dir: &str, more: &[&str]) -> String {
        succeeded(self.command(run_dir, more).output().unwrap())
    }

    fn fails(&self, run_dir: &str, more: &[&str]) -> String {
        failed(self.command(run_dir, more).output().unwrap())
    }

    fn metrics(&self, run_dir: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(run_dir).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// (update, loss) of every update.
    fn losses(&self, run_dir: &str) -> Vec<(u64, f64)> {
        let metrics = self.metrics(run_dir);
        let updates = metrics.iter().filter_map(|line| {
            Some((line["train/optimizer_step"].as_u64()?, line["train/loss"].as_f64()?))
        });
        updates.collect()
    }
}

fn succeeded(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn failed(output: Output) -> String {
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!error.contains("panicked"), "{error}");
    error
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
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

fn saved(run_dir: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(run_dir) else { return 0 };
    let is_state = |name: String| name.starts_with("state-step");
    entries
        .filter(|e| e.as_ref().is_ok_and(|e| is_state(e.file_name().into_string().unwrap())))
        .count()
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
    let command = run.command("run", &[&steps[..], &["3"]].concat());
    let mut limited = Command::new("bash");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$@\"", "bash"]);
    limited.arg(command.get_program()).args(command.get_args());
    let error = failed(limited.output().unwrap());
    assert!(error.contains("write"), "{error}");
    assert!(bytes(&run.path("run/state-step2.safetensors")) == before);
    assert!(!run.path("run/state-step3.safetensors").exists());
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
