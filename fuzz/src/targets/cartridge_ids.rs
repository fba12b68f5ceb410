//! Names of cartridges: ids on their way to folders, `model` suffixes, `<cartridge>` blocks, and the header
//! that repeats them.

use std::path::{Component, Path};

use cartouche::{
    api::{
        cartridge_blocks,
        cartridges::{ModelName, collect, header},
        openai::reply::CartridgeUsed,
    },
    cartridge::folder_name,
    limits,
};
use serde_json::json;

use super::{Bounds, Linear, Outcome, Target};
use crate::mutate::{self, Random};

pub const TARGET: Target = Target {
    name: "cartridge_ids",
    seeds,
    mutate,
    run,
    bounds: Bounds {
        memory: Linear { base: 64 << 10, per_byte: 200 },
        work: Linear { base: 256 << 10, per_byte: 1000 },
    },
    needs_system: false,
};

const WORDS: [&str; 40] = [
    "/",
    "\\",
    "..",
    "../",
    ".",
    "-",
    "_",
    "--",
    "__",
    ":",
    "|",
    "*",
    "\u{0}",
    "\u{7f}",
    "\n",
    "\r\n",
    " ",
    "\u{2028}",
    "\u{202e}",
    "é",
    "😀",
    "%2e%2e%2f",
    "C:\\",
    "//host/share",
    "CON",
    "~",
    "$HOME",
    "a",
    "org/name",
    "@main",
    ".pt",
    "<cartridge>",
    "</cartridge>",
    "{\"id\":\"a\"}",
    "{\"id\":\"a\",\"source\":\"local\"}",
    "\"force_redownload\":true",
    "}",
    "{",
    "org/model:",
    ",",
];

fn seeds() -> Vec<Vec<u8>> {
    [
        "hazyresearch/cartridge-wauoq23f",
        "../../etc/passwd",
        "/data/run/cache-step32.pt",
        "org/model:name",
        "Be kind.\n\n<cartridge> {\"id\": \"a\", \"source\": \"local\"}\n</cartridge>\n\n\nBe brief.",
        "ключ.é",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

fn mutate(text: &mut Vec<u8>, random: &mut Random) {
    mutate::text(text, &WORDS, random);
    text.truncate(8 << 10);
}

fn run(text: &[u8]) -> Outcome {
    let text = &*String::from_utf8_lossy(text);
    named_in_model(text);
    let blocks = named_in_blocks(text);
    repeated_in_header(text);
    let folder = match folder_name(text) {
        Ok(name) => {
            one_folder(text, &name);
            "folder"
        }
        Err(error) => return Outcome::refused(format!("{error}, {blocks}")),
    };
    let named = collect(Some(text), Vec::new(), Vec::new(), false);
    assert_eq!(named.is_ok(), text.len() <= limits::MAX_CARTRIDGE_ID_BYTES);
    Outcome::accepted(format!("{folder}, {blocks}"))
}

/// A folder name is one ordinary component of a path, whatever the system.
fn one_folder(id: &str, name: &str) {
    let plain = |c: char| !c.is_ascii_control() && !r#"/\.:|*?<>"'"#.contains(c);
    assert!(name.chars().all(plain) && !name.is_empty() && name.len() <= 255, "{name:?}");
    let path = Path::new("root").join(name);
    let mut components = path.components().skip(1);
    assert!(matches!(components.next(), Some(Component::Normal(_))) && components.next().is_none());
    assert!(id.len() <= limits::MAX_CARTRIDGE_ID_BYTES);
}

fn named_in_model(text: &str) {
    for served in ["org/model", "qwen:7b", "é"] {
        match ModelName::parse(Some(text), served) {
            ModelName::WithCartridge(id) => assert!(!id.is_empty() && text.ends_with(id)),
            ModelName::Served => assert!(text.eq_ignore_ascii_case(served)),
            ModelName::Other(name) => assert_eq!(name, text),
        }
    }
}

fn named_in_blocks(text: &str) -> &'static str {
    let mut messages =
        [json!({"role": "system", "content": text}), json!({"role": "user", "content": text})];
    let taken = cartridge_blocks::take(&mut messages);
    assert_eq!(messages[1]["content"], text, "blocks of other roles are text");
    let rest = messages[0]["content"].as_str().expect("a content");
    match taken {
        Err(error) => {
            assert_eq!(error.status.as_u16(), 400);
            "bad block"
        }
        Ok(found) if found.is_empty() => {
            assert_eq!(rest, text, "a text without blocks is left alone");
            "no block"
        }
        Ok(found) => {
            assert!(text.matches("<cartridge>").count() >= found.len() && rest.len() < text.len());
            "blocks"
        }
    }
}

/// The header can be read back: no id can forge a separator or break the header.
fn repeated_in_header(id: &str) {
    let used = CartridgeUsed { id: id.to_owned(), generation: "ab12".to_owned(), tokens: 1 };
    let Some(value) = header(&[used.clone(), used]) else { return assert!(id.is_empty()) };
    let value = value.to_str().expect("visible ASCII");
    assert!(value.len() <= limits::MAX_ECHO_HEADER_BYTES + 4);
    for item in value.split(',').filter(|item| *item != "...") {
        let (name, generation) = item.split_once('@').expect("an id and its generation");
        assert_eq!(generation, "ab12");
        assert_eq!(decoded(name), id.as_bytes());
    }
}

fn decoded(text: &str) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' {
            let (hex, tail) = rest.split_at(2);
            let hex = std::str::from_utf8(hex).expect("ASCII");
            out.push(u8::from_str_radix(hex, 16).expect("two digits"));
            rest = tail;
        } else {
            out.push(byte);
        }
    }
    out
}
