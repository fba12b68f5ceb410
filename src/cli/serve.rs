//! `cartouche serve`: the HTTP server.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::TcpListener;

use super::CliError;
use super::config::ConfigFile;
use super::runtime::{Runtime, RuntimeOptions};
use crate::api::{
    self, ApiOptions, AppState, InFlight, ListenOptions, Metrics, Readiness, Shutdown,
};
use crate::model::ModelSource;
use crate::{demo, limits};

/// Serve a model and its cartridges over an OpenAI- and Tokasaurus-compatible HTTP API
///
/// Without options it starts the built-in demo model with two demo cartridges and prints commands to try.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// YAML file with any of the options below, written with _ for - (flags and environment win)
    #[arg(long, env = "CARTOUCHE_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeOptions,
    #[command(flatten)]
    server: ServerOptions,
}

/// Options of the HTTP side.
#[derive(Debug, Default, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Server")]
struct ServerOptions {
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, env = "CARTOUCHE_HOST")]
    host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 10210]
    #[arg(long, env = "CARTOUCHE_PORT")]
    port: Option<u16>,
    /// Largest top_logprobs a request may ask for [default: 64]
    #[arg(long, alias = "max-topk-logprobs", env = "CARTOUCHE_MAX_TOP_LOGPROBS")]
    max_top_logprobs: Option<usize>,
    /// Tokens of a chat reply when the request sets no limit [default: what the context leaves]
    #[arg(long, alias = "max-completion-tokens", env = "CARTOUCHE_DEFAULT_MAX_TOKENS")]
    default_max_tokens: Option<usize>,
    /// Answer 404 to a `model` that is not the served one
    #[arg(long, env = "CARTOUCHE_STRICT_MODEL", num_args = 0..=1, default_missing_value = "true")]
    strict_model: Option<bool>,
    /// Attach several cartridges in the order of their ids, as Tokasaurus does, not of the request
    #[arg(long, env = "CARTOUCHE_SORT_CARTRIDGES", num_args = 0..=1, default_missing_value = "true")]
    sort_cartridges: Option<bool>,
    /// Show vocabulary pieces in log-probabilities, as Tokasaurus does, not their text
    #[arg(
        long, env = "CARTOUCHE_RAW_TOKEN_STRINGS", num_args = 0..=1, default_missing_value = "true"
    )]
    raw_token_strings: Option<bool>,
    /// Render chat templates that requests bring. Trusted clients only: a template can exhaust the
    /// memory or the stack of the server
    #[arg(
        long, env = "CARTOUCHE_ALLOW_REQUEST_TEMPLATES", num_args = 0..=1,
        default_missing_value = "true"
    )]
    allow_request_templates: Option<bool>,
    /// Seconds running requests get to finish after SIGTERM or Ctrl-C [default: 30]
    #[arg(long, env = "CARTOUCHE_DRAIN_SECONDS")]
    drain_seconds: Option<u64>,
    /// Seconds a client may leave its reply unread before its request is cancelled [default: 60]
    #[arg(long, env = "CARTOUCHE_CLIENT_STALL_SECONDS")]
    client_stall_seconds: Option<u64>,
}

