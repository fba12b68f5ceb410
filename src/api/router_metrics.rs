//! The gauges that inference routers read, under vLLM's names: the Gateway API inference extension and llm-d
//! pick a replica by its queue, its KV cache, and the adapters (here: cartridges) it already has.
//!
//! Written by hand because a series whose labels change would stay in a recorder for ever.

use std::{fmt::Write, time::SystemTime};

use super::{AppState, access::Scope};
use crate::cartridge::Origin;
use crate::engine::{BLOCK_TOKENS, EngineStats};

/// Appends the series. As in vLLM, every choice of a request counts as one, and blocks that only hold reusable
/// prefixes count as free.
pub(super) fn append(text: &mut String, state: &AppState, stats: EngineStats, scope: &Scope) {
    let info = state.engine.info();
    let model = [("model_name", state.model.name.as_str())];
    let used = stats.used_blocks as f64 / stats.total_blocks.max(1) as f64;
    let mut gauge = |name, help, labels: &[(&str, &str)], value: f64| {
        family(text, name, help);
        line(text, name, labels, value);
    };
    gauge(
        "vllm:num_requests_waiting",
        "Choices of requests that wait",
        &model,
        stats.waiting as f64,
    );
    gauge(
        "vllm:num_requests_running",
        "Choices of requests in the batch",
        &model,
        stats.running as f64,
    );
    gauge("vllm:kv_cache_usage_perc", "KV cache in use; 1 is all of it", &model, used);
    let cache = [
        ("model_name", state.model.name.as_str()),
        ("block_size", &BLOCK_TOKENS.to_string()),
        ("num_gpu_blocks", &stats.total_blocks.to_string()),
        ("enable_prefix_caching", if info.prefix_cache { "True" } else { "False" }),
    ];
    gauge("vllm:cache_config_info", "Sizes of the KV cache", &cache, 1.0);
    let mut in_use = state.in_flight.cartridges();
    for ids in [&mut in_use.running, &mut in_use.waiting] {
        ids.retain(|id| scope.shows(id, Origin::Memory));
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let adapters = [
        // Each sequence of a batch may bring a cartridge of its own.
        ("max_lora", info.max_running_sequences.to_string()),
        ("running_lora_adapters", list(&in_use.running)),
        ("waiting_lora_adapters", list(&in_use.waiting)),
    ];
    let adapters = adapters.each_ref().map(|(key, value)| (*key, value.as_str()));
    gauge(
        "vllm:lora_requests_info",
        "Cartridges of requests; the value is the time of this reading",
        &adapters,
        now.map_or(0.0, |now| now.as_secs_f64()),
    );
}

/// Comma separated; a comma inside an id, and the percent sign that stands for it, are percent-encoded.
fn list(ids: &[String]) -> String {
    let encoded: Vec<String> =
        ids.iter().map(|id| id.replace('%', "%25").replace(',', "%2C")).collect();
    encoded.join(",")
}

fn family(text: &mut String, name: &str, help: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
}

fn line(text: &mut String, name: &str, labels: &[(&str, &str)], value: f64) {
    let labels: Vec<String> =
        labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
    let _ = writeln!(text, "{name}{{{}}} {value}", labels.join(","));
}

/// A label's value as the text format has it.
fn escape(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_clients_stay_inside_their_label() {
        let ids = ["a,b".to_owned(), "50%".to_owned(), "x\"} 1\n\\".to_owned()];
        let mut text = String::new();
        line(&mut text, "m", &[("l", &list(&ids))], 1.5);
        assert_eq!(text, "m{l=\"a%2Cb,50%25,x\\\"} 1\\n\\\\\"} 1.5\n");
    }
}
