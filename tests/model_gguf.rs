//! Whole GGUF models: tokenizer, template and end tokens of the file, and what is refused.

mod common;

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{self, Value as Meta};
use cartouche::model::{LoadOptions, LoadedModel, ModelError, ModelSource, load};
use cartouche::text::TemplateRequest;
use serde_json::{Map, Value, json};

fn load_gguf(path: &Path) -> Result<LoadedModel, ModelError> {
    load(&ModelSource::Gguf(path.to_owned()), &LoadOptions::default())
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A fixture's file with some of its metadata set, or with `None` removed, in a folder of its own.
fn edited(fixture: &str, edits: &[(&str, Option<Meta>)]) -> (tempfile::TempDir, PathBuf) {
    let original = common::model_fixtures(|name| name == fixture)[0].folder.join("model.gguf");
    let mut file = BufReader::new(File::open(original).unwrap());
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut metadata = content.metadata.clone();
    for (key, value) in edits {
        match value {
            Some(value) => metadata.insert((*key).to_owned(), value.clone()),
            None => metadata.remove(*key),
        };
    }
    let tensors: Vec<(String, QTensor)> = content
        .tensor_infos
        .keys()
        .map(|name| (name.clone(), content.tensor(&mut file, name, &Device::Cpu).unwrap()))
        .collect();
    let metadata: Vec<(&str, &Meta)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
    (folder, path)
}

fn text(value: &str) -> Option<Meta> {
    Some(Meta::String(value.to_owned()))
}

#[test]
fn gguf_tokenizers_give_the_ids_of_their_tokenizer_json() {
    for fixture in common::model_fixtures(|name| name.starts_with("gguf")) {
        let tokenizer = load_gguf(&fixture.folder.join("model.gguf")).unwrap().tokenizer;
        let cases = fixture.expected["tokenizer"].as_array().unwrap();
        assert!(cases.len() >= 8, "{}", fixture.name);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let plain = tokenizer.encode(text, false).unwrap();
            assert_eq!(plain, ids(&case["ids"]), "{} {text:?}", fixture.name);
            let special = tokenizer.encode(text, true).unwrap();
            assert_eq!(special, ids(&case["ids_special"]), "{} {text:?}", fixture.name);
            assert_eq!(tokenizer.decode(&plain, false).unwrap(), text);
        }
    }
}

/// What separates the three schemes on the fixtures' vocabulary: `123` and `cat` are entries, the second out
/// of reach of the merges.
#[test]
fn names_of_splits_mean_what_they_mean_to_llama_cpp() {
    const BOS: u32 = 270;
    for (pre, asked, number, word, bos) in [
        ("llama-bpe", None, vec![265], vec![269], true),
        ("llama3", None, vec![265], vec![269], true),
        ("llama-v3", Some(false), vec![265], vec![269], false),
        ("smaug-bpe", None, vec![265], vec![99, 97, 116], false),
        ("tekken", None, vec![49, 50, 51], vec![269], true),
        ("qwen2", None, vec![49, 50, 51], vec![99, 97, 116], false),
        ("qwen2", Some(true), vec![49, 50, 51], vec![99, 97, 116], true),
    ] {
        let key = "tokenizer.ggml.add_bos_token";
        let edits = [("tokenizer.ggml.pre", text(pre)), (key, asked.map(Meta::Bool))];
        let (_folder, path) = edited("gguf_llama_f16", &edits);
        let tokenizer = load_gguf(&path).unwrap().tokenizer;
        assert_eq!(tokenizer.encode("123", false).unwrap(), number, "{pre}");
        assert_eq!(tokenizer.encode("cat", false).unwrap(), word, "{pre}");
        let front: Vec<u32> = if bos { vec![BOS] } else { vec![] };
        assert_eq!(tokenizer.encode("", true).unwrap(), front, "{pre} {asked:?}");
    }
    // Only Nemo's split ends a word where upper case begins.
    for (pre, expected) in [("tekken", vec![269, 88]), ("llama-bpe", vec![99, 97, 116, 88])] {
        let (_folder, path) = edited("gguf_llama_f16", &[("tokenizer.ggml.pre", text(pre))]);
        let tokenizer = load_gguf(&path).unwrap().tokenizer;
        let got = tokenizer.encode("catX", false).unwrap();
        assert_eq!(got, expected, "{pre}");
    }
}

#[test]
fn control_and_user_defined_tokens_match_whole() {
    let original = common::model_fixtures(|name| name == "gguf_qwen2_f16")[0].folder.clone();
    let mut file = File::open(original.join("model.gguf")).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let Meta::Array(mut types) = content.metadata["tokenizer.ggml.token_type"].clone() else {
        panic!("token_type is an array")
    };
    // The last control token becomes a user-defined one: still whole, no longer special.
    let last = types.len() - 1;
    types[last] = Meta::I32(4);
    let edits = [("tokenizer.ggml.token_type", Some(Meta::Array(types)))];
    let (_folder, path) = edited("gguf_qwen2_f16", &edits);
    let tokenizer = load_gguf(&path).unwrap().tokenizer;
    assert_eq!(tokenizer.encode("a<|im_end|>b", false).unwrap(), [97, 271, 98]);
    assert_eq!(tokenizer.decode(&[97, 270, 271], true).unwrap(), "a<|im_end|>");
}

