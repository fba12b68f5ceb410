//! The result as one page: plots, a table, and what was run. It loads nothing from elsewhere.

use std::fmt::Write;

use serde_json::Value;

use super::plot::{STYLES, Series, chart, escape};
use super::table::{notes, number};
use super::{Distribution, LevelSummary, Report};

const STYLE: &str = include_str!("page.css");

/// The page of a report; `whole` is what `bench.json` holds.
pub fn page(report: &Report, whole: &Value) -> String {
    let mut out = String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n");
    let names: Vec<&str> = report.targets.iter().map(|t| t.label.as_str()).collect();
    let title = format!("Load test: {}", names.join(", "));
    let _ = writeln!(
        out,
        "<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{0}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{0}</h1>",
        escape(&title)
    );
    let _ = writeln!(out, "<p class=\"facts\">{}</p>", escape(&facts(whole)));
    legend(report, &mut out);
    out.push_str("<div class=\"charts\">\n");
    let percentiles = "Solid: median. Dashed: 99th percentile.";
    let rate = |l: &LevelSummary| Some(l.output_tokens_per_s);
    figure(
        report,
        &mut out,
        "Throughput",
        "output tokens/s",
        "All clients together.",
        &[(&rate, false)],
    );
    for (title, unit, of) in [
        ("Time to first token", "ms", (|l| l.ttft_ms) as fn(&LevelSummary) -> Option<Distribution>),
        ("Inter-token latency", "ms", |l| l.itl_ms),
        ("Latency of a request", "ms", |l| l.latency_ms),
    ] {
        let p50 = move |l: &LevelSummary| of(l).map(|d| d.p50);
        let p99 = move |l: &LevelSummary| of(l).map(|d| d.p99);
        figure(report, &mut out, title, unit, percentiles, &[(&p50, false), (&p99, true)]);
    }
    out.push_str("</div>\n");
    table(report, &mut out);
    out.push_str("<h2>Notes</h2>\n<ul>\n");
    for note in notes(report) {
        let _ = writeln!(out, "<li>{}</li>", escape(&note));
    }
    out.push_str("</ul>\n");
    let command = whole.get("command").and_then(Value::as_array);
    let words = command.into_iter().flatten().filter_map(Value::as_str).map(shell_word);
    let _ = writeln!(
        out,
        "<h2>Command</h2>\n<pre>{}</pre>\n</body>\n</html>",
        escape(&words.collect::<Vec<_>>().join(" "))
    );
    out
}

/// When and where, in a line.
fn facts(whole: &Value) -> String {
    let text = |path: &str| whole.pointer(path).and_then(Value::as_str).unwrap_or("?").to_owned();
    let cores = whole.pointer("/machine/cores").and_then(Value::as_u64).unwrap_or(0);
    let models: Vec<String> = whole
        .get("targets")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|t| {
            let text = |key: &str| t.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
            format!("{}: {} at {}", text("label"), text("model"), text("url"))
        })
        .collect();
    format!(
        "{}. {}, {cores} cores. Client: cartouche {}. {}.",
        text("/started"),
        text("/machine/cpu"),
        text("/version"),
        models.join("; ")
    )
}

fn legend(report: &Report, out: &mut String) {
    out.push_str("<p class=\"legend\">");
    for (i, target) in report.targets.iter().enumerate() {
        let _ =
            write!(out, "<span><i class=\"s{}\"></i>{}</span>", i % STYLES, escape(&target.label));
    }
    out.push_str("</p>\n");
}

/// A number of a level, and whether its line is dashed.
type Line<'a> = (&'a dyn Fn(&LevelSummary) -> Option<f64>, bool);

fn figure(
    report: &Report,
    out: &mut String,
    title: &str,
    unit: &str,
    caption: &str,
    lines: &[Line<'_>],
) {
    let mut x: Vec<f64> = report.medians.iter().map(|l| l.load).collect();
    x.sort_unstable_by(f64::total_cmp);
    x.dedup();
    let open = report.medians.first().is_some_and(|l| l.r#loop == "open");
    let x_title = if open { "requests/s sent" } else { "clients" };
    let mut series = Vec::new();
    for (i, target) in report.targets.iter().enumerate() {
        for (of, dashed) in lines {
            let own = report.medians.iter().filter(|l| l.target == target.label);
            let mut points: Vec<(f64, f64)> = own.filter_map(|l| Some((l.load, of(l)?))).collect();
            points.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
            let name = target.label.clone() + if *dashed { ", p99" } else { "" };
            series.push(Series { name, style: i, dashed: *dashed, points });
        }
    }
    let _ = writeln!(
        out,
        "<figure>\n<h2>{title}</h2>\n{}<figcaption>{caption}</figcaption>\n</figure>",
        chart(x_title, unit, &x, &series)
    );
}

fn table(report: &Report, out: &mut String) {
    out.push_str(
        "<h2>Levels</h2>\n<div class=\"wide\"><table>\n<thead><tr><th>load</th><th>target</th>\
         <th>output<br>tokens/s</th><th>requests/s</th><th>prompt<br>tokens/s</th>\
         <th>TTFT ms<br>p50 / p95 / p99</th><th>ITL ms<br>p50 / p95 / p99</th><th>TPOT ms<br>p50</th>\
         <th>latency ms<br>p50 / p99</th><th>ok</th><th>failed</th><th>429</th>\
         </tr></thead>\n<tbody>\n",
    );
    let three = |d: Option<Distribution>| match d {
        Some(d) => {
            format!("{} / {} / {}", number(Some(d.p50)), number(Some(d.p95)), number(Some(d.p99)))
        }
        None => "-".to_owned(),
    };
    for l in &report.medians {
        let latency = l.latency_ms.map_or("-".to_owned(), |d| {
            format!("{} / {}", number(Some(d.p50)), number(Some(d.p99)))
        });
        let cells = [
            l.load_text(),
            escape(&l.target),
            number(Some(l.output_tokens_per_s)),
            number(Some(l.requests_per_s)),
            number(Some(l.prompt_tokens_per_s)),
            three(l.ttft_ms),
            three(l.itl_ms),
            number(l.tpot_ms.map(|d| d.p50)),
            latency,
            l.counts.ok.to_string(),
            l.counts.failed.to_string(),
            l.counts.rejected_429.to_string(),
        ];
        let _ = writeln!(out, "<tr><td>{}</td></tr>", cells.join("</td><td>"));
    }
    out.push_str("</tbody>\n</table></div>\n");
}

/// An argument as a shell would read it back.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=:/.,@%+".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}
