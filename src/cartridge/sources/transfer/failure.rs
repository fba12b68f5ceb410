//! Why a transfer failed, told without addresses' queries or keys.

use std::{io, time::Duration};

use ureq::Timeout;

use crate::cartridge::{CartridgeError, Source};

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{host} answered {status}{}", .code.as_deref().map(|c| format!(" ({c})")).unwrap_or_default())]
    Status {
        host: String,
        status: u16,
        /// What the hub says in `X-Error-Code`.
        code: Option<String>,
        retry_after: Option<Duration>,
    },
    #[error("{host} cannot be reached: {reason}")]
    Unreachable { host: String, reason: String },
    #[error("{host} cut the connection after {got} bytes{}", .of.map(|n| format!(" of {n}")).unwrap_or_default())]
    Cut { host: String, got: u64, of: Option<u64> },
    #[error("{host} {what} within {seconds} s ({flag} changes that)")]
    TimedOut { host: String, what: &'static str, seconds: u64, flag: &'static str },
    #[error(
        "{host} sends on to {to}, which is not a host it may send to; nothing was asked of that one"
    )]
    Redirected { host: String, to: String },
    #[error("{host} sends on in circles or to a wrong address")]
    LostRedirect { host: String },
    #[error(
        "{host} delivered other content than was announced ({what} {found}, expected {expected})"
    )]
    Wrong { host: String, what: &'static str, found: String, expected: String },
    #[error("it has {size} bytes, the limit is {limit}")]
    TooLarge { size: u64, limit: u64 },
    #[error("the answer of {host} is not what its API says: {reason}")]
    Malformed { host: String, reason: String },
    #[error("the server is stopping")]
    Stopped,
    #[error(transparent)]
    Disk(#[from] CartridgeError),
}

/// How a source is named when it fails.
#[derive(Debug, Clone, Copy)]
pub struct Told<'a> {
    pub id: &'a str,
    pub source: Source,
    /// Begins the sentence; the words are those of Tokasaurus.
    pub stem: &'a str,
    /// What to set for access.
    pub access: &'a str,
}

impl Failure {
    /// Whether the same request may succeed a moment later.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            Self::Cut { .. } => true,
            _ => false,
        }
    }

    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// The error a request gets.
    pub fn told(self, Told { id, source, stem, access }: Told<'_>) -> CartridgeError {
        let unavailable = |reason: String| CartridgeError::SourceUnavailable {
            id: id.to_owned(),
            from: source,
            reason: format!("{stem}: {reason}"),
        };
        match self {
            Self::Disk(error) => error.named(id),
            Self::TooLarge { size, limit } => {
                CartridgeError::too_large("bytes", size, limit).named(id)
            }
            Self::Status { status: 404 | 410, .. } => {
                CartridgeError::NotFound { id: id.to_owned(), hint: format!("{stem}: {self}") }
            }
            Self::Status { status: 401 | 403, .. } => {
                unavailable(format!("{self}: it does not exist, or {access}"))
            }
            other => unavailable(other.to_string()),
        }
    }

    /// From an error of ureq, which may show an address with its query.
    pub(super) fn of(error: ureq::Error, host: &str, limits: super::TimeLimits) -> Self {
        let host = host.to_owned();
        let timed_out = |what, limit: Duration, flag| Self::TimedOut {
            host: host.clone(),
            what,
            seconds: limit.as_secs(),
            flag,
        };
        let unreachable =
            |reason: &str| Self::Unreachable { host: host.clone(), reason: reason.to_owned() };
        match error {
            ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
                timed_out("did not connect", limits.connect, "--source-connect-seconds")
            }
            ureq::Error::Timeout(Timeout::PerRead | Timeout::PerWrite) => {
                timed_out("sent nothing", limits.idle, "--source-idle-seconds")
            }
            ureq::Error::Timeout(_) => {
                timed_out("did not deliver", limits.total, "--source-total-seconds")
            }
            ureq::Error::Io(error) => match error.kind() {
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe => Self::Cut { host, got: 0, of: None },
                _ => unreachable(&error.to_string()),
            },
            ureq::Error::HostNotFound => unreachable("there is no such host"),
            ureq::Error::ConnectionFailed => unreachable("the connection failed"),
            ureq::Error::ConnectProxyFailed(_) => unreachable("the proxy refused"),
            ureq::Error::Tls(reason) => unreachable(reason),
            ureq::Error::Rustls(error) => unreachable(&format!(
                "TLS: {error} (SSL_CERT_FILE names further certificates to trust)"
            )),
            ureq::Error::Protocol(_) => {
                Self::Malformed { host, reason: "it is no HTTP".to_owned() }
            }
            ureq::Error::LargeResponseHeader(..) => {
                Self::Malformed { host, reason: "its head is too long".to_owned() }
            }
            // Others may show an address; their kind says enough.
            _ => unreachable("the request could not be sent"),
        }
    }
}
