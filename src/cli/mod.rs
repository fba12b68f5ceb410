//! The command line: one file per command.
//!
//! Options come from four places, the first that sets a value wins: flags, `CARTOUCHE_*` environment
//! variables, the YAML file given with `--config`, built-in defaults.

mod access;
mod announce;
mod ask;
mod bench;
mod cartridge;
mod chat;
mod config;
mod device;
mod error;
mod eval;
mod runtime;
mod serve;
mod sources;
mod synthesize;
mod train;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

pub use error::CliError;

/// One process that serves cartridges: trained KV-cache prefixes that stand for a long text.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
#[command(after_help = "Start here: `cartouche serve` needs no model, account or GPU.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::ServeArgs>),
    Chat(Box<chat::ChatArgs>),
    Cartridge(Box<cartridge::CartridgeArgs>),
    Eval(Box<eval::EvalArgs>),
    Bench(Box<bench::BenchArgs>),
    Train(Box<train::TrainArgs>),
    Synthesize(Box<synthesize::SynthesizeArgs>),
}

/// Parses the command line, runs the command and reports its error. The whole of `main`.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let default_level = match cli.command {
        Command::Serve(_) => "info",
        _ => "warn",
    };
    let filter = EnvFilter::try_from_env("CARTOUCHE_LOG");
    let filter = filter.unwrap_or_else(|_| EnvFilter::new(default_level));
    // The HTTP client writes signed addresses at `trace`.
    let quiet = ["ureq=info", "ureq_proto=info"].into_iter().filter_map(|text| text.parse().ok());
    tracing_subscriber::fmt()
        .with_env_filter(quiet.fold(filter, EnvFilter::add_directive))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // It would tell on the very output that failed, and panic.
        .log_internal_errors(false)
        .init();
    let result = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Chat(args) => chat::run(*args),
        Command::Cartridge(args) => cartridge::run(*args),
        Command::Eval(args) => eval::run(*args),
        Command::Bench(args) => bench::run(*args),
        Command::Train(args) => train::run(*args),
        Command::Synthesize(args) => synthesize::run(*args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(CliError::Stopped { code, said }) => {
            eprintln!("{said}");
            ExitCode::from(code)
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
