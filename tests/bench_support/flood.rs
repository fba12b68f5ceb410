//! What the client itself can take: a server that does nothing but write chunks as our server words them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// Starts it. Every request gets `chunks` chunks, each written alone and after `pause`.
pub fn flood(chunks: usize, pause: Duration) -> SocketAddr {
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
