//! The edges of a connection: clients that do not read, a drain, a stop.

mod api_support;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use api_support::Server;
use cartouche::{
    api::{ApiOptions, ListenOptions, Shutdown, serve},
    engine::EngineOptions,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

struct Running {
    server: Server,
    address: SocketAddr,
    shutdown: Shutdown,
    task: JoinHandle<()>,
}

async fn start(options: ListenOptions) -> Running {
    let server = Server::new(ApiOptions::default(), EngineOptions::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = Shutdown::default();
    let (router, state) = (server.router.clone(), server.state.clone());
    let task = tokio::spawn(serve(listener, router, state, options, shutdown.clone()));
    Running { server, address, shutdown, task }
}

/// A long request with large chunks.
fn long(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "Tell me everything."}], "ignore_eos": true,
           "max_tokens": 4000, "stream": stream, "logprobs": true, "top_logprobs": 20,
           "cartridges": [{"id": "alpha", "source": "local"}]})
}

fn send(socket: &mut TcpStream, body: &Value) {
    let body = body.to_string();
    let length = body.len();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length";
    socket.write_all(format!("{head}: {length}\r\n\r\n{body}").as_bytes()).unwrap();
}

fn open(address: SocketAddr, body: &Value) -> TcpStream {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    send(&mut socket, body);
    socket
}

/// Reads until `part` was seen, on a thread that may block.
async fn read_until(mut socket: TcpStream, part: &'static str) -> (TcpStream, String) {
    let read = move || {
        let (mut seen, mut buffer) = (Vec::new(), [0; 16384]);
        while !String::from_utf8_lossy(&seen).contains(part) {
            let count = socket.read(&mut buffer).unwrap();
            assert!(count > 0, "closed after {}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&buffer[..count]);
        }
        (socket, String::from_utf8_lossy(&seen).into_owned())
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

async fn rest(mut socket: TcpStream) -> String {
    let read = move || {
        let mut seen = Vec::new();
        socket.read_to_end(&mut seen).unwrap();
        String::from_utf8_lossy(&seen).into_owned()
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

/// One request on a connection of its own.
async fn get(address: SocketAddr, path: &str) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(head.as_bytes()).unwrap();
    rest(socket).await
}

/// Waits until a condition holds; a minute is a failure.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2400 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("not within a minute: {what}");
}

fn leases(server: &Server) -> usize {
    server.state.registry.stats().leases
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_client_that_never_reads_is_disconnected_and_its_blocks_return() {
    let stall = Duration::from_millis(300);
    let running = start(ListenOptions { client_stall: stall, ..Default::default() }).await;
    let socket = open(running.address, &long(true));
    let state = &running.server.state;
    eventually("it is in flight", || state.in_flight.count() == 1).await;
    // Far more than the buffers of both sockets is generated, and nobody reads.
    eventually("it is given up", || state.in_flight.count() == 0).await;
    eventually("the engine holds nothing", || {
        let stats = state.engine.stats();
        stats.running + stats.waiting + stats.used_blocks == 0 && leases(&running.server) == 0
    })
    .await;
    let text = running.server.get("/metrics").await.text;
    assert!(text.contains("cartouche_generation_seconds_count{outcome=\"cancelled\"} 1"), "{text}");
    drop(socket);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_slow_reader_that_goes_on_reading_is_served() {
    let stall = Duration::from_secs(20);
    let running = start(ListenOptions { client_stall: stall, ..Default::default() }).await;
    let mut body = long(true);
    body["max_tokens"] = json!(300);
    let (mut socket, seen) = read_until(open(running.address, &body), "data: ").await;
    let read = move || {
        let (mut seen, mut buffer) = (seen, [0; 8192]);
        while !seen.contains("[DONE]") {
            std::thread::sleep(Duration::from_millis(2));
            let count = socket.read(&mut buffer).unwrap();
            assert!(count > 0, "closed early");
            seen += &String::from_utf8_lossy(&buffer[..count]);
        }
        seen
    };
    let seen = tokio::task::spawn_blocking(read).await.unwrap();
    assert_eq!(seen.matches("\"finish_reason\":\"length\"").count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_drain_refuses_new_requests_and_lets_running_ones_finish() {
    let running = start(ListenOptions::default()).await;
    let mut body = long(true);
    body["max_tokens"] = json!(1500);
    let (stream, seen) = read_until(open(running.address, &body), "data: ").await;
    let idle = TcpStream::connect(running.address).unwrap();
    running.shutdown.drain();
    eventually("it drains", || running.server.state.check_ready().is_err()).await;
    let ready = get(running.address, "/health/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("shutting_down"), "{ready}");
    assert!(get(running.address, "/health/live").await.starts_with("HTTP/1.1 200"));
    let refused = rest(open(running.address, &long(true))).await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("shutting_down"), "{refused}");
    assert!(refused.to_lowercase().contains("retry-after: 5"), "{refused}");
    let seen = seen + &rest(stream).await;
    assert!(seen.contains("\"finish_reason\":\"length\"") && seen.contains("[DONE]"));
    tokio::time::timeout(Duration::from_secs(60), running.task).await.unwrap().unwrap();
    assert!(TcpStream::connect(running.address).is_err(), "the socket is closed");
    drop(idle);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_drain_leaves_ends_with_an_error() {
    let drain = Duration::from_millis(50);
    let running = start(ListenOptions { drain, ..Default::default() }).await;
    let (stream, seen) = read_until(open(running.address, &long(true)), "data: ").await;
    let whole = open(running.address, &long(false));
    eventually("both are in flight", || running.server.state.in_flight.count() == 2).await;
    running.shutdown.drain();
    let seen = seen + &rest(stream).await;
    assert!(seen.contains("\"code\":\"shutting_down\""), "{seen}");
    assert!(!seen.contains("[DONE]"));
    assert!(seen.ends_with("0\r\n\r\n"), "the body is complete");
    let whole = rest(whole).await;
    assert!(whole.starts_with("HTTP/1.1 503") && whole.contains("shutting_down"), "{whole}");
    tokio::time::timeout(Duration::from_secs(60), running.task).await.unwrap().unwrap();
    eventually("leases are back", || leases(&running.server) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_client_that_does_not_read_does_not_hold_up_the_exit() {
    let drain = Duration::from_millis(50);
    let running = start(ListenOptions { drain, ..Default::default() }).await;
    let deaf = open(running.address, &long(true));
    eventually("it is in flight", || running.server.state.in_flight.count() == 1).await;
    running.shutdown.drain();
    tokio::time::timeout(Duration::from_secs(60), running.task).await.unwrap().unwrap();
    drop(deaf);
}
