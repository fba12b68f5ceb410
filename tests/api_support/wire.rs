//! HTTP over a real socket, a request per connection.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use cartouche::api::{ListenOptions, Shutdown, serve};
use tokio::net::TcpListener;

use super::{Reply, Server};

/// A server that listens on this machine, until it is dropped.
pub struct Listening {
    pub address: SocketAddr,
    pub shutdown: Shutdown,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.shutdown.at_once();
    }
}

impl Listening {
    pub async fn start(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, shutdown) = (listener.local_addr().unwrap(), Shutdown::default());
        let (router, state) = (server.router.clone(), Arc::clone(&server.state));
        tokio::spawn(serve(listener, router, state, ListenOptions::default(), shutdown.clone()));
        Self { address, shutdown }
    }

    /// The head of a request, sent; the body is up to the caller.
    pub fn open(&self, method: &str, path: &str, headers: &[(&str, String)]) -> TcpStream {
        let mut socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", self.address);
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        socket.write_all((head + "connection: close\r\n\r\n").as_bytes()).unwrap();
        socket
    }

    /// A whole request. The reply may come before the body was read, and the rest of it then fails to be sent.
    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, String)],
        body: Vec<u8>,
    ) -> Reply {
        let length = ("content-length", body.len().to_string());
        let mut socket = self.open(method, path, &[headers, &[length]].concat());
        let work = move || {
            let _ = socket.write_all(&body);
            read(socket)
        };
        tokio::task::spawn_blocking(work).await.unwrap()
    }
}

/// The reply, whose body has a length.
pub fn read(mut socket: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            // The server closed although not all was sent to it.
            Err(e) if !bytes.is_empty() => {
                assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "{e}");
                break;
            }
            Err(e) => panic!("no reply: {e}"),
        }
    }
    let text = String::from_utf8(bytes).unwrap();
    let (head, text) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text}"));
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap();
    let headers = lines.map(|line| line.split_once(": ").unwrap()).map(|(name, value)| {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        (name, HeaderValue::from_str(value).unwrap())
    });
    Reply {
        status: StatusCode::from_bytes(status.as_bytes()).unwrap(),
        headers: headers.collect::<HeaderMap>(),
        text: text.to_owned(),
    }
}
