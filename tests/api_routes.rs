//! Routes beside generation, and what happens at the edges of HTTP.

mod api_support;

use api_support::{MODEL, Server};
use axum::{body::Body, http::Request};
use cartouche::{api::ApiOptions, engine::EngineOptions, limits};
use serde_json::json;

#[tokio::test]
async fn health_and_ping() {
    let server = Server::new(ApiOptions::default(), EngineOptions::default());
    assert_eq!(server.get("/ping").await.ok(), json!({"message": "pong"}));
    assert_eq!(server.get("/health/live").await.ok(), json!({"status": "alive"}));
    assert_eq!(server.get("/health/ready").await.ok(), json!({"status": "ready"}));
    server.state.ready.drain();
    let reply = server.get("/health/ready").await;
    assert_eq!((reply.error().0, reply.code().as_str()), (503, "shutting_down"));
    assert!(reply.headers.contains_key("retry-after"));
    assert_eq!(server.get("/health").await.status, 503);
    assert_eq!(server.get("/health/live").await.status, 200);
    for reply in [server.chat(json!({})).await, server.complete(json!({})).await] {
        assert_eq!((reply.error().0, reply.code().as_str()), (503, "shutting_down"));
        assert!(reply.headers.contains_key("retry-after"));
        assert_eq!(reply.header("connection"), "close");
    }
    server.state.ready.set_ready();
    assert_eq!(server.get("/health").await.status, 503, "a drain is not taken back");
}

#[tokio::test]
async fn exactly_one_model_is_listed() {
    let server = Server::shared();
    let list = server.get("/v1/models").await.ok();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["max_model_len"], 4096);
    assert_eq!(server.get("/v1/models/Cartouche-Demo").await.ok(), list["data"][0]);
    let reply = server.get("/v1/models/org/other").await;
    assert_eq!((reply.error().0, reply.code().as_str()), (404, "model_not_found"));
    let reply = server.get("/v1/models/%FF").await;
    assert_eq!(reply.error().0, 400, "a path that is not UTF-8 has a JSON error too");
}

#[tokio::test]
async fn max_model_len_is_what_the_cache_can_hold() {
    let engine = EngineOptions { kv_bytes: 1 << 20, ..EngineOptions::default() };
    let server = Server::new(ApiOptions::default(), engine);
    let info = server.state.engine.info();
    assert!(info.kv_tokens < info.max_context, "the test needs a small cache: {info:?}");
    let model = server.get("/v1/models").await.ok()["data"][0].clone();
    assert_eq!(model["max_model_len"], info.kv_tokens);
    let reply = server.post("/tokenize", json!({"prompt": "a"})).await.ok();
    assert_eq!(reply["max_model_len"], info.kv_tokens);
}

#[tokio::test]
async fn errors_cut_what_the_client_sent() {
    let server = Server::shared();
    let long = "x".repeat(1_000_000);
    for body in [
        json!({"prompt": "a", "logit_bias": {long.as_str(): 1}}),
        json!({"prompt": {long.as_str(): 1}}),
        json!({"prompt": "a", "temperature": long}),
        json!({"prompt": "a", "cartridges": [{"id": "a", "source": long}]}),
    ] {
        let reply = server.post("/v1/completions", body).await;
        assert_eq!(reply.error().0, 400);
        assert!(reply.text.len() < 4 * limits::MAX_ERROR_TEXT_BYTES, "{}", reply.text.len());
    }
}

#[tokio::test]
async fn bodies_of_too_many_values_are_refused_before_they_are_built() {
    let zeros = "0,".repeat(limits::MAX_JSON_VALUES);
    for (path, body) in [
        ("/v1/completions", format!("{{\"prompt\":[{zeros}0]}}")),
        ("/v1/chat/completions", format!("{{\"messages\":[{zeros}0]}}")),
        ("/detokenize", format!("{{\"tokens\":[{zeros}0]}}")),
    ] {
        let (status, _, message) = Server::shared().post_text(path, &body).await.error();
        assert_eq!(status, 400);
        assert!(message.contains("values"), "{message}");
    }
}

#[tokio::test]
async fn a_long_text_is_refused_by_its_bytes() {
    let server = Server::shared();
    let long = "x".repeat(limits::MAX_BODY_BYTES - 1000);
    for reply in [
        server.complete(json!({"prompt": long})).await,
        server.chat(json!({"messages": [{"role": "user", "content": long}]})).await,
        server.post("/tokenize", json!({"prompt": long})).await,
    ] {
        assert_eq!((reply.error().0, reply.code().as_str()), (400, "context_length_exceeded"));
        assert!(reply.error().2.contains("bytes"), "{}", reply.error().2);
    }
}

#[tokio::test]
async fn cartridges_have_their_own_list() {
    let server = Server::new(ApiOptions::default(), EngineOptions::default());
    let generation = server.insert("gamma", 9, 3);
    let list = server.get("/v1/cartridges").await.ok();
    let entries = list["data"].as_array().unwrap();
    assert_eq!(entries.len(), 3);
    let entry = entries.iter().find(|e| e["id"] == "gamma").unwrap();
    assert_eq!(entry["object"], "cartridge");
    assert_eq!(entry["generation"], generation.as_str());
    assert_eq!((&entry["tokens"], &entry["frozen_tokens"]), (&json!(9), &json!(1)));
    assert_eq!(entry["resident"], true);
}

