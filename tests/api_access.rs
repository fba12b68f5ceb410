//! API keys: which routes need one, what counts as one, how they are changed, where they never show.

mod api_support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    sync::Arc,
};

use api_support::{Reply, Server, log::Log, wire::Listening};
use axum::{
    body::Body,
    http::{Request, header::AUTHORIZATION},
};
use cartouche::{
    api::{Access, ApiOptions, KeySources, Route, access::Need, routes},
    engine::EngineOptions,
    limits,
};
use serde_json::{Value, json};

const USER: &str = "sk-user-Secret-1";
const ADMIN: &str = "sk-admin-Secret-2";

fn sources(user: Option<&str>, admin: Option<&str>) -> KeySources {
    let owned = |key: Option<&str>| key.map(str::to_owned);
    KeySources { user_keys: owned(user), admin_keys: owned(admin), ..KeySources::default() }
}

fn options() -> ApiOptions {
    ApiOptions { demo_requests: true, ..ApiOptions::default() }
}

fn server(access: Access) -> Server {
    Server::with_access(options(), EngineOptions::default(), None, access)
}

fn guarded() -> Server {
    server(Access::new(sources(Some(USER), Some(ADMIN)), true).unwrap())
}

/// A path that the pattern of a route matches.
fn path_of(route: &Route) -> String {
    let parts = route.path.split('/').map(|part| if part.contains('{') { "some" } else { part });
    parts.collect::<Vec<_>>().join("/")
}

async fn send(server: &Server, method: &str, path: &str, keys: &[&[u8]]) -> Reply {
    let mut request = Request::builder().method(method).uri(path);
    for key in keys {
        request = request.header(AUTHORIZATION, *key);
    }
    server.send(request.body(Body::empty()).unwrap()).await
}

fn assert_unauthorized(reply: &Reply, what: &str) {
    assert_eq!(reply.status, 401, "{what}: {}", reply.text);
    assert_eq!(reply.header("www-authenticate"), "Bearer realm=\"cartouche\"", "{what}");
    assert!(!reply.header("x-request-id").is_empty());
    if !reply.text.is_empty() {
        assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
        reply.error();
    }
}

/// Walks the table the router is made of: a route that is added is tried too.
#[tokio::test]
async fn every_route_but_health_needs_a_key_and_admin_routes_an_admin_key() {
    let server = guarded();
    let all = routes(&options());
    let open: Vec<&str> =
        all.iter().filter(|r| r.need == Need::Nothing).map(|r| &*r.path).collect();
    assert_eq!(open, ["/ping", "/health", "/health/live", "/health/ready"]);
    for route in &all {
        let (method, path) = (route.method.as_str(), path_of(route));
        let what = format!("{method} {path}");
        let without = send(&server, method, &path, &[]).await;
        let wrong = server.ask("sk-user-Secret-x", method, &path, Value::Null).await;
        let user = server.ask(USER, method, &path, Value::Null).await;
        let admin = server.ask(ADMIN, method, &path, Value::Null).await;
        if route.need == Need::Nothing {
            for reply in [without, wrong, user, admin] {
                assert_eq!(reply.status, 200, "{what}");
            }
            continue;
        }
        assert_unauthorized(&without, &what);
        assert_eq!(without.code(), "missing_api_key");
        assert_unauthorized(&wrong, &what);
        assert_eq!(wrong.code(), "invalid_api_key");
        assert!(![401, 403].contains(&admin.status.as_u16()), "{what}: {}", admin.text);
        let refused = route.need == Need::Admin;
        assert_eq!(user.status == 403, refused, "{what}: {}", user.text);
        assert_eq!(user.status == 403, user.text.contains("admin_key_required"), "{what}");
        for other in ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "X"] {
            let reply = send(&server, other, &path, &[]).await;
            assert_unauthorized(&reply, &format!("{other} {path}"));
        }
    }
}

/// What is not in the table is closed too, and says nothing about what there is.
#[tokio::test]
async fn paths_that_are_no_route_need_a_key() {
    let server = guarded();
    for path in [
        "/",
        "/v1",
        "/v1/nothing",
        "/docs",
        "/health/",
        "/health/x",
        "//health",
        "/HEALTH",
        "/ping/..",
        "/health/..%2fv1%2fmodels",
        "/v1/models/",
        "/demo/some",
        "/metrics/",
        "/%2e%2e/health",
    ] {
        assert_unauthorized(&send(&server, "GET", path, &[]).await, path);
        assert!(
            [404, 405].contains(&server.ask(USER, "GET", path, Value::Null).await.status.as_u16()),
            "{path}"
        );
    }
    let body = json!({"messages": [{"role": "user", "content": "x"}]});
    let reply = server.ask(USER, "POST", "/v1/chat/completions", body).await;
    assert_eq!(reply.ok()["object"], "chat.completion");
}

