//! `config.yaml` beside a cartridge: what other tools say about it. Advisory: the tensors decide.

use std::path::Path;

use serde_json::json;
use serde_yaml_ng::Value;

use super::{Cartridge, CartridgeError, format::write_atomically};
use crate::limits;

/// What a `config.yaml` says that concerns a server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigYaml {
    /// `model.pretrained_model_name_or_path`.
    pub model: Option<String>,
    /// `kv_cache_initializer.max_tokens`: all tokens, frozen ones included. Often wrong.
    pub tokens: Option<u64>,
}

/// Reads a `config.yaml` as a trainer, Weights & Biases (which wraps each entry in `value`) or
/// [`write_config_yaml`] wrote it. Python tags are read over; nothing is executed.
///
/// # Errors
/// A sentence for a warning: a file that is too large or no YAML says nothing, and is no reason to
/// refuse the cartridge.
pub fn read_config_yaml(text: &str) -> Result<ConfigYaml, String> {
    if text.len() as u64 > limits::MAX_CONFIG_YAML_BYTES {
        let limit = limits::MAX_CONFIG_YAML_BYTES;
        return Err(format!("config.yaml is ignored: {} bytes, the limit is {limit}", text.len()));
    }
    let root: Value =
        serde_yaml_ng::from_str(text).map_err(|e| format!("config.yaml is ignored: {e}"))?;
    let model = look_up(&root, &["model", "pretrained_model_name_or_path"]);
    let tokens = look_up(&root, &["kv_cache_initializer", "max_tokens"]);
    Ok(ConfigYaml {
        model: model.and_then(Value::as_str).map(str::to_owned),
        tokens: tokens.and_then(Value::as_u64),
    })
}

/// Follows keys through mappings, tags and the `value` wrappers of Weights & Biases.
fn look_up<'a>(root: &'a Value, keys: &[&str]) -> Option<&'a Value> {
    keys.iter().try_fold(root, |value, key| {
        let mapping = untagged(value);
        let found = mapping.get(*key).or_else(|| untagged(mapping.get("value")?).get(*key));
        found.map(untagged)
    })
}

fn untagged(mut value: &Value) -> &Value {
    while let Value::Tagged(tagged) = value {
        value = &tagged.value;
    }
    value
}

/// The `config.yaml` that stock servers want beside a cartridge.
///
/// # Errors
/// [`CartridgeError::Invalid`].
pub fn config_yaml(cartridge: &Cartridge) -> Result<String, CartridgeError> {
    let mut config = json!({
        "kv_cache_initializer": {
            "max_tokens": cartridge.tokens(),
            "num_frozen_tokens": cartridge.frozen_tokens(),
        },
    });
    if let Some(model) = &cartridge.provenance().model {
        config["model"] = json!({ "pretrained_model_name_or_path": model });
    }
    serde_yaml_ng::to_string(&config)
        .map_err(|e| CartridgeError::invalid(format!("config.yaml cannot be written: {e}")))
}

/// Writes [`config_yaml`] as `path`.
///
/// # Errors
/// [`CartridgeError::Io`].
pub fn write_config_yaml(path: &Path, cartridge: &Cartridge) -> Result<(), CartridgeError> {
    let text = config_yaml(cartridge)?;
    write_atomically(path, |file| {
        use std::io::Write;
        file.write_all(text.as_bytes()).map_err(|e| CartridgeError::io("write the file", &e))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(text: &str) -> (Option<String>, Option<u64>) {
        let config = read_config_yaml(text).unwrap();
        (config.model, config.tokens)
    }

    #[test]
    fn reads_trainer_and_wandb_forms() {
        let expected = (Some("meta-llama/Llama-3.2-3B".to_owned()), Some(2048));
        let pydantic = "
_config_type: {_is_type: true, _module: cartridges.train, _qualname: TrainConfig}
kv_cache_initializer:
  max_tokens: 2048
  num_frozen_tokens: 1
model:
  pretrained_model_name_or_path: meta-llama/Llama-3.2-3B
";
        let wandb = "
_wandb: {desc: null, value: {python_version: 3.12}}
kv_cache_initializer:
  desc: null
  value: {max_tokens: 2048}
model:
  value: {pretrained_model_name_or_path: meta-llama/Llama-3.2-3B}
";
        let python = "
kv_cache_initializer: !!python/object:cartridges.initialization.KVFromText
  max_tokens: 2048
  shape: !!python/tuple [1, 2]
model: !!python/object/apply:os.system
  pretrained_model_name_or_path: meta-llama/Llama-3.2-3B
";
        for text in [pydantic, wandb, python] {
            assert_eq!(facts(text), expected, "{text}");
        }
        assert_eq!(facts("kv_cache_initializer: {max_tokens: null}"), (None, None));
        assert_eq!(facts("[]"), (None, None));
        assert_eq!(facts(""), (None, None));
    }

    #[test]
    fn what_cannot_be_read_is_a_warning() {
        let bomb = (0..12).fold("a0: &a0 [x, x]\n".to_owned(), |text, i| {
            let next = i + 1;
            let aliases = vec![format!("*a{i}"); 10].join(", ");
            format!("{text}a{next}: &a{next} [{aliases}]\n")
        });
        let deep = "[".repeat(100_000);
        let large = "x".repeat(limits::MAX_CONFIG_YAML_BYTES as usize + 1);
        for text in ["a: [", "\t", &bomb, &deep, &large] {
            let warning = read_config_yaml(text).unwrap_err();
            assert!(warning.starts_with("config.yaml is ignored"), "{warning}");
        }
    }
}
