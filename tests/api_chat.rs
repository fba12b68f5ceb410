//! Chat completions on the demo model.

mod api_support;

use std::sync::Arc;

use api_support::{MODEL, Server};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use cartouche::{
    api::{ApiOptions, AppState, ServedModel, router},
    engine::EngineOptions,
    text::{ChatTemplate, Tokenizer},
};
use serde_json::{Value, json};

fn text(reply: &Value) -> &str {
    reply["choices"][0]["message"]["content"].as_str().unwrap()
}

fn fingerprint(reply: &Value) -> Value {
    serde_json::from_str(reply["system_fingerprint"].as_str().unwrap()).unwrap()
}

fn alpha() -> Value {
    json!([{"id": "alpha", "source": "local"}])
}

#[tokio::test]
async fn a_reply_has_every_member_clients_read() {
    let reply = Server::shared().chat(json!({"ignore_eos": true})).await;
    assert_eq!(reply.header("content-type"), "application/json");
    let mut body = reply.ok();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(body["created"].as_u64().unwrap() > 1_600_000_000);
    assert_eq!(fingerprint(&body)["completion_ids"][0].as_array().unwrap().len(), 8);
    for member in ["id", "created", "system_fingerprint"] {
        body[member] = Value::Null;
    }
    body["choices"][0]["message"]["content"] = Value::Null;
    let prompt = body["usage"]["prompt_tokens"].as_u64().unwrap();
    let expected = json!({
        "id": null,
        "object": "chat.completion",
        "created": null,
        "model": MODEL,
        "choices": [{
            "index": 0,
            "message": {
                "role": "assistant", "content": null, "refusal": null, "annotations": null,
                "audio": null, "function_call": null, "tool_calls": null,
            },
            "logprobs": null,
            "finish_reason": "length",
            "stop_reason": null,
        }],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 8,
            "total_tokens": prompt + 8,
            "prompt_tokens_details": {"cached_tokens": 0, "cartridge_tokens": 0},
        },
        "system_fingerprint": null,
        "service_tier": null,
    });
    body["usage"]["prompt_tokens_details"]["cached_tokens"] = json!(0);
    assert_eq!(body, expected);
}

