//! The load generator against scripted servers and our own.

mod bench_support;

use std::time::Duration;

use bench_support::{Fake, LIMIT, Script};
use cartouche::bench::{
    Amount, Api, BenchError, Endpoint, Failure, Load, Plan, Prefix, PromptSource, Report, Target,
    WorkloadOptions, csv, run, table,
};
use indicatif::ProgressBar;
use serde_json::{Map, Value};
use tokio::sync::watch;

fn target(label: &str, url: &str) -> Target {
    let endpoint = Endpoint::new(url, Some("a-key")).unwrap();
    Target { label: label.to_owned(), url: url.to_owned(), endpoint }
}

fn plan(targets: Vec<Target>, levels: Vec<Load>, requests: usize) -> Plan {
    Plan {
        targets,
        levels,
        amount: Amount::Requests(requests),
        warmup: 0,
        repeat: 1,
        timeout_s: LIMIT.as_secs_f64(),
        retry_429: 0,
        model: None,
        workload: WorkloadOptions {
            api: Api::Chat,
            prompt: PromptSource::Random { tokens: 25 },
            prefix: Prefix::None,
            output_tokens: 4,
            exact_output: true,
            temperature: 0.0,
            seed: 1,
            same_prompt: false,
            extra_body: Map::new(),
        },
        raw: true,
    }
}

async fn measure(plan: &Plan) -> Result<Report, BenchError> {
    let (_keep, stop) = watch::channel(false);
    tokio::time::timeout(LIMIT, run(plan, &ProgressBar::hidden(), stop)).await.unwrap()
}

async fn measure_script(script: Script, load: Load, requests: usize) -> Result<Report, BenchError> {
    let fake = Fake::start(script).await;
    measure(&plan(vec![target("fake", &fake.url())], vec![load], requests)).await
}

fn failure(result: Result<Report, BenchError>) -> Failure {
    match result {
        Err(BenchError::Target { failure, .. }) => failure,
        other => panic!("{other:?}"),
    }
}

const TWO: Load = Load::Closed { clients: 2 };

#[tokio::test]
async fn every_request_is_seen_once_and_counted() {
    let fake = Fake::start(Script::Good { tokens: 4 }).await;
    let mut plan =
        plan(vec![target("fake", &fake.url())], vec![TWO, Load::Closed { clients: 3 }], 5);
    (plan.warmup, plan.repeat) = (1, 2);
    let report = measure(&plan).await.unwrap();
    assert_eq!((report.levels.len(), report.medians.len()), (4, 2));
    for (level, clients) in report.levels.iter().zip([2, 2, 3, 3]) {
        assert_eq!((level.counts.ok, level.counts.failed), (5 * clients, 0));
        assert_eq!(level.output_tokens, Some(4.0));
        assert_eq!((level.prompt_tokens, level.cached_tokens), (Some(9.0), Some(4.0)));
        assert_eq!(level.chunks_per_token, Some(1.0));
    }
    // A first request, then warm-up and measured ones; each prompt its own.
    let seen = fake.seen.lock().await;
    assert_eq!(seen.len(), 1 + 2 * (2 + 3) * (1 + 5));
    let mut prompts: Vec<String> = seen.iter().map(|body| body["messages"].to_string()).collect();
    prompts.sort();
    prompts.dedup();
    assert_eq!(prompts.len(), seen.len());
    let body = &seen[0];
    assert_eq!((&body["model"], &body["max_tokens"]), (&Value::from("fake"), &Value::from(4)));
    assert_eq!(body["stream_options"]["include_usage"], true);
    // 25 tokens less 5 of the template, at two tokens a word.
    let words = body["messages"][0]["content"].as_str().unwrap().split(' ').count();
    assert_eq!(words, 10);
    assert!(report.verdict().is_ok());
}

