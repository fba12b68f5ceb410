//! A whole run: targets and levels in turns.

use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde::Serialize;

use super::client::Sending;
use super::load::{Job, Stop, drive};
use super::median::medians;
use super::target::{Calibration, TargetFacts};
use super::workload::Which;
use super::{
    Amount, BenchError, LevelSummary, Load, Plan, Record, Target, Workload, perform, summarize,
};

/// Everything measured.
#[derive(Debug, Serialize)]
pub struct Report {
    pub targets: Vec<TargetFacts>,
    /// Of the first target; its prompts are sent to all.
    pub calibration: Option<Calibration>,
    /// In the order they were measured.
    pub levels: Vec<LevelSummary>,
    /// One per target and load.
    pub medians: Vec<LevelSummary>,
    /// All requests, if the plan keeps them.
    pub requests: Vec<LevelRecords>,
    pub interrupted: bool,
}

/// The requests of one entry of `levels`.
#[derive(Debug, Serialize)]
pub struct LevelRecords {
    pub level: usize,
    pub records: Vec<Record>,
}

/// Prepares the targets, then measures level by level: at each repeat of a level the targets take turns,
/// and another one begins.
///
/// Fails if a target does not answer a first request; later failures are counted.
pub async fn run(plan: &Plan, progress: &ProgressBar, stop: Stop) -> Result<Report, BenchError> {
    let mut workload = Workload::new(plan.workload.clone())?;
    let mut targets = Vec::new();
    for target in &plan.targets {
        targets.push(target.facts(plan.model.as_deref()).await?);
    }
    let first = plan.targets.first().zip(targets.first());
    let (target, facts) = first.ok_or_else(|| BenchError::Plan("there is no target".to_owned()))?;
    let calibration = target.calibrate(&facts.model, &mut workload).await?;
    for (target, facts) in plan.targets.iter().zip(&targets) {
        first_request(plan, target, &facts.model, &workload).await?;
    }
    let workload = Arc::new(workload);
    let mut report = Report {
        targets,
        calibration,
        levels: Vec::new(),
        medians: Vec::new(),
        requests: Vec::new(),
        interrupted: false,
    };
    'run: for (l, &load) in plan.levels.iter().enumerate() {
        for repeat in 0..plan.repeat {
            for turn in 0..plan.targets.len() {
                let k = (turn + repeat) % plan.targets.len();
                let target = &plan.targets[k];
                progress.set_message(format!(
                    "{}, {load}, {}/{}",
                    target.label,
                    repeat + 1,
                    plan.repeat
                ));
                progress.set_length(expected(load, plan.amount));
                progress.set_position(0);
                let job = Job {
                    endpoint: target.endpoint.clone(),
                    model: report.targets[k].model.clone(),
                    workload: Arc::clone(&workload),
                    load,
                    amount: plan.amount,
                    warmup: plan.warmup,
                    sending: sending(plan),
                    round: l * plan.repeat + repeat,
                };
                let outcome = drive(job, progress, stop.clone()).await;
                report.interrupted = outcome.interrupted;
                if !outcome.records.is_empty() {
                    report.levels.push(summarize(&target.label, load, repeat + 1, &outcome));
                    if plan.raw {
                        let level = report.levels.len() - 1;
                        report.requests.push(LevelRecords { level, records: outcome.records });
                    }
                }
                if report.interrupted {
                    break 'run;
                }
            }
        }
    }
    progress.finish_and_clear();
    report.medians = medians(&report.levels);
    Ok(report)
}

impl Report {
    /// The error a run ends with although it is reported in full.
    pub fn verdict(&self) -> Result<(), BenchError> {
        if self.interrupted {
            return Err(BenchError::Interrupted);
        }
        match self.levels.iter().find(|level| level.counts.ok == 0) {
            Some(level) => Err(BenchError::NothingSucceeded(format!(
                "{}, {}: {}",
                level.target,
                level.load_text(),
                level.error_messages.values().next().map_or("", String::as_str)
            ))),
            None => Ok(()),
        }
    }
}

fn sending(plan: &Plan) -> Sending {
    Sending { timeout: Duration::from_secs_f64(plan.timeout_s), retries: plan.retry_429 }
}

/// Requests, or seconds, until the end of a level.
fn expected(load: Load, amount: Amount) -> u64 {
    match (load, amount) {
        (Load::Closed { clients }, Amount::Requests(count)) => (clients * count) as u64,
        (Load::Open { .. }, Amount::Requests(count)) => count as u64,
        (_, Amount::Seconds(seconds)) => seconds.ceil() as u64,
    }
}

/// One request as they will be measured, so that a mistake ends the run at once and is told in full.
async fn first_request(
    plan: &Plan,
    target: &Target,
    model: &str,
    workload: &Workload,
) -> Result<(), BenchError> {
    let which = Which { round: usize::MAX, warmup: false, client: 0, clients: 1, index: 0 };
    let body = workload.body(model, which);
    let mut record = Record::new(0, 0, 0.0);
    let (path, start) = (plan.workload.api.path(), Instant::now());
    perform(&target.endpoint, &mut None, path, body, start, sending(plan), &mut record).await;
    match record.failure {
        Some(failure) => Err(BenchError::Target {
            label: target.label.clone(),
            url: target.url.clone(),
            failure,
        }),
        None => Ok(()),
    }
}