#[tokio::test]
async fn choices_share_the_prompt_and_differ_by_seed() {
    let server = Server::shared();
    let body = json!({"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 12, "ignore_eos": true});
    let first = server.chat(body.clone()).await.ok();
    let again = server.chat(body).await.ok();
    assert_eq!(first["choices"], again["choices"], "a seeded request repeats");
    assert_eq!(first["choices"].as_array().unwrap().len(), 3);
    let ids = fingerprint(&first)["completion_ids"].clone();
    assert!(ids[0] != ids[1] && ids[1] != ids[2]);
    assert_eq!(first["usage"]["completion_tokens"], 36);
    let one = server.chat(json!({"max_tokens": 1})).await.ok();
    assert_eq!(first["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn logprobs_have_ids_bytes_and_descending_alternatives() {
    let server = Server::shared();
    let body = json!({"logprobs": true, "top_logprobs": 20, "ignore_eos": true});
    let reply = server.chat(body).await.ok();
    let content = reply["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 8);
    let ids = fingerprint(&reply)["completion_ids"][0].clone();
    for (entry, id) in content.iter().zip(ids.as_array().unwrap()) {
        assert_eq!(&entry["id"], id);
        let bytes: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).unwrap();
        let token = entry["token"].as_str().unwrap();
        assert!(token.starts_with("bytes:") || bytes == token.as_bytes());
        let top = entry["top_logprobs"].as_array().unwrap();
        let values: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert_eq!(values.len(), 20);
        assert!(values.windows(2).all(|w| w[0] >= w[1]));
        assert_eq!(top[0]["id"], *id, "greedy takes the first");
        assert_eq!(top[0]["logprob"], entry["logprob"]);
    }
    let named = json!({"logprobs": true, "return_tokens_as_token_ids": true, "max_tokens": 1});
    let named = server.chat(named).await.ok();
    let token = &named["choices"][0]["logprobs"]["content"][0]["token"];
    assert_eq!(*token, format!("token_id:{}", ids[0]));
}

#[tokio::test]
async fn the_fingerprint_packs_what_logprobs_show() {
    let server = Server::shared();
    let shown = json!({"logprobs": true, "top_logprobs": 5, "n": 2, "ignore_eos": true});
    let shown = server.chat(shown).await.ok();
    let packed = json!({"logprobs": true, "top_logprobs": 5, "n": 2, "ignore_eos": true,
                        "logprobs_in_fingerprint": true});
    let reply = server.chat(packed).await.ok();
    assert!(reply["choices"][0]["logprobs"].is_null());
    let fingerprint = fingerprint(&reply);
    for choice in 0..2 {
        let bytes =
            |key: &str| STANDARD.decode(fingerprint[key][choice].as_str().unwrap()).unwrap();
        let words = |key: &str| -> Vec<[u8; 4]> {
            bytes(key).chunks(4).map(|b| b.try_into().unwrap()).collect()
        };
        let content = shown["choices"][choice]["logprobs"]["content"].as_array().unwrap();
        let (chosen, ids) = (words("packed_chosen_logprobs"), words("packed_topk_indices"));
        let logprobs = words("packed_topk_logprobs");
        assert_eq!((chosen.len(), ids.len(), logprobs.len()), (8, 40, 40));
        for (t, entry) in content.iter().enumerate() {
            let close = |bytes: [u8; 4], value: &Value| {
                let (a, b) = (f64::from(f32::from_le_bytes(bytes)), value.as_f64().unwrap());
                assert!((a - b).abs() < 1e-4, "{a} {b}");
            };
            close(chosen[t], &entry["logprob"]);
            for k in 0..5 {
                let top = &entry["top_logprobs"][k];
                assert_eq!(i64::from(i32::from_le_bytes(ids[5 * t + k])), top["id"]);
                close(logprobs[5 * t + k], &top["logprob"]);
            }
        }
    }
    let plain = json!({"logprobs_in_fingerprint": true, "max_tokens": 2, "ignore_eos": true});
    let plain = server.chat(plain).await.ok();
    let plain = self::fingerprint(&plain);
    assert_eq!(
        STANDARD.decode(plain["packed_chosen_logprobs"][0].as_str().unwrap()).unwrap().len(),
        8
    );
    assert!(plain["packed_topk_indices"].is_null());
}

#[tokio::test]
async fn logprobs_can_ignore_the_temperature() {
    let server = Server::shared();
    let body = |temperature: f64, ignore: bool| {
        json!({"temperature": temperature, "seed": 3, "max_tokens": 1, "logprobs": true,
               "top_logprobs": 3, "logprobs_ignore_temperature": ignore, "ignore_eos": true})
    };
    let top = |reply: Value| {
        reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"]
            .as_f64()
            .unwrap()
    };
    let greedy = top(server.chat(body(0.0, false)).await.ok());
    let hot = top(server.chat(body(3.0, false)).await.ok());
    let ignored = top(server.chat(body(3.0, true)).await.ok());
    assert!(hot < greedy - 1e-4, "a temperature flattens what is described: {hot} {greedy}");
    assert!((ignored - greedy).abs() < 1e-5);
}

#[tokio::test]
async fn stop_strings_cut_the_text_but_not_the_ids() {
    let server = Server::shared();
    let full = server.chat(json!({"max_tokens": 12, "ignore_eos": true})).await.ok();
    let chars: Vec<char> = text(&full).chars().collect();
    assert!(chars.len() > 6, "the demo model must write something here: {}", text(&full));
    let stop: String = chars[3..5].iter().collect();
    let cut = text(&full).find(&stop).unwrap();
    let body = json!({"max_tokens": 12, "ignore_eos": true, "stop": [stop, "\u{0}never"]});
    let reply = server.chat(body.clone()).await.ok();
    assert_eq!(text(&reply), &text(&full)[..cut]);
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    assert_eq!(reply["choices"][0]["stop_reason"], stop.as_str());
    let ids = fingerprint(&reply)["completion_ids"][0].as_array().unwrap().clone();
    assert_eq!(reply["usage"]["completion_tokens"], ids.len());
    assert_eq!(ids[..], fingerprint(&full)["completion_ids"][0].as_array().unwrap()[..ids.len()]);
    let mut kept = body;
    kept["include_stop_str_in_output"] = json!(true);
    let kept = server.chat(kept).await.ok();
    assert_eq!(text(&kept), format!("{}{stop}", &text(&full)[..cut]));
}

#[tokio::test]
async fn cartridges_are_named_in_every_supported_way() {
    let server = Server::new(ApiOptions::default(), EngineOptions::default());
    let generation = server.insert("alpha", 7, 9);
    // The demo model is sure of its first token with and without; the unlikely ones tell.
    let plain = server.chat(json!({"logprobs": true, "top_logprobs": 5})).await;
    assert_eq!(plain.header("x-cartouche-cartridges"), "");
    assert!(plain.ok().get("cartridges").is_none());
    let listed = json!({"logprobs": true, "top_logprobs": 5, "cartridges": alpha()});
    let listed = server.chat(listed).await;
    assert_eq!(listed.header("x-cartouche-cartridges"), format!("alpha@{generation}"));
    let body = listed.ok();
    assert_eq!(body["cartridges"], json!([{"id": "alpha", "generation": generation, "tokens": 7}]));
    assert_eq!(body["usage"]["prompt_tokens_details"]["cartridge_tokens"], 7);
    assert_eq!(body["usage"]["prompt_tokens"], plain.ok()["usage"]["prompt_tokens"]);
    let unlikely = |r: &Value| {
        let first = &r["choices"][0]["logprobs"]["content"][0];
        first["top_logprobs"][4]["logprob"].as_f64().unwrap()
    };
    assert!((unlikely(&body) - unlikely(&plain.ok())).abs() > 1e-3, "the cartridge is attended to");

    let request = json!({
        "messages": [{"role": "user", "content": "Hello, who are you?"}],
        "max_tokens": 8, "temperature": 0, "logprobs": true, "top_logprobs": 5,
        "cartridges": alpha(),
    });
    for path in ["/v1/cartridge/chat/completions", "/custom/cartridge/chat/completions"] {
        assert_eq!(server.post(path, request.clone()).await.ok()["choices"], body["choices"]);
    }
    for model in [format!("{MODEL}:alpha"), ":alpha".to_owned()] {
        let reply = server.chat(json!({"logprobs": true, "top_logprobs": 5, "model": model})).await;
        assert_eq!(reply.ok()["choices"], body["choices"]);
        assert_eq!(reply.ok()["model"], model.as_str());
    }

    // A block leaves the (empty) system message behind, so it equals a list beside such a message.
    let messages = |system: &str| {
        json!([{"role": "system", "content": system},
               {"role": "user", "content": "Hello, who are you?"}])
    };
    let block = r#"<cartridge>{"id": "alpha", "source": "local"}</cartridge>"#;
    let by_block = server
        .chat(json!({"logprobs": true, "messages": messages(block),
                                      "cartridges": [{"id": "beta", "source": "local"}]}))
        .await;
    let by_list = server
        .chat(json!({"logprobs": true, "messages": messages(""), "cartridges": alpha()}))
        .await;
    assert_eq!(by_block.ok()["choices"], by_list.ok()["choices"]);
    assert!(by_block.header("x-cartouche-warnings").contains("replace the cartridges list"));
}

#[tokio::test]
async fn several_cartridges_keep_the_order_of_the_request_unless_sorted() {
    let both = json!([{"id": "beta", "source": "local"}, {"id": "alpha", "source": "local"},
                      {"id": "beta", "source": "local"}]);
    let ids = |reply: Value| -> Vec<String> {
        let list = reply["cartridges"].as_array().unwrap().clone();
        list.iter().map(|c| c["id"].as_str().unwrap().to_owned()).collect()
    };
    let two_sources = json!([{"id": "alpha", "source": "local"}, {"id": "alpha"}]);
    let reply = Server::shared().chat(json!({"cartridges": two_sources})).await.ok();
    assert_eq!(ids(reply), ["alpha"]);
    let reply = Server::shared().chat(json!({"cartridges": both})).await.ok();
    assert_eq!(reply["usage"]["prompt_tokens_details"]["cartridge_tokens"], 12);
    assert_eq!(ids(reply), ["beta", "alpha"]);
    let sorted = ApiOptions { sort_cartridges: true, ..ApiOptions::default() };
    let server = Server::new(sorted, EngineOptions::default());
    assert_eq!(ids(server.chat(json!({"cartridges": both})).await.ok()), ["alpha", "beta"]);
}

#[tokio::test]
async fn a_replaced_cartridge_answers_with_its_new_generation() {
    let server = Server::new(ApiOptions::default(), EngineOptions::default());
    let body = json!({"cartridges": alpha(), "logprobs": true});
    let before = server.chat(body.clone()).await.ok();
    let generation = server.insert("alpha", 7, 77);
    let after = server.chat(body).await.ok();
    assert_eq!(after["cartridges"][0]["generation"], generation.as_str());
    assert_ne!(before["cartridges"], after["cartridges"]);
    assert_ne!(before["choices"][0]["logprobs"], after["choices"][0]["logprobs"]);
}

#[tokio::test]
async fn an_unusable_cartridge_is_an_error_on_every_path() {
    let server = Server::shared();
    let gone = json!([{"id": "gone", "source": "local"}]);
    let block = json!([{"role": "system", "content": r#"<cartridge>{"id":"gone","source":"local"}</cartridge>"#}]);
    for extra in [
        json!({"cartridges": gone}),
        json!({"messages": block}),
        json!({"model": format!("{MODEL}:gone")}),
        json!({"cartridges": gone, "stream": true}),
    ] {
        let reply = server.chat(extra).await;
        assert_eq!(reply.error().0, 404);
        assert_eq!(
            (reply.error().1.as_str(), reply.code().as_str()),
            ("cartridges", "cartridge_not_found")
        );
    }
    let broken = json!([{"role": "system", "content": "<cartridge>{\"name\": 1}</cartridge>"}]);
    assert_eq!(server.chat(json!({"messages": broken})).await.error().1, "messages[0].content");
}

#[tokio::test]
async fn other_models_are_served_with_a_warning_or_refused() {
    let reply = Server::shared().chat(json!({"model": "todo"})).await;
    assert_eq!(reply.ok()["model"], "todo");
    assert!(reply.header("x-cartouche-warnings").contains(MODEL));
    assert_eq!(Server::shared().chat(json!({"model": null})).await.ok()["model"], MODEL);
    let strict = ApiOptions { strict_model: true, ..ApiOptions::default() };
    let server = Server::new(strict, EngineOptions::default());
    let reply = server.chat(json!({"model": "todo"})).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (404, "model_not_found"));
    server.chat(json!({"model": "CARTOUCHE-demo"})).await.ok();
}

#[tokio::test]
async fn messages_end_the_prompt_as_their_last_role_asks() {
    let server = Server::shared();
    let ids = |extra: Value| {
        let server = server.clone();
        async move {
            let mut body = json!({"return_token_ids": true, "max_tokens": 1});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            let reply = server.chat(body).await.ok();
            let ids = reply["prompt_token_ids"].clone();
            let text = server.post("/detokenize", json!({"tokens": ids})).await.ok();
            text["prompt"].as_str().unwrap().to_owned()
        }
    };
    let user = json!({"role": "user", "content": [{"type": "text", "text": "a"},
                                                  {"type": "text", "text": "b"}]});
    let assistant = json!({"role": "assistant", "content": "Well"});
    let open = "<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(ids(json!({"messages": [user]})).await, open);
    let resumed = ids(json!({"messages": [user, assistant]})).await;
    assert_eq!(resumed, format!("{open}Well"));
    let closed = json!({"messages": [user, assistant], "add_generation_prompt": true});
    assert_eq!(ids(closed).await, format!("{open}Well<|im_end|>\n<|im_start|>assistant\n"));
}

#[tokio::test]
async fn templates_of_requests_are_for_trusted_clients() {
    // Doubling a string forty times would end the process if it were run.
    let bomb = "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}\
                {% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    let server = Server::shared();
    for extra in [
        json!({"chat_template": bomb}),
        json!({"chat_template_kwargs": {"chat_template": bomb}}),
        json!({"apply_chat_template_overrides": {"chat_template": bomb}}),
    ] {
        let refused = server.chat(extra.clone()).await;
        assert_eq!((refused.error().0, refused.error().1.as_str()), (400, "chat_template"));
        assert_eq!(refused.code(), "unsupported_parameter");
        let mut body = extra;
        body["messages"] = json!([{"role": "user", "content": "a"}]);
        assert_eq!(server.post("/tokenize", body).await.code(), "unsupported_parameter");
    }
    let options = ApiOptions { allow_request_templates: true, ..ApiOptions::default() };
    let server = Server::new(options, EngineOptions::default());
    let body = json!({"messages": [{"role": "user", "content": "a"}],
        "apply_chat_template_overrides":
            {"chat_template": "{{ messages[0].content }}|{{ x }}", "x": 5}});
    let tokens = server.post("/tokenize", body).await.ok()["tokens"].clone();
    let text = server.post("/detokenize", json!({"tokens": tokens})).await.ok();
    assert_eq!(text["prompt"], "a|5");
    let broken = server.chat(json!({"chat_template": "{{ 1 +"})).await.error();
    assert_eq!((broken.0, broken.1.as_str()), (400, "chat_template"));
}

/// The demo model behind a SentencePiece tokenizer that writes newlines as bytes.
fn sentencepiece() -> (Server, u32) {
    let path = format!("{}/tests/fixtures/tokenizers/llama2.json", env!("CARGO_MANIFEST_DIR"));
    let fixture: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let json = fixture["tokenizer"].to_string();
    let tokenizer = Tokenizer::from_bytes(json.as_bytes()).unwrap();
    let hello = tokenizer.token_id("▁hello").unwrap();
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let base = Server::shared();
    let state = Arc::new(AppState {
        engine: base.state.engine.clone(),
        registry: Arc::clone(&base.state.registry),
        model: Arc::new(ServedModel {
            name: MODEL.to_owned(),
            tokenizer,
            chat_template: Some(ChatTemplate::new(template, serde_json::Map::new()).unwrap()),
            eos_token_ids: vec![],
            is_llama3: false,
        }),
        options: ApiOptions::default(),
        access: Arc::clone(&base.state.access),
        ready: base.state.ready.clone(),
        metrics: Arc::clone(&base.state.metrics),
        in_flight: Arc::clone(&base.state.in_flight),
        started: 0,
    });
    (Server { router: router(Arc::clone(&state)), state }, hello)
}

#[tokio::test]
async fn a_continued_message_keeps_the_space_it_goes_on_with() {
    let (server, hello) = sentencepiece();
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let chat = |extra: Value| {
        let bias = json!({"messages": messages, "logit_bias": {hello.to_string(): 100},
                          "max_tokens": 2});
        let server = server.clone();
        async move { text(&server.chat(api_support::merge(bias, extra)).await.ok()).to_owned() }
    };
    assert_eq!(chat(json!({})).await, " hello hello");
    assert_eq!(chat(json!({"add_generation_prompt": true})).await, "hello hello");
}

#[tokio::test]
async fn a_prompt_that_ends_in_a_newline_does_not_meet_its_own_stop_string() {
    let (server, hello) = sentencepiece();
    let body = json!({"prompt": "hello\n", "stop": ["\n"], "max_tokens": 2,
                      "logit_bias": {hello.to_string(): 100}});
    let reply = server.complete(body).await.ok();
    assert_eq!(reply["choices"][0]["text"], " hello hello");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn ignored_fields_are_named_in_a_header() {
    let reply = Server::shared()
        .chat(json!({"user": "me", "store": false, "parallel_tool_calls": true, "zébra": 1}))
        .await;
    reply.ok();
    assert_eq!(
        reply.header("x-cartouche-ignored-fields"),
        "parallel_tool_calls, store, user, z?bra"
    );
}

#[tokio::test]
async fn refusals_name_the_field() {
    let server = Server::shared();
    for (extra, param) in [
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0].type",
        ),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"top_logprobs": 5}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 65}), "top_logprobs"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 8, "max_completion_tokens": 9}), "max_tokens"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"stop": ["a", ""]}), "stop"),
        (json!({"logit_bias": {"999999": 1}}), "logit_bias.999999"),
        (json!({"cartridges": [{"source": "local"}]}), "cartridges[0]"),
        (json!({"cartridges": [{"id": ""}]}), "cartridges[0].id"),
        (json!({"chat_template": "{{ 1 +"}), "chat_template"),
        (json!({"model": "x".repeat(2000)}), "model"),
        (json!({"min_tokens": 9}), "min_tokens"),
    ] {
        let (status, at, message) = server.chat(extra.clone()).await.error();
        assert_eq!((status, at.as_str()), (400, param), "{extra}: {message}");
    }
    let long = "word ".repeat(6000);
    let reply = server
        .chat(json!({"messages": [{"role": "user", "content": long}], "max_tokens": null}))
        .await;
    assert_eq!((reply.error().0, reply.code().as_str()), (400, "context_length_exceeded"));
    assert!(reply.error().2.starts_with("Request has prompt length = "));
}

