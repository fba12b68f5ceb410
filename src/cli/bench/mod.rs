//! `cartouche bench`: options of the load generator, and of the measurement without a server.

mod plan;
mod shape;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};
use tokio::sync::watch;

use super::CliError;
use crate::bench;

/// Measure an OpenAI-compatible server under load: throughput, time to first token, inter-token latency
///
/// Works with any server that streams chat or text completions (this one, llama.cpp, vLLM, ...). Several
/// --target are measured in turns with the same requests. Plain http only.
///
/// Percentiles are nearest-rank. Rates are over the time in which all clients were busy. TTFT is the time
/// to the first chunk with text; ITL the time between such chunks; TPOT the time per token after the first.
///
/// With --shape no server is measured but the decoder in this process, on random weights of a real model's
/// shape made on the device: decoding, a shared cartridge, a full KV memory, and training, each beside the
/// shortest time that the device's own copy and matrix product allow.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cartouche bench --clients 1,8,32 --out results
  cartouche bench --target ours=http://127.0.0.1:10210 --target llama.cpp=http://127.0.0.1:8080 --repeat 3
  cartouche bench --rate 2,4,8 --seconds 30 --prompt-tokens 512
  cartouche bench --scenario shared --prefix cartridge --cartridge harbour-log --clients 1,8,32
  cartouche bench --scenario distinct --prefix text --prefix-tokens 2048 --clients fill
  cartouche bench --shape llama-3.1-8b --device cuda --out results
  cartouche bench --shape llama-3.2-1b --layers 1 --scale 16 --device cpu")]
pub struct BenchArgs {
    /// The server: http://host:port, with or without /v1
    #[arg(long, default_value = "http://127.0.0.1:10210", conflicts_with = "targets")]
    url: String,
    /// A server and what to call it, LABEL=URL; may be repeated, and ratios are to the first
    #[arg(long = "target", value_name = "LABEL=URL", value_parser = parse_target)]
    targets: Vec<(String, String)>,
    /// Model to ask for [default: the first that each server lists]
    #[arg(long)]
    model: Option<String>,
    /// Sent as `Authorization: Bearer`; left out of the report
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    #[arg(long, value_enum, default_value = "chat")]
    endpoint: EndpointArg,

    /// Closed loop: numbers of clients, each sending when its last request is answered; `fill` takes as
    /// many as the KV cache holds [default: 1]
    #[arg(long, value_delimiter = ',', conflicts_with = "rates", help_heading = "Load")]
    clients: Vec<ClientsArg>,
    /// Open loop: requests per second at random (Poisson) times; latency counts from the intended time
    #[arg(long = "rate", value_delimiter = ',', value_parser = positive, help_heading = "Load")]
    rates: Vec<f64>,
    /// Requests on their way at most in the open loop; later ones wait, and the wait is latency
    #[arg(long, default_value_t = 256, value_parser = at_least_1, help_heading = "Load")]
    max_outstanding: usize,
    /// Requests of each client (closed loop) or of each level (open loop) [default: 10, or 100]
    #[arg(long, conflicts_with = "seconds", value_parser = at_least_1, help_heading = "Load")]
    requests: Option<usize>,
    /// Seconds of each level; requests that have started are finished
    #[arg(long, value_parser = positive, help_heading = "Load")]
    seconds: Option<f64>,
    /// Unmeasured requests of each client before a closed level, in all before an open one
    #[arg(long, default_value_t = 1, help_heading = "Load")]
    warmup: usize,
    /// Times each level is measured on each target; medians are shown
    #[arg(long, default_value_t = 1, value_parser = at_least_1, help_heading = "Load")]
    repeat: usize,
    /// Seconds after which a request has failed
    #[arg(long, default_value_t = 600.0, value_parser = positive, help_heading = "Load")]
    timeout: f64,
    /// Times a 429 is waited out as its Retry-After says; the wait is latency
    #[arg(long, default_value_t = 0, help_heading = "Load")]
    retry_429: u32,

    /// Prompt tokens without prefix, as the server counts them: random words [default: 128; with a
    /// prefix 32]
    #[arg(long, value_parser = at_least_1, help_heading = "Requests")]
    prompt_tokens: Option<usize>,
    /// JSON lines of prompts instead: "...", {"prompt": "..."} or {"messages": [...]}
    #[arg(long, conflicts_with = "prompt_tokens", help_heading = "Requests")]
    prompt_file: Option<PathBuf>,
    /// Send the same prompt every time, not one of its own for each request
    #[arg(long, help_heading = "Requests")]
    same_prompt: bool,
    /// Tokens of each answer (max_tokens)
    #[arg(long, default_value_t = 128, value_parser = at_least_1, help_heading = "Requests")]
    output_tokens: usize,
    /// Let answers end early: do not send ignore_eos and min_tokens
    #[arg(long, help_heading = "Requests")]
    allow_eos: bool,
    #[arg(long, default_value_t = 0.0, help_heading = "Requests")]
    temperature: f64,
    /// Seed of prompts and arrival times, and of sampling if the temperature is above 0
    #[arg(long, default_value_t = 0, help_heading = "Requests")]
    seed: u64,
    /// JSON object merged into each body; null removes a field
    #[arg(long, value_parser = parse_object, help_heading = "Requests")]
    extra_body: Option<Object>,

