//! The result as text for a terminal.

use std::fmt::Write;

use super::{Distribution, LevelSummary, Report};

impl LevelSummary {
    /// The load in words: `8 clients`, `2 requests/s`.
    pub fn load_text(&self) -> String {
        match (self.r#loop.as_str(), self.load) {
            ("open", rate) => format!("{rate} requests/s"),
            (_, 1.0) => "1 client".to_owned(),
            (_, clients) => format!("{clients} clients"),
        }
    }
}

/// A line per target and load (medians if repeated), ratios to the first target, and what to know to
/// read them.
pub fn table(report: &Report) -> String {
    let rows = &report.medians;
    let label = |l: &LevelSummary| l.target.chars().count();
    let width = rows.iter().map(label).max().unwrap_or(0).max(6);
    let mut out = format!(
        "{:<14} {:<width$} {:>9} {:>8} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>10} {:>6} {:>6}\n",
        "load",
        "target",
        "output",
        "requests",
        "prompt",
        "TTFT ms",
        "p99",
        "ITL ms",
        "p99",
        "TPOT ms",
        "latency ms",
        "ok",
        "failed"
    );
    let _ = writeln!(
        out,
        "{:<14} {:<width$} {:>9} {:>8} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>10} {:>6} {:>6}",
        "", "", "tokens/s", "/s", "tokens/s", "p50", "", "p50", "", "p50", "p50", "", ""
    );
    let p50 = |d: Option<Distribution>| number(d.map(|d| d.p50));
    let p99 = |d: Option<Distribution>| number(d.map(|d| d.p99));
    for l in rows {
        let _ = writeln!(
            out,
            "{:<14} {:<width$} {:>9} {:>8} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>10} {:>6} {:>6}",
            l.load_text(),
            l.target,
            number(Some(l.output_tokens_per_s)),
            number(Some(l.requests_per_s)),
            number(Some(l.prompt_tokens_per_s)),
            p50(l.ttft_ms),
            p99(l.ttft_ms),
            p50(l.itl_ms),
            p99(l.itl_ms),
            p50(l.tpot_ms),
            p50(l.latency_ms),
            l.counts.ok,
            l.counts.failed + l.counts.rejected_429,
        );
    }
    ratios(report, width, &mut out);
    for note in notes(report) {
        let _ = writeln!(out, "note: {note}");
    }
    out
}

/// About three significant digits; `-` for nothing.
pub fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(v) if v >= 100.0 || v == 0.0 => format!("{v:.0}"),
        Some(v) if v >= 10.0 => format!("{v:.1}"),
        Some(v) if v >= 1.0 => format!("{v:.2}"),
        Some(v) => format!("{v:.3}"),
    }
}

/// The first target's level of the same load.
fn base<'a>(report: &'a Report, level: &LevelSummary) -> Option<&'a LevelSummary> {
    let first = &report.targets.first()?.label;
    report
        .medians
        .iter()
        .find(|l| l.target == *first && l.load == level.load && l.r#loop == level.r#loop)
}

fn ratios(report: &Report, width: usize, out: &mut String) {
    let [first, _, ..] = &report.targets[..] else { return };
    let _ = writeln!(
        out,
        "\nRelative to {} (more than 1: more tokens, longer times)\n{:<14} {:<width$} {:>9} {:>9} {:>9}",
        first.label, "load", "target", "tokens/s", "TTFT p50", "ITL p50"
    );
    for level in report.medians.iter().filter(|l| l.target != first.label) {
        let Some(base) = base(report, level) else { continue };
        let ratio = |of: &dyn Fn(&LevelSummary) -> Option<f64>| {
            let (a, b) = (of(level), of(base).filter(|b| *b > 0.0));
            a.zip(b).map_or("-".to_owned(), |(a, b)| format!("{:.2}", a / b))
        };
        let _ = writeln!(
            out,
            "{:<14} {:<width$} {:>9} {:>9} {:>9}",
            level.load_text(),
            level.target,
            ratio(&|l| Some(l.output_tokens_per_s)),
            ratio(&|l| l.ttft_ms.map(|d| d.p50)),
            ratio(&|l| l.itl_ms.map(|d| d.p50)),
        );
    }
}

/// What a reader could trip over.
pub fn notes(report: &Report) -> Vec<String> {
    let mut notes = Vec::new();
    let targets = report.targets.iter().map(|t| t.label.as_str());
    let mut lengths: Vec<String> = Vec::new();
    for target in targets {
        let levels = || report.medians.iter().filter(|l| l.target == target);
        let mean = |of: &dyn Fn(&LevelSummary) -> Option<f64>| {
            Distribution::of(levels().filter_map(of)).map(|d| d.mean)
        };
        lengths.push(format!(
            "{target} {} prompt ({} cached) and {} output tokens",
            number(mean(&|l| l.prompt_tokens)),
            number(mean(&|l| l.cached_tokens)),
            number(mean(&|l| l.output_tokens))
        ));
        let unsteady = levels().filter(|l| !l.steady && l.counts.ok > 0).count();
        if unsteady > 0 {
            notes.push(format!(
                "{target}: at {unsteady} level(s) the clients were never all busy; rates are over the \
                 whole level"
            ));
        }
        if levels().any(|l| l.counts.without_usage > 0) {
            notes.push(format!(
                "{target} sent no usage: its output tokens are counted chunks, its prompt tokens unknown"
            ));
        }
        if let Some(share) = mean(&|l| l.chunks_per_token).filter(|share| *share < 0.95) {
            notes.push(format!(
                "{target} sent {share:.2} chunks with text per token: ITL is the time between chunks; \
                 compare TPOT"
            ));
        }
        for level in levels().filter(|l| !l.errors.is_empty()) {
            for (kind, count) in &level.errors {
                let message = level.error_messages.get(kind).map_or("", String::as_str);
                notes.push(format!("{target}, {}: {count} × {kind}: {message}", level.load_text()));
            }
        }
        if levels().any(|l| l.client_cpu.is_some_and(|cpu| cpu > 0.8)) {
            notes.push(format!(
                "{target}: this client used more than 80 % of a core; it may be what was measured"
            ));
        }
    }
    notes.insert(0, format!("mean request: {}", lengths.join("; ")));
    if report.calibration.as_ref().is_some_and(|c| !c.measured) {
        notes.push(
            "the server counts no prompt tokens: a random word is taken for a token".to_owned(),
        );
    }
    notes
}
