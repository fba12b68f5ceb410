//! One streamed request over HTTP/1.1, timed.
//!
//! Connections are kept alive and belong to whoever sends on them: no pool stands between the clock and
//! the socket. TLS is left out: it would be measured along with the server.

use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER, SERVER};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::sse::{SseParser, Usage, read_event};
use super::{BenchError, Failure, Record};
use crate::limits;

/// Where requests go and the key they carry.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// `host:port`.
    authority: String,
    host: HeaderValue,
    /// Path before `/v1`, without a final slash.
    base: String,
    authorization: Option<HeaderValue>,
}

/// A kept-alive connection.
#[derive(Debug)]
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
}

/// Status, `Server` header and body of a plain request.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub server: Option<String>,
    pub body: Vec<u8>,
}

impl Endpoint {
    /// From `http://host[:port][/base][/v1]` and an API key.
    pub fn new(url: &str, api_key: Option<&str>) -> Result<Self, BenchError> {
        let invalid = || BenchError::Url(url.to_owned());
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let uri: Uri = full.parse().map_err(|_| invalid())?;
        if uri.scheme_str() != Some("http") || uri.query().is_some() {
            return Err(invalid());
        }
        let name = uri.host().filter(|host| !host.is_empty()).ok_or_else(invalid)?;
        let base = uri.path().trim_end_matches('/');
        let authorization = match api_key {
            Some(key) => {
                let mut value = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| {
                    BenchError::Plan("the API key holds characters a header cannot".to_owned())
                })?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        Ok(Self {
            authority: format!("{name}:{}", uri.port_u16().unwrap_or(80)),
            host: HeaderValue::from_str(uri.authority().map_or(name, |a| a.as_str()))
                .map_err(|_| invalid())?,
            base: base.strip_suffix("/v1").unwrap_or(base).to_owned(),
            authorization,
        })
    }

    /// A new connection.
    pub async fn connect(&self) -> Result<Connection, Failure> {
        let stream = TcpStream::connect(&self.authority)
            .await
            .map_err(|e| Failure::Connect(format!("{}: {e}", self.authority)))?;
        // A delayed send would be measured as the server's.
        let _ = stream.set_nodelay(true);
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| Failure::Connect(e.to_string()))?;
        // Its errors reach whoever waits for the reply.
        tokio::spawn(connection);
        Ok(Connection { sender })
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(HOST, &self.host)
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.authorization {
            request = request.header(AUTHORIZATION, key);
        }
        request.body(Full::new(body)).map_err(|e| Failure::Protocol(e.to_string()))
    }

    /// One request on a fresh connection, its whole answer read. `None` as body: a GET.
    pub async fn ask(&self, path: &str, body: Option<&Value>) -> Result<Answer, Failure> {
        self.ask_on(&mut None, path, body).await
    }