#[tokio::test]
async fn sampling_fields_reach_the_engine() {
    let server = Server::shared();
    let biased = json!({"logit_bias": {"700": 100}, "max_tokens": 3, "ignore_eos": true});
    let reply = server.chat(biased).await.ok();
    assert_eq!(fingerprint(&reply)["completion_ids"][0], json!([700, 700, 700]));
    let stopped = json!({"logit_bias": {"700": 100}, "stop_token_ids": [700]});
    let reply = server.chat(stopped).await.ok();
    assert_eq!(text(&reply), "");
    assert_eq!(reply["choices"][0]["stop_reason"], 700);
    assert_eq!(reply["usage"]["completion_tokens"], 1);
    let ended = json!({"logit_bias": {"2": 100}, "max_tokens": 5});
    let reply = server.chat(ended).await.ok();
    assert_eq!((text(&reply), &reply["choices"][0]["finish_reason"]), ("", &json!("stop")));
    assert_eq!(fingerprint(&reply)["completion_ids"][0], json!([2]), "EOS is among the ids");
    let minimum = json!({"logit_bias": {"2": 100}, "max_tokens": 5, "min_tokens": 3});
    let reply = server.chat(minimum).await.ok();
    assert_eq!(reply["usage"]["completion_tokens"], 4);
}