#[tokio::test]
async fn only_the_whole_key_once_and_as_it_is_written_opens() {
    let server = guarded();
    let bearer = |key: &str| format!("Bearer {key}").into_bytes();
    let open = [
        bearer(USER),
        bearer(ADMIN),
        format!("bearer {USER}").into_bytes(),
        format!("BEARER   {USER}").into_bytes(),
    ];
    for value in &open {
        assert_eq!(send(&server, "GET", "/v1/models", &[value]).await.status, 200);
    }
    let long = "x".repeat(limits::MAX_API_KEY_BYTES + 1);
    for value in [
        b"".to_vec(),
        b"Bearer".to_vec(),
        b"Bearer ".to_vec(),
        b"Bearer null".to_vec(),
        b"Bearer \xff\xfe".to_vec(),
        USER.as_bytes().to_vec(),
        bearer(&USER.to_lowercase()),
        bearer(&USER.to_uppercase()),
        bearer(&USER[..USER.len() - 1]),
        bearer(&format!("{USER}x")),
        bearer(&format!("{USER},{ADMIN}")),
        bearer(&format!("{USER} {ADMIN}")),
        bearer(&long),
        format!("Basic {USER}").into_bytes(),
        format!("Token {USER}").into_bytes(),
        format!("Bearer:{USER}").into_bytes(),
        format!("Bearer\t{USER}").into_bytes(),
    ] {
        let reply = send(&server, "GET", "/v1/models", &[&value]).await;
        assert_unauthorized(&reply, &String::from_utf8_lossy(&value));
        assert_eq!(reply.code(), "invalid_api_key");
        assert!(!reply.text.contains("Secret"), "{}", reply.text);
    }
    let (user, admin) = (bearer(USER), bearer(ADMIN));
    for twice in [[&user[..], &user], [&user, &admin], [b"Basic eA==", &user]] {
        let reply = send(&server, "GET", "/v1/models", &twice).await;
        assert_unauthorized(&reply, "twice");
        assert!(reply.text.contains("more than once"), "{}", reply.text);
    }
    // Other places for a key are none.
    for (name, path) in
        [("x-api-key", "/v1/models"), ("api-key", "/v1/models?api_key=sk-user-Secret-1")]
    {
        let request = Request::get(path).header(name, USER).body(Body::empty()).unwrap();
        assert_unauthorized(&server.send(request).await, name);
    }
}

#[tokio::test]
async fn several_keys_of_the_environment_all_open() {
    let both = format!("{USER}, second-key");
    let server = server(Access::new(sources(Some(&both), None), true).unwrap());
    for key in [USER, "second-key"] {
        assert_eq!(server.ask(key, "GET", "/v1/models", Value::Null).await.status, 200);
    }
    let list = server.ask(&both, "GET", "/v1/models", Value::Null).await;
    assert_unauthorized(&list, "the list is no key");
}

