//! What an admin does to cartridges while the server runs, over real connections.

mod api_support;

use std::path::PathBuf;

use api_support::{
    Reply,
    admin::{ADMIN, Test, USER, tag},
    log::Log,
};
use axum::{body::Body, http::Request};
use cartouche::api::{ApiOptions, ImplicitLoad};
use serde_json::json;

/// From a form to a deletion, each change seen by the next request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cartridge_is_published_replaced_and_deleted_while_serving() {
    let test = Test::new().await;
    let ((first, one), (second, two)) = (test.file(6, 1), test.file(9, 2));
    assert_eq!(test.used("team/notes").await.code(), "cartridge_not_found");
    let config = b"model:\n  pretrained_model_name_or_path: cartouche-demo\n";
    let parts: [(&str, &[u8]); 4] =
        [("cartridge", &first), ("config", config), ("id", b"team/notes"), ("if_absent", b"true")];
    let reply = test.form(&parts).await;
    assert_eq!(reply.ok(), json!({"object": "cartridge", "id": "team/notes", "generation": one}));
    assert_eq!(reply.header("etag"), tag(&one));
    assert_eq!(test.used("team/notes").await.ok()["cartridges"][0]["generation"], one.as_str());
    let shown = test.get("/v1/cartridges/team/notes").await;
    assert_eq!(shown.header("etag"), tag(&one));
    let shown = shown.ok();
    assert_eq!((&shown["generation"], &shown["tokens"]), (&json!(one), &json!(6)));
    assert_eq!((&shown["resident"], &shown["others"]), (&json!(true), &json!([])));
    let config = test.files().into_iter().find(|path| path.ends_with("config.yaml")).unwrap();
    assert!(std::fs::read_to_string(config).unwrap().contains("cartouche-demo"));

    // Again as if nothing were there: refused, by a field and by a header, and nothing changed.
    let reply = test.form(&parts).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (409, "cartridge_conflict"));
    assert_eq!(reply.json()["error"]["found"], one.as_str());
    let put = "/v1/cartridges/team/notes";
    let reply = test.ask("PUT", put, &[("if-none-match", "*")], &second).await;
    assert_eq!((reply.error().0, reply.header("etag")), (412, &*tag(&one)));
    let reply = test.ask("PUT", put, &[("if-match", &tag(&two))], &second).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (412, "cartridge_conflict"));
    assert_eq!(test.used("team/notes").await.ok()["cartridges"][0]["generation"], one.as_str());

    let reply = test.ask("PUT", put, &[("if-match", &tag(&one))], &second).await;
    assert_eq!(reply.ok()["generation"], two.as_str());
    assert_eq!(test.used("team/notes").await.ok()["cartridges"][0]["generation"], two.as_str());

    let reply = test.ask("DELETE", put, &[("if-match", &tag(&one))], b"").await;
    assert_eq!((reply.error().0, reply.json()["error"]["found"].as_str()), (412, Some(&*two)));
    let reply = test.ask("DELETE", put, &[("if-match", &tag(&two))], b"").await;
    assert_eq!(reply.ok()["deleted"], true);
    for reply in [
        test.used("team/notes").await,
        test.get(put).await,
        test.ask("DELETE", put, &[], b"").await,
    ] {
        assert_eq!((reply.error().0, reply.code().as_str()), (404, "cartridge_not_found"));
    }
    assert_eq!(test.uploads(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loading_unloading_and_pinning_change_what_is_resident() {
    let test = Test::new().await;
    let (file, generation) = test.file(6, 1);
    test.ask("PUT", "/v1/cartridges/notes", &[], &file).await.ok();
    let state = async || {
        let entry = test.get("/v1/cartridges/notes").await.ok();
        let flag = |name: &str| entry[name].as_bool().unwrap();
        (flag("resident"), flag("pinned"))
    };
    assert_eq!(
        test.post("/v1/cartridges/unload", json!({"id": "notes"})).await.ok()["was_resident"],
        true
    );
    assert_eq!(state().await, (false, false), "registered, not resident");
    assert_eq!(
        test.post("/v1/cartridges/unload", json!({"id": "notes"})).await.ok()["was_resident"],
        false
    );
    let reply = test.post("/v1/cartridges/notes/pin", json!({})).await;
    assert_eq!(reply.code(), "cartridge_not_found", "it has to be loaded first");
    let reply = test.post("/v1/cartridges/load", json!({"id": "notes", "pin": true})).await;
    assert_eq!(reply.ok(), json!({"object": "cartridge", "id": "notes", "generation": generation}));
    assert_eq!(state().await, (true, true));
    let reply = test.post("/v1/cartridges/unload", json!({"id": "notes"})).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (409, "cartridge_conflict"));
    assert_eq!(
        test.ask("POST", "/v1/cartridges/notes/unpin", &[], b"").await.ok()["pinned"],
        false
    );
    assert_eq!(state().await, (true, false));
    test.ask("POST", "/v1/cartridges/notes/pin", &[], b"").await.ok();
    assert_eq!(state().await, (true, true));

    let reply = test.post("/v1/cartridges/load", json!({"id": "absent"})).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (404, "cartridge_not_found"));
    let reply =
        test.post("/v1/cartridges/load", json!({"id": "o/r", "source": "huggingface"})).await;
    assert_eq!((reply.error().0, reply.code().as_str()), (502, "cartridge_source_unavailable"));
    for body in [json!({}), json!({"id": 1}), json!({"id": "a", "sauce": 1}), json!([])] {
        assert_eq!(test.post("/v1/cartridges/load", body).await.error().0, 400);
    }
    for path in ["/v1/cartridges/notes", "/v1/cartridges/pin", "/v1/cartridges/notes/delete"] {
        assert_eq!(test.post(path, json!({})).await.code(), "not_found", "{path}");
    }
}