#[tokio::test]
async fn targets_take_turns_with_the_same_requests() {
    let (a, b) = (
        Fake::start(Script::Good { tokens: 4 }).await,
        Fake::start(Script::Good { tokens: 8 }).await,
    );
    let targets = vec![target("a", &a.url()), target("b", &b.url())];
    let mut plan = plan(targets, vec![TWO, Load::Closed { clients: 1 }], 2);
    plan.repeat = 2;
    let report = measure(&plan).await.unwrap();
    let order: Vec<&str> = report.levels.iter().map(|l| l.target.as_str()).collect();
    assert_eq!(order, ["a", "b", "b", "a", "a", "b", "b", "a"]);
    let sorted = async |fake: &Fake| {
        let mut bodies: Vec<String> = fake.seen.lock().await.iter().map(Value::to_string).collect();
        bodies.sort();
        bodies
    };
    assert_eq!(sorted(&a).await, sorted(&b).await);
    let text = table(&report);
    assert!(text.contains("Relative to a"), "{text}");
}

// A closed loop would wait for the stalled answer and send the rest late: their latency would be short.
#[tokio::test]
async fn requests_that_could_not_be_sent_in_time_have_waited_all_the_same() {
    let (open, gate) = watch::channel(false);
    let fake = Fake::start(Script::Gated { tokens: 3, gate }).await;
    let load = Load::Open { rate: 400.0, max_outstanding: 1 };
    let plan = plan(vec![target("fake", &fake.url())], vec![load], 20);
    let seen = std::sync::Arc::clone(&fake.seen);
    // Opens after the last request was due (the same arrivals, from the first one's moment on).
    let due = cartouche::bench::arrivals(400.0, 1, Amount::Requests(20));
    let opener = tokio::spawn(async move {
        while seen.lock().await.len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_secs_f64(due[19])).await;
        open.send(true).unwrap();
        // Dropping the sender would open the gate too.
        open
    });
    let report = measure(&plan).await.unwrap();
    opener.await.unwrap();
    let records = &report.requests[0].records;
    assert_eq!(records.len(), 20);
    let last_due = records.iter().map(|r| r.intended_s).fold(0.0, f64::max);
    for record in records {
        let waited = last_due - record.intended_s;
        assert!(record.latency_s() >= waited, "{record:?}");
        assert!(record.ttft_s().unwrap() >= waited, "{record:?}");
    }
    // The bound held: one at a time, each sent when the one before had ended.
    let mut by_time: Vec<_> = records.iter().collect();
    by_time.sort_by(|a, b| a.sent_s.total_cmp(&b.sent_s));
    assert!(by_time.windows(2).all(|pair| pair[0].ended_s <= pair[1].sent_s));
    assert!(by_time.windows(2).all(|pair| pair[0].index < pair[1].index));
}

#[tokio::test]
async fn a_mistake_in_the_first_request_ends_the_run() {
    let first = async |script| failure(measure_script(script, TWO, 1).await);
    assert_eq!(first(Script::Cut).await, Failure::NoDone);
    assert_eq!(first(Script::ErrorEvent).await, Failure::ErrorEvent("lost".to_owned()));
    let status = Failure::Status { code: 503, message: "gone".to_owned() };
    assert_eq!(first(Script::Breaks(0)).await, status);
    assert!(matches!(first(Script::Html).await, Failure::Protocol(_)));
    assert_eq!(first(Script::Good { tokens: 0 }).await, Failure::Empty);
    let nobody = measure(&plan(vec![target("nobody", "http://127.0.0.1:1")], vec![TWO], 1)).await;
    assert!(matches!(failure(nobody), Failure::Connect(_)));
}

#[tokio::test]
async fn later_failures_are_counted_by_kind() {
    // One first request, one good one.
    let report = measure_script(Script::Breaks(2), TWO, 2).await.unwrap();
    let level = &report.levels[0];
    assert_eq!((level.counts.ok, level.counts.failed), (1, 3));
    assert_eq!(level.errors["http_503"], 3);
    assert!(table(&report).contains("gone"));
    assert!(report.verdict().is_ok());
    let none = measure_script(Script::Breaks(1), TWO, 2).await.unwrap();
    assert!(
        matches!(none.verdict(), Err(BenchError::NothingSucceeded(why)) if why.contains("gone"))
    );
}

