//! `cartouche cartridge prefill` and models in a folder: what is refused before it costs time or misleads.

use std::path::Path;
use std::process::Command;

use cartouche::demo;
use cartouche::model::{LoadOptions, ModelSource, load};
use serde_json::{Value, json};

/// The demo model as a folder.
fn demo_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::write(folder.path().join(name), demo::model_file(name).unwrap()).unwrap();
    }
    folder
}

/// The messages of a run over a document of one line; the output is `folder/{output}`.
fn prefill(folder: &Path, output: &str, more: &[&str]) -> Result<(), String> {
    let document = folder.join("document.txt");
    std::fs::write(&document, "The lamp is green.\n").unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_cartouche"))
        .args(["cartridge", "prefill", "--model"])
        .arg(folder)
        .arg("--document")
        .arg(&document)
        .arg("--output")
        .arg(folder.join(output))
        .args(more)
        .output()
        .unwrap();
    match run.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&run.stderr).into_owned()),
    }
}

const BLOCKS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[test]
fn a_cartridge_is_refused_where_requests_would_not_continue_it() {
    let default_system = format!(
        "{{% if messages[0].role != 'system' %}}<|im_start|>system\nBe kind.<|im_end|>\n{{% endif %}}\
         {BLOCKS}"
    );
    let bos = format!("<|endoftext|>{BLOCKS}");
    let folded = "{% if messages|length > 1 %}<|im_start|>user\n{{ messages[0].content }}\n\
                  {{ messages[1].content }}<|im_end|>\n{% else %}<|im_start|>system\n\
                  {{ messages[0].content }}<|im_end|>\n{% endif %}";
    let folder = demo_folder();
    for (template, says) in [
        (default_system.as_str(), "no system message with \"<|im_start|>system\\nBe kind."),
        (bos.as_str(), "no system message with \"<|endoftext|>\""),
        (folded, "differently when a user's message follows"),
    ] {
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        let refusal = prefill(folder.path(), "out.pt", &[]).unwrap_err();
        assert!(refusal.contains(says) && refusal.contains("--force"), "{refusal}");
        assert!(!folder.path().join("out.pt").exists());
        prefill(folder.path(), "forced.pt", &["--force"]).unwrap();
        assert!(folder.path().join("forced.pt").exists());
    }
    std::fs::write(folder.path().join("chat_template.jinja"), BLOCKS).unwrap();
    prefill(folder.path(), "out.pt", &[]).unwrap();
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_the_model_loads() {
    let folder = demo_folder();
    std::fs::write(folder.path().join("config.json"), "no model").unwrap();
    let refusal = prefill(folder.path(), "out.bin", &[]).unwrap_err();
    assert!(refusal.contains("must end in .pt or .safetensors"), "{refusal}");
    let refusal = prefill(folder.path(), "missing/out.pt", &[]).unwrap_err();
    assert!(refusal.contains("missing does not exist"), "{refusal}");
}

#[test]
fn a_tokenizer_with_ids_beyond_the_vocabulary_is_refused() {
    let folder = demo_folder();
    let file = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    config["vocab_size"] = json!(100);
    std::fs::write(&file, config.to_string()).unwrap();
    let source = ModelSource::Folder(folder.path().to_owned());
    let error = load(&source, &LoadOptions::default()).unwrap_err().to_string();
    let expected = ["tokenizer.json", "ids up to ", "vocab_size is 100"];
    assert!(expected.iter().all(|part| error.contains(part)), "{error}");
}
