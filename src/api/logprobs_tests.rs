use super::*;

fn writer(style: TokenStyle) -> TokenWriter {
    let json = crate::demo::model_file("tokenizer.json").unwrap();
    TokenWriter { tokenizer: Tokenizer::from_bytes(json).unwrap(), style }
}

fn token(id: u32, logprob: f32, top: &[(u32, f32)]) -> SampledToken {
    SampledToken { id, logprob, top: top.to_vec() }
}

#[test]
fn chat_entries() {
    // " w", then the first byte of a two-byte char.
    let tokens =
        [token(326, -0.25, &[(326, -0.25), (14, -2.0)]), token(130, f32::NEG_INFINITY, &[])];
    let wire = serde_json::to_value(writer(TokenStyle::Text).chat(&tokens)).unwrap();
    let expected = json!({
        "content": [
            {"token": " w", "id": 326, "bytes": [32, 119], "logprob": -0.25, "top_logprobs": [
                {"token": " w", "id": 326, "bytes": [32, 119], "logprob": -0.25},
                {"token": ",", "id": 14, "bytes": [44], "logprob": -2.0},
            ]},
            {"token": "bytes:\\xc3", "id": 130, "bytes": [195], "logprob": -9999.0,
             "top_logprobs": []},
        ],
        "refusal": null,
    });
    assert_eq!(wire, expected);
}

#[test]
fn token_styles() {
    let name = |style| writer(style).chat(&[token(326, 0.0, &[])]).content[0].token.clone();
    assert_eq!(name(TokenStyle::Text), " w");
    assert_eq!(name(TokenStyle::Piece), "Ġw");
    assert_eq!(name(TokenStyle::Id), "token_id:326");
}

#[test]
fn text_lists() {
    let writer = writer(TokenStyle::Text);
    let mut lists = TextLogprobs::default();
    writer.push_text(&mut lists, 700, None, true, 0);
    let outside_top = token(326, -3.0, &[(14, -0.5), (16, -1.0)]);
    writer.push_text(&mut lists, 326, Some(&outside_top), true, 5);
    let expected = json!({
        "tokens": ["Hello", " w"],
        "token_logprobs": [null, -3.0],
        "top_logprobs": [null, {",": -0.5, ".": -1.0, " w": -3.0}],
        "text_offset": [0, 5],
    });
    assert_eq!(serde_json::to_value(&lists).unwrap(), expected);
    let mut chosen_only = TextLogprobs::default();
    writer.push_text(&mut chosen_only, 326, Some(&token(326, -3.0, &[])), false, 0);
    assert_eq!(chosen_only.top_logprobs, None);
    assert_eq!(chosen_only.token_logprobs, [Some(-3.0)]);
}

#[test]
fn prompt_logprobs_are_keyed_by_token_id() {
    let positions = [None, Some(token(326, -3.0, &[(14, -0.5), (326, -3.0), (16, -4.0)]))];
    let expected = json!([null, {
        "326": {"logprob": -3.0, "rank": 2, "decoded_token": " w"},
        "14": {"logprob": -0.5, "rank": 1, "decoded_token": ","},
    }]);
    assert_eq!(writer(TokenStyle::Text).prompt(&positions, 2), expected);
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