#[tokio::test]
async fn without_keys_nobody_needs_one_and_any_that_is_sent_is_ignored() {
    let server = server(Access::open(false));
    assert_eq!(server.get("/v1/models").await.status, 200);
    assert_eq!(server.ask("unused", "GET", "/v1/models", Value::Null).await.status, 200);
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..600 {
        if holds().await {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("not within half a minute: {what}");
}

fn replace(path: &Path, text: &str) {
    let next = path.with_extension("next");
    std::fs::write(&next, text).unwrap();
    std::fs::rename(next, path).unwrap();
}

#[tokio::test]
async fn a_changed_key_file_is_taken_up_and_a_bad_one_keeps_the_old_keys() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.yaml");
    std::fs::write(&path, "- {name: a, key: first-key}").unwrap();
    let files = KeySources { user_file: Some(path.clone()), ..sources(None, Some(ADMIN)) };
    let server = server(Access::new(files, true).unwrap());
    let hurry = Arc::new(tokio::sync::Notify::new());
    let told = Arc::clone(&hurry);
    tokio::spawn(Arc::clone(&server.state.access).watch(move || {
        let told = Arc::clone(&told);
        async move { told.notified().await }
    }));
    let status =
        async |key: &str| server.ask(key, "GET", "/v1/models", Value::Null).await.status.as_u16();
    assert_eq!((status("first-key").await, status("second-key").await), (200, 401));
    replace(&path, "- {name: b, key: second-key}");
    eventually("the new key opens", async || status("second-key").await == 200).await;
    assert_eq!(status("first-key").await, 401, "the old one does not any more");
    for bad in ["- {name: c, key: third-key", "", "[]", "- {name: c, kee: third-key}"] {
        replace(&path, bad);
        hurry.notify_one();
        assert!(server.state.access.reload().is_err());
        assert_eq!((status("second-key").await, status("third-key").await), (200, 401), "{bad}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(server.state.access.reload().is_err(), "a file that is gone does not open the server");
    assert_eq!((status("second-key").await, status("").await), (200, 401));
    replace(&path, "- {name: c, key: third-key}");
    eventually("it recovers", async || status("third-key").await == 200).await;
    assert_eq!(status(ADMIN).await, 200, "keys of the environment stay");
}

#[tokio::test]
async fn keys_show_nowhere() {
    let log = Log::shared();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.yaml");
    std::fs::write(&path, "- {name: tenant, key: sk-file-Secret-3, cache_salt: Salt-Secret-4}")
        .unwrap();
    let files = KeySources { user_file: Some(path), ..sources(Some(USER), Some(ADMIN)) };
    let server = server(Access::new(files, true).unwrap());
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2,
        "cache_salt": "Own-Secret-5"});
    let mut shown = String::new();
    for key in [USER, ADMIN, "sk-file-Secret-3", "sk-wrong-Secret-6"] {
        for (method, path) in
            [("POST", "/v1/chat/completions"), ("GET", "/v1/nothing"), ("GET", "/metrics")]
        {
            let reply = server.ask(key, method, path, body.clone()).await;
            shown += &format!("{:?}{}", reply.headers, reply.text);
        }
    }
    shown += &format!("{:?}", server.state.access);
    let log = log.text();
    assert!(log.contains("key=\"tenant\"") && log.contains("CARTOUCHE_API_KEY-1"), "{log}");
    for text in [&log, &shown] {
        assert!(!text.contains("Secret"), "{text}");
    }
}

/// A refusal costs the client's upload nothing and the server no memory: the body is not read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_body_is_not_waited_for() {
    let server = guarded();
    let listening = Listening::start(&server).await;
    let address = listening.address;
    let ask = move || {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
        let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n\r\n{";
        socket.write_all(head.as_bytes()).unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        text
    };
    let text = tokio::task::spawn_blocking(ask).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 401 Unauthorized\r\n"), "{text}");
    assert!(text.contains("\"code\":\"missing_api_key\""), "{text}");
}

#[tokio::test]
async fn cross_origin_pages_are_let_in_only_where_they_are_named() {
    let preflight = |origin: &str| {
        Request::options("/v1/chat/completions")
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
            .body(Body::empty())
            .unwrap()
    };
    let allowed = "access-control-allow-origin";
    let closed = guarded();
    let reply = closed.send(preflight("https://a.example")).await;
    assert_unauthorized(&reply, "off by default");
    assert!(!reply.headers.contains_key(allowed));
    let cors_origins = vec!["https://a.example".parse().unwrap(), "http://b:3000".parse().unwrap()];
    let options = ApiOptions { cors_origins, ..options() };
    let access = Access::new(sources(Some(USER), None), true).unwrap();
    let server = Server::with_access(options, EngineOptions::default(), None, access);
    for origin in ["https://a.example", "http://b:3000"] {
        let reply = server.send(preflight(origin)).await;
        assert_eq!((reply.status.as_u16(), reply.header(allowed)), (200, origin));
        assert!(reply.header("access-control-allow-headers").contains("authorization"));
        assert!(reply.header("access-control-allow-methods").contains("POST"));
    }
    let reply = server.send(preflight("https://evil.example")).await;
    assert!(!reply.headers.contains_key(allowed), "{:?}", reply.headers);
    // The page is told why it was refused, and a preflight is no way around the key.
    let get = Request::get("/v1/models").header("origin", "https://a.example");
    let reply = server.send(get.body(Body::empty()).unwrap()).await;
    assert_unauthorized(&reply, "no key");
    assert_eq!(reply.header(allowed), "https://a.example");
    assert!(!reply.headers.contains_key("access-control-allow-credentials"));
}
