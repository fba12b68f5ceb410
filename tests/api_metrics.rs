//! `/metrics`: the text is well formed, the names are the documented ones, and the numbers are true.

mod api_support;

use std::collections::{BTreeMap, BTreeSet};

use api_support::{MODEL, Server, merge};
use axum::{body::Body, http::Request};
use cartouche::{api::ApiOptions, engine::EngineOptions};
use http_body_util::BodyExt;
use serde_json::json;
use tower::ServiceExt;

/// One line of the text.
#[derive(Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// What a scrape says.
#[derive(Debug, Default)]
struct Exposition {
    /// Family to type.
    types: BTreeMap<String, String>,
    samples: Vec<Sample>,
}

impl Exposition {
    /// Parses the text format, strictly: help and type before the samples of a family, families in one piece,
    /// no series twice.
    fn parse(text: &str) -> Self {
        let mut parsed = Self::default();
        let mut helped = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut family = String::new();
        assert!(text.ends_with('\n'));
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert!(helped.contains(name), "no help before {line}");
                assert!(parsed.types.insert(name.to_owned(), kind.to_owned()).is_none(), "{line}");
                name.clone_into(&mut family);
            } else {
                assert!(!line.starts_with('#'), "{line}");
                let sample = Sample::parse(line);
                let kind = parsed.types[&family].as_str();
                let suffix = sample.name.strip_prefix(&family).unwrap_or_else(|| panic!("{line}"));
                let suffixes: &[&str] =
                    if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                assert!(suffixes.contains(&suffix), "{line}");
                assert_eq!(sample.labels.contains_key("le"), suffix == "_bucket", "{line}");
                assert!(kind == "gauge" || sample.value >= 0.0, "{line}");
                assert!(seen.insert((sample.name.clone(), sample.labels.clone())), "twice: {line}");
                parsed.samples.push(sample);
            }
        }
        assert_eq!(helped, parsed.types.keys().cloned().collect());
        parsed
    }

    fn series(&self, name: &str) -> Vec<&Sample> {
        self.samples.iter().filter(|sample| sample.name == name).collect()
    }

    /// The only series of a name.
    fn one(&self, name: &str) -> &Sample {
        match self.series(name)[..] {
            [sample] => sample,
            ref other => panic!("{name}: {other:?}"),
        }
    }
}

