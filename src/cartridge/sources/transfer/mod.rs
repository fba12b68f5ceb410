//! The one way to the network: requests of the sources, with limits on time and size, redirects only to
//! hosts that may be asked, keys only for the host they are for, and downloads that go on after a cut.

mod download;
mod failure;
mod hosts;

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use ureq::{
    Agent, AsSendBody, Body, SendBody,
    http::{self, HeaderMap, Method, Response, header},
    tls::{RootCerts, TlsConfig},
};

use crate::limits;

pub use download::{Delivered, Expected, parse_sha256};
pub use failure::{Failure, Told};
pub use hosts::{Address, Hosts, Secret, encode, encode_path};

/// How long a source may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeLimits {
    /// To accept a connection: name lookup, TCP and TLS each.
    pub connect: Duration,
    /// Between two bytes.
    pub idle: Duration,
    /// For one fetch in all.
    pub total: Duration,
}

impl Default for TimeLimits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(limits::DEFAULT_SOURCE_CONNECT_SECONDS),
            idle: Duration::from_secs(limits::DEFAULT_SOURCE_IDLE_SECONDS),
            total: Duration::from_secs(limits::DEFAULT_SOURCE_TOTAL_SECONDS),
        }
    }
}

/// What to ask for.
#[derive(Debug, Clone)]
pub struct Request {
    pub address: Address,
    /// `Authorization`, sent to the host of `address` and to no other.
    pub authorization: Option<Secret>,
    /// Hosts, besides that one, it may be sent on to.
    pub hosts: Hosts,
    pub headers: Vec<(String, String)>,
}

impl Request {
    pub fn new(address: Address) -> Self {
        let hosts = Hosts::default();
        Self { address, authorization: None, hosts, headers: Vec::new() }
    }

