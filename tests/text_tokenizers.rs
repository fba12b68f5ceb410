//! Tokenizers encode and decode as the reference package does, and streaming gives the same text as
//! decoding everything at once. `scripts/fixtures/tokenizers_small.py` writes the fixtures.

use cartouche::text::{Detokenizer, Tokenizer};
use proptest::prelude::*;
use serde_json::Value;

const NAMES: [&str; 4] = ["byte_level", "llama2", "metaspace", "no_decoder"];

fn fixture(name: &str) -> (Tokenizer, Value) {
    let path = format!("{}/tests/fixtures/tokenizers/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let fixture: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_bytes(fixture["tokenizer"].to_string().as_bytes()).unwrap();
    (tokenizer, fixture)
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> (Vec<String>, String) {
    let mut detokenizer = Detokenizer::new(tokenizer, skip);
    let pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
    let rest = detokenizer.finish();
    assert_eq!(detokenizer.finish(), "", "finish leaves nothing");
    (pieces, rest)
}

#[test]
fn encoding_and_decoding_match_the_reference() {
    for name in NAMES {
        let (tokenizer, fixture) = fixture(name);
        assert_eq!(tokenizer.vocab_size() as u64, fixture["vocab_size"].as_u64().unwrap());
        for case in fixture["encode"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(
                tokenizer.encode(text, false).unwrap(),
                ids(&case["plain"]),
                "{name} {text:?}"
            );
            assert_eq!(
                tokenizer.encode(text, true).unwrap(),
                ids(&case["special"]),
                "{name} {text:?}"
            );
        }
        for case in fixture["decode"].as_array().unwrap() {
            for (skip, key) in [(false, "kept"), (true, "skipped")] {
                let expected = case[key].as_str().unwrap();
                let list = ids(&case["ids"]);
                assert_eq!(tokenizer.decode(&list, skip).unwrap(), expected, "{name}");
                let (pieces, rest) = stream(&tokenizer, &list, skip);
                assert_eq!(pieces.concat() + &rest, expected, "{name} streamed {list:?}");
            }
        }
    }
}

#[test]
fn the_bytes_of_tokens_are_the_text() {
    let (tokenizer, _) = fixture("byte_level");
    for text in
        ["hello world", " hello  world", "👩‍👩‍👧 x", "日本語\n", "a<think>b</think>", "\u{FFFD}"]
    {
        let tokens = tokenizer.encode(text, false).unwrap();
        let bytes: Vec<u8> = tokens.iter().flat_map(|id| tokenizer.token_bytes(*id)).collect();
        assert_eq!(bytes, text.as_bytes());
    }
    let (tokenizer, _) = fixture("llama2");
    let tokens = tokenizer.encode("hello 日本 world", false).unwrap();
    let bytes: Vec<u8> = tokens.iter().flat_map(|id| tokenizer.token_bytes(*id)).collect();
    assert_eq!(bytes, " hello 日本 world".as_bytes(), "the leading space is the tokenizer's");
}

#[test]
fn single_tokens() {
    let (tokenizer, _) = fixture("byte_level");
    let id = |piece: &str| tokenizer.token_id(piece).unwrap();
    assert_eq!(tokenizer.token_string(id("Ġworld")), "Ġworld");
    assert_eq!(tokenizer.token_bytes(id("Ġworld")), b" world");
    assert_eq!(tokenizer.token_bytes(id("ĠðŁ")), [b' ', 0xF0, 0x9F]);
    // An added token is its text even where its chars are of the byte alphabet.
    assert_eq!(tokenizer.token_string(id("naïve word")), "naïve word");
    assert_eq!(tokenizer.token_bytes(id("naïve word")), "naïve word".as_bytes());
    assert_eq!(tokenizer.token_bytes(id("<|end|>")), b"<|end|>");
    assert!(tokenizer.is_special(id("<|end|>")) && !tokenizer.is_special(id("<think>")));
    assert_eq!(tokenizer.token_string(99_999), "<UNK_99999>");
    assert!(tokenizer.token_bytes(99_999).is_empty() && !tokenizer.is_special(99_999));
    assert_eq!(tokenizer.token_id("nope"), None);

    let (tokenizer, _) = fixture("metaspace");
    let id = |piece: &str| tokenizer.token_id(piece).unwrap();
    assert_eq!(tokenizer.token_bytes(id("<0xE2>")), [0xE2]);
    assert_eq!(tokenizer.token_bytes(id("▁world")), b" world");
    assert_eq!(tokenizer.token_string(id("<0xE2>")), "<0xE2>");
}

#[test]
fn text_is_released_as_soon_as_it_is_final() {
    let (tokenizer, _) = fixture("byte_level");
    let id = |piece: &str| tokenizer.token_id(piece).unwrap();
    // The space of " 👩" is shown at once, the emoji when its last byte is there; a genuine U+FFFD
    // is not held back; a char cut off by other text is replaced as soon as that is sure.
    let tokens = ["ĠðŁ", "ĳ", "©", "ï", "¿", "½", "Ã", "h", "<|end|>", "ð"].map(id);
    let (pieces, rest) = stream(&tokenizer, &tokens, true);
    assert_eq!(pieces, [" ", "", "👩", "", "", "\u{FFFD}", "", "\u{FFFD}h", "", ""]);
    assert_eq!(rest, "\u{FFFD}");

    let (tokenizer, _) = fixture("llama2");
    let id = |piece: &str| tokenizer.token_id(piece).unwrap();
    let tokens = ["▁hello", "▁world", "</s>", "▁", "<0xC3>", "<0xA9>", "o", "<0x0A>"].map(id);
    let (pieces, rest) = stream(&tokenizer, &tokens, true);
    assert_eq!(pieces, ["hello", " world", "", " ", "", "", "éo", ""]);
    assert_eq!(rest, "\n");
}

#[test]
fn a_tokenizer_that_truncates_or_pads_is_made_not_to() {
    let (_, fixture) = fixture("byte_level");
    let mut json = fixture["tokenizer"].clone();
    json["truncation"] = serde_json::json!(
        {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = serde_json::json!({"strategy": {"Fixed": 50}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.encode("abcdefgh", false).unwrap().len(), 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn streaming_any_tokens_equals_decoding_them(
        seeds in prop::collection::vec(
            prop::collection::vec(any::<prop::sample::Index>(), 0..60),
            8,
        ),
        skip: bool,
    ) {
        for name in NAMES {
            let (tokenizer, _) = fixture(name);
            let size = tokenizer.vocab_size() + 2;
            for seed in &seeds {
                // Half of the tokens come from the end of the vocabulary: merges, spaces, special
                // tokens.
                let tokens: Vec<u32> = seed.iter().enumerate()
                    .map(|(i, x)| match i % 2 {
                        0 => x.index(size),
                        _ => size - 1 - x.index(size.min(24)),
                    })
                    .map(|id| id as u32)
                    .collect();
                let (pieces, rest) = stream(&tokenizer, &tokens, skip);
                let whole = tokenizer.decode(&tokens, skip).unwrap();
                prop_assert_eq!(pieces.concat() + &rest, whole, "{} {:?}", name, tokens);
            }
        }
    }
}
