//! `config.yaml` beside a cartridge: what other tools say about it. Advisory: the tensors decide.

use std::{fmt, path::Path};

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IgnoredAny, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};
use serde_json::json;

use super::{Cartridge, CartridgeError, Provenance, format::write_atomically};
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
    let ignored = |reason: String| format!("config.yaml is ignored: {reason}");
    if text.len() as u64 > limits::MAX_CONFIG_YAML_BYTES {
        let limit = limits::MAX_CONFIG_YAML_BYTES;
        return Err(ignored(format!("{} bytes, the limit is {limit}", text.len())));
    }
    // The scanner looks at every list and map that is open at every token.
    let openings = text.bytes().filter(|byte| matches!(byte, b'{' | b'[')).count();
    if openings > limits::MAX_CONFIG_YAML_OPENINGS {
        let limit = limits::MAX_CONFIG_YAML_OPENINGS;
        return Err(ignored(format!("{openings} `{{` and `[`, the limit is {limit}")));
    }
    let root = NodeSeed { depth: 0 }.deserialize(serde_yaml_ng::Deserializer::from_str(text));
    let root = root.map_err(|e| ignored(e.to_string()))?;
    let text = |node: &Node| match node {
        Node::Text(text) => Some(text.clone()),
        _ => None,
    };
    let number = |node: &Node| match node {
        Node::Number(number) => Some(*number),
        _ => None,
    };
    Ok(ConfigYaml {
        model: root.look_up(&["model", "pretrained_model_name_or_path"]).and_then(text),
        tokens: root.look_up(&["kv_cache_initializer", "max_tokens"]).and_then(number),
    })
}

/// The entries that are looked up; no others are built.
const KEYS: [&str; 5] =
    ["model", "pretrained_model_name_or_path", "kv_cache_initializer", "max_tokens", "value"];
/// Maps inside of one another on the way to a fact: section, wrapper, and what they hold.
const MAX_DEPTH: usize = 4;

/// What is kept of a value. A few lines of aliases to aliases can stand for more values than fit
/// into memory, so values are not built and then searched, but looked up while they are parsed.
enum Node {
    Map(Vec<(&'static str, Node)>),
    Text(String),
    Number(u64),
    Other,
}

impl Node {
    fn get(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Map(entries) => entries.iter().find(|(key, _)| *key == name).map(|(_, v)| v),
            _ => None,
        }
    }

    /// Follows keys through maps and the `value` wrappers of Weights & Biases.
    fn look_up(&self, keys: &[&str]) -> Option<&Self> {
        keys.iter().try_fold(self, |node, key| {
            node.get(key).or_else(|| node.get("value").and_then(|wrapped| wrapped.get(key)))
        })
    }
}

#[derive(Clone, Copy)]
struct NodeSeed {
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for NodeSeed {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NodeSeed {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries: Vec<(&'static str, Node)> = Vec::new();
        while let Some(key) = map.next_key_seed(Self { depth: MAX_DEPTH })? {
            let known = |text: String| KEYS.into_iter().find(|known| *known == text);
            let known = match key {
                Node::Text(text) if self.depth < MAX_DEPTH => known(text),
                _ => None,
            };
            match known {
                Some(name) if entries.iter().any(|(seen, _)| *seen == name) => {
                    return Err(A::Error::custom(format_args!("`{name}` stands there twice")));
                }
                Some(name) => {
                    entries.push((name, map.next_value_seed(Self { depth: self.depth + 1 })?));
                }
                // Skipped where it stands: aliases in it are not followed.
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Node::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Node::Other)
    }

    /// A value with a tag.
    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<Node, A::Error> {
        let (_, value) = data.variant::<IgnoredAny>()?;
        value.newtype_variant_seed(self)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Node, E> {
        let fits = text.len() <= limits::MAX_CARTRIDGE_FACT_BYTES;
        Ok(if fits { Node::Text(text.to_owned()) } else { Node::Other })
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Node, E> {
        Ok(Node::Number(number))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_i128<E: Error>(self, _: i128) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_u128<E: Error>(self, _: u128) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_unit<E: Error>(self) -> Result<Node, E> {
        Ok(Node::Other)
    }

    /// An empty document.
    fn visit_none<E: Error>(self) -> Result<Node, E> {
        Ok(Node::Other)
    }
}

/// Completes what a cartridge's file says about its making from its `config.yaml`; trouble with that is a
/// warning.
pub(super) fn complete_from_config(
    text: &str,
    id: &str,
    tokens: usize,
    provenance: &mut Provenance,
) {
    match read_config_yaml(text) {
        Ok(config) => {
            if let Some(claimed) = config.tokens.filter(|n| *n != tokens as u64) {
                tracing::warn!(id, tokens, claimed, "config.yaml is wrong about the tokens");
            }
            if provenance.model.is_none() {
                provenance.model = config.model;
            }
        }
        Err(warning) => tracing::warn!(id, "{warning}"),
    }
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
        assert_eq!(facts("model: [pretrained_model_name_or_path]\n1: 2\n[a]: b"), (None, None));
        let shared = "a: &m {pretrained_model_name_or_path: x}\nmodel: *m\n? {model: 1}\n: 2";
        assert_eq!(facts(shared), (Some("x".to_owned()), None));
        assert_eq!(facts("kv_cache_initializer: {max_tokens: -1}"), (None, None));
        let large =
            "model: 1e400\nvalue: -99999999999999999999\nmax_tokens: 0xffffffffffffffffffff";
        assert_eq!(facts(large), (None, None));
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
        for text in ["a: [", "\t", "*a", "model: 1\nmodel: 2", &deep, &large] {
            let warning = read_config_yaml(text).unwrap_err();
            assert!(warning.starts_with("config.yaml is ignored"), "{warning}");
        }
        assert_eq!(facts(&bomb), (None, None), "what is not looked up is not built");
        let looked_up = format!("{bomb}model: *a12\nkv_cache_initializer: *a12");
        assert_eq!(facts(&looked_up), (None, None));
    }

    /// Found by fuzzing: 15 kB stood for 650 MB, in values that nobody looks up.
    #[test]
    fn aliases_are_not_expanded() {
        let n = 9000;
        let list = |item: &str| vec![item; n].join(",");
        let text = format!("a: &a [{}]\nmodel: &b [{}]\nvalue: *b", list("1"), list("*a"));
        assert!(text.len() as u64 <= limits::MAX_CONFIG_YAML_BYTES);
        assert_eq!(facts(&text), (None, None));
        // Looked up, and in one another.
        let text = "model: &a {model: &b {model: {value: *b}, value: *a}, value: *a}";
        assert_eq!(facts(text), (None, None));
    }

    /// Found by fuzzing: 350 kB kept a processor busy for 50 s.
    #[test]
    fn open_lists_and_maps_are_counted_before_they_are_scanned() {
        let text: String = (0..2000).map(|i| format!("k{i}: {{\n")).collect();
        let warning = read_config_yaml(&text).unwrap_err();
        assert!(warning.contains("2000 `{` and `[`"), "{warning}");
    }
}
