//! What one tenant can learn or use of another: nothing.

mod api_support;

use api_support::{Reply, Server};
use cartouche::{
    api::{Access, ApiOptions, KeySources},
    engine::EngineOptions,
    limits,
};
use serde_json::{Value, json};

const KEYS: &str = "
- {name: a, key: key-of-a, cartridges: [alpha, 'a/*'], cache_salt: salt-of-a}
- {name: b, key: key-of-b, cartridges: [beta, absent], cache_salt: salt-of-b, force_redownload: false}
- {name: c, key: key-of-c}
- {name: d, key: key-of-d}
- {name: root, key: key-of-root, role: admin}
";

fn server() -> Server {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.yaml");
    std::fs::write(&path, KEYS).unwrap();
    let sources = KeySources { user_file: Some(path), ..KeySources::default() };
    let access = Access::new(sources, true).unwrap();
    Server::with_access(ApiOptions::default(), EngineOptions::default(), None, access)
}

async fn chat(server: &Server, key: &str, extra: Value) -> Reply {
    let body = json!({"messages": [{"role": "user", "content": "Hello, who are you?"}],
        "max_tokens": 4, "temperature": 0});
    server.ask(key, "POST", "/v1/chat/completions", api_support::merge(body, extra)).await
}

/// Every way to name a cartridge: fields of a chat request.
fn ways(id: &str) -> Vec<Value> {
    let block = format!("<cartridge>{}</cartridge>", json!({"id": id, "source": "local"}));
    let named = |source: &str| json!({"cartridges": [{"id": id, "source": source}]});
    vec![
        named("local"),
        named("huggingface"),
        named("wandb"),
        json!({"model": format!("cartouche-demo:{id}")}),
        json!({"model": format!(":{id}")}),
        json!({"messages": [{"role": "system", "content": block}, {"role": "user", "content": "x"}]}),
    ]
}

#[tokio::test]
async fn a_key_uses_its_own_cartridges_in_every_way_and_no_others_in_none() {
    let server = server();
    server.insert("a/notes", 6, 3);
    for (key, inside, outside) in [
        ("key-of-a", ["alpha", "a/notes"], "beta"),
        ("key-of-b", ["beta", "beta"], "alpha"),
        ("key-of-root", ["alpha", "beta"], "none"),
        ("key-of-c", ["a/notes", "beta"], "none"),
    ] {
        for id in inside {
            for way in ways(id) {
                assert_eq!(
                    chat(&server, key, way.clone()).await.ok()["cartridges"][0]["id"],
                    id,
                    "{way}"
                );
            }
        }
        for way in ways(outside).into_iter().filter(|_| outside != "none") {
            let reply = chat(&server, key, way.clone()).await;
            assert_eq!(
                (reply.error().0, reply.code().as_str()),
                (404, "cartridge_not_found"),
                "{way}"
            );
        }
    }
    // One that is not allowed beside one that is.
    let both = json!({"cartridges": [{"id": "alpha", "source": "local"}, {"id": "beta", "source": "local"}]});
    assert_eq!(chat(&server, "key-of-a", both).await.code(), "cartridge_not_found");
    for path in ["/v1/completions", "/v1/cartridge/completions", "/custom/cartridge/completions"] {
        let body = json!({"prompt": "x", "max_tokens": 1, "cartridges": [{"id": "beta", "source": "local"}]});
        assert_eq!(
            server.ask("key-of-a", "POST", path, body.clone()).await.code(),
            "cartridge_not_found"
        );
        server.ask("key-of-b", "POST", path, body).await.ok();
    }
    let body = json!({"prompt": "x", "model": ":beta"});
    server.ask("key-of-a", "POST", "/tokenize", body).await.ok();
}

/// `alpha` is there and forbidden to b; `gamma` is not there, `absent` is neither there nor forbidden.
#[tokio::test]
async fn a_forbidden_cartridge_answers_like_one_that_is_not_there() {
    let server = server();
    let anonymous = |reply: &Reply, id: &str| {
        let mut headers: Vec<_> = reply.headers.keys().map(|name| name.as_str()).collect();
        headers.sort();
        (reply.status, format!("{headers:?}"), reply.text.replace(id, "ID"))
    };
    for i in 0..ways("").len() {
        let mut seen = Vec::new();
        for id in ["alpha", "gamma"] {
            let way = ways(id).swap_remove(i);
            seen.push(anonymous(&chat(&server, "key-of-b", way).await, id));
        }
        assert_eq!(seen[0], seen[1]);
    }
    // Words too are those of a look that finds nothing.
    let local = |id: &str| json!({"cartridges": [{"id": id, "source": "local"}]});
    let forbidden = anonymous(&chat(&server, "key-of-b", local("alpha")).await, "alpha");
    let absent = anonymous(&chat(&server, "key-of-b", local("absent")).await, "absent");
    assert_eq!(forbidden, absent);
    // Nothing was looked up for it.
    let before = server.state.registry.stats();
    let force =
        json!({"cartridges": [{"id": "alpha", "source": "local", "force_redownload": true}]});
    let reply = chat(&server, "key-of-b", force).await;
    assert_eq!(reply.code(), "cartridge_not_found", "before the right to reload is looked at");
    assert_eq!(server.state.registry.stats(), before);
}