#[test]
fn a_gguf_loads_with_its_own_template_and_end_tokens() {
    for (name, bos) in [("gguf_llama_q8_0", true), ("gguf_qwen2_q8_0", false)] {
        let fixture = &common::model_fixtures(|fixture| fixture == name)[0];
        let model = load_gguf(&fixture.folder.join("model.gguf")).unwrap();
        assert_eq!(model.name, "model");
        assert_eq!(model.eos_token_ids, [271]);
        assert!(!model.is_llama3);
        let prompt = model.chat_template.as_ref().unwrap().render(&TemplateRequest {
            messages: &[json!({"role": "user", "content": "hi"})],
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: &Map::new(),
        });
        assert_eq!(prompt.unwrap(), "user: hi\nassistant: ");
        assert_eq!(model.tokenizer.encode("", true).unwrap().len(), usize::from(bos));
    }
}

/// A word-level tokenizer with ids 0 to `largest`.
fn other_tokenizer(largest: u32) -> String {
    let vocabulary: Map<String, Value> =
        (0..=largest).map(|id| (format!("w{id}"), id.into())).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    })
    .to_string()
}

#[test]
fn files_beside_a_gguf_do_not_override_it() {
    let (folder, path) = edited("gguf_llama_f16", &[]);
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("tokenizer.json", &other_tokenizer(10));
    write("generation_config.json", r#"{"eos_token_id": [1, 2]}"#);
    write("tokenizer_config.json", r#"{"chat_template": "other", "eos_token": "h"}"#);
    write("chat_template.jinja", "other");
    let model = load_gguf(&path).unwrap();
    assert_eq!(model.tokenizer.encode("cat", false).unwrap(), [269]);
    assert_eq!(model.eos_token_ids, [271]);
    let request = TemplateRequest {
        messages: &[json!({"role": "user", "content": "hi"})],
        tools: None,
        add_generation_prompt: true,
        continue_final_message: false,
        kwargs: &Map::new(),
    };
    assert_eq!(model.chat_template.unwrap().render(&request).unwrap(), "user: hi\nassistant: ");
}

#[test]
fn files_beside_a_gguf_fill_what_it_lacks() {
    let (folder, path) = edited(
        "gguf_llama_f16",
        &[
            ("tokenizer.ggml.pre", text("deepseek-llm")),
            ("tokenizer.ggml.eos_token_id", None),
            ("tokenizer.chat_template", None),
        ],
    );
    let refused = load_gguf(&path).unwrap_err();
    assert!(matches!(refused, ModelError::Unsupported { .. }), "{refused}");
    let refused = refused.to_string();
    assert!(refused.contains("deepseek-llm") && refused.contains("tokenizer.json"), "{refused}");
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("tokenizer.json", &other_tokenizer(271));
    write("generation_config.json", r#"{"eos_token_id": [7, 3]}"#);
    write("chat_template.jinja", "beside");
    let model = load_gguf(&path).unwrap();
    assert_eq!(model.tokenizer.encode("w5", false).unwrap(), [5]);
    assert_eq!(model.eos_token_ids, [3, 7]);
    assert!(model.chat_template.is_some());

    write("tokenizer.json", &other_tokenizer(272));
    let refused = load_gguf(&path).unwrap_err().to_string();
    assert!(refused.contains("up to 272") && refused.contains("vocab_size is 272"), "{refused}");
}

#[test]
fn gguf_metadata_that_changes_the_function_is_refused() {
    for (fixture, key, value, says) in [
        ("gguf_llama_f16", "llama.rope.dimension_count", Meta::U32(8), "rotating 8 of 16"),
        ("gguf_llama_f16", "llama.expert_count", Meta::U32(8), "8 experts"),
        ("gguf_llama_f16", "general.architecture", Meta::String("mistral".to_owned()), "mistral"),
        ("gguf_llama_f16", "tokenizer.ggml.model", Meta::String("llama".to_owned()), "model llama"),
        ("gguf_qwen2_f16", "tokenizer.ggml.pre", Meta::String("gpt-2".to_owned()), "pre gpt-2"),
    ] {
        let (_folder, path) = edited(fixture, &[(key, Some(value))]);
        let error = load_gguf(&path).expect_err(key);
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    let (_folder, path) = edited("gguf_llama_f16", &[("llama.expert_count", Some(Meta::U32(0)))]);
    load_gguf(&path).unwrap();
}

#[test]
fn a_gguf_sliding_window_limits_the_context() {
    let key = "llama.attention.sliding_window";
    let (_folder, path) = edited("gguf_llama_f16", &[(key, Some(Meta::U32(20)))]);
    assert_eq!(load_gguf(&path).unwrap().decoder.config().max_positions, 20);
    let (_folder, path) = edited("gguf_llama_f16", &[(key, Some(Meta::U32(0)))]);
    assert!(load_gguf(&path).unwrap().decoder.config().max_positions > 20);
}