#[tokio::test]
async fn tokenize_and_detokenize() {
    let server = Server::shared();
    let body =
        json!({"model": MODEL, "prompt": "Hello world, café 😀.", "return_token_strs": true});
    let reply = server.post("/tokenize", body).await.ok();
    assert_eq!(reply["count"], reply["tokens"].as_array().unwrap().len());
    assert_eq!(reply["max_model_len"], 4096);
    let pieces: Vec<&str> =
        reply["token_strs"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
    assert!(pieces.concat().starts_with("HelloĠworld,ĠcafÃ©"), "{pieces:?}");
    let text = server.post("/detokenize", json!({"tokens": reply["tokens"]})).await.ok();
    assert_eq!(text, json!({"prompt": "Hello world, café 😀."}));

    let messages = json!([{"role": "user", "content": "Hi"}]);
    let chat = server.post("/tokenize", json!({"messages": messages})).await.ok();
    let text = server.post("/detokenize", json!({"tokens": chat["tokens"]})).await.ok();
    assert_eq!(text["prompt"], "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    let closed = json!({"messages": messages, "add_generation_prompt": false, "zebra": 1});
    let closed = server.post("/tokenize", closed).await;
    assert_eq!(closed.header("x-cartouche-ignored-fields"), "zebra");
    assert!(closed.ok()["count"].as_u64() < chat["count"].as_u64());

    assert_eq!(server.post("/tokenize", json!({})).await.error().1, "prompt");
    let both = json!({"prompt": "a", "messages": messages});
    assert_eq!(server.post("/tokenize", both).await.error().0, 400);
    let unknown = server.post("/detokenize", json!({"tokens": [1, 2154]})).await.error();
    assert_eq!((unknown.0, unknown.1.as_str()), (400, "tokens[1]"));
}

#[tokio::test]
async fn errors_have_one_shape() {
    let server = Server::shared();
    assert_eq!(server.get("/v1/nothing").await.error().0, 404);
    assert_eq!(server.get("/v1/chat/completions").await.error().0, 405);
    for (body, part) in [
        ("", "line 1 column 0"),
        ("{", "line 1 column 1"),
        ("{\"messages\": [],}", "line 1 column"),
        ("[]", "expected a map"),
        ("null", "expected a map"),
        ("{\"messages\": 5}", "messages"),
        ("{\"messages\": [], \"messages\": []}", "duplicate field"),
    ] {
        let (status, _, message) = server.post_text("/v1/chat/completions", body).await.error();
        assert_eq!(status, 400, "{body}");
        assert!(message.contains(part), "{body}: {message}");
    }
    let deep = format!("{{\"messages\": {}", "[".repeat(100_000));
    assert_eq!(server.post_text("/v1/chat/completions", &deep).await.error().0, 400);
}

#[tokio::test]
async fn large_bodies_are_413() {
    let server = Server::shared();
    let body = format!("{{\"prompt\":\"{}\"}}", "x".repeat(limits::MAX_BODY_BYTES));
    let reply = server.post_text("/v1/completions", &body).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (413, "body_too_large"));
}

#[tokio::test]
async fn a_full_queue_is_429() {
    let engine = EngineOptions { max_queued_sequences: 0, ..EngineOptions::default() };
    let server = Server::new(ApiOptions::default(), engine);
    for stream in [false, true] {
        let reply = server.chat(json!({"stream": stream})).await;
        assert_eq!((reply.error().0, reply.code().as_str()), (429, "queue_full"));
        assert_eq!(reply.header("retry-after"), "1");
    }
}

#[tokio::test]
async fn any_content_type_is_read_as_json() {
    let body = json!({"prompt": "a", "max_tokens": 1}).to_string();
    let request = Request::post("/v1/completions")
        .header("content-type", "application/x-www-form-urlencoded")
        .body(Body::from(body))
        .unwrap();
    Server::shared().send(request).await.ok();
}

#[tokio::test]
async fn request_ids_come_back() {
    let server = Server::shared();
    let ping = |id: &str| {
        let request = Request::get("/ping").header("x-request-id", id);
        server.send(request.body(Body::empty()).unwrap())
    };
    assert_eq!(ping("abc-123").await.header("x-request-id"), "abc-123");
    let long = "x".repeat(limits::MAX_REQUEST_ID_BYTES + 1);
    let replaced = ping(&long).await;
    let replaced = replaced.header("x-request-id");
    assert!(!replaced.is_empty() && replaced.len() <= limits::MAX_REQUEST_ID_BYTES);
    let made = [server.get("/ping").await, server.get("/nothing").await];
    assert_ne!(made[0].header("x-request-id"), made[1].header("x-request-id"));
    assert!(!made[1].header("x-request-id").is_empty());
}

#[tokio::test]
async fn priority_is_read_and_wrong_ones_are_named() {
    let server = Server::shared();
    for value in [json!("interactive"), json!("batch"), json!(-1), json!(7)] {
        let reply = server.chat(json!({"priority": value})).await;
        assert_eq!(reply.header("x-cartouche-ignored-fields"), "");
        reply.ok();
        server.complete(json!({"priority": value})).await.ok();
    }
    for value in [json!("high"), json!(1.5), json!([1])] {
        let reply = server.chat(json!({"priority": value})).await;
        let (status, param, _) = reply.error();
        assert_eq!((status, param.as_str()), (400, "priority"));
    }
}
