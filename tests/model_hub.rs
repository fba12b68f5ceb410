//! Models from a hub, played by a local server: downloads, the cache without network, refusals.
//!
//! The binary runs as a child, since cache and endpoint are given in its environment.

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use cartouche::demo;

const DEMO_FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Serves `/{id}/resolve/{revision}/{file}` as the hub does, for one repository.
struct Hub {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// Answers every request with `status` if one is given.
    fn start(id: &str, files: HashMap<String, Vec<u8>>, status: Option<u16>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, prefix) = (Arc::clone(&asked), format!("/{id}/resolve/main/"));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that goes away is no concern of the server.
                let _ = answer(&stream.unwrap(), &prefix, &files, status, &log);
            }
        });
        Self { endpoint, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn answer(
    mut stream: &TcpStream,
    prefix: &str,
    files: &HashMap<String, Vec<u8>>,
    status: Option<u16>,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let (mut path, mut first, mut last) = (String::new(), 0, None);
    for line in BufReader::new(stream).lines() {
        let line = line?;
        if let Some(rest) = line.strip_prefix("GET ") {
            path = rest.split(' ').next().unwrap_or_default().to_owned();
        } else if let Some((_, range)) = line.to_lowercase().split_once("range: bytes=") {
            let (from, to) = range.split_once('-').unwrap();
            (first, last) = (from.parse().unwrap(), to.parse::<usize>().ok());
        } else if line.is_empty() {
            break;
        }
    }
    log.lock().unwrap().push(path.clone());
    let file = path.strip_prefix(prefix);
    let body = file.and_then(|file| files.get(file));
    let (status, body) = match (status, body) {
        (Some(status), _) => (status, None),
        (None, None) => (404, None),
        (None, Some(body)) => (206, Some(body)),
    };
    let Some(body) = body else {
        return write!(
            stream,
            "HTTP/1.1 {status} No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
    };
    let end = last.map_or(body.len(), |last| last + 1).min(body.len());
    let part = body.get(first..end).unwrap_or_default();
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\netag: \"etag-{}\"\r\nx-repo-commit: c0ffee\r\n\
         content-range: bytes {first}-{}/{}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        file.unwrap_or_default(),
        end.saturating_sub(1),
        body.len(),
        part.len(),
    )?;
    stream.write_all(part)
}

fn demo_files() -> HashMap<String, Vec<u8>> {
    let file = |name: &&str| ((*name).to_owned(), demo::model_file(name).unwrap().to_vec());
    DEMO_FILES.iter().map(file).collect()
}

/// Makes a small cartridge with `model`: the shortest command that loads one.
fn prefill(model: &str, home: &Path, endpoint: &str) -> Output {
    let document = home.join("document.txt");
    std::fs::write(&document, "The lamp is green.").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
    for proxy in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(proxy).env_remove(proxy.to_uppercase());
    }
    command
        .args(["cartridge", "prefill", "--force", "--model", model, "--document"])
        .arg(&document)
        .arg("--output")
        .arg(home.join("out.safetensors"))
        .env("HF_HOME", home)
        .env("HF_ENDPOINT", endpoint)
        .env_remove("HF_TOKEN")
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("TRANSFORMERS_OFFLINE")
        .output()
        .unwrap()
}

fn assert_works(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn refusal(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An address nothing listens on.
fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn a_model_downloads_once_and_then_starts_without_network() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start("acme/demo", demo_files(), None);
    assert_works(&prefill("acme/demo", home.path(), &hub.endpoint));
    let asked = hub.asked();
    let asks = |file: &str| asked.iter().any(|path| path.ends_with(file));
    assert!(DEMO_FILES.iter().all(|file| asks(file)), "{asked:?}");
    // The demo model has no such file: the hub's 404 is an answer.
    assert!(asks("chat_template.jinja"), "{asked:?}");
    let config = asked.iter().position(|path| path.ends_with("/config.json"));
    let optional = asked.iter().rposition(|path| {
        ["chat_template.jinja", "generation_config.json"].iter().any(|file| path.ends_with(file))
    });
    assert!(optional < config, "config.json vouches for the optional files: {asked:?}");

    let offline = prefill("acme/demo", home.path(), &nowhere());
    assert_works(&offline);

    let cached_config = walk(home.path(), "config.json");
    std::fs::remove_file(cached_config).unwrap();
    let refusal = refusal(&prefill("acme/demo", home.path(), &nowhere()));
    assert!(refusal.contains("acme/demo") && refusal.contains("HF_ENDPOINT"), "{refusal}");
}

/// The entry of that name below a folder.
fn walk(folder: &Path, name: &str) -> std::path::PathBuf {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().is_some_and(|n| n == name) {
                return path;
            }
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    panic!("no {name}");
}

#[test]
fn half_a_download_is_not_taken_for_the_model() {
    let home = tempfile::tempdir().unwrap();
    let mut files = demo_files();
    files.remove("model.safetensors");
    let hub = Hub::start("acme/half", files, None);
    let missing = refusal(&prefill("acme/half", home.path(), &hub.endpoint));
    assert!(missing.contains("model.safetensors"), "{missing}");
    let offline = refusal(&prefill("acme/half", home.path(), &nowhere()));
    assert!(offline.contains("only the cache was read"), "{offline}");
}

#[test]
fn a_gguf_file_of_a_hub_repository_loads() {
    let home = tempfile::tempdir().unwrap();
    let fixture = common::model_fixtures(|name| name == "gguf_qwen2_q8_0").remove(0);
    let bytes = std::fs::read(fixture.folder.join("model.gguf")).unwrap();
    let files = HashMap::from([("tiny-Q8_0.gguf".to_owned(), bytes)]);
    let hub = Hub::start("acme/tiny-GGUF", files, None);
    assert_works(&prefill("acme/tiny-GGUF/tiny-Q8_0.gguf", home.path(), &hub.endpoint));
    assert!(hub.asked().iter().all(|path| path.ends_with(".gguf")), "{:?}", hub.asked());
    assert_works(&prefill("acme/tiny-GGUF/tiny-Q8_0.gguf", home.path(), &nowhere()));
    let wrong = refusal(&prefill("acme/tiny-GGUF/other.gguf", home.path(), &hub.endpoint));
    assert!(wrong.contains("other.gguf: the file is missing"), "{wrong}");
}

#[test]
fn refusals_of_the_hub_say_what_to_do() {
    for (status, says) in [(401, "HF_TOKEN does not give access"), (503, "answered 503")] {
        let home = tempfile::tempdir().unwrap();
        let hub = Hub::start("acme/gated", demo_files(), Some(status));
        let refusal = refusal(&prefill("acme/gated", home.path(), &hub.endpoint));
        assert!(refusal.contains(says) && refusal.contains("acme/gated"), "{refusal}");
    }
}