    /// The same on `connection`, which is opened if need be.
    pub async fn ask_on(
        &self,
        connection: &mut Option<Connection>,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer, Failure> {
        let (method, bytes) = match body {
            Some(body) => (Method::POST, Bytes::from(body.to_string())),
            None => (Method::GET, Bytes::new()),
        };
        let response = self.send(connection, method, path, bytes).await?;
        let status = response.status().as_u16();
        let server = response.headers().get(SERVER).and_then(|value| value.to_str().ok());
        let server = server.map(str::to_owned);
        Ok(Answer { status, server, body: read_all(response).await? })
    }

    async fn send(
        &self,
        connection: &mut Option<Connection>,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, Failure> {
        let request = self.request(method, path, body)?;
        // A server may close an idle connection at any time.
        if connection.as_ref().is_none_or(|c| c.sender.is_closed()) {
            *connection = Some(self.connect().await?);
        }
        let Some(open) = connection.as_mut() else {
            return Err(Failure::Connect("no connection".to_owned()));
        };
        let broken = |e: hyper::Error| Failure::Disconnected(e.to_string());
        open.sender.ready().await.map_err(broken)?;
        open.sender.send_request(request).await.map_err(broken)
    }
}

async fn read_all(response: Response<Incoming>) -> Result<Vec<u8>, Failure> {
    let (mut body, mut bytes) = (response.into_body(), Vec::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Failure::Disconnected(e.to_string()))?;
        if let Some(data) = frame.data_ref() {
            bytes.extend_from_slice(data);
        }
        if bytes.len() > limits::MAX_SSE_EVENT_BYTES {
            return Err(Failure::Protocol("the answer is too large".to_owned()));
        }
    }
    Ok(bytes)
}

/// The message of an error reply, or the beginning of what came instead.
pub fn error_message(body: &[u8]) -> String {
    let parsed: Option<Value> = serde_json::from_slice(body).ok();
    let message = parsed.as_ref().and_then(|reply| {
        let error = reply.get("error")?;
        error.get("message").or(Some(error))?.as_str()
    });
    let text = message.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    text.trim().chars().take(300).collect()
}

/// How requests are sent, besides where.
#[derive(Debug, Clone, Copy)]
pub struct Sending {
    pub timeout: Duration,
    /// Times a 429 is waited out (as its `Retry-After` says) and the request sent again.
    pub retries: u32,
}

/// Sends `body` to `path` and fills `record` in; `start` is the beginning of the level.
///
/// `connection` is used and kept if it can be used again.
pub async fn perform(
    endpoint: &Endpoint,
    connection: &mut Option<Connection>,
    path: &str,
    body: Bytes,
    start: Instant,
    sending: Sending,
    record: &mut Record,
) {
    record.sent_s = start.elapsed().as_secs_f64();
    let attempts = async {
        loop {
            let outcome = attempt(endpoint, connection, path, body.clone(), start, record).await;
            match outcome {
                Err(Failure::Busy { retry_after, .. }) if record.retries < sending.retries => {
                    record.retries += 1;
                    tokio::time::sleep(retry_after.unwrap_or(Duration::from_secs(1))).await;
                }
                outcome => return outcome,
            }
        }
    };
    let outcome = tokio::time::timeout(sending.timeout, attempts).await;
    record.failure = outcome.unwrap_or(Err(Failure::Timeout(sending.timeout))).err();
    record.ended_s = start.elapsed().as_secs_f64();
    if !record.tokens_from_usage {
        record.output_tokens = record.chunks_s.len() as u64;
    }
    if record.failure.is_none() && record.output_tokens == 0 {
        record.failure = Some(Failure::Empty);
    }
    // Nobody reads the rest of a failed reply.
    if record.failure.is_some() {
        *connection = None;
    }
}

async fn attempt(
    endpoint: &Endpoint,
    connection: &mut Option<Connection>,
    path: &str,
    body: Bytes,
    start: Instant,
    record: &mut Record,
) -> Result<(), Failure> {
    let response = endpoint.send(connection, Method::POST, path, body).await?;
    let status = response.status().as_u16();
    if status != 200 {
        let after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok());
        let retry_after = after.and_then(|v| v.parse().ok()).map(Duration::from_secs);
        let message = error_message(&read_all(response).await?);
        return Err(match status {
            429 => Failure::Busy { retry_after, message },
            code => Failure::Status { code, message },
        });
    }
    let kind = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    if !kind.starts_with("text/event-stream") {
        return Err(Failure::Protocol(format!("content-type is `{kind}`")));
    }
    let (mut parser, mut done) = (SseParser::default(), false);
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Failure::Disconnected(e.to_string()))?;
        let Some(data) = frame.data_ref() else { continue };
        let now = start.elapsed().as_secs_f64();
        parser.feed(data, |data| {
            let event = read_event(data)?;
            if event.content {
                record.chunks_s.push(now);
            }
            if let Some(Usage { prompt_tokens, completion_tokens, cached_tokens }) = event.usage {
                record.prompt_tokens = Some(prompt_tokens);
                record.cached_tokens = cached_tokens;
                record.output_tokens = completion_tokens;
                record.tokens_from_usage = true;
            }
            done |= event.done;
            Ok(())
        })?;
    }
    if done { Ok(()) } else { Err(Failure::NoDone) }
}