    /// With one more header.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// What is sent along.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    Nothing,
    Bytes(&'a [u8]),
    /// So many bytes of a file from a place on.
    File(&'a File, u64, u64),
}

/// An answer that is no error.
pub(super) struct Reply {
    pub response: Response<Body>,
    /// The host it came from.
    pub host: String,
    /// Heads of the first answer, which may have been a redirect: the hub says there what will come.
    pub first: HeaderMap,
}

/// Sends requests. Clones share connections and are stopped together.
#[derive(Debug, Clone)]
pub struct Transfer {
    agent: Agent,
    limits: TimeLimits,
    stopped: Arc<AtomicBool>,
}

impl Transfer {
    /// Proxies are taken from the environment; `SSL_CERT_FILE` names certificates to trust instead of
    /// Mozilla's, for servers of a company's own.
    pub fn new(limits: TimeLimits) -> Self {
        let config = Agent::config_builder()
            .user_agent(concat!("cartouche/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            // Followed here, since each step is checked.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(limits.connect))
            .timeout_connect(Some(limits.connect))
            .timeout_per_read(Some(limits.idle))
            .timeout_per_write(Some(limits.idle))
            .tls_config(TlsConfig::builder().root_certs(root_certs()).build())
            .build();
        Self { agent: Agent::new_with_config(config), limits, stopped: Arc::default() }
    }

    pub fn limits(&self) -> TimeLimits {
        self.limits
    }

    /// Ends all transfers now and lets no further one begin.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.agent.clone().shutdown();
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// When a fetch that begins now has to be over.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.limits.total
    }

    /// A JSON reply to a GET.
    pub fn get_json(&self, request: &Request, deadline: Instant) -> Result<Value, Failure> {
        let bytes = self.get(request, limits::MAX_SOURCE_REPLY_BYTES, deadline)?;
        parse(&bytes, request)
    }

    /// A small file.
    pub fn get(
        &self,
        request: &Request,
        max_bytes: u64,
        deadline: Instant,
    ) -> Result<Vec<u8>, Failure> {
        self.again(deadline, || {
            let reply = self.exchange(&Method::GET, request, Content::Nothing, deadline)?;
            self.whole(reply, max_bytes)
        })
    }

    /// A JSON reply to something sent. `may_repeat`: sending it twice does no harm.
    pub fn send(
        &self,
        method: &Method,
        request: &Request,
        content: Content<'_>,
        may_repeat: bool,
        deadline: Instant,
    ) -> Result<(HeaderMap, Vec<u8>), Failure> {
        let once = || {
            let reply = self.exchange(method, request, content, deadline)?;
            let heads = reply.response.headers().clone();
            Ok((heads, self.whole(reply, limits::MAX_SOURCE_REPLY_BYTES)?))
        };
        if may_repeat { self.again(deadline, once) } else { once() }
    }

    /// Sends JSON, and reads JSON.
    pub fn post_json(
        &self,
        request: &Request,
        value: &Value,
        may_repeat: bool,
        deadline: Instant,
    ) -> Result<Value, Failure> {
        let mut request = request.clone();
        if !request.headers.iter().any(|(name, _)| name == "content-type") {
            request = request.with("content-type", "application/json");
        }
        let text = value.to_string();
        let content = Content::Bytes(text.as_bytes());
        let (_, bytes) = self.send(&Method::POST, &request, content, may_repeat, deadline)?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        parse(&bytes, &request)
    }

    /// Tries until it succeeds, fails for good, or was tried often enough.
    fn again<T>(
        &self,
        deadline: Instant,
        mut once: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut pause = Duration::from_millis(limits::SOURCE_BACK_OFF_MILLIS);
        let mut tries = 0;
        loop {
            tries += 1;
            let failure = match once() {
                Err(_) if self.is_stopped() => return Err(Failure::Stopped),
                Err(failure) if failure.is_passing() && tries < limits::MAX_SOURCE_TRIES => failure,
                other => return other,
            };
            let asked = match &failure {
                Failure::Status { retry_after, .. } => retry_after.unwrap_or_default(),
                _ => Duration::ZERO,
            };
            let most = Duration::from_secs(limits::MAX_RETRY_AFTER_SECONDS);
            let wait = pause.max(asked).min(most);
            pause *= 2;
            if Instant::now() + wait >= deadline {
                return Err(failure);
            }
            tracing::debug!(%failure, ?wait, tries, "trying again");
            self.sleep(wait)?;
        }
    }

    /// Sleeps, but not longer than until [`Self::stop`].
    fn sleep(&self, time: Duration) -> Result<(), Failure> {
        let until = Instant::now() + time;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            if self.is_stopped() {
                return Err(Failure::Stopped);
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
        Ok(())
    }

    /// One try: follows redirects, and makes a failure of an answer that tells one.
    fn exchange(
        &self,
        method: &Method,
        request: &Request,
        content: Content<'_>,
        deadline: Instant,
    ) -> Result<Reply, Failure> {
        let mut address = request.address.clone();
        let mut first = None;
        for _ in 0..=limits::MAX_SOURCE_REDIRECTS {
            if self.is_stopped() {
                return Err(Failure::Stopped);
            }
            let response = self.once(method, request, &address, content, deadline)?;
            let host = address.host().to_owned();
            let status = response.status();
            let heads = response.headers();
            let text = |name| heads.get(name).and_then(|value| value.to_str().ok());
            if !status.is_redirection() || status == http::StatusCode::NOT_MODIFIED {
                if status.is_client_error() || status.is_server_error() {
                    let code = text("x-error-code").map(|code| code.chars().take(64).collect());
                    let retry_after = text("retry-after").and_then(retry_after);
                    let status = status.as_u16();
                    return Err(Failure::Status { host, status, code, retry_after });
                }
                let first = first.unwrap_or_else(|| heads.clone());
                return Ok(Reply { response, host, first });
            }
            let Some(Ok(to)) = text(header::LOCATION.as_str()).map(|to| address.join(to)) else {
                return Err(Failure::LostRedirect { host });
            };
            let is_read = matches!(*method, Method::GET | Method::HEAD);
            let is_home = to.origin() == request.address.origin();
            if !is_read || !(is_home || request.hosts.allow(&to)) {
                return Err(Failure::Redirected { host, to: to.host().to_owned() });
            }
            first.get_or_insert_with(|| heads.clone());
            address = to;
        }
        Err(Failure::LostRedirect { host: address.host().to_owned() })
    }

    fn once(
        &self,
        method: &Method,
        request: &Request,
        address: &Address,
        content: Content<'_>,
        deadline: Instant,
    ) -> Result<Response<Body>, Failure> {
        let failed = |error| Failure::of(error, address.host(), self.limits);
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(ureq::Error::Timeout(ureq::Timeout::Global)));
        }
        let mut builder = http::Request::builder()
            .method(method)
            .uri(address.reveal())
            // A file must come as it is: it is counted, digested and continued by its bytes.
            .header(header::ACCEPT_ENCODING, "identity");
        for (name, value) in &request.headers {
            builder = builder.header(name, value);
        }
        if address.origin() == request.address.origin()
            && let Some(secret) = &request.authorization
        {
            builder = builder.header(header::AUTHORIZATION, secret.reveal());
        }
        match content {
            Content::Nothing => self.run(builder.body(()), left),
            Content::Bytes(bytes) => self.run(builder.body(bytes), left),
            Content::File(file, from, bytes) => {
                let mut file = file.try_clone().map_err(|e| failed(e.into()))?;
                file.seek(SeekFrom::Start(from)).map_err(|e| failed(e.into()))?;
                builder = builder.header(header::CONTENT_LENGTH, bytes);
                let part = SendBody::from_owned_reader(file.take(bytes));
                self.run(builder.body(part), left)
            }
        }
        .map_err(failed)
    }

    fn run<S: AsSendBody>(
        &self,
        request: http::Result<http::Request<S>>,
        left: Duration,
    ) -> Result<Response<Body>, ureq::Error> {
        let request = self.agent.configure_request(request?).timeout_global(Some(left)).build();
        self.agent.run(request)
    }

    /// The body of a small reply.
    fn whole(&self, reply: Reply, max_bytes: u64) -> Result<Vec<u8>, Failure> {
        let (host, mut bytes) = (reply.host, Vec::new());
        let mut body = reply.response.into_body();
        let read = body.as_reader().take(max_bytes + 1).read_to_end(&mut bytes);
        read.map_err(|e| Failure::of(e.into(), &host, self.limits))?;
        if bytes.len() as u64 > max_bytes {
            let reason = format!("it has more than {max_bytes} bytes");
            return Err(Failure::Malformed { host, reason });
        }
        Ok(bytes)
    }
}

fn parse(bytes: &[u8], request: &Request) -> Result<Value, Failure> {
    serde_json::from_slice(bytes).map_err(|_| Failure::Malformed {
        host: request.address.host().to_owned(),
        reason: "it is no JSON".to_owned(),
    })
}

/// Seconds, or a date.
fn retry_after(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = chrono::DateTime::parse_from_rfc2822(text).ok()?;
    at.signed_duration_since(chrono::Utc::now()).to_std().ok()
}

fn root_certs() -> RootCerts {
    let Some(path) = std::env::var_os("SSL_CERT_FILE") else { return RootCerts::WebPki };
    let read = std::fs::read(&path);
    let certs: Vec<_> = read
        .iter()
        .flat_map(|pem| ureq::tls::parse_pem(pem))
        .filter_map(|item| match item {
            Ok(ureq::tls::PemItem::Certificate(cert)) => Some(cert),
            _ => None,
        })
        .collect();
    if certs.is_empty() {
        tracing::warn!("SSL_CERT_FILE holds no certificate that can be read: Mozilla's are used");
        return RootCerts::WebPki;
    }
    RootCerts::new_with_certs(&certs)
}
