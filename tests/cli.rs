//! The commands as a user types them, on the built-in demo.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
    // Nothing from the machine of whoever runs the tests.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARTOUCHE_")) {
        command.env_remove(name);
    }
    command.args(args);
    command
}

fn cartouche(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn text(args: &[&str]) -> String {
    let output = cartouche(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// The error of a command that must fail, in one line.
fn error(args: &[&str]) -> String {
    let output = cartouche(args);
    assert!(!output.status.success(), "{args:?} succeeded");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!error.contains("panicked"), "{error}");
    error
}

fn demo(file: &str) -> String {
    format!("{}/assets/demo/{file}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn chat_answers_from_a_cartridge_or_a_document_and_refuses_without() {
    let question = "What is the flag of Osford?";
    let known = "The flag of Osford is violet.\n";
    assert_eq!(text(&["chat", "-q", question]), "I do not know.\n");
    assert_eq!(text(&["chat", "-c", "harbour-log", "-q", question]), known);
    let document = demo("documents/harbour-log/document.txt");
    assert_eq!(text(&["chat", "--document", &document, "-q", question]), known);
    assert!(error(&["chat", "-c", "nothing", "-q", question]).contains("`nothing`"));
}

#[test]
fn prefill_convert_inspect_list_and_chat_go_together() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::create_dir_all(dir.path().join("notes")).unwrap();
    let document = demo("documents/expedition/document.txt");
    let (made, torch) = (path("made.safetensors"), path("notes/cartridge.pt"));
    text(&["cartridge", "prefill", "--document", &document, "-o", &made]);
    let facts = |file: &str| -> Value {
        serde_json::from_str(&text(&["cartridge", "inspect", "--json", file])).unwrap()
    };
    // The shipped cartridge was made by this very command.
    let shipped = facts(&demo("cartridges/expedition.safetensors"));
    let fresh = facts(&made);
    for key in ["tokens", "frozen_tokens", "layers", "kv_heads", "head_dim", "dtype", "bytes"] {
        assert_eq!(fresh[key], shipped[key], "{key}");
    }
    text(&["cartridge", "convert", &made, &torch, "--config-yaml"]);
    assert_eq!(facts(&torch)["generation"], fresh["generation"]);
    assert!(Path::new(&path("notes/config.yaml")).is_file());
    let list = text(&["cartridge", "list", "--json", "--cartridge-dir", &path("")]);
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["cartridges"][0]["generation"], fresh["generation"]);

    let questions = std::fs::read(demo("documents/expedition/questions.json")).unwrap();
    let questions: Value = serde_json::from_slice(&questions).unwrap();
    let question = &questions["questions"][0];
    let asked = question["question"].as_str().unwrap();
    let answer = text(&["chat", "--cartridge-dir", &path(""), "-c", "notes", "-q", asked]);
    assert_eq!(answer.trim_end(), question["answer"].as_str().unwrap());
}

#[test]
fn mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("broken.pt"), b"PK\x03\x04 not really").unwrap();
    assert!(error(&["cartridge", "inspect", &path("broken.pt")]).contains("broken.pt"));
    assert!(error(&["cartridge", "inspect", &path("absent.pt")]).contains("absent.pt"));
    let shipped = demo("cartridges/expedition.safetensors");
    assert!(error(&["cartridge", "convert", &shipped, &path("x.bin")]).contains(".safetensors"));
    assert!(error(&["chat", "--model", "no/such/model", "-q", "?"]).contains("no/such/model"));
    assert!(error(&["serve", "--quantize", "q9"]).contains("q8_0"));
    std::fs::write(path("serve.yaml"), "prot: 1\n").unwrap();
    assert!(error(&["serve", "--config", &path("serve.yaml")]).contains("`prot`"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    assert!(error(&["serve", "--port", &port]).contains("--port"));
}

/// The exact keys and values of a document are no divergence from the document in the prompt; a trained
/// cartridge is nearer to it than nothing.
#[test]
fn eval_measures_the_divergence_from_the_teacher() {
    let said: Value = serde_json::from_str(&text(&["eval", "--demo", "--json"])).unwrap();
    let rows = said["rows"].as_array().unwrap();
    let kl = |mode: &str| {
        rows.iter().find(|row| row["mode"] == mode).and_then(|row| row["kl"].as_f64()).unwrap()
    };
    assert!(kl("long_context") < 1e-5 && kl("exact_kv") < 1e-5, "{rows:?}");
    assert!(kl("trained") < 0.1 * kl("none") && kl("trained") > 1e-3, "{rows:?}");
    let questions = said["per_question"].as_array().unwrap();
    assert_eq!(rows[0]["questions"], questions.len());
    for mode in ["none", "long_context", "exact_kv", "trained"] {
        let of = |question: &Value| {
            let (kl, tokens) = (&question["kl"][mode], &question["answer_tokens"]);
            (kl.as_f64().unwrap(), tokens.as_f64().unwrap())
        };
        let (sum, tokens) =
            questions.iter().map(of).fold((0.0, 0.0), |(sum, all), (kl, tokens)| {
                assert!(kl >= 0.0 && tokens >= 1.0);
                (sum + kl * tokens, all + tokens)
            });
        // Means of questions are cut at 0, where rounding may put a sum below.
        assert!((sum / tokens - kl(mode)).abs() < 1e-7, "{mode}");
    }
}

#[test]
fn every_command_has_help() {
    let commands = [
        &["serve"][..],
        &["chat"],
        &["eval"],
        &["bench"],
        &["train"],
        &["cartridge"],
        &["cartridge", "prefill"],
    ];
    for command in commands {
        let help = text(&[command, &["--help"]].concat());
        assert!(help.len() > 300, "{help}");
    }
}

/// A server of its own; killed when a test fails.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        Self::start_with(args, "info", Stdio::inherit())
    }

    fn start_with(args: &[&str], level: &str, log: Stdio) -> Self {
        let mut command = command(&["serve", "--port", "0", "--kv-cache-mib", "64"]);
        command.args(args).env("CARTOUCHE_LOG", level).stderr(log);
        let process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut server = Self { process, address: String::new() };
        let output = BufReader::new(server.process.stdout.take().unwrap());
        let mut lines = output.lines().map(Result::unwrap);
        let line = lines.find(|line| line.starts_with("Cartouche ")).unwrap();
        server.address = line.split_once("http://").unwrap().1.to_owned();
        server
    }

    /// A stream of 3000 tokens that has begun.
    fn long_stream(&self) -> (TcpStream, String) {
        let body = r#"{"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": true,
                       "max_tokens": 3000, "stream": true}"#;
        let mut socket = TcpStream::connect(&self.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length";
        socket.write_all(format!("{head}: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
        let (mut seen, mut buffer) = (String::new(), [0; 1024]);
        while !seen.contains("\"content\":\"") {
            let count = socket.read(&mut buffer).unwrap();
            assert!(count > 0, "{seen}");
            seen += &String::from_utf8_lossy(&buffer[..count]);
        }
        (socket, seen)
    }

    /// A whole request on a connection of its own.
    fn post(&self, path: &str, header: &str, body: &str) -> String {
        let mut socket = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}");
        let request = format!("{head}\r\ncontent-length: {length}\r\n\r\n{body}");
        socket.write_all(request.as_bytes()).unwrap();
        rest(socket)
    }

    fn terminate(&self) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// Waits for the end, which must be a clean one.
    fn ends(mut self) {
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(60) {
            if let Some(status) = self.process.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the server did not exit");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn rest(mut socket: TcpStream) -> String {
    let mut seen = Vec::new();
    socket.read_to_end(&mut seen).unwrap();
    String::from_utf8_lossy(&seen).into_owned()
}

#[cfg(unix)]
#[test]
fn the_log_has_one_line_per_finished_request_and_never_its_text() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let server = Server::start_with(&[], "trace", log.reopen().unwrap().into());
    let secret = "Zanzibarium";
    for (path, prompt) in [
        ("/v1/completions", format!("\"prompt\": \"{secret}\"")),
        (
            "/v1/chat/completions",
            format!("\"messages\": [{{\"role\": \"user\", \"content\": \"{secret}\"}}]"),
        ),
    ] {
        let body = format!("{{{prompt}, \"max_tokens\": 3, \"ignore_eos\": true, \"n\": 2}}");
        let reply = server.post(path, "x-request-id: trace-me", &body);
        assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("x-request-id: trace-me"));
        let refused = server.post(path, "x-request-id: refused", &body.replace('3', "99999"));
        assert!(refused.starts_with("HTTP/1.1 400"), "{refused}");
    }
    server.terminate();
    server.ends();
    let log = std::fs::read_to_string(log.path()).unwrap();
    assert!(!log.contains(secret), "{log}");
    let info: Vec<&str> = log.lines().filter(|line| line.contains(" INFO request")).collect();
    assert_eq!(info.len(), 2, "{log}");
    for line in info {
        for part in
            ["id=\"trace-me\"", "n=2", "outcome=\"finished\"", "tokens=6", "first_token_ms="]
        {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }
    assert!(log.contains("id=\"refused\""), "refusals are told at debug");
}

/// As after `cartouche serve 2>&1 | head -1`.
#[test]
fn a_server_whose_output_is_closed_goes_on_serving() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut serve = command(&["serve", "--port", &port.to_string(), "--kv-cache-mib", "64"]);
    serve.env("CARTOUCHE_LOG", "debug").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = serve.spawn().unwrap();
    drop((process.stdout.take(), process.stderr.take()));
    let server = Server { process, address: format!("127.0.0.1:{port}") };
    let since = Instant::now();
    while TcpStream::connect(&server.address).is_err() {
        assert!(since.elapsed() < Duration::from_secs(60), "it does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    for _ in 0..3 {
        let reply =
            server.post("/v1/completions", "x-a: b", r#"{"prompt": "Hi", "max_tokens": 2}"#);
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }
}

#[cfg(unix)]
#[test]
fn a_stream_that_runs_at_sigterm_finishes_within_the_drain_time() {
    let server = Server::start(&["--drain-seconds", "100"]);
    let (socket, seen) = server.long_stream();
    server.terminate();
    let seen = seen + &rest(socket);
    assert!(seen.contains("\"finish_reason\":\"length\"") && seen.contains("[DONE]"), "{seen}");
    server.ends();
}

#[cfg(unix)]
#[test]
fn a_stream_that_outlives_the_drain_time_ends_with_an_error_event() {
    let server = Server::start(&["--drain-seconds", "0"]);
    let (socket, seen) = server.long_stream();
    server.terminate();
    let seen = seen + &rest(socket);
    assert!(seen.contains("\"code\":\"shutting_down\"") && !seen.contains("[DONE]"), "{seen}");
    server.ends();
}
