//! `cartouche synthesize`: conversations about a document, as a dataset.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::CliError;
use super::config::ConfigFile;
use super::runtime::RuntimeOptions;
use super::train::conversations::Conversations;
use super::train::data_options::DataFlags;
use super::train::document::Document;
use super::train::lessons;
use super::train::options::usage;
use crate::train::dataset::{Conversation, write_jsonl, write_parquet};
use crate::train::{Journal, TrainError};

/// Where the dataset goes.
#[derive(Debug, Default, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Output")]
struct OutputFlags {
    /// Dataset to write: .parquet or .jsonl. What is not finished is kept beside it, in a file that ends
    /// with .journal: the same command goes on with it
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Make a dataset of conversations about a document
///
/// The model asks itself questions about parts of the document (or takes yours), and answers them with the
/// document in its prompt. `cartouche train --conversations` learns from the file, as do the original
/// trainers.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  cartouche synthesize --model ./instruct-model --document notes.txt --out notes.parquet")]
pub struct SynthesizeArgs {
    /// YAML file with any of the options below, written with _ for - (flags win)
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    data: DataFlags,
    #[command(flatten)]
    runtime: RuntimeOptions,
}

type Write = fn(&Path, &[Conversation]) -> Result<(), crate::train::dataset::DatasetError>;

pub fn run(args: SynthesizeArgs) -> Result<(), CliError> {
    let file = ConfigFile::read(args.config.as_deref())?;
    let known = [
        serde_json::to_value(RuntimeOptions::default()),
        serde_json::to_value(OutputFlags::default()),
        serde_json::to_value(DataFlags::default()),
    ];
    file.check_keys(&known.map(|value| value.unwrap_or_default()))?;
    let (data, options) = (file.complete(&args.data)?, file.complete(&args.runtime)?);
    let out: OutputFlags = file.complete(&args.output)?;
    let out = out.out.ok_or_else(|| usage("--out: where is the dataset to go?".to_owned()))?;
    let write: Write = match out.extension().and_then(|e| e.to_str()) {
        Some("parquet") => write_parquet,
        Some("jsonl") => write_jsonl,
        _ => return Err(usage(format!("{}: must end with .parquet or .jsonl", out.display()))),
    };
    if out.exists() {
        return Err(usage(format!("{} is there already; choose another --out", out.display())));
    }
    data.check()?;
    options.set_threads()?;
    let runtime = options.start()?;
    let document = Document::read(&runtime, data.document()?)?;
    let conversations = Conversations::to_learn(&data);
    let source = lessons::source(&runtime, &document, &conversations, &data)?;
    let mut journal = open(&out, &source)?;
    let rows = lessons::rows(&runtime, &document, &conversations, &data, &mut journal)?;
    let conversations: Vec<Conversation> = rows.into_iter().map(|row| row.conversation).collect();
    write(&out, &conversations)?;
    journal.remove()?;
    println!("{} conversations in {}", conversations.len(), out.display());
    Ok(())
}

fn open(out: &Path, source: &str) -> Result<Journal, CliError> {
    let mut path = out.as_os_str().to_owned();
    path.push(".journal");
    Journal::open(Path::new(&path), source).map_err(|error| match error {
        TrainError::Resume { path, reason } => {
            let path = path.display();
            usage(format!("{path}: {reason}; delete it to begin anew, or choose another --out"))
        }
        error => error.into(),
    })
}