/// An id is what follows the route, whatever it is called; actions are POST alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_id_is_taken_for_an_action() {
    let test = Test::new().await;
    for (i, (id, path)) in [
        ("load", "load"),
        ("unload", "unload"),
        ("x/pin", "x/pin"),
        ("org/name@v1", "org/name@v1"),
        ("org/other@v2", "org%2Fother%40v2"),
        ("spaced name", "spaced%20name"),
        ("100%", "100%25"),
    ]
    .into_iter()
    .enumerate()
    {
        let path = format!("/v1/cartridges/{path}");
        let (file, generation) = test.file(5, i as u64 + 10);
        let reply = test.ask("PUT", &path, &[], &file).await.ok();
        assert_eq!((&reply["id"], &reply["generation"]), (&json!(id), &json!(generation)));
        assert_eq!(test.get(&path).await.ok()["id"], id);
        assert_eq!(test.post(&format!("{path}/pin"), json!({})).await.ok()["id"], id);
        assert_eq!(test.used(id).await.ok()["cartridges"][0]["generation"], generation.as_str());
        assert_eq!(test.ask("DELETE", &path, &[], b"").await.ok()["id"], id);
    }
    for path in ["/v1/cartridges/%FF", "/v1/cartridges/%2E", "/v1/cartridges/%20"] {
        let (file, _) = test.file(5, 1);
        assert_eq!(test.ask("PUT", path, &[], &file).await.error().0, 400, "{path}");
    }
    assert_eq!(test.uploads(), Vec::<PathBuf>::new());
}

/// Also: what came of an upload whose client leaves is removed.
/// The generation is told whole, in a stream, on every route, and in errors that come after it was found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_reply_says_which_generation_answered() {
    let test = Test::new().await;
    let (file, generation) = test.file(6, 1);
    test.ask("PUT", "/v1/cartridges/notes", &[], &file).await.ok();
    let header = format!("notes@{generation}");
    let used = json!([{"id": "notes", "generation": generation, "tokens": 6}]);
    let cartridges = json!([{"id": "notes", "source": "local"}]);
    let messages = json!([{"role": "user", "content": "x"}]);
    for (path, body) in [
        ("/v1/chat/completions", json!({"messages": messages, "max_tokens": 2})),
        ("/custom/cartridge/chat/completions", json!({"messages": messages, "max_tokens": 2})),
        ("/v1/completions", json!({"prompt": "x", "max_tokens": 2})),
        ("/v1/cartridge/completions", json!({"prompt": "x", "max_tokens": 2})),
    ] {
        let body = api_support::merge(body, json!({"cartridges": cartridges}));
        let reply = test.server.ask(USER, "POST", path, body.clone()).await;
        assert_eq!(reply.header("x-cartouche-cartridges"), header);
        assert_eq!(reply.ok()["cartridges"], used);
        let stream = api_support::merge(body.clone(), json!({"stream": true}));
        let reply = test.server.ask(USER, "POST", path, stream).await;
        assert_eq!(reply.header("x-cartouche-cartridges"), header);
        assert!(reply.events().iter().any(|event| event["cartridges"] == used), "{}", reply.text);
        let long = api_support::merge(body, json!({"max_tokens": 1_000_000}));
        let reply = test.server.ask(USER, "POST", path, long).await;
        assert_eq!((reply.error().0, reply.header("x-cartouche-cartridges")), (400, &*header));
    }
}