impl Sample {
    fn parse(line: &str) -> Self {
        let end = line.find(['{', ' ']).unwrap();
        let name = &line[..end];
        let legal = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        assert!(
            name.chars().all(legal) && !name.starts_with(|c: char| c.is_ascii_digit()),
            "{line}"
        );
        let mut labels = BTreeMap::new();
        let mut rest = &line[end..];
        if let Some(inner) = rest.strip_prefix('{') {
            rest = inner;
            while !rest.starts_with('}') {
                let (key, after) = rest.split_once("=\"").unwrap();
                assert!(key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{line}");
                let mut value = String::new();
                let mut chars = after.char_indices();
                let end = loop {
                    match chars.next().unwrap() {
                        (i, '"') => break i + 1,
                        (_, '\\') => value.push(match chars.next().unwrap().1 {
                            'n' => '\n',
                            c @ ('\\' | '"') => c,
                            c => panic!("\\{c} in {line}"),
                        }),
                        (_, c) => value.push(c),
                    }
                };
                assert!(labels.insert(key.to_owned(), value).is_none(), "{line}");
                rest = &after[end..];
                rest = rest.strip_prefix(',').unwrap_or(rest);
            }
            rest = &rest[1..];
        }
        let value = rest.strip_prefix(' ').unwrap().parse().unwrap_or_else(|_| panic!("{line}"));
        Self { name: name.to_owned(), labels, value }
    }
}

async fn scrape(server: &Server) -> Exposition {
    let reply = server.get("/metrics").await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    Exposition::parse(&reply.text)
}

fn fresh() -> Server {
    Server::new(ApiOptions::default(), EngineOptions::default())
}

/// Names are what dashboards and routers hold on to: a change here is a change for them.
#[tokio::test]
async fn names_types_and_labels_are_the_documented_ones() {
    let server = fresh();
    server.chat(json!({"ignore_eos": true, "n": 2})).await.ok();
    server.get("/v1/nothing").await;
    let metrics = scrape(&server).await;
    let mut lines: BTreeSet<String> = BTreeSet::new();
    for (family, kind) in &metrics.types {
        let of = metrics.samples.iter().filter(|s| {
            let suffix = s.name.strip_prefix(family.as_str());
            suffix.is_some_and(|s| ["", "_bucket", "_sum", "_count"].contains(&s))
        });
        let labels: BTreeSet<&str> =
            of.flat_map(|s| s.labels.keys()).map(String::as_str).filter(|l| *l != "le").collect();
        let labels: Vec<&str> = labels.into_iter().collect();
        lines.insert(format!("{family} {kind} {}", labels.join(",")).trim_end().to_owned());
    }
    let expected = [
        "cartouche_cached_prompt_tokens_total counter",
        "cartouche_cartridge_budget_bytes gauge",
        "cartouche_cartridge_bytes gauge",
        "cartouche_cartridge_evictions_total counter",
        "cartouche_cartridge_fetch_failures_total counter",
        "cartouche_cartridge_fetches_total counter",
        "cartouche_cartridge_host_bytes gauge",
        "cartouche_cartridge_leases gauge",
        "cartouche_cartridge_load_failures_total counter",
        "cartouche_cartridge_loads_total counter",
        "cartouche_cartridge_restores_total counter",
        "cartouche_cartridges_resident gauge",
        "cartouche_choices_finished_total counter reason",
        "cartouche_completion_tokens_total counter",
        "cartouche_engine_steps_total counter",
        "cartouche_generation_seconds histogram outcome",
        "cartouche_http_requests_total counter method,route,status",
        "cartouche_http_response_start_seconds histogram route",
        "cartouche_inter_token_latency_seconds histogram",
        "cartouche_kv_blocks gauge",
        "cartouche_kv_blocks_cached gauge",
        "cartouche_kv_blocks_used gauge",
        "cartouche_preemptions_total counter",
        "cartouche_prefix_cache_hit_tokens_total counter",
        "cartouche_prefix_cache_queried_tokens_total counter",
        "cartouche_prompt_tokens_total counter",
        "cartouche_requests_in_flight gauge",
        "cartouche_sequences_running gauge",
        "cartouche_sequences_waiting gauge",
        "cartouche_time_to_first_token_seconds histogram",
        "cartouche_time_to_prompt_done_seconds histogram",
        "cartouche_waiting_tokens gauge",
        "vllm:cache_config_info gauge block_size,enable_prefix_caching,model_name,num_gpu_blocks",
        "vllm:kv_cache_usage_perc gauge model_name",
        "vllm:lora_requests_info gauge max_lora,running_lora_adapters,waiting_lora_adapters",
        "vllm:num_requests_running gauge model_name",
        "vllm:num_requests_waiting gauge model_name",
    ];
    assert_eq!(lines.into_iter().collect::<Vec<_>>(), expected);
    let docs = include_str!("../docs/metrics.md");
    for family in metrics.types.keys() {
        assert!(docs.contains(&format!("`{family}`")), "{family} is not in docs/metrics.md");
    }
}

#[tokio::test]
async fn what_happened_is_what_is_counted() {
    let server = fresh();
    let body = json!({"ignore_eos": true, "max_tokens": 8, "n": 2});
    let usage = server.chat(body.clone()).await.ok()["usage"].clone();
    let stream = merge(body, json!({"stream": true, "n": 1}));
    server.chat(stream).await.events();
    server.get("/v1/nothing").await;
    let metrics = scrape(&server).await;
    let value = |name| metrics.one(name).value;
    assert_eq!(value("cartouche_completion_tokens_total"), 24.0);
    assert_eq!(value("cartouche_inter_token_latency_seconds_count"), 21.0);
    assert_eq!(value("cartouche_time_to_first_token_seconds_count"), 2.0);
    assert_eq!(value("cartouche_time_to_prompt_done_seconds_count"), 2.0);
    let prompt = usage["prompt_tokens"].as_f64().unwrap();
    assert_eq!(value("cartouche_prompt_tokens_total"), 2.0 * prompt);
    assert_eq!(value("cartouche_requests_in_flight"), 0.0);
    assert_eq!(value("cartouche_cartridges_resident"), 2.0);
    assert!(value("cartouche_cartridge_bytes") > 0.0);
    let finished = metrics.one("cartouche_choices_finished_total");
    assert_eq!((finished.labels["reason"].as_str(), finished.value), ("length", 3.0));
    let ended = metrics.one("cartouche_generation_seconds_count");
    assert_eq!((ended.labels["outcome"].as_str(), ended.value), ("finished", 2.0));
    for (route, status) in [("/v1/chat/completions", "200"), ("unmatched", "404")] {
        let found = metrics
            .series("cartouche_http_requests_total")
            .into_iter()
            .any(|sample| sample.labels["route"] == route && sample.labels["status"] == status);
        assert!(found, "{route} {status}");
    }
    let text = server.get("/metrics").await.text;
    assert!(!text.contains("nothing"), "paths must not become labels");
}

#[tokio::test]
async fn routers_see_sizes_and_the_cartridges_of_running_requests() {
    let server = fresh();
    let odd = "odd, \"id\"\\50%";
    server.insert(odd, 3, 9);
    let body = json!({
        "model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "ignore_eos": true,
        "max_tokens": 4000, "stream": true,
        "cartridges": [{"id": "beta", "source": "local"}, {"id": odd, "source": "local"}],
    });
    let request = Request::post("/v1/chat/completions").body(Body::from(body.to_string())).unwrap();
    let mut reply = server.router.clone().oneshot(request).await.unwrap().into_body();
    reply.frame().await.unwrap().unwrap();
    let during = scrape(&server).await;
    let info = during.one("vllm:lora_requests_info");
    assert_eq!(info.labels["running_lora_adapters"], "beta,odd%2C \"id\"\\50%25");
    assert_eq!(info.labels["waiting_lora_adapters"], "");
    assert_eq!(
        info.labels["max_lora"],
        server.state.engine.info().max_running_sequences.to_string()
    );
    assert!(info.value > 1.7e9, "a Unix time");
    assert_eq!(during.one("vllm:num_requests_running").value, 1.0);
    assert_eq!(during.one("vllm:num_requests_running").labels["model_name"], MODEL);
    let usage = during.one("vllm:kv_cache_usage_perc").value;
    assert!(usage > 0.0 && usage <= 1.0, "{usage}");
    let cache = &during.one("vllm:cache_config_info").labels;
    assert_eq!(cache["block_size"], "16");
    let blocks = server.state.engine.stats().total_blocks.to_string();
    assert_eq!(cache["num_gpu_blocks"], blocks);
    assert_eq!(during.one("cartouche_requests_in_flight").value, 1.0);
    drop(reply);
    let after = scrape(&server).await;
    let info = after.one("vllm:lora_requests_info");
    assert_eq!(info.labels["running_lora_adapters"], "", "no series is left behind");
    assert_eq!(after.one("cartouche_requests_in_flight").value, 0.0);
}

/// Ids, models and paths come from clients: however many different ones, nothing is kept of them.
#[tokio::test]
async fn distinct_names_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let dir = Some(dir.path().to_owned());
    let server = Server::with_cartridge_dir(ApiOptions::default(), EngineOptions::default(), dir);
    let ask = async |i: usize| {
        for source in ["local", "wandb", "huggingface"] {
            let body = json!({
                "model": format!("model-{i}"), "messages": [{"role": "user", "content": "Hi"}],
                "cartridges": [{"id": format!("id-{i}"), "source": source}],
            });
            assert!(server.post("/v1/chat/completions", body).await.status.as_u16() >= 400);
        }
        server.get(&format!("/v1/models/m-{i}")).await;
        server.get(&format!("/v1/none-{i}")).await;
    };
    ask(0).await;
    // Its own route is counted once it was answered.
    scrape(&server).await;
    let (before, listed) =
        (scrape(&server).await.samples.len(), server.state.registry.list().len());
    for i in 1..300 {
        ask(i).await;
    }
    assert_eq!(scrape(&server).await.samples.len(), before);
    assert_eq!(server.state.registry.list().len(), listed);
}
