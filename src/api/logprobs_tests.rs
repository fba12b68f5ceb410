use serde_json::Value;

use super::*;

fn writer(style: TokenStyle) -> TokenWriter {
    let json = crate::demo::model_file("tokenizer.json").unwrap();
    TokenWriter { tokenizer: Tokenizer::from_bytes(json).unwrap(), style }
}

/// Id of a vocabulary piece of the demo model.
fn id(piece: &str) -> u32 {
    writer(TokenStyle::Text).tokenizer.token_id(piece).unwrap()
}

fn token(id: u32, logprob: f32, top: &[(u32, f32)]) -> SampledToken {
    SampledToken { id, logprob, top: top.to_vec() }
}

#[test]
fn chat_entries() {
    // " w", then the first byte of a two-byte char.
    let (w, comma, byte) = (id("Ġw"), id(","), id("Ã"));
    let tokens =
        [token(w, -0.25, &[(w, -0.25), (comma, -2.0)]), token(byte, f32::NEG_INFINITY, &[])];
    let wire = serde_json::to_value(writer(TokenStyle::Text).chat(&tokens)).unwrap();
    let expected = json!({
        "content": [
            {"token": " w", "id": w, "bytes": [32, 119], "logprob": -0.25, "top_logprobs": [
                {"token": " w", "id": w, "bytes": [32, 119], "logprob": -0.25},
                {"token": ",", "id": comma, "bytes": [44], "logprob": -2.0},
            ]},
            {"token": "bytes:\\xc3", "id": byte, "bytes": [195], "logprob": -9999.0,
             "top_logprobs": []},
        ],
        "refusal": null,
    });
    assert_eq!(wire, expected);
}

#[test]
fn token_styles() {
    let w = id("Ġw");
    let name = |style| writer(style).chat(&[token(w, 0.0, &[])]).content[0].token.clone();
    assert_eq!(name(TokenStyle::Text), " w");
    assert_eq!(name(TokenStyle::Piece), "Ġw");
    assert_eq!(name(TokenStyle::Id), format!("token_id:{w}"));
}

#[test]
fn text_lists() {
    let writer = writer(TokenStyle::Text);
    let (w, comma, stop) = (id("Ġw"), id(","), id("."));
    let mut lists = TextLogprobs::default();
    writer.push_text(&mut lists, id("H"), None, true, 0);
    let outside_top = token(w, -3.0, &[(comma, -0.5), (stop, -1.0)]);
    writer.push_text(&mut lists, w, Some(&outside_top), true, 1);
    let expected = json!({
        "tokens": ["H", " w"],
        "token_logprobs": [null, -3.0],
        "top_logprobs": [null, {",": -0.5, ".": -1.0, " w": -3.0}],
        "text_offset": [0, 1],
    });
    assert_eq!(serde_json::to_value(&lists).unwrap(), expected);
    let mut chosen_only = TextLogprobs::default();
    writer.push_text(&mut chosen_only, w, Some(&token(w, -3.0, &[])), false, 0);
    assert_eq!(chosen_only.top_logprobs, None);
    assert_eq!(chosen_only.token_logprobs, [Some(-3.0)]);
}

#[test]
fn prompt_logprobs_are_keyed_by_token_id() {
    let (w, comma, stop) = (id("Ġw"), id(","), id("."));
    let positions = [None, Some(token(w, -3.0, &[(comma, -0.5), (w, -3.0), (stop, -4.0)]))];
    let mut expected = json!([null, {}]);
    expected[1][w.to_string()] = json!({"logprob": -3.0, "rank": 2, "decoded_token": " w"});
    expected[1][comma.to_string()] = json!({"logprob": -0.5, "rank": 1, "decoded_token": ","});
    let writer = writer(TokenStyle::Text);
    assert_eq!(serde_json::to_value(writer.prompt(&positions, 2)).unwrap(), expected);
}

#[test]
fn fingerprint_without_packing_has_the_ids() {
    let mut fingerprint = Fingerprint::new(2, false, 2);
    fingerprint.push(0, &token(5, -1.0, &[(5, -1.0), (6, -2.0)]));
    fingerprint.push(1, &token(7, -1.0, &[(7, -1.0), (6, -2.0)]));
    fingerprint.push(1, &token(2, -1.0, &[(2, -1.0), (6, -2.0)]));
    assert_eq!(
        fingerprint.to_json(),
        r#"{"completion_ids":[[5],[7,2]],"packed_chosen_logprobs":null,"packed_topk_indices":null,"packed_topk_logprobs":null}"#
    );
    assert_eq!(fingerprint.total_tokens(), 3);
}

#[test]
fn packed_arrays_are_little_endian_rows() {
    let mut fingerprint = Fingerprint::new(1, true, 2);
    fingerprint.push(0, &token(5, -1.0, &[(5, -1.0), (6, -2.0)]));
    fingerprint.push(0, &token(300, -0.5, &[(300, -0.5), (1, -8.0)]));
    let json: Value = serde_json::from_str(&fingerprint.to_json()).unwrap();
    let bytes = |key: &str| STANDARD.decode(json[key][0].as_str().unwrap()).unwrap();
    let floats = |key: &str| -> Vec<f32> {
        bytes(key).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    assert_eq!(floats("packed_chosen_logprobs"), [-1.0, -0.5]);
    assert_eq!(floats("packed_topk_logprobs"), [-1.0, -2.0, -0.5, -8.0]);
    let ids = [5, 0, 0, 0, 6, 0, 0, 0, 44, 1, 0, 0, 1, 0, 0, 0];
    assert_eq!(bytes("packed_topk_indices"), ids);
}

#[test]
fn chosen_logprobs_alone_are_packed_without_top() {
    let mut fingerprint = Fingerprint::new(1, true, 0);
    fingerprint.push(0, &token(5, -1.0, &[]));
    let json: Value = serde_json::from_str(&fingerprint.to_json()).unwrap();
    assert_eq!(json["packed_chosen_logprobs"], json!(["AACAvw=="]));
    assert_eq!(json["packed_topk_indices"], Value::Null);
}
