//! `cartouche bench` as a user types it.

mod bench_support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use bench_support::{Fake, LIMIT, Script};
use serde_json::Value;

/// Nothing from the environment of whoever runs the tests.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARTOUCHE_")) {
        command.env_remove(name);
    }
    command.env_remove("OPENAI_API_KEY").args(args);
    command
}

/// `cartouche serve` with the demo model, ended when it is dropped.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start() -> Self {
        let mut serve = command(&["serve", "--port", "0"]);
        let mut child = serve.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let url = lines.find_map(|line| {
            Some(line.strip_prefix("Cartouche ")?.split_once(" on ")?.1.to_owned())
        });
        Self { child, url: url.unwrap() }
    }

    fn bench(&self, args: &[&str]) -> Output {
        command(&[&["bench", "--url", &self.url], args].concat()).output().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn error(output: &Output) -> String {
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

#[test]
fn our_own_server_is_measured_and_the_files_agree() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().display().to_string();
    let output = server.bench(&[
        "--clients=1,3",
        "--requests=2",
        "--prompt-tokens=40",
        "--output-tokens=6",
        "--scenario=shared",
        "--prefix=cartridge",
        "--cartridge=harbour-log",
        "--api-key=hush-hush",
        "--raw",
        "--out",
        &out,
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(shown.contains("1 client ") && shown.contains("3 clients"), "{shown}");

    let (json, csv) = (read(dir.path(), "bench.json"), read(dir.path(), "bench.csv"));
    let html = read(dir.path(), "bench.html");
    assert!(![&json, &csv, &html].iter().any(|text| text.contains("hush-hush")));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["targets"][0]["model"], "cartouche-demo");
    assert_eq!(json["calibration"]["measured"], true);
    let levels = json["levels"].as_array().unwrap();
    let names: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    let at = |name: &str| names.iter().position(|n| *n == name).unwrap();
    let rows: Vec<Vec<&str>> = csv.lines().skip(1).map(|l| l.split(',').collect()).collect();
    assert_eq!((levels.len(), rows.len()), (2, 2));
    for ((level, row), clients) in levels.iter().zip(&rows).zip([1, 3]) {
        assert_eq!(level["counts"]["ok"], 2 * clients);
        assert_eq!(level["output_tokens"], 6.0);
        // Words of one token each, so the length is met but for the first word of the text.
        let prompt = level["prompt_tokens"].as_f64().unwrap();
        assert!((prompt - 40.0).abs() <= 2.0, "{prompt}");
        for (name, path) in [("ttft_ms_p50", "/ttft_ms/p50"), ("latency_ms_p99", "/latency_ms/p99")]
        {
            assert_eq!(row[at(name)].parse::<f64>().ok(), level.pointer(path).unwrap().as_f64());
        }
    }
    let requests = json["requests"].as_array().unwrap();
    let records: Vec<&Value> =
        requests.iter().flat_map(|level| level["records"].as_array().unwrap()).collect();
    assert_eq!(records.len(), 8);
    for record in records {
        let time = |key: &str| record[key].as_f64().unwrap();
        assert!(time("intended_s") <= time("sent_s") && time("sent_s") < time("ended_s"));
    }

    assert_eq!(html.matches("<svg").count(), 4);
    for tag in ["svg", "figure", "table", "tr", "td", "g", "text", "title", "h2", "div"] {
        let opened =
            html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    assert_eq!(html.matches("<tr><td>").count(), 2);
    for loads_from_elsewhere in ["<script", "<link", "<img", "src=", "href=", "@import", "url("] {
        assert!(!html.contains(loads_from_elsewhere), "{loads_from_elsewhere}");
    }
}

#[test]
fn as_many_clients_as_the_cache_holds() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().display().to_string();
    let args =
        ["--scenario=distinct", "--prefix-tokens=60", "--prompt-tokens=30", "--output-tokens=4"];
    let fill = ["--clients=fill", "--kv-tokens=500", "--reserve=30", "--requests=1", "--out", &out];
    let output = server.bench(&[&args[..], &fill].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: Value = serde_json::from_str(&read(dir.path(), "bench.json")).unwrap();
    // (500 - 30) / (60 + 30 + 4)
    assert_eq!(json["levels"][0]["load"], 5.0);
    let prompt = json["levels"][0]["prompt_tokens"].as_f64().unwrap();
    assert!((prompt - 90.0).abs() <= 3.0, "{prompt}");
    // Without --kv-tokens the server says it: more than these requests can be short of.
    let all = ["--clients=fill", "--reserve=100000000"];
    let refused = error(&server.bench(&[&args[..], &all].concat()));
    // 1 GiB of blocks of 16 tokens, 48 KiB each.
    assert!(refused.contains("349520 KV tokens"), "{refused}");
}

#[test]
fn mistakes_are_named() {
    let server = Server::start();
    let refused = |args: &[&str]| error(&server.bench(args));
    let body = r#"{"response_format": {"type": "json_object"}}"#;
    assert!(refused(&["--extra-body", body]).contains("answered 400: response_format"));
    assert!(refused(&["--prompt-tokens=1"]).contains("--prompt-tokens 1"));
    assert!(refused(&["--cartridge=a"]).contains("--scenario"));
    assert!(refused(&["--scenario=shared"]).contains("--prefix-tokens"));
    let distinct = ["--scenario=distinct", "--prefix=cartridge"];
    assert!(refused(&[&distinct[..], &["--cartridge=a"]].concat()).contains("{client}"));
    let missing = refused(&["--scenario=shared", "--prefix=cartridge", "--cartridge=nothing"]);
    assert!(missing.contains("nothing"), "{missing}");
    assert!(refused(&["--clients=fill"]).contains("--scenario distinct"));
    assert!(refused(&["--extra-body=[]"]).contains("JSON object"));
    assert!(refused(&["--prompt-file=/nowhere"]).contains("/nowhere"));
    let nobody = command(&["bench", "--url", "http://127.0.0.1:1"]).output().unwrap();
    assert!(error(&nobody).contains("is the server running?"));
    let tls = command(&["bench", "--url", "https://127.0.0.1:1"]).output().unwrap();
    assert!(error(&tls).contains("https is not supported"));
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_writes_what_was_measured() {
    let fake = Fake::start(Script::Good { tokens: 2 }).await;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().display().to_string();
    let url = fake.url();
    let mut bench = command(&["bench", "--url", &url, "--seconds=600", "--out", &out]);
    let child = bench.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let enough = async {
        while fake.seen.lock().await.len() < 10 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LIMIT, enough).await.unwrap();
    // SAFETY: a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let output = tokio::task::spawn_blocking(|| child.wait_with_output()).await.unwrap().unwrap();
    assert!(error(&output).contains("interrupted"));
    assert_eq!(read(dir.path(), "bench.csv").lines().count(), 2);
    let json: Value = serde_json::from_str(&read(dir.path(), "bench.json")).unwrap();
    assert_eq!(json["interrupted"], true);
}
