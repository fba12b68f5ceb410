//! Text completions on the demo model.

mod api_support;

use api_support::Server;
use serde_json::{Value, json};

fn text(reply: &Value) -> &str {
    reply["choices"][0]["text"].as_str().unwrap()
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

#[tokio::test]
async fn prompts_come_in_four_forms() {
    let server = Server::shared();
    let prompts = ["The harbour log says", "Hello"];
    let mut ids = Vec::new();
    for prompt in prompts {
        ids.push(server.post("/tokenize", json!({"prompt": prompt})).await.ok()["tokens"].clone());
    }
    let one = server.complete(json!({"prompt": prompts[0]})).await.ok();
    assert_eq!(one["object"], "text_completion");
    let by_ids = server.complete(json!({"prompt": ids[0]})).await.ok();
    assert_eq!(one["choices"], by_ids["choices"]);
    let other = server.complete(json!({"prompt": prompts[1]})).await.ok();
    for list in [json!(prompts), json!(ids)] {
        let both = server.complete(json!({"prompt": list, "n": 2})).await.ok();
        let choices = both["choices"].as_array().unwrap();
        let texts: Vec<&str> = choices.iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(texts, [text(&one), text(&one), text(&other), text(&other)]);
        let indices: Vec<u64> = choices.iter().map(|c| c["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, [0, 1, 2, 3]);
        let lengths = ids.iter().map(|l| l.as_array().unwrap().len()).sum::<usize>();
        assert_eq!(both["usage"]["prompt_tokens"], lengths, "each prompt counts once");
    }
}

#[tokio::test]
async fn sixteen_tokens_by_default() {
    let reply =
        Server::shared().complete(json!({"max_tokens": null, "ignore_eos": true})).await.ok();
    assert_eq!(reply["usage"]["completion_tokens"], 16);
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn echo_scores_the_prompt_without_generating() {
    let server = Server::shared();
    let prompt = "Hello, café 😀 world.";
    let body = json!({"prompt": prompt, "echo": true, "logprobs": 2, "max_tokens": 0});
    let scored = server.complete(body).await.ok();
    assert_eq!(text(&scored), prompt);
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let lists = &scored["choices"][0]["logprobs"];
    let tokens = strings(&lists["tokens"]);
    let count = server.post("/tokenize", json!({"prompt": prompt})).await.ok()["count"].clone();
    assert_eq!(json!(tokens.len()), count);
    let logprobs = lists["token_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), tokens.len());
    assert!(logprobs[0].is_null() && lists["top_logprobs"][0].is_null());
    assert!(logprobs[1..].iter().all(|v| v.as_f64().unwrap() <= 0.0));
    for (i, top) in lists["top_logprobs"].as_array().unwrap().iter().enumerate().skip(1) {
        let top = top.as_object().unwrap();
        assert!((2..=3).contains(&top.len()));
        assert_eq!(top[tokens[i]], logprobs[i], "the token itself is among them");
    }
    // Offsets are in chars: cutting the text there gives the tokens that are whole chars.
    let chars: Vec<char> = prompt.chars().collect();
    let offsets = lists["text_offset"].as_array().unwrap();
    for (token, offset) in tokens.iter().zip(offsets) {
        let rest: String = chars[offset.as_u64().unwrap() as usize..].iter().collect();
        assert!(token.starts_with("bytes:") || rest.starts_with(token), "{token} at {offset}");
    }
}

#[tokio::test]
async fn offsets_of_echo_count_special_tokens_in_the_text() {
    let prompt = "ab<|im_end|>cd";
    let body = json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 0});
    let scored = Server::shared().complete(body).await.ok();
    assert_eq!(text(&scored), prompt);
    let lists = &scored["choices"][0]["logprobs"];
    let offsets = lists["text_offset"].as_array().unwrap();
    let tokens = strings(&lists["tokens"]);
    assert!(tokens.contains(&"<|im_end|>"), "{tokens:?}");
    for (token, offset) in tokens.iter().zip(offsets) {
        let rest = &prompt[offset.as_u64().unwrap() as usize..];
        assert!(rest.starts_with(token), "{token} at {offset}");
    }
}

#[tokio::test]
async fn choices_share_the_log_probabilities_of_their_prompt() {
    let server = Server::shared();
    let body = json!({"echo": true, "logprobs": 2, "prompt_logprobs": 1, "n": 3, "seed": 1,
                      "temperature": 1.5, "max_tokens": 3, "ignore_eos": true});
    let reply = server.complete(body).await.ok();
    let choices = reply["choices"].as_array().unwrap();
    let length = choices[0]["prompt_logprobs"].as_array().unwrap().len();
    for choice in choices {
        assert_eq!(choice["prompt_logprobs"], choices[0]["prompt_logprobs"]);
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let (own, first) = (&choice["logprobs"][list], &choices[0]["logprobs"][list]);
            assert_eq!(own.as_array().unwrap().len(), length + 3, "{list}");
            assert_eq!(own.as_array().unwrap()[..length], first.as_array().unwrap()[..length]);
        }
    }
}

#[tokio::test]
async fn echo_with_output_agrees_with_scoring() {
    let server = Server::shared();
    let body = json!({"echo": true, "logprobs": 1, "max_tokens": 4, "ignore_eos": true});
    let both = server.complete(body).await.ok();
    let plain =
        server.complete(json!({"logprobs": 1, "max_tokens": 4, "ignore_eos": true})).await.ok();
    assert_eq!(text(&both), format!("The harbour log says{}", text(&plain)));
    let (all, own) = (&both["choices"][0]["logprobs"], &plain["choices"][0]["logprobs"]);
    let (tokens, own_tokens) = (strings(&all["tokens"]), strings(&own["tokens"]));
    let start = tokens.len() - 4;
    assert_eq!(tokens[start..], own_tokens[..]);
    // The same sequence scored as a prompt has the log-probabilities it was generated with.
    let mut ids: Vec<Value> =
        server.post("/tokenize", json!({"prompt": "The harbour log says"})).await.ok()["tokens"]
            .as_array()
            .unwrap()
            .clone();
    let fingerprint: Value =
        serde_json::from_str(plain["system_fingerprint"].as_str().unwrap()).unwrap();
    ids.extend(fingerprint["completion_ids"][0].as_array().unwrap().clone());
    let scored = server
        .complete(json!({"prompt": ids, "echo": true, "logprobs": 0, "max_tokens": 0}))
        .await
        .ok();
    let scored = &scored["choices"][0]["logprobs"];
    assert!(scored["top_logprobs"].is_null(), "logprobs 0 gives the tokens' own only");
    for i in 0..4 {
        let generated = own["token_logprobs"][i].as_f64().unwrap();
        let scored = scored["token_logprobs"][start + i].as_f64().unwrap();
        assert!((generated - scored).abs() < 1e-3, "{generated} {scored}");
    }
    let offset = all["text_offset"][start].as_u64().unwrap();
    assert_eq!(offset, "The harbour log says".chars().count() as u64);
}

#[tokio::test]
async fn prompt_logprobs_and_token_ids() {
    let reply = Server::shared()
        .complete(json!({"prompt_logprobs": 2, "return_token_ids": true, "ignore_eos": true}))
        .await
        .ok();
    let choice = &reply["choices"][0];
    let prompt_ids = choice["prompt_token_ids"].as_array().unwrap();
    let logprobs = choice["prompt_logprobs"].as_array().unwrap();
    assert_eq!(prompt_ids.len(), logprobs.len());
    assert!(logprobs[0].is_null());
    for (id, entry) in prompt_ids.iter().zip(logprobs).skip(1) {
        assert!(entry[id.to_string()]["logprob"].as_f64().unwrap() <= 0.0);
    }
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 6);
}

#[tokio::test]
async fn cartridges_change_the_scores_of_the_prompt() {
    let server = Server::shared();
    let body = json!({"echo": true, "logprobs": 1, "max_tokens": 0,
                      "cartridges": [{"id": "alpha", "source": "local"}]});
    let with = server.post("/v1/cartridge/completions", {
        let mut body = body.clone();
        body["prompt"] = json!("The harbour log says");
        body
    });
    let with = with.await.ok();
    let plain = json!({"echo": true, "logprobs": 1, "max_tokens": 0});
    let plain = server.complete(plain).await.ok();
    let scores = |reply: &Value| reply["choices"][0]["logprobs"]["token_logprobs"].clone();
    // A cartridge is keys and values: no logits come out of it, so the first token stays unscored.
    assert!(scores(&with)[0].is_null());
    for i in 1..scores(&plain).as_array().unwrap().len() {
        assert_ne!(scores(&with)[i], scores(&plain)[i]);
    }
    assert_eq!(with["usage"]["prompt_tokens_details"]["cartridge_tokens"], 7);
    let same = server.complete(body).await.ok();
    assert_eq!(same["choices"], with["choices"]);
}

#[tokio::test]
async fn streams_carry_echo_logprobs_and_all_prompts() {
    let server = Server::shared();
    let body = json!({"prompt": ["The harbour log says", "Hello"], "echo": true, "logprobs": 1,
                      "n": 2, "ignore_eos": true});
    let whole = server.complete(body.clone()).await.ok();
    let streamed = server
        .complete(api_support::merge(
            body,
            json!({"stream": true, "stream_options": {"include_usage": true}}),
        ))
        .await;
    assert!(streamed.header("content-type").starts_with("text/event-stream"));
    let mut texts = vec![String::new(); 4];
    let mut tokens: Vec<Vec<String>> = vec![Vec::new(); 4];
    let mut finished = 0;
    let events = streamed.events();
    for event in &events {
        for choice in event["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            texts[index] += choice["text"].as_str().unwrap();
            if let Some(list) = choice["logprobs"]["tokens"].as_array() {
                tokens[index].extend(list.iter().map(|t| t.as_str().unwrap().to_owned()));
            }
            finished += usize::from(choice["finish_reason"].is_string());
        }
    }
    assert_eq!(finished, 4);
    for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["text"], texts[i].as_str());
        assert_eq!(choice["logprobs"]["tokens"], json!(tokens[i]));
    }
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
}

#[tokio::test]
async fn refusals_name_the_field() {
    let server = Server::shared();
    for (extra, param) in [
        (json!({"suffix": "x"}), "suffix"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [1, 99999]}), "prompt[1]"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"logprobs": 65}), "logprobs"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"n": 65}), "n"),
    ] {
        let reply = server.complete(extra.clone()).await;
        let (status, at, message) = reply.error();
        assert_eq!((status, at.as_str()), (400, param), "{extra}: {message}");
    }
    let reply = server.complete(json!({"max_tokens": 5000})).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (400, "context_length_exceeded"));
}