    /// What clients have in common: nothing; a long prefix each of its own; one prefix for all
    #[arg(long, value_enum, default_value = "plain", help_heading = "Prefixes")]
    scenario: Scenario,
    /// The prefix: random words in the prompt, or a cartridge
    #[arg(long, value_enum, default_value = "text", help_heading = "Prefixes")]
    prefix: PrefixArg,
    /// Tokens of a prefix; of a cartridge, only `--clients fill` needs it
    #[arg(long, value_parser = at_least_1, help_heading = "Prefixes")]
    prefix_tokens: Option<usize>,
    /// Cartridge id; `{client}` stands for the client's number from 0
    #[arg(long, help_heading = "Prefixes")]
    cartridge: Option<String>,
    /// File with a cartridge id on each line; client i takes line i
    #[arg(long, conflicts_with = "cartridge", help_heading = "Prefixes")]
    cartridges_file: Option<PathBuf>,
    #[arg(long, default_value = "local", help_heading = "Prefixes")]
    cartridge_source: String,
    /// Tokens of KV cache for `--clients fill` [default: as the first target's /metrics says]
    #[arg(long, help_heading = "Prefixes")]
    kv_tokens: Option<usize>,
    /// KV tokens that `--clients fill` leaves free
    #[arg(long, default_value_t = 0, help_heading = "Prefixes")]
    reserve: usize,

    /// Write bench.csv, bench.json and bench.html into this folder; with --shape, shape.csv
    #[arg(long, help_heading = "Output")]
    out: Option<PathBuf>,
    /// Put every request into bench.json
    #[arg(long, requires = "out", help_heading = "Output")]
    raw: bool,

    // The last: its heading would go on for what follows.
    #[command(flatten)]
    shape: shape::ShapeArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum EndpointArg {
    Chat,
    Completions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    Plain,
    Distinct,
    Shared,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrefixArg {
    Text,
    Cartridge,
}

#[derive(Debug, Clone, Copy)]
enum ClientsArg {
    Number(usize),
    Fill,
}

impl std::str::FromStr for ClientsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "fill" { Ok(Self::Fill) } else { at_least_1(text).map(Self::Number) }
    }
}

/// clap would take a bare map for an option with many values.
type Object = Box<Map<String, Value>>;

fn parse_object(text: &str) -> Result<Object, String> {
    serde_json::from_str(text).map(Box::new).map_err(|e| format!("not a JSON object: {e}"))
}

fn parse_target(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((label, url)) if !label.is_empty() => Ok((label.to_owned(), url.to_owned())),
        _ => Err("expected LABEL=URL".to_owned()),
    }
}

fn at_least_1(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a whole number from 1".to_owned()),
        Ok(number) => Ok(number),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err("expected a number above 0".to_owned()),
    }
}

pub fn run(args: BenchArgs) -> Result<(), CliError> {
    if args.shape.is_wanted() {
        return args.shape.run(args.out.as_deref());
    }
    // One thread: the client takes at most one core from the server it measures.
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let tokio = tokio
        .map_err(|source| CliError::System { what: "cannot start the async runtime", source })?;
    let started = chrono::Local::now();
    let (plan, report) = tokio.block_on(async {
        let plan = args.plan().await?;
        let (sender, stop) = watch::channel(false);
        tokio::spawn(async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                let _ = sender.send(true);
            }
        });
        let report = bench::run(&plan, &progress_bar(), stop).await?;
        Ok::<_, CliError>((plan, report))
    })?;
    print!("{}", bench::table(&report));
    if let Some(folder) = &args.out {
        bench::write(folder, &plan, &report, started, &command_line())?;
        println!("written: {}/bench.csv, bench.json, bench.html", folder.display());
    }
    Ok(report.verdict()?)
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::no_length();
    // indicatif itself draws nothing where standard error is not a terminal.
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar
}

/// How this was called, without the key.
fn command_line() -> Vec<String> {
    let mut hide = false;
    let show = |arg: String| {
        let hidden = std::mem::replace(&mut hide, arg == "--api-key");
        match arg.starts_with("--api-key=") {
            true => "--api-key=***".to_owned(),
            false if hidden => "***".to_owned(),
            false => arg,
        }
    };
    std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).map(show).collect()
}
