//! What a client can make grow or last, each with its refusal: nesting, lists, bodies, heads, time.

mod api_support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use api_support::{Server, wire::Listening};
use axum::body::Body;
use axum::http::Request;
use cartouche::{api::ApiOptions, engine::EngineOptions, limits};
use serde_json::{Value, json};

fn nested(depth: usize) -> Value {
    (0..depth).fold(json!(1), |inner, _| json!([inner]))
}

/// In every place where any value is taken. The parser's own limit is 128.
#[tokio::test]
async fn json_that_nests_too_deep_is_a_400() {
    let server = Server::shared();
    let user = json!({"role": "user", "content": "x"});
    for depth in [200, 10_000] {
        let text = format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        for (path, body) in [
            ("/v1/chat/completions", format!("{{\"messages\": [{user}], \"tools\": [{text}]}}")),
            ("/v1/chat/completions", format!("{{\"messages\": [{{\"role\": {text}}}]}}")),
            (
                "/v1/chat/completions",
                format!("{{\"messages\": [{user}], \"chat_template_kwargs\": {{\"a\": {text}}}}}"),
            ),
            ("/v1/chat/completions", format!("{{\"messages\": [{user}], \"zebra\": {text}}}")),
            ("/v1/completions", format!("{{\"prompt\": {text}}}")),
            ("/v1/completions", format!("{{\"prompt\": \"x\", \"stop\": {text}}}")),
            ("/tokenize", format!("{{\"messages\": [{user}], \"documents\": {text}}}")),
            ("/detokenize", format!("{{\"tokens\": {text}}}")),
            ("/v1/cartridges/load", format!("{{\"id\": {text}}}")),
        ] {
            let reply = server.post_text(path, &body).await;
            assert_eq!(reply.error().0, 400, "{path} {}", &body[..80]);
        }
    }
    let block = format!("<cartridge>{{\"id\": \"alpha\", \"x\": {}}}</cartridge>", nested(100));
    let messages = json!([{"role": "system", "content": block}, user]);
    server.chat(json!({"messages": messages})).await.ok();
    let block =
        format!("<cartridge>{{\"id\": \"alpha\", \"x\": {}1}}</cartridge>", "[".repeat(200));
    let messages = json!([{"role": "system", "content": block}, user]);
    assert_eq!(server.chat(json!({"messages": messages})).await.error().1, "messages[0].content");
}

#[tokio::test]
async fn lists_have_limits_that_name_the_field() {
    let server = Server::shared();
    let user = json!({"role": "user", "content": "x"});
    let many = |count: usize, value: Value| Value::Array(vec![value; count]);
    let bias: serde_json::Map<String, Value> =
        (0..=limits::MAX_LOGIT_BIAS).map(|i| (i.to_string(), json!(1))).collect();
    let ids = (0..=limits::MAX_CARTRIDGES_PER_REQUEST).map(|i| json!({"id": i.to_string()}));
    for (field, value) in [
        ("messages", many(limits::MAX_MESSAGES + 1, user)),
        ("stop", many(limits::MAX_STOP_STRINGS + 1, json!("x"))),
        ("stop_token_ids", many(limits::MAX_LOGIT_BIAS + 1, json!(1))),
        ("logit_bias", Value::Object(bias)),
        ("cartridges", ids.collect()),
        ("n", json!(limits::MAX_CHOICES + 1)),
    ] {
        let reply = server.chat(json!({field: value})).await;
        assert_eq!((reply.error().0, reply.error().1.as_str()), (400, field), "{}", reply.text);
    }
    let prompts = many(limits::MAX_PROMPTS + 1, json!("x"));
    assert_eq!(server.complete(json!({"prompt": prompts})).await.error().1, "prompt");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_a_408() {
    let server = Server::shared();
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/cartridges/load"] {
        let silent = tokio_stream::pending::<Result<Vec<u8>, std::io::Error>>();
        let request = Request::post(path).body(Body::from_stream(silent)).unwrap();
        let reply = server.send(request).await;
        assert_eq!((reply.error().0, reply.code().as_str()), (408, "body_timeout"), "{path}");
    }
    let silent = tokio_stream::pending::<Result<Vec<u8>, std::io::Error>>();
    let request = Request::put("/v1/cartridges/x").body(Body::from_stream(silent)).unwrap();
    let reply = server.send(request).await;
    assert!([408, 502].contains(&reply.error().0), "{}", reply.text);
}

/// Its status, or none where the connection was closed without a reply.
fn status_of(mut socket: TcpStream) -> Option<u16> {
    let mut text = Vec::new();
    // A reset after the reply says that not all was read.
    let _ = socket.read_to_end(&mut text);
    String::from_utf8_lossy(&text).split(' ').nth(1)?.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_that_are_too_large_are_refused() {
    // Its own: it is stopped at the end.
    let server = Server::new(ApiOptions::default(), EngineOptions::default());
    let listening = Listening::start(&server).await;
    let address = listening.address;
    let ask = move |headers: String| {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let _ = socket.write_all(
            format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n")
                .as_bytes(),
        );
        status_of(socket)
    };
    let work = move || {
        let long = format!("x-long: {}\r\n", "a".repeat(2 << 20));
        let many: String = (0..1000).map(|i| format!("x-{i}: a\r\n")).collect();
        let key = format!("authorization: Bearer {}\r\n", "a".repeat(100_000));
        (ask(String::new()), ask(long), ask(many), ask(key))
    };
    let (plain, long, many, key) = tokio::task::spawn_blocking(work).await.unwrap();
    assert_eq!(plain, Some(200));
    // The reply may be lost with a head that is cut off.
    for status in [long, many] {
        assert!([Some(431), None].contains(&status), "{status:?}");
    }
    // Within the limits of a head; without keys it does not matter.
    assert_eq!(key, Some(200));
}