#[tokio::test]
async fn what_an_admin_does_is_logged_and_counted_under_the_name_of_the_key() {
    let log = Log::shared();
    let test = Test::new().await;
    let (file, generation) = test.file(6, 1);
    let send = async |method: &str, path: &str, body: Vec<u8>| {
        let request = Request::builder().method(method).uri(path);
        let request = request.header("authorization", format!("Bearer {ADMIN}"));
        test.server.send(request.body(Body::from(body)).unwrap()).await
    };
    send("PUT", "/v1/cartridges/audited%0Aa", file).await.ok();
    send("POST", "/v1/cartridges/load", b"{\"id\": \"absent-too\"}".to_vec()).await;
    send("DELETE", "/v1/cartridges/audited%0Aa", Vec::new()).await.ok();
    let log = log.text();
    let ids = ["id=\"audited\\na\"", "id=\"absent-too\""];
    let ours =
        |line: &&str| line.contains("admin action") && ids.iter().any(|id| line.contains(id));
    let lines: Vec<&str> = log.lines().filter(ours).collect();
    assert_eq!(lines.len(), 3, "{log}");
    for (line, action) in lines.iter().zip(["publish", "load", "delete"]) {
        assert!(line.contains(&format!("action=\"{action}\"")), "{line}");
        assert!(line.contains("key=\"CARTOUCHE_ADMIN_KEY-1\""), "{line}");
    }
    assert!(lines[0].contains(&generation), "{}", lines[0]);
    assert!(lines[1].contains("code=\"cartridge_not_found\""), "{}", lines[1]);
    assert!(!log.contains("Secret"), "{log}");
    let text = test.get("/metrics").await.text;
    for (action, outcome) in [("publish", "done"), ("load", "refused"), ("delete", "done")] {
        let name = "cartouche_admin_actions_total";
        let line = format!("{name}{{action=\"{action}\",outcome=\"{outcome}\"}} 1");
        assert!(text.contains(&line), "{line}");
    }
}

/// `off`: what an admin loaded, until an admin loads it again; `local`: files of the directory as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_requests_load_by_themselves_can_be_limited() {
    for mode in [ImplicitLoad::Off, ImplicitLoad::Local, ImplicitLoad::Any] {
        let options = ApiOptions { implicit_load: mode, ..ApiOptions::default() };
        let test = Test::with(Test::keys(), options).await;
        let (file, generation) = test.file(6, 1);
        test.ask("PUT", "/v1/cartridges/notes", &[], &file).await.ok();
        let ask = async |id: &str, source: &str, force: bool| {
            let named = json!([{"id": id, "source": source, "force_redownload": force}]);
            test.chat(json!({"cartridges": named})).await
        };
        let is_used =
            |reply: &Reply| reply.ok()["cartridges"][0]["generation"] == generation.as_str();
        for source in ["local", "huggingface"] {
            assert!(is_used(&ask("notes", source, false).await), "{mode}: it is in memory");
        }
        test.post("/v1/cartridges/unload", json!({"id": "notes"})).await.ok();
        for source in ["huggingface", "local"] {
            let reply = ask("notes", source, false).await;
            if mode == ImplicitLoad::Off {
                assert_eq!((reply.error().0, reply.code().as_str()), (404, "cartridge_not_found"));
                let absent = ask("absent", source, false).await;
                assert_eq!(
                    absent.text.replace("absent", "notes"),
                    reply.text,
                    "as if it were not there"
                );
            } else {
                assert!(is_used(&reply), "{mode} {source}: {}", reply.text);
            }
        }
        let expected = if mode == ImplicitLoad::Any { 502 } else { 404 };
        assert_eq!(ask("absent", "huggingface", false).await.error().0, expected, "{mode}");
        assert_eq!(ask("absent", "local", false).await.error().0, 404, "{mode}");
        let refused = (403, "force_redownload_forbidden".to_owned());
        let forced = async |source: &str| {
            let reply = ask("notes", source, true).await;
            (reply.status.as_u16(), reply.json()["error"]["code"].as_str().unwrap_or("").to_owned())
        };
        assert_eq!(forced("local").await == refused, mode == ImplicitLoad::Off, "{mode}");
        assert_eq!(forced("huggingface").await == refused, mode != ImplicitLoad::Any, "{mode}");
        // An admin loads all the same.
        test.post("/v1/cartridges/load", json!({"id": "notes", "force_redownload": true}))
            .await
            .ok();
        assert!(is_used(&ask("notes", "local", false).await), "{mode}");
    }
}
