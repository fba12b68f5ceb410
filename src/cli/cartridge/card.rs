//! The README of a published cartridge: what it is, the numbers of its training, and how to use it.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::target::Target;
use crate::cartridge::Cartridge;

/// The last numbers of a training run.
#[derive(Debug, Default, PartialEq)]
pub struct Training {
    /// Metrics as `train` writes them, each with its last value.
    pub last: Map<String, Value>,
    /// Loss after the first update.
    pub first_loss: Option<f64>,
}

impl Training {
    /// From `metrics.jsonl` in a run's folder; `None` where there is none.
    pub fn read(folder: &Path) -> Option<Self> {
        let text = fs::read_to_string(folder.join("metrics.jsonl")).ok()?;
        let mut training = Self::default();
        // A line that was cut short by a kill is no JSON.
        for line in text.lines().filter_map(|line| serde_json::from_str::<Map<_, _>>(line).ok()) {
            training.first_loss =
                training.first_loss.or_else(|| line.get("train/loss").and_then(Value::as_f64));
            training.last.extend(line);
        }
        (!training.last.is_empty()).then_some(training)
    }

    fn rows(&self) -> Vec<(String, String)> {
        let number = |value: &Value| match value.as_f64() {
            Some(number) if !value.is_u64() => format!("{number:.4}"),
            _ => value.to_string(),
        };
        let named = [
            ("train/optimizer_step", "updates"),
            ("train/loss", "loss, last update"),
            ("train/perplexity", "perplexity, last update"),
            ("train/kl", "KL to the teacher, last update"),
            ("train/num_input_tokens", "input tokens seen"),
            ("train/num_target_tokens", "supervised tokens seen"),
        ];
        let mut rows: Vec<_> = named
            .iter()
            .filter_map(|(key, name)| Some(((*name).to_owned(), number(self.last.get(*key)?))))
            .collect();
        if let Some(loss) = self.first_loss {
            rows.insert(1.min(rows.len()), ("loss, first update".to_owned(), format!("{loss:.4}")));
        }
        let held_out =
            self.last.iter().filter(|(key, value)| key.starts_with("eval") && value.is_number());
        rows.extend(held_out.map(|(key, value)| (format!("`{key}`"), number(value))));
        rows
    }
}

/// The model as a hub id, if that is what it is.
fn hub_model(model: &str) -> Option<&str> {
    let is_part = |part: &str| {
        let is_char = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && part.chars().all(is_char)
    };
    let (owner, name) = model.split_once('/')?;
    (is_part(owner) && is_part(name)).then_some(model)
}

/// Text of a file that anyone may have written, on one line of a table.
fn plain(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    text.replace(['|', '`', '<', '>', '[', ']'], " ")
}

/// The README. `sha256` is that of the file.
pub fn card(
    target: &Target,
    cartridge: &Cartridge,
    (file, sha256): (&str, &str),
    training: Option<&Training>,
) -> String {
    let (shape, made) = (cartridge.shape(), cartridge.provenance());
    let (id, source) = match target {
        Target::Remote(source, id) => (id.split('@').next().unwrap_or(id), source.to_string()),
        Target::Here(id) => (id.as_str(), "local".to_owned()),
    };
    let model = made.model.as_deref();
    let mut text = "---\nlibrary_name: cartouche\ntags:\n- cartridge\n- kv-cache\n".to_owned();
    if let Some(model) = model.and_then(hub_model) {
        text += &format!("base_model: {model}\n");
    }
    text += &format!(
        "---\n\n# {}\n\nA cartridge: a KV-cache prefix of {} tokens that stands for a long text. A server \
         attends to it as if the text were in the prompt.\n\n| | |\n|---|---|\n",
        plain(id),
        cartridge.tokens()
    );
    let dtype = format!("{:?}", cartridge.dtype()).to_lowercase();
    let rows = [
        ("model", model.map_or_else(|| "not recorded".to_owned(), plain)),
        ("made of", made.origin.as_deref().map_or_else(|| "not recorded".to_owned(), plain)),
        ("tokens", format!("{}, {} of them frozen", cartridge.tokens(), cartridge.frozen_tokens())),
        (
            "shape",
            format!(
                "{} layers, {} KV heads, head size {}, {dtype}",
                shape.layers, shape.kv_heads, shape.head_dim
            ),
        ),
        ("generation", format!("`{}`", cartridge.generation())),
        ("file", format!("`{file}`, SHA-256 `{sha256}`")),
    ];
    rows.iter().for_each(|(name, value)| text += &format!("| {name} | {value} |\n"));
    if let Some(training) = training {
        text += "\n## Training\n\n| | |\n|---|---|\n";
        for (name, value) in training.rows() {
            text += &format!("| {name} | {value} |\n");
        }
    }
    let model = model.and_then(hub_model).unwrap_or("MODEL");
    text += &format!(
        "\n## Use\n\n```sh\ncartouche serve --model {model}\n\
         curl http://127.0.0.1:10210/v1/chat/completions -H 'content-type: application/json' -d \
         '{{\"messages\": [{{\"role\": \"user\", \"content\": \"...\"}}], \"cartridges\": [{{\"id\": \"{id}\", \
         \"source\": \"{source}\"}}]}}'\n```\n"
    );
    text
}
