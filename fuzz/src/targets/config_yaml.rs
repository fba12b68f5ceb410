//! The `config.yaml` beside a cartridge: tags, anchors and aliases, nesting.

use cartouche::{cartridge::read_config_yaml, limits};

use super::{Bounds, Linear, Outcome, Target};
use crate::mutate::{self, Random};

pub const TARGET: Target = Target {
    name: "config_yaml",
    seeds,
    mutate,
    run,
    // The YAML library turns the whole text into events first, of some hundred bytes each.
    bounds: Bounds {
        memory: Linear { base: 256 << 10, per_byte: 600 },
        work: Linear { base: 1 << 20, per_byte: 2000 },
    },
    needs_system: false,
};

const WORDS: [&str; 40] = [
    "model:",
    "pretrained_model_name_or_path: ",
    "kv_cache_initializer:",
    "max_tokens: ",
    "value:",
    "\n",
    "\n  ",
    "\n    ",
    "- ",
    "? ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    ", ",
    "&a ",
    "*a",
    "&b ",
    "*b",
    "<<: *a",
    "!!python/object/apply:os.system ",
    "!!str ",
    "! ",
    "!<tag:yaml.org,2002:int> ",
    "|\n  ",
    ">-\n  ",
    "'",
    "\"",
    "\\x41\\",
    "# ",
    "---\n",
    "...\n",
    "%YAML 1.1\n",
    "%TAG ! x:\n",
    "null",
    "-1",
    "0x7fffffffffffffff",
    "18446744073709551616",
    "\u{feff}",
];

fn seeds() -> Vec<Vec<u8>> {
    [
        "kv_cache_initializer:\n  max_tokens: 2048\n  num_frozen_tokens: 1\nmodel:\n  \
         pretrained_model_name_or_path: meta-llama/Llama-3.2-3B\n",
        "_wandb: {desc: null, value: {python_version: 3.12}}\nkv_cache_initializer:\n  desc: null\n  \
         value: {max_tokens: 2048}\nmodel:\n  value: {pretrained_model_name_or_path: a/b}\n",
        "kv_cache_initializer: !!python/object:cartridges.initialization.KVFromText\n  max_tokens: \
         2048\n  shape: !!python/tuple [1, 2]\nmodel: !!python/object/apply:os.system\n  \
         pretrained_model_name_or_path: a/b\n",
        "a: &a [x, x]\nb: &b [*a, *a]\nmodel: &m {pretrained_model_name_or_path: 'x'}\nvalue: *m\n",
        "? complex\n: - 1\n  - |\n    text\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

fn mutate(text: &mut Vec<u8>, random: &mut Random) {
    mutate::text(text, &WORDS, random);
    // The scanner's time is quadratic in the depth of a text; a short one shows all that it does.
    text.truncate(4096);
}

fn run(text: &[u8]) -> Outcome {
    let Ok(text) = std::str::from_utf8(text) else {
        // A file that is no UTF-8 is not read this far.
        return Outcome::refused("not UTF-8");
    };
    match read_config_yaml(text) {
        Ok(config) => {
            let model = config.model.as_ref();
            assert!(model.is_none_or(|name| name.len() <= limits::MAX_CARTRIDGE_FACT_BYTES));
            if let Some(name) = model {
                assert!(name.len() <= text.len(), "more than was written");
            }
            Outcome::accepted(format!(
                "model {}, tokens {}",
                config.model.is_some(),
                config.tokens.is_some()
            ))
        }
        Err(warning) => {
            assert!(warning.starts_with("config.yaml is ignored"));
            Outcome::refused(warning)
        }
    }
}
