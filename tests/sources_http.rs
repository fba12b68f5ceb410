//! Cartridges from addresses of listed hosts.

mod stand_in;

use cartouche::cartridge::{Cached, CartridgeError, FileSource, HttpFiles, transfer::Transfer};
use stand_in::{
    Answer, StandIn, Trouble,
    hub::sha256,
    store_support::{MAX_BYTES, cartridge, read, store, times, torch_bytes},
};

fn source(hosts: &[&str], dir: &std::path::Path) -> Cached<HttpFiles> {
    let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let remote = HttpFiles::new(&hosts, false).unwrap();
    Cached::new(remote, Transfer::new(times()), store(dir), MAX_BYTES)
}

fn files() -> StandIn {
    StandIn::start(|asked| match asked.path.split('?').next().unwrap() {
        "/a.pt" => Answer::new(200, torch_bytes(1.0)).with("ETag", "\"one\""),
        "/plain.pt" => Answer::new(200, torch_bytes(1.0)),
        "/text" => Answer::new(200, "no cartridge"),
        _ => Answer::new(404, ""),
    })
}

#[test]
fn only_listed_hosts_are_asked() {
    let (server, other, dir) = (files(), files(), tempfile::tempdir().unwrap());
    let id = format!("{}/a.pt", server.url);
    let off = source(&[], dir.path()).fetch(&id).unwrap_err().to_string();
    assert!(off.contains("--http-source-host"), "{off}");
    let listed = source(&[&server.url], dir.path());
    listed.fetch(&id).unwrap();
    assert_eq!(read(&listed, &id).unwrap().generation(), cartridge(1.0).generation());
    let port = server.host().split(':').nth(1).unwrap();
    for wrong in [
        format!("{}/a.pt", other.url),
        format!("http://localhost:{port}/a.pt"),
        format!("http://[::1]:{port}/a.pt"),
        format!("http://0.0.0.0:{port}/a.pt"),
        format!("http://2130706433:{port}/a.pt"),
        format!("https://127.0.0.1:{port}/a.pt"),
        format!("http://127.0.0.1:{port}@{}/a.pt", other.host()),
        "file:///etc/passwd".to_owned(),
        "a.pt".to_owned(),
    ] {
        listed.fetch(&wrong).unwrap_err();
    }
    assert!(other.asked().is_empty());
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn a_redirect_to_a_host_that_is_not_listed_is_not_followed() {
    let (server, other, dir) = (files(), files(), tempfile::tempdir().unwrap());
    let id = format!("{}/a.pt", server.url);
    let away = Answer::new(302, "").with("Location", format!("{}/a.pt", other.url));
    server.trouble("/a.pt", Trouble::Answer(away), 2);
    let error = source(&[&server.url], dir.path()).fetch(&id).unwrap_err();
    assert!(error.to_string().contains("sends on to"), "{error}");
    assert!(other.asked().is_empty());
    source(&[&server.url, &other.url], dir.path()).fetch(&id).unwrap();
}

#[test]
fn credentials_in_an_address_are_refused_and_not_repeated() {
    let (server, dir) = (files(), tempfile::tempdir().unwrap());
    let id = format!("http://user:hunter2@{}/a.pt", server.host());
    let error = source(&[&server.url], dir.path()).fetch(&id).unwrap_err();
    assert!(matches!(error, CartridgeError::InvalidId { .. }), "{error}");
    assert!(error.to_string().contains("credentials"), "{error}");
    let signed = format!("{}/a.pt?signature=hunter2", server.url);
    let source = source(&[&server.url], dir.path());
    source.fetch(&signed).unwrap();
    let from = source.record(&signed).unwrap().unwrap().from;
    assert!(!from.contains("hunter2"), "{from}");
}

#[test]
fn a_digest_in_the_id_is_held_to_and_asked_for_once() {
    let (server, dir) = (files(), tempfile::tempdir().unwrap());
    let right = sha256(&torch_bytes(1.0));
    let source = source(&[&server.url], dir.path());
    let id = format!("{}/plain.pt#sha256={right}", server.url);
    source.fetch(&id).unwrap();
    source.fetch(&id).unwrap();
    assert_eq!(server.asked().len(), 1);
    let wrong = format!("{}/a.pt#sha256={}", server.url, sha256(b"other"));
    assert!(source.fetch(&wrong).unwrap_err().to_string().contains("SHA-256"));
    assert_eq!(source.stamp(&wrong).unwrap(), None);
    let none = format!("{}/a.pt#sha256=12", server.url);
    assert!(matches!(source.fetch(&none), Err(CartridgeError::InvalidId { .. })));
}

#[test]
fn unchanged_content_is_not_sent_again_and_parts_of_unknown_content_are_not_joined() {
    let (server, dir) = (files(), tempfile::tempdir().unwrap());
    let source = source(&[&server.url], dir.path());
    let id = format!("{}/a.pt", server.url);
    source.fetch(&id).unwrap();
    source.fetch(&id).unwrap();
    assert_eq!(server.asked()[1].head("if-none-match"), Some("\"one\""));
    // Without an ETag or a digest nothing tells whether two parts belong together.
    let plain = format!("{}/plain.pt", server.url);
    server.trouble("/plain.pt", Trouble::CutAfter(100), 1);
    source.fetch(&plain).unwrap();
    assert!(server.asked_for("/plain.pt").iter().all(|asked| asked.head("range").is_none()));
    for (path, kind) in [("text", "cartridge_invalid"), ("nothing", "cartridge_not_found")] {
        let error = source.fetch(&format!("{}/{path}", server.url)).unwrap_err();
        assert_eq!(error.code(), kind, "{error}");
    }
}

/// The content changed between the cut and the continuation; the server says so by another ETag.
#[test]
fn an_etag_that_changes_between_two_parts_begins_again() {
    let changed = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let now = std::sync::Arc::clone(&changed);
    let server = StandIn::start(move |_| match now.load(std::sync::atomic::Ordering::SeqCst) {
        false => Answer::new(200, torch_bytes(1.0)).with("ETag", "\"one\""),
        true => Answer::new(200, torch_bytes(2.0)).with("ETag", "\"two\""),
    });
    for careless in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let source = source(&[&server.url], dir.path());
        let id = format!("{}/a.pt", server.url);
        changed.store(false, std::sync::atomic::Ordering::SeqCst);
        server.trouble("/a.pt", Trouble::HangAfter(900), 1);
        source.fetch(&id).unwrap_err();
        changed.store(true, std::sync::atomic::Ordering::SeqCst);
        if careless {
            server.trouble("/a.pt", Trouble::NoIfRange, 1);
        }
        source.fetch(&id).unwrap();
        assert_eq!(read(&source, &id).unwrap().generation(), cartridge(2.0).generation());
    }
}
