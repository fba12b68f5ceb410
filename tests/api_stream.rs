//! Streaming over real sockets: pieces come as they are made, and an end is always told.

mod api_support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use api_support::Server;
use cartouche::{api::ApiOptions, engine::EngineOptions};
use serde_json::{Value, json};

fn delta(event: &Value) -> &str {
    event["choices"][0]["delta"]["content"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn chunks_add_up_to_the_whole_reply() {
    let server = Server::shared();
    let body = json!({"max_tokens": 10, "ignore_eos": true, "seed": 5, "temperature": 1.0,
                      "logprobs": true, "top_logprobs": 2, "n": 2});
    let whole = server.chat(body.clone()).await.ok();
    let mut body = body;
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let reply = server.chat(body).await;
    assert!(reply.header("content-type").starts_with("text/event-stream"));
    let events = reply.events();
    for index in 0..2 {
        let of: Vec<&Value> = events.iter().filter(|e| e["choices"][0]["index"] == index).collect();
        assert_eq!(of[0]["choices"][0]["delta"]["role"], "assistant");
        let content: String = of.iter().map(|e| delta(e)).collect();
        let expected = &whole["choices"][index];
        assert_eq!(expected["message"]["content"], content.as_str());
        let logprobs: Vec<Value> = of
            .iter()
            .filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array())
            .flatten()
            .cloned()
            .collect();
        assert_eq!(expected["logprobs"]["content"], json!(logprobs));
        let last = of.last().unwrap();
        assert_eq!(last["choices"][0]["finish_reason"], "length");
        assert_eq!(last["choices"][0]["delta"], json!({}));
        assert!(
            of.iter().all(|e| e["object"] == "chat.completion.chunk" && e["id"] == of[0]["id"])
        );
        assert!(of.len() > 10, "one chunk per token");
    }
    let usage = events.last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 20);
    assert_eq!(usage["system_fingerprint"], whole["system_fingerprint"]);
}

#[tokio::test]
async fn without_include_usage_no_chunk_has_usage() {
    let reply = Server::shared().chat(json!({"stream": true})).await;
    let events = reply.events();
    assert!(events.iter().all(|e| e["usage"].is_null()));
    let last = events.last().unwrap();
    assert!(last["choices"][0]["finish_reason"].is_string());
    let fingerprint: Value =
        serde_json::from_str(last["system_fingerprint"].as_str().unwrap()).unwrap();
    assert!(!fingerprint["completion_ids"][0].as_array().unwrap().is_empty());
}

#[tokio::test]
async fn stop_strings_do_not_leak_into_the_stream() {
    let server = Server::shared();
    let full = server.chat(json!({"max_tokens": 12, "ignore_eos": true})).await.ok();
    let full = full["choices"][0]["message"]["content"].as_str().unwrap();
    let stop: String = full.chars().skip(3).take(2).collect();
    let body = json!({"max_tokens": 12, "ignore_eos": true, "stop": stop, "stream": true});
    let events = server.chat(body).await.events();
    let content: String = events.iter().map(delta).collect();
    assert_eq!(content, full[..full.find(&stop).unwrap()]);
    assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], stop.as_str());
}

#[tokio::test]
async fn errors_before_the_stream_are_plain_errors() {
    let server = Server::shared();
    let reply = server.chat(json!({"stream": true, "max_tokens": 99999})).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (400, "context_length_exceeded"));
}

/// A server on a socket of its own.
async fn listen(server: &Server) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = server.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

/// A blocking client: the server runs on the runtime's other threads.
fn open(address: std::net::SocketAddr, body: &Value) -> TcpStream {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = body.to_string();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(request.as_bytes()).unwrap();
    socket
}

/// Waits until the engine holds nothing.
async fn idle(server: &Server) {
    for _ in 0..400 {
        let stats = server.state.engine.stats();
        if stats.running == 0 && stats.waiting == 0 && stats.used_blocks == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("the engine still holds {:?}", server.state.engine.stats());
}

fn long(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "Tell me everything."}], "ignore_eos": true,
           "max_tokens": 3500, "stream": stream, "cartridges": [{"id": "alpha", "source": "local"}]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pieces_arrive_before_the_reply_is_complete_and_hanging_up_cancels() {
    let server = Server::new(ApiOptions::default(), EngineOptions::default());
    let address = listen(&server).await;
    let mut socket = open(address, &long(true));
    let (mut seen, mut buffer) = (String::new(), [0; 4096]);
    while seen.matches("data: ").count() < 4 {
        let count = socket.read(&mut buffer).unwrap();
        assert!(count > 0, "closed after: {seen}");
        seen += &String::from_utf8_lossy(&buffer[..count]);
    }
    assert!(seen.to_lowercase().contains("content-type: text/event-stream"));
    assert!(!seen.contains("[DONE]"));
    assert!(server.state.engine.stats().running > 0, "still generating");
    drop(socket);
    idle(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn hanging_up_cancels_whole_replies_and_waiting_requests_too() {
    let engine = EngineOptions { max_running_sequences: 1, ..EngineOptions::default() };
    let server = Server::new(ApiOptions::default(), engine);
    let address = listen(&server).await;
    let running = open(address, &long(false));
    let waiting = open(address, &long(false));
    for _ in 0..400 {
        let stats = server.state.engine.stats();
        if stats.running == 1 && stats.waiting == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let stats = server.state.engine.stats();
    assert_eq!((stats.running, stats.waiting), (1, 1));
    let leases = || -> usize { server.state.registry.list().iter().map(|c| c.leases).sum() };
    assert!(leases() > 0, "both requests hold the cartridge");
    drop(waiting);
    drop(running);
    idle(&server).await;
    for _ in 0..400 {
        if leases() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} leases are still held", leases());
}
