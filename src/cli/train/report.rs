//! What a run shows and writes down: a progress bar, `metrics.jsonl` with the names of the original
//! trainers' wandb logs, and `loss.html`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::bench::plot::{Series, chart};
use crate::cli::CliError;
use crate::train::StepReport;

pub struct Report {
    path: PathBuf,
    metrics: File,
    bar: ProgressBar,
    started: Instant,
    tokens: u64,
    /// After each update, and on held-out conversations: (update, loss).
    losses: Vec<(f64, f64)>,
    held_out: Vec<(f64, f64)>,
}

impl Report {
    /// Opens the log in `run_dir`. Lines of updates after `step` are taken out: they are made again.
    pub fn open(run_dir: &Path, step: u64, max_steps: u64) -> Result<Self, CliError> {
        let path = run_dir.join("metrics.jsonl");
        let io = |source| CliError::Io { path: path.clone(), source };
        let old = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(io(e)),
        };
        let mut kept = String::new();
        let (mut losses, mut held_out) = (Vec::new(), Vec::new());
        for line in old.lines() {
            // A line that was cut short by a kill is no JSON and belongs to a later step.
            let Ok(value) = serde_json::from_str::<Value>(line) else { continue };
            let Some(at) = value["train/optimizer_step"].as_u64().filter(|at| *at <= step) else {
                continue;
            };
            if let Some(loss) = value["train/loss"].as_f64() {
                losses.push((at as f64, loss));
            }
            if let Some(loss) = held_out_loss(&value) {
                held_out.push((at as f64, loss));
            }
            kept.push_str(line);
            kept.push('\n');
        }
        let temporary = path.with_extension("jsonl.tmp");
        std::fs::write(&temporary, kept)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(io)?;
        let metrics = OpenOptions::new().append(true).open(&path).map_err(io)?;
        let bar = ProgressBar::new(max_steps).with_position(step);
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}") {
            bar.set_style(style);
        }
        bar.reset_eta();
        Ok(Self { path, metrics, bar, started: Instant::now(), tokens: 0, losses, held_out })
    }

    /// One update.
    pub fn step(&mut self, report: &StepReport) -> Result<(), CliError> {
        self.tokens += report.input_tokens;
        let rate = self.tokens as f64 / self.started.elapsed().as_secs_f64();
        let position = &report.position;
        self.losses.push((position.step as f64, report.loss));
        self.bar.set_position(position.step);
        self.bar.set_message(format!(
            "loss {:.4}  perplexity {:.2}  KL {:.4}  {rate:.0} tokens/s",
            report.loss,
            report.loss.exp(),
            report.kl
        ));
        self.write(&json!({
            "train/optimizer_step": position.step,
            "train/epoch_idx": report.epoch,
            "train/iter_idx": position.packs,
            "train/loss": report.loss,
            "train/perplexity": report.loss.exp(),
            "train/kl": report.kl,
            "train/grad_norm": report.grad_norm,
            "train/step_num_input_tokens": report.input_tokens,
            "train/step_num_target_tokens": report.target_tokens,
            "train/num_input_tokens": position.input_tokens,
            "train/num_target_tokens": position.target_tokens,
            "train/tokens_per_s": rate,
            "optimizer/lr_group0": report.lr,
        }))
    }

    /// One measurement on held-out conversations.
    pub fn held_out(&mut self, step: u64, value: &Value) -> Result<(), CliError> {
        self.held_out.extend(held_out_loss(value).map(|loss| (step as f64, loss)));
        self.write(value)
    }

    /// Whether the log has the measurement after `step` updates: a run that goes on need not repeat it.
    pub fn has_held_out(&self, step: u64) -> bool {
        self.held_out.iter().any(|(at, _)| *at == step as f64)
    }

    /// Says something without breaking the bar.
    pub fn say(&self, line: &str) {
        self.bar.suspend(|| println!("{line}"));
    }

    /// Appends a line of metrics.
    pub fn write(&mut self, value: &Value) -> Result<(), CliError> {
        let written = writeln!(self.metrics, "{value}");
        written.map_err(|source| CliError::Io { path: self.path.clone(), source })
    }

    /// Ends the bar and draws the loss.
    pub fn finish(&mut self) -> Result<(), CliError> {
        self.bar.finish_and_clear();
        let path = self.path.with_file_name("loss.html");
        let points = self.losses.iter().chain(&self.held_out);
        let last = points.fold(1.0, |last: f64, point| last.max(point.0));
        let ticks: Vec<f64> = (0..=5).map(|i| (last * f64::from(i) / 5.0).round()).collect();
        let lines = [("loss", &self.losses), ("loss on held-out conversations", &self.held_out)];
        let lines = lines.iter().filter(|(_, points)| !points.is_empty());
        let (mut legend, mut series) = (String::new(), Vec::new());
        for (style, (name, points)) in lines.enumerate() {
            legend += &format!("<span><i class=\"s{style}\"></i>{name}</span>");
            let points = thinned(points);
            series.push(Series { name: (*name).to_owned(), style, dashed: false, points });
        }
        let page = format!(
            "<!doctype html>\n<meta charset=\"utf-8\">\n<title>Loss</title>\n<style>\n{}</style>\n\
             <p class=\"legend\">{legend}</p>\n{}",
            include_str!("../../bench/page.css"),
            chart("update", "loss", &ticks, &series)
        );
        std::fs::write(&path, page).map_err(|source| CliError::Io { path, source })
    }
}

/// The value of `eval_{name}/loss`, if the line has one.
fn held_out_loss(line: &Value) -> Option<f64> {
    let is_loss = |name: &str| name.starts_with("eval_") && name.ends_with("/loss");
    line.as_object()?.iter().find(|(name, _)| is_loss(name))?.1.as_f64()
}

/// Means over equal stretches, so that a long run is no larger a page than a short one.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    const MOST: usize = 200;
    let mean = |some: &[(f64, f64)]| {
        let sum = some.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / some.len() as f64, sum.1 / some.len() as f64)
    };
    points.chunks(points.len().div_ceil(MOST).max(1)).map(mean).collect()
}
