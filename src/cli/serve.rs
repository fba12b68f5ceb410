//! `cartouche serve`: the HTTP server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

use super::CliError;
use super::access::{AccessOptions, Opened};
use super::announce::announce;
use super::config::ConfigFile;
use super::runtime::{Runtime, RuntimeOptions};
use crate::api::{
    self, ApiOptions, AppState, InFlight, ListenOptions, Metrics, Readiness, Shutdown,
};
use crate::limits;
use crate::model::ModelSource;

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
    #[command(flatten)]
    access: AccessOptions,
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
        serde_json::to_value(AccessOptions::default()),
    ];
    file.check_keys(&known.map(|value| value.unwrap_or_default()))?;
    let runtime_options = file.complete(&args.runtime)?;
    let server = file.complete(&args.server)?;
    let access = file.complete(&args.access)?;
    runtime_options.set_threads()?;
    let host = server.host.as_deref().unwrap_or("127.0.0.1");
    let address = format!("{host}:{}", server.port.unwrap_or(10210));
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let tokio = tokio
        .map_err(|source| CliError::System { what: "cannot start the async runtime", source })?;
    // Bound before the model is loaded: a taken port is told at once. Clients wait in the backlog.
    let listener = tokio.block_on(TcpListener::bind(&address));
    let listener = listener.map_err(|source| CliError::Listen { address, source })?;
    let local = listener.local_addr().map_err(|source| CliError::System {
        what: "the listening socket has no address",
        source,
    })?;
    // Before the model too: wrong keys are told at once.
    let access = access.open(local)?;
    let runtime = runtime_options.start()?;
    let result = tokio.block_on(serve(runtime, server, access, (listener, local), started));
    // A load that hangs on a dead file system must not hold up the exit.
    tokio.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(
    runtime: Runtime,
    options: ServerOptions,
    Opened { access, cors_origins, implicit_load }: Opened,
    (listener, local): (TcpListener, SocketAddr),
    started: Instant,
) -> Result<(), CliError> {
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
            cors_origins,
            implicit_load,
            demo_requests: runtime.source == ModelSource::Demo,
        },
        access: Arc::clone(&access),
        ready: ready.clone(),
        metrics: Arc::new(Metrics::default()),
        in_flight: Arc::new(InFlight::default()),
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
    });
    let router = api::router(Arc::clone(&state));
    ready.set_ready();
    // Whoever started it may have closed its output, and still wants the server.
    if let Err(error) =
        announce(&mut std::io::stdout(), &runtime, &access, local, started.elapsed())
    {
        tracing::warn!(%error, "cannot write to standard output");
    }

    let seconds = |given: Option<u64>, default| Duration::from_secs(given.unwrap_or(default));
    let options = ListenOptions {
        client_stall: seconds(options.client_stall_seconds, limits::DEFAULT_CLIENT_STALL_SECONDS),
        drain: seconds(options.drain_seconds, limits::DEFAULT_DRAIN_SECONDS),
    };
    let shutdown = Shutdown::default();
    tokio::spawn(watch_signals(shutdown.clone()));
    tokio::spawn(access.watch(super::access::hangup));
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
