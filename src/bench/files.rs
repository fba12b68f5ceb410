//! The result as files: `bench.csv`, `bench.json`, `bench.html`.

use std::path::Path;

use chrono::{DateTime, Local};
use serde_json::{Value, json};

use super::{BenchError, Load, Machine, Plan, Report, html};

/// Members of a `LevelSummary` that are one number or text.
const SCALARS: [&str; 17] = [
    "target",
    "loop",
    "load",
    "repeat",
    "wall_s",
    "window_s",
    "steady",
    "output_tokens_per_s",
    "requests_per_s",
    "prompt_tokens_per_s",
    "middle_rounds_tokens_per_s",
    "client_cpu",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "chunks_per_token",
    "errors",
];
/// Members with members of their own, and those.
const NESTED: [(&[&str], &[&str]); 2] = [
    (&["counts"], &["ok", "failed", "rejected_429", "retried_429", "without_usage"]),
    (
        &["ttft_ms", "itl_ms", "tpot_ms", "latency_ms", "decode_tokens_per_s"],
        &["mean", "min", "p50", "p90", "p95", "p99", "max"],
    ),
];

/// Writes the three files into `folder`, which is made if need be.
pub fn write(
    folder: &Path,
    plan: &Plan,
    report: &Report,
    started: DateTime<Local>,
    command: &[String],
) -> Result<(), BenchError> {
    let json = whole(plan, report, started, command);
    let files = [
        ("bench.csv", csv(report)),
        ("bench.json", format!("{json:#}\n")),
        ("bench.html", html::page(report, &json)),
    ];
    std::fs::create_dir_all(folder)
        .map_err(|source| BenchError::Io { path: folder.to_owned(), source })?;
    for (name, text) in files {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|source| BenchError::Io { path, source })?;
    }
    Ok(())
}

/// What was run, where, and what came out.
fn whole(plan: &Plan, report: &Report, started: DateTime<Local>, command: &[String]) -> Value {
    let max_outstanding = plan.levels.iter().find_map(|load| match load {
        Load::Open { max_outstanding, .. } => Some(*max_outstanding),
        Load::Closed { .. } => None,
    });
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "started": started.to_rfc3339_opts(chrono::SecondsFormat::Secs, false),
        "command": command,
        "machine": Machine::here(),
        "plan": {
            "levels": plan.levels,
            "amount": plan.amount,
            "warmup": plan.warmup,
            "repeat": plan.repeat,
            "timeout_s": plan.timeout_s,
            "retry_429": plan.retry_429,
            "max_outstanding": max_outstanding,
            "workload": plan.workload,
        },
        "targets": report.targets,
        "calibration": report.calibration,
        "interrupted": report.interrupted,
        "medians": report.medians,
        "levels": report.levels,
        "requests": report.requests,
    })
}

/// One row per target, load and repeat. Nested members are joined by `_`: `ttft_ms_p50`. Errors read
/// `kind:count;kind:count`; their messages are in the JSON.
pub fn csv(report: &Report) -> String {
    let columns = columns();
    let names = columns.iter().map(|path| path.join("_")).collect::<Vec<_>>();
    let mut text = names.join(",") + "\n";
    for level in &report.levels {
        let row = serde_json::to_value(level).unwrap_or_default();
        let cells = columns.iter().map(|path| {
            let value = path.iter().try_fold(&row, |value, key| value.get(key));
            cell(value.unwrap_or(&Value::Null))
        });
        text += &cells.collect::<Vec<_>>().join(",");
        text.push('\n');
    }
    text
}

/// The members behind the columns.
fn columns() -> Vec<Vec<&'static str>> {
    let scalars = SCALARS.iter().map(|name| vec![*name]);
    let nested = NESTED.iter().flat_map(|(outer, inner)| {
        outer.iter().flat_map(|outer| inner.iter().map(|inner| vec![*outer, *inner]))
    });
    scalars.chain(nested).collect()
}

/// Quoted where CSV needs it; empty for nothing.
pub(super) fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Object(counts) => counts
            .iter()
            .map(|(kind, count)| format!("{kind}:{count}"))
            .collect::<Vec<_>>()
            .join(";"),
        other => other.to_string(),
    };
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::Outcome;
    use super::super::{Record, summarize};
    use super::*;

    #[test]
    fn every_member_of_a_summary_has_its_column() {
        let mut record = Record::new(0, 0, 0.0);
        (record.chunks_s, record.output_tokens, record.ended_s) = (vec![1.0, 2.0], 2, 2.0);
        let outcome = Outcome { records: vec![record], ..Outcome::default() };
        let level = summarize("a", Load::Closed { clients: 1 }, 1, &outcome);
        let row = serde_json::to_value(&level).unwrap();
        let mut have: Vec<Vec<String>> = Vec::new();
        for (key, value) in row.as_object().unwrap() {
            match value.as_object().filter(|_| key != "errors" && key != "error_messages") {
                Some(inner) => have.extend(inner.keys().map(|i| vec![key.clone(), i.clone()])),
                None => have.push(vec![key.clone()]),
            }
        }
        have.retain(|path| path[0] != "error_messages");
        let mut want: Vec<Vec<String>> =
            columns().into_iter().map(|p| p.into_iter().map(str::to_owned).collect()).collect();
        have.sort();
        want.sort();
        assert_eq!(have, want);
    }

    #[test]
    fn cells_are_quoted_where_csv_needs_it() {
        assert_eq!(cell(&json!("a,b \"c\"")), "\"a,b \"\"c\"\"\"");
        assert_eq!(cell(&json!({"no_done": 2, "http_500": 1})), "no_done:2;http_500:1");
        assert_eq!((cell(&Value::Null), cell(&json!(1.5))), (String::new(), "1.5".to_owned()));
    }
}
