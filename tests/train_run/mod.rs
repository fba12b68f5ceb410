//! Runs of `cartouche train` on the built-in demo, each in a folder that goes away.
#![allow(dead_code)] // each test binary uses its own part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// The program, with nothing from the machine of whoever runs the tests.
pub fn cartouche(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARTOUCHE_")) {
        command.env_remove(name);
    }
    command.args(args);
    command
}

/// A run of its own below a folder that goes away.
pub struct Run {
    dir: tempfile::TempDir,
}

impl Run {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command(&self, run_dir: &str, more: &[&str]) -> Command {
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

    pub fn train(&self, run_dir: &str, more: &[&str]) -> String {
        succeeded(self.command(run_dir, more).output().unwrap())
    }

    pub fn fails(&self, run_dir: &str, more: &[&str]) -> String {
        failed(self.command(run_dir, more).output().unwrap())
    }

    pub fn metrics(&self, run_dir: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(run_dir).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// (update, loss) of every update.
    pub fn losses(&self, run_dir: &str) -> Vec<(u64, f64)> {
        let metrics = self.metrics(run_dir);
        let updates = metrics.iter().filter_map(|line| {
            Some((line["train/optimizer_step"].as_u64()?, line["train/loss"].as_f64()?))
        });
        updates.collect()
    }
}

pub fn succeeded(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn failed(output: Output) -> String {
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!error.contains("panicked"), "{error}");
    error
}

pub fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Checkpoints in the folder of a run.
pub fn saved(run_dir: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(run_dir) else { return 0 };
    let is_state = |name: String| name.starts_with("state-step");
    entries
        .filter(|e| e.as_ref().is_ok_and(|e| is_state(e.file_name().into_string().unwrap())))
        .count()
}
