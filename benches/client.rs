//! What the client of `cartouche bench` itself can take: chunks per second, and per second of its one core.
//!
//!     cargo bench --bench client

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use cartouche::bench::{Api, Endpoint, Record, Sending, perform};
use tokio::task::JoinSet;

/// Clients, chunks each is sent, and microseconds between two of them.
const LOADS: [(usize, usize, u64); 3] = [(1, 200_000, 0), (32, 20_000, 0), (32, 2_000, 1000)];

fn main() {
    for (clients, chunks, pause) in LOADS {
        let address = flood(chunks, Duration::from_micros(pause));
        let (start, cpu) = (Instant::now(), thread_cpu_seconds());
        let one = move |client| async move {
            let endpoint = Endpoint::new(&address.to_string(), None).unwrap();
            let sending = Sending { timeout: Duration::from_secs(60), retries: 0 };
            let mut record = Record::new(client, 0, 0.0);
            let path = Api::Chat.path();
            perform(&endpoint, &mut None, path, "{}".into(), start, sending, &mut record).await;
            assert_eq!((&record.failure, record.chunks_s.len()), (&None, chunks));
        };
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio.block_on(async {
            let requests: JoinSet<()> = (0..clients).map(one).collect();
            requests.join_all().await
        });
        let total = (chunks * clients) as f64;
        println!(
            "{clients} clients, {pause} us between chunks: {:.0} chunks/s, {:.0} per core-second",
            total / start.elapsed().as_secs_f64(),
            total / (thread_cpu_seconds() - cpu)
        );
    }
}

/// Processor seconds of this thread, which holds the client and not the server.
fn thread_cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec, which the call fills in.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Starts a server that does nothing but write chunks as ours words them. Every request gets `chunks` chunks, each written alone and after `pause`.
fn flood(chunks: usize, pause: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that leaves ends its thread.
            std::thread::spawn(move || serve(stream, chunks, pause));
        }
    });
    address
}

fn serve(mut stream: TcpStream, chunks: usize, pause: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let event = |data: &str| format!("{:x}\r\ndata: {data}\n\n\r\n", data.len() + 8);
    let token = event(
        r#"{"id":"chatcmpl-cbb29630-0587-41c2-8bf2-9b473b225adf","object":"chat.completion.chunk","created":1795262960,"model":"cartouche-demo","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}],"usage":null,"system_fingerprint":null,"service_tier":null}"#,
    );
    let usage = format!(
        r#"{{"choices":[],"usage":{{"prompt_tokens":9,"completion_tokens":{chunks},"total_tokens":9}}}}"#
    );
    let end = event(&usage) + &event("[DONE]") + "0\r\n\r\n";
    loop {
        let (mut length, mut line) = (0, String::new());
        while reader.read_line(&mut line)? > 2 {
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
            line.clear();
        }
        if line.is_empty() {
            return Ok(());
        }
        reader.read_exact(&mut vec![0; length])?;
        stream.write_all(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        )?;
        for _ in 0..chunks {
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
            stream.write_all(token.as_bytes())?;
        }
        stream.write_all(end.as_bytes())?;
    }
}
