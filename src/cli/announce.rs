//! What `cartouche serve` prints when it is ready.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;

use super::runtime::Runtime;
use crate::api::Access;
use crate::model::ModelSource;
use crate::{demo, limits};

/// Tells what runs here and what to try.
pub fn announce(
    out: &mut impl Write,
    runtime: &Runtime,
    access: &Access,
    address: SocketAddr,
    start: Duration,
) -> std::io::Result<()> {
    let info = runtime.engine.info();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    writeln!(out, "\nCartouche {} on http://{address}", env!("CARGO_PKG_VERSION"))?;
    writeln!(
        out,
        "model       {} ({:.0} MiB of weights, ready in {:.2} s)",
        runtime.model.name,
        mib(runtime.weight_bytes),
        start.as_secs_f64()
    )?;
    let entries = runtime.registry.list();
    for entry in &entries {
        match entry.tokens {
            Some(tokens) => writeln!(out, "cartridge   {} ({tokens} tokens)", entry.id)?,
            None => writeln!(out, "cartridge   {} (on disk)", entry.id)?,
        }
    }
    if entries.is_empty() {
        writeln!(out, "cartridge   none yet; put them into --cartridge-dir")?;
    }
    writeln!(
        out,
        "limits      {} tokens of context, {} tokens of KV cache ({:.0} MiB), {} sequences at once, \
         {} sequences or {} prompt tokens waiting, bodies up to {} MiB",
        info.max_context,
        info.kv_tokens,
        mib(info.kv_bytes),
        info.max_running_sequences,
        info.max_queued_sequences,
        info.max_queued_tokens,
        limits::MAX_BODY_BYTES >> 20
    )?;
    let prefix_cache = if info.prefix_cache { "on" } else { "off" };
    writeln!(out, "prefix      cache of prompt beginnings: {prefix_cache}")?;
    let keys = match (access.has_keys(), access.has_admin_key()) {
        (true, true) => "every route but health needs an API key",
        (true, false) => "every route but health needs an API key; no admin key is set",
        (false, _) => "no API keys are set: everybody who can connect is served",
    };
    writeln!(out, "access      {keys}")?;
    match runtime.source {
        ModelSource::Demo => announce_demo(out, address, access.has_keys()),
        _ => Ok(()),
    }
}

fn announce_demo(out: &mut impl Write, address: SocketAddr, keys: bool) -> std::io::Result<()> {
    let Some(document) = demo::DOCUMENTS.first() else { return Ok(()) };
    let Ok(questions) = document.questions() else { return Ok(()) };
    let Some(first) = questions.first() else { return Ok(()) };
    let chat = format!("http://{address}/v1/chat/completions");
    let message = json!([{"role": "user", "content": first.question}]);
    let curl = if keys { "curl -s -H \"Authorization: Bearer $KEY\"" } else { "curl -s" };
    let cartridge = json!([{"id": document.name, "source": "local"}]);
    writeln!(
        out,
        "
Try it: one question about the {title}, asked in three ways.

1. Plainly: the model does not know.
   {curl} {chat} -H 'Content-Type: application/json' \\
     -d '{{\"messages\": {message}, \"temperature\": 0}}'

2. With the long document in the prompt: right, and paid for in every request.
   {curl} http://{address}/demo/{name}/request | {curl} {chat} -H 'Content-Type: application/json' -d @-

3. With the cartridge that stands for the document: right, with a prompt of a few tokens.
   {curl} {chat} -H 'Content-Type: application/json' \\
     -d '{{\"messages\": {message}, \"temperature\": 0, \"cartridges\": {cartridge}}}'
",
        title = questions.title,
        name = document.name,
    )
}
