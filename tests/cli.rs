//! The commands as a user types them, on the built-in demo.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn cartouche(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cartouche"));
    // Nothing from the machine of whoever runs the tests.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARTOUCHE_")) {
        command.env_remove(name);
    }
    command.args(args).output().unwrap()
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

#[test]
fn every_command_has_help() {
    for command in [&["serve"][..], &["chat"], &["eval"], &["cartridge"], &["cartridge", "prefill"]]
    {
        let help = text(&[command, &["--help"]].concat());
        assert!(help.len() > 300, "{help}");
    }
}