#[tokio::test]
async fn busy_is_counted_apart_or_waited_out() {
    let fake = Fake::start(Script::BusyByTurns).await;
    let mut plan = plan(vec![target("fake", &fake.url())], vec![Load::Closed { clients: 1 }], 4);
    let report = measure(&plan).await.unwrap();
    let counts = report.levels[0].counts;
    assert_eq!((counts.ok, counts.rejected_429, counts.failed), (2, 2, 0));
    plan.retry_429 = 1;
    let report = measure(&plan).await.unwrap();
    let counts = report.levels[0].counts;
    assert_eq!((counts.ok, counts.rejected_429, counts.retried_429), (4, 0, 4));
}

#[tokio::test]
async fn without_usage_chunks_are_counted_and_it_is_said() {
    let report = measure_script(Script::NoUsage { tokens: 6 }, TWO, 2).await.unwrap();
    let level = &report.levels[0];
    assert_eq!((level.output_tokens, level.prompt_tokens), (Some(6.0), None));
    assert_eq!(level.counts.without_usage, 4);
    assert!(table(&report).contains("counted chunks"));
}

#[tokio::test]
async fn an_interrupted_run_keeps_what_was_measured() {
    let (_open, gate) = watch::channel(false);
    let good = Fake::start(Script::Good { tokens: 4 }).await;
    let stuck = Fake::start(Script::Gated { tokens: 4, gate }).await;
    let targets = vec![target("good", &good.url()), target("stuck", &stuck.url())];
    let plan = plan(targets, vec![TWO], 3);
    let (sender, stop) = watch::channel(false);
    let seen = std::sync::Arc::clone(&stuck.seen);
    tokio::spawn(async move {
        while seen.lock().await.len() < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        sender.send(true)
    });
    let report = tokio::time::timeout(LIMIT, run(&plan, &ProgressBar::hidden(), stop))
        .await
        .unwrap()
        .unwrap();
    assert!(report.interrupted);
    assert_eq!(report.levels.len(), 1);
    assert_eq!((report.levels[0].target.as_str(), report.levels[0].counts.ok), ("good", 6));
    assert!(matches!(report.verdict(), Err(BenchError::Interrupted)));
}

#[tokio::test]
async fn the_csv_has_one_row_per_level_and_reads_back() {
    let report = measure_script(Script::Good { tokens: 4 }, TWO, 3).await.unwrap();
    let text = csv(&report);
    let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let (names, row) = (lines.next().unwrap(), lines.next().unwrap());
    assert_eq!((lines.next(), names.len()), (None, row.len()));
    let value = |name: &str| row[names.iter().position(|n| *n == name).unwrap()];
    assert_eq!((value("target"), value("loop"), value("load")), ("fake", "closed", "2.0"));
    assert_eq!((value("counts_ok"), value("errors")), ("6", ""));
    let level = &report.levels[0];
    let number = |name: &str| value(name).parse::<f64>().ok();
    assert_eq!(number("ttft_ms_p99"), level.ttft_ms.map(|d| d.p99));
    assert_eq!(number("output_tokens_per_s"), Some(level.output_tokens_per_s));
}

#[test]
fn urls_are_taken_with_and_without_v1_and_refused_where_they_cannot_work() {
    for url in ["http://h:1", "http://h:1/", "http://h:1/v1", "h:1", "http://[::1]:80/base/v1/"] {
        assert!(Endpoint::new(url, None).is_ok(), "{url}");
    }
    for url in ["https://h", "", "http://", "ftp://h", "http://h?q"] {
        assert!(matches!(Endpoint::new(url, None), Err(BenchError::Url(_))), "{url}");
    }
    assert!(matches!(Endpoint::new("h", Some("a\nb")), Err(BenchError::Plan(_))));
}
