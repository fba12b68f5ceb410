//! The gate. Every request passes it, those for routes that do not exist too: what is open is named, the
//! rest is closed.

use std::sync::Arc;

use axum::{
    extract::{MatchedPath, Request, State},
    http::{
        HeaderMap, HeaderName,
        header::{AUTHORIZATION, FORWARDED, HOST, ORIGIN},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{super::error::ApiError, Access, Caller, Rights, Role};
use crate::{api::AppState, limits};

/// What a route asks of its callers, once the server has keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Health probes.
    Nothing,
    /// A key of any role.
    Key,
    /// An admin key. Without any keys: a client on the same machine.
    Admin,
}

/// Finds out who calls. `open` are the route patterns that need no key.
pub(in super::super) async fn authenticate(
    State((state, open)): State<(Arc<AppState>, Arc<[String]>)>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    if path.is_some_and(|path| open.iter().any(|open| open == path)) {
        return next.run(request).await;
    }
    match identify(&state.access, request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => {
            tracing::debug!(code = error.code, "a request without a valid key is refused");
            error.into_response()
        }
    }
}

fn identify(access: &Access, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let ring = access.ring();
    if ring.len() == 0 {
        // A key sent to a server without keys is ignored: clients must send something.
        return Ok(Caller::new(Rights::of(KEYLESS, Role::User)));
    }
    let mut sent = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = sent.next() else { return Err(ApiError::missing_key()) };
    if sent.next().is_some() {
        return Err(ApiError::wrong_key("the Authorization header was sent more than once"));
    }
    let (scheme, key) = split(value.as_bytes());
    if !scheme.eq_ignore_ascii_case(b"bearer") {
        return Err(ApiError::wrong_key("the Authorization header must read `Bearer KEY`"));
    }
    let known = if key.len() > limits::MAX_API_KEY_BYTES { None } else { ring.find(key) };
    known.ok_or_else(|| ApiError::wrong_key("incorrect API key provided"))
}

/// The name of callers of a server without keys.
const KEYLESS: &str = "-";

/// At the first space; more spaces may follow it.
fn split(value: &[u8]) -> (&[u8], &[u8]) {
    let end = value.iter().position(|&byte| byte == b' ').unwrap_or(value.len());
    let key = value[end..].iter().position(|&byte| byte != b' ');
    (&value[..end], key.map_or(&[], |start| &value[end + start..]))
}

/// Lets only admins through. Stands behind [`authenticate`].
pub(in super::super) async fn require_admin(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    request: Request,
    next: Next,
) -> Response {
    let access = &state.access;
    let allowed = match access.has_keys() {
        true if caller.role == Role::Admin => Ok(()),
        true if access.has_admin_key() => Err("this route needs an admin key".to_owned()),
        true => Err(format!("this route needs an admin key, and the server has none: {HOW}")),
        false => check_local(access.loopback, request.headers())
            .map_err(|why| format!("{why}, so this route needs an admin key: {HOW}")),
    };
    match allowed {
        Ok(()) => next.run(request).await,
        Err(message) => ApiError::admin_needed(message).into_response(),
    }
}

const HOW: &str = "set CARTOUCHE_ADMIN_KEY or --admin-key-file";

/// Without keys, whether the request is of somebody on this machine, and not of a web page that a browser
/// here shows (which may send, though not read), or of somebody behind a proxy.
fn check_local(loopback: bool, headers: &HeaderMap) -> Result<(), &'static str> {
    const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
    if !loopback {
        return Err("the server has no keys and listens beyond this machine");
    }
    if headers.contains_key(ORIGIN) {
        return Err("the request comes from a web page");
    }
    if headers.contains_key(FORWARDED) || headers.contains_key(FORWARDED_FOR) {
        return Err("the request comes through a proxy");
    }
    // A name of another host that leads here: a web page got its own name to mean this machine.
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    match is_local_host(host) {
        true => Ok(()),
        false => Err("the request was meant for another host"),
    }
}

fn is_local_host(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_ends_at_the_first_space() {
        for (value, scheme, key) in [
            ("Bearer abc", "Bearer", "abc"),
            ("Bearer   abc", "Bearer", "abc"),
            ("Bearer a b", "Bearer", "a b"),
            ("Bearer", "Bearer", ""),
            ("Bearer ", "Bearer", ""),
            ("", "", ""),
            (" abc", "", "abc"),
        ] {
            assert_eq!(split(value.as_bytes()), (scheme.as_bytes(), key.as_bytes()), "{value:?}");
        }
    }

    #[test]
    fn names_of_this_machine() {
        for host in
            ["localhost", "LOCALHOST:10210", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "[::1]"]
        {
            assert!(is_local_host(host), "{host}");
        }
        for host in ["example.com", "127.0.0.1.example.com:80", "10.0.0.1", "", "localhost.", ":80"]
        {
            assert!(!is_local_host(host), "{host}");
        }
    }
}
