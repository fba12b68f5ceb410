//! Uploads that are bad, slow, cut off, in each other's way, or of somebody who may not.

mod api_support;

use std::{io::Write, path::PathBuf};

use api_support::admin::{ADMIN, FORM, Test, eventually, form, tag};
use axum::{body::Body, http::Request};
use cartouche::api::{Access, KeySources};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_uploads_are_refused_and_leave_nothing() {
    let test = Test::new().await;
    let (good, generation) = test.file(6, 1);
    test.ask("PUT", "/v1/cartridges/notes", &[], &good).await.ok();
    let files = test.files();
    let mut cut = good.clone();
    cut.truncate(good.len() / 2);
    for bytes in [&b""[..], b"not a cartridge", &cut, b"PK\x03\x04 not really"] {
        let reply = test.ask("PUT", "/v1/cartridges/notes", &[], bytes).await;
        assert_eq!((reply.error().0, reply.code().as_str()), (400, "cartridge_invalid"));
        let reply = test.form(&[("id", b"notes"), ("cartridge", bytes)]).await;
        assert_eq!((reply.error().0, reply.code().as_str()), (400, "cartridge_invalid"));
    }
    let big = vec![b'x'; 2 << 20];
    for (parts, param) in [
        (vec![], "id"),
        (vec![("id", &b"notes"[..])], "cartridge"),
        (vec![("cartridge", &good[..])], "id"),
        (vec![("id", b""), ("cartridge", &good)], "id"),
        (vec![("id", b"\xff"), ("cartridge", &good)], "id"),
        (vec![("id", &big), ("cartridge", &good)], "id"),
        (vec![("id", b"a"), ("id", b"b"), ("cartridge", &good)], "id"),
        (vec![("id", b"a"), ("cartridge", &good), ("cartridge", &good)], "cartridge"),
        (vec![("id", b"a"), ("cartridge", &good), ("config", &big)], "config"),
        (vec![("id", b"a"), ("cartridge", &good), ("config", b"a: [")], "config"),
        (vec![("id", b"a"), ("cartridge", &good), ("zebra", b"1")], "zebra"),
        (vec![("id", b"a"), ("cartridge", &good), ("if_absent", b"yes")], "if_absent"),
        (
            vec![("id", b"a"), ("cartridge", &good), ("expected_generation", b"ab")],
            "expected_generation",
        ),
    ] {
        let reply = test.form(&parts).await;
        assert_eq!((reply.error().0, reply.error().1.as_str()), (400, param), "{}", reply.text);
    }
    let whole = form(&[("id", b"a"), ("cartridge", &good)]);
    for (kind, body) in [
        (FORM, &whole[..whole.len() - 10]),
        (FORM, b"--XX\r\n"),
        (FORM, b""),
        (FORM, &big),
        ("multipart/form-data", &whole),
        ("application/json", b"{}"),
    ] {
        let reply = test.ask("POST", "/v1/cartridges", &[("content-type", kind)], body).await;
        assert_eq!(reply.error().0, 400, "{}", reply.text);
    }
    let reply = test.ask("PUT", "/v1/cartridges/a", &[("content-type", FORM)], &whole).await;
    assert_eq!(reply.error().0, 400);
    assert_eq!(test.files(), files, "the old file is as it was, and nothing else is there");
    assert_eq!(test.used("notes").await.ok()["cartridges"][0]["generation"], generation.as_str());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_to_disk_as_it_comes() {
    let test = Test::new().await;
    let key = ("authorization", format!("Bearer {ADMIN}"));
    let head = &form(&[("id", b"large"), ("cartridge", b"")])[..];
    let head = &head[..head.len() - b"\r\n--XX--\r\n".len()];
    let cases = [
        ("PUT", "/v1/cartridges/large", "application/octet-stream", &b""[..]),
        ("POST", "/v1/cartridges", FORM, head),
    ];
    for (method, path, kind, start) in cases {
        let kind = ("content-type", kind.to_owned());
        let length = ("content-length", (1u64 << 30).to_string());
        let mut socket = test.wire.open(method, path, &[key.clone(), kind, length]);
        socket.write_all(start).unwrap();
        let written = || -> u64 {
            test.uploads().iter().filter_map(|path| path.metadata().ok()).map(|m| m.len()).sum()
        };
        for mib in 1..=4u64 {
            socket.write_all(&vec![7; 1 << 20]).unwrap();
            eventually("all but the last piece is in a file", || written() >= (mib - 1) << 20)
                .await;
        }
        drop(socket);
        eventually("it is removed", || test.uploads().is_empty()).await;
    }
    assert_eq!(test.get("/v1/cartridges/large").await.error().0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_publishers_that_expect_the_same_one_wins() {
    let test = Test::new().await;
    let (start, first) = test.file(6, 1);
    test.ask("PUT", "/v1/cartridges/notes", &[], &start).await.ok();
    let mut expected = first;
    for round in 0..5 {
        let (a, b) = (test.file(6, 100 + round), test.file(7, 200 + round));
        let tag = tag(&expected);
        let put = async |file: &[u8]| {
            test.ask("PUT", "/v1/cartridges/notes", &[("if-match", &tag)], file).await
        };
        let (x, y) = tokio::join!(put(&a.0), put(&b.0));
        let mut statuses = [x.status.as_u16(), y.status.as_u16()];
        expected = if statuses[0] == 200 { a.1 } else { b.1 };
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 412]);
        assert_eq!(test.used("notes").await.ok()["cartridges"][0]["generation"], expected.as_str());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_keys_only_this_machine_changes_cartridges() {
    let test = Test::with_access(Access::open(true)).await;
    let (file, _) = test.file(6, 1);
    let put = async |test: &Test, headers: &[(&str, &str)]| {
        test.ask("PUT", "/v1/cartridges/notes", headers, &file).await
    };
    put(&test, &[]).await.ok();
    for (header, why) in [
        (("origin", "https://evil.example"), "web page"),
        (("origin", "null"), "web page"),
        (("x-forwarded-for", "10.0.0.1"), "proxy"),
        (("forwarded", "for=10.0.0.1"), "proxy"),
    ] {
        let reply = put(&test, &[header]).await;
        assert_eq!((reply.error().0, reply.code().as_str()), (403, "admin_key_required"));
        assert!(
            reply.text.contains(why) && reply.text.contains("CARTOUCHE_ADMIN_KEY"),
            "{}",
            reply.text
        );
    }
    let rebound = Request::delete("/v1/cartridges/notes").header("host", "evil.example");
    let reply = test.server.send(rebound.body(Body::empty()).unwrap()).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (403, "admin_key_required"));
    test.get("/v1/cartridges/notes").await.ok();

    let test = Test::with_access(Access::open(false)).await;
    let reply = put(&test, &[]).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (403, "admin_key_required"));
    assert!(reply.text.contains("--admin-key-file"), "{}", reply.text);
    assert_eq!(test.get("/v1/cartridges").await.ok()["object"], "list");
    assert_eq!(test.uploads(), Vec::<PathBuf>::new());

    let sources = KeySources { user_keys: Some(ADMIN.to_owned()), ..KeySources::default() };
    let test = Test::with_access(Access::new(sources, true).unwrap()).await;
    let reply = put(&test, &[]).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (403, "admin_key_required"));
    assert!(reply.text.contains("the server has none"), "{}", reply.text);
}

#[tokio::test]
async fn a_server_that_drains_changes_nothing_any_more() {
    let test = Test::new().await;
    let (file, _) = test.file(6, 1);
    test.server.state.ready.drain();
    for reply in [
        test.ask("PUT", "/v1/cartridges/a", &[], &file).await,
        test.form(&[("id", b"a"), ("cartridge", &file)]).await,
        test.post("/v1/cartridges/load", json!({"id": "a"})).await,
        test.ask("DELETE", "/v1/cartridges/a", &[], b"").await,
    ] {
        assert_eq!((reply.error().0, reply.code().as_str()), (503, "shutting_down"));
    }
    assert_eq!(test.uploads(), Vec::<PathBuf>::new());
}