#[tokio::test]
async fn lists_and_metrics_show_what_a_key_may_name() {
    let server = server();
    server.insert("a/notes", 6, 3);
    let ids = async |key: &str| {
        let list = server.ask(key, "GET", "/v1/cartridges", Value::Null).await.ok();
        let entries = list["data"].as_array().unwrap().clone();
        entries.iter().map(|e| e["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids("key-of-a").await, ["a/notes", "alpha"]);
    assert_eq!(ids("key-of-b").await, ["beta"]);
    assert_eq!(ids("key-of-root").await, ["a/notes", "alpha", "beta"]);
    let held = server.state.in_flight.enter();
    held.holds(vec!["alpha".to_owned(), "beta".to_owned()]);
    for (key, shown, hidden) in [("key-of-a", "alpha", "beta"), ("key-of-b", "beta", "alpha")] {
        let text = server.ask(key, "GET", "/metrics", Value::Null).await.text;
        let line = text.lines().find(|line| line.starts_with("vllm:lora_requests_info")).unwrap();
        assert!(line.contains(&format!("waiting_lora_adapters=\"{shown}\"")), "{line}");
        assert!(!text.contains(hidden), "{line}");
    }
}

#[tokio::test]
async fn reloading_is_a_right() {
    let server = server();
    let force =
        |id: &str| json!({"cartridges": [{"id": id, "source": "local", "force_redownload": true}]});
    let reply = chat(&server, "key-of-b", force("beta")).await;
    let (status, param, _) = reply.error();
    assert_eq!((status, param.as_str()), (403, "cartridges"));
    assert_eq!(reply.code(), "force_redownload_forbidden");
    chat(&server, "key-of-a", force("alpha")).await.ok();
}

fn cached(reply: &Reply) -> u64 {
    reply.ok()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// Neither `cached_tokens` nor the steps of the engine, which are the time, tell what others have asked.
#[tokio::test]
async fn no_salt_sees_what_was_asked_under_another() {
    let server = server();
    let long = "The keeper of the light at Osford writes down every ship that passes, ".repeat(8);
    let ask = async |key: &str, salt: Option<&str>| {
        let before = server.state.engine.stats().prefix_hit_tokens;
        let messages = json!([{"role": "user", "content": long}]);
        let reply = chat(&server, key, json!({"messages": messages, "cache_salt": salt})).await;
        let cached = cached(&reply);
        assert_eq!(server.state.engine.stats().prefix_hit_tokens - before, cached);
        (cached, reply.json()["choices"][0]["message"]["content"].clone())
    };
    // Each for the first time, although the prompt is always the same.
    let all = [
        ("key-of-a", None),
        ("key-of-b", None),
        ("key-of-c", None),
        ("key-of-c", Some("salt-of-a")),
        ("key-of-a", Some("salt-of-b")),
        ("key-of-b", Some("salt-of-b")),
        ("key-of-a", Some("x")),
    ];
    let mut texts = Vec::new();
    for (key, salt) in all {
        let (cached, text) = ask(key, salt).await;
        assert_eq!(cached, 0, "{key} {salt:?}");
        texts.push(text);
    }
    for (key, salt) in all {
        let (cached, text) = ask(key, salt).await;
        assert!(cached > 100, "{key} {salt:?}: its own is found");
        texts.push(text);
    }
    // Keys without a salt share, as they are told to.
    assert!(ask("key-of-d", None).await.0 > 100);
    assert!(texts.iter().all(|text| *text == texts[0]), "the answer does not depend on it");
}

#[tokio::test]
async fn cache_salt_is_a_string_with_a_limit() {
    let server = server();
    for salt in
        [json!(""), json!("x".repeat(limits::MAX_CACHE_SALT_BYTES + 1)), json!(5), json!(["a"])]
    {
        let reply = chat(&server, "key-of-c", json!({"cache_salt": salt})).await;
        assert_eq!(
            (reply.error().0, reply.error().1.as_str()),
            (400, "cache_salt"),
            "{}",
            reply.text
        );
    }
    let reply = chat(&server, "key-of-c", json!({"cache_salt": "x"})).await;
    assert_eq!((reply.status.as_u16(), reply.header("x-cartouche-ignored-fields")), (200, ""));
}