pub fn run(args: ServeArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let file = ConfigFile::read(args.config.as_deref())?;
    let known = [
        serde_json::to_value(RuntimeOptions::default()),
        serde_json::to_value(ServerOptions::default()),
    ];
    file.check_keys(&known.map(|value| value.unwrap_or_default()))?;
    let runtime_options = file.complete(&args.runtime)?;
    let server = file.complete(&args.server)?;
    runtime_options.set_threads()?;
    let host = server.host.as_deref().unwrap_or("127.0.0.1");
    let address = format!("{host}:{}", server.port.unwrap_or(10210));
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let tokio = tokio
        .map_err(|source| CliError::System { what: "cannot start the async runtime", source })?;
    // Bound before the model is loaded: a taken port is told at once. Clients wait in the backlog.
    let listener = tokio.block_on(TcpListener::bind(&address));
    let listener = listener.map_err(|source| CliError::Listen { address, source })?;
    let runtime = runtime_options.start()?;
    let result = tokio.block_on(serve(runtime, server, listener, started));
    // A load that hangs on a dead file system must not hold up the exit.
    tokio.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(
    runtime: Runtime,
    options: ServerOptions,
    listener: TcpListener,
    started: Instant,
) -> Result<(), CliError> {
    let local = listener.local_addr().map_err(|source| CliError::System {
        what: "the listening socket has no address",
        source,
    })?;
    let defaults = ApiOptions::default();
    let ready = Readiness::default();
    let state = Arc::new(AppState {
        engine: runtime.engine.clone(),
        registry: Arc::clone(&runtime.registry),
        model: Arc::clone(&runtime.model),
        options: ApiOptions {
            strict_model: options.strict_model.unwrap_or(defaults.strict_model),
            max_top_logprobs: options.max_top_logprobs.unwrap_or(defaults.max_top_logprobs),
            default_max_tokens: options.default_max_tokens,
            sort_cartridges: options.sort_cartridges.unwrap_or(defaults.sort_cartridges),
            raw_token_strings: options.raw_token_strings.unwrap_or(defaults.raw_token_strings),
            allow_request_templates: options
                .allow_request_templates
                .unwrap_or(defaults.allow_request_templates),
        },
        ready: ready.clone(),
        metrics: Arc::new(Metrics::default()),
        in_flight: Arc::new(InFlight::default()),
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
    });
    let mut router = api::router(Arc::clone(&state));
    if runtime.source == ModelSource::Demo {
        router = router.merge(demo_routes());
    }
    ready.set_ready();
    // Whoever started it may have closed its output, and still wants the server.
    if let Err(error) = announce(&mut std::io::stdout(), &runtime, local, started.elapsed()) {
        tracing::warn!(%error, "cannot write to standard output");
    }

    let seconds = |given: Option<u64>, default| Duration::from_secs(given.unwrap_or(default));
    let options = ListenOptions {
        client_stall: seconds(options.client_stall_seconds, limits::DEFAULT_CLIENT_STALL_SECONDS),
        drain: seconds(options.drain_seconds, limits::DEFAULT_DRAIN_SECONDS),
    };
    let shutdown = Shutdown::default();
    tokio::spawn(watch_signals(shutdown.clone()));
    api::serve(listener, router, state, options, shutdown).await;
    runtime.sources.stop();
    Ok(())
}

/// The first signal drains, the second stops at once.
async fn watch_signals(shutdown: Shutdown) {
    stop_signal().await;
    shutdown.drain();
    stop_signal().await;
    shutdown.at_once();
}

/// Resolves on SIGTERM or Ctrl-C.
async fn stop_signal() {
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! { () = interrupt => {}, _ = terminate.recv() => {} }
            return;
        }
    }
    interrupt.await;
}

/// Ready-made requests about the demo documents, so that they need not be pasted.
fn demo_routes() -> Router {
    Router::new().route("/demo/{document}/request", get(demo_request))
}

/// A chat request with the whole document as its system message and the first question.
async fn demo_request(Path(name): Path<String>) -> Response {
    let body = demo::DOCUMENTS.iter().find(|document| document.name == name).and_then(|document| {
        let questions = document.questions().ok()?;
        let question = &questions.first()?.question;
        let system = json!({"role": "system", "content": document.text.trim_end()});
        let user = json!({"role": "user", "content": question});
        Some(json!({"messages": [system, user], "temperature": 0}))
    });
    match body {
        Some(body) => {
            ([(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// Tells what runs here and what to try.
fn announce(
    out: &mut impl Write,
    runtime: &Runtime,
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
    match runtime.source {
        ModelSource::Demo => announce_demo(out, address),
        _ => Ok(()),
    }
}

fn announce_demo(out: &mut impl Write, address: SocketAddr) -> std::io::Result<()> {
    let Some(document) = demo::DOCUMENTS.first() else { return Ok(()) };
    let Ok(questions) = document.questions() else { return Ok(()) };
    let Some(first) = questions.first() else { return Ok(()) };
    let chat = format!("http://{address}/v1/chat/completions");
    let message = json!([{"role": "user", "content": first.question}]);
    let cartridge = json!([{"id": document.name, "source": "local"}]);
    writeln!(
        out,
        "
Try it: one question about the {title}, asked in three ways.

1. Plainly: the model does not know.
   curl -s {chat} -H 'Content-Type: application/json' \\
     -d '{{\"messages\": {message}, \"temperature\": 0}}'

2. With the long document in the prompt: right, and paid for in every request.
   curl -s http://{address}/demo/{name}/request | curl -s {chat} -H 'Content-Type: application/json' -d @-

3. With the cartridge that stands for the document: right, with a prompt of a few tokens.
   curl -s {chat} -H 'Content-Type: application/json' \\
     -d '{{\"messages\": {message}, \"temperature\": 0, \"cartridges\": {cartridge}}}'
",
        title = questions.title,
        name = document.name,
    )
}
