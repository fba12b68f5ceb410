//! `cartouche chat`: talk to a model in the terminal.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use super::CliError;
use super::runtime::{Runtime, RuntimeOptions};
use crate::cartridge::{CartridgeRef, Lease, Source};
use crate::engine::{Event, GenerateRequest, LogprobOptions, SamplingParams};
use crate::text::Detokenizer;

/// Talk to a model in the terminal, with or without a cartridge
///
/// The model runs in this process; no server is needed. Ctrl-D or /quit leaves, /clear forgets the talk.
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// Cartridge to attach, by id; may be repeated
    #[arg(long = "cartridge", short = 'c')]
    cartridges: Vec<String>,
    /// Text file to put into the system message
    #[arg(long)]
    document: Option<PathBuf>,
    /// System message
    #[arg(long, conflicts_with = "document")]
    system: Option<String>,
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Seed of the sampling, for answers that can be repeated
    #[arg(long)]
    seed: Option<u64>,
    /// Tokens of one answer at most
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// Ask this one question and leave
    #[arg(long, short)]
    question: Option<String>,
    #[command(flatten)]
    runtime: RuntimeOptions,
}

pub fn run(args: ChatArgs) -> Result<(), CliError> {
    args.runtime.set_threads()?;
    let runtime = args.runtime.start()?;
    let leases = acquire(&runtime, &args.cartridges)?;
    let system = match &args.document {
        Some(path) => Some(
            std::fs::read_to_string(path)
                .map_err(|source| CliError::Io { path: path.clone(), source })?
                .trim_end()
                .to_owned(),
        ),
        None => args.system.clone(),
    };
    let opening: Vec<Value> =
        system.iter().map(|text| json!({"role": "system", "content": text})).collect();
    let mut talk = Talk { runtime: &runtime, leases, args: &args, messages: opening.clone() };
    if let Some(question) = &args.question {
        return talk.ask(question);
    }
    let mut editor = rustyline::DefaultEditor::new().map_err(terminal)?;
    println!("{} — Ctrl-D or /quit leaves, /clear forgets the talk", runtime.model.name);
    loop {
        match editor.readline("you> ") {
            Ok(line) => match line.trim() {
                "" => {}
                "/quit" => return Ok(()),
                "/clear" => talk.messages = opening.clone(),
                question => {
                    // History only serves the arrow keys.
                    let _ = editor.add_history_entry(question);
                    // A refused question leaves the talk as it was.
                    let before = talk.messages.clone();
                    if let Err(error) = talk.ask(question) {
                        eprintln!("error: {error}");
                        talk.messages = before;
                    }
                }
            },
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(()),
            Err(error) => return Err(terminal(error)),
        }
    }
}

fn terminal(error: ReadlineError) -> CliError {
    CliError::Usage(format!("the terminal cannot be read: {error}"))
}

fn acquire(runtime: &Runtime, ids: &[String]) -> Result<Vec<Lease>, CliError> {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let tokio = tokio
        .map_err(|source| CliError::System { what: "cannot start the async runtime", source })?;
    ids.iter()
        .map(|id| {
            let reference =
                CartridgeRef { id: id.clone(), source: Source::Local, force_redownload: false };
            Ok(tokio.block_on(runtime.registry.acquire(&reference))?)
        })
        .collect()
}

struct Talk<'a> {
    runtime: &'a Runtime,
    leases: Vec<Lease>,
    args: &'a ChatArgs,
    messages: Vec<Value>,
}

impl Talk<'_> {
    /// Prints the answer as it comes and adds both sides to the talk.
    fn ask(&mut self, question: &str) -> Result<(), CliError> {
        self.messages.push(json!({"role": "user", "content": question}));
        let prompt = self.runtime.chat_prompt(&self.messages, !self.leases.is_empty())?;
        let info = self.runtime.engine.info();
        let cartridge: usize = self.leases.iter().map(|l| l.tokens()).sum();
        let room = info.max_context.saturating_sub(cartridge).min(info.kv_tokens);
        let room = room.saturating_sub(prompt.len());
        let mut stream = self.runtime.engine.submit(GenerateRequest {
            prompt,
            cartridges: self.leases.clone(),
            n: 1,
            sampling: SamplingParams {
                temperature: self.args.temperature,
                seed: self.args.seed,
                max_tokens: self.args.max_tokens.min(room.max(1)),
                ..SamplingParams::default()
            },
            stop_token_ids: self.runtime.model.eos_token_ids.clone(),
            logprobs: LogprobOptions::default(),
            priority: Default::default(),
            cache_salt: None,
        })?;
        let mut detokenizer = Detokenizer::new(&self.runtime.model.tokenizer, true);
        let mut answer = String::new();
        let mut show = |text: &str| {
            // Nobody reads any more when this fails; the answer is still kept.
            let mut out = std::io::stdout();
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            answer.push_str(text);
        };
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Token { token, .. } => show(&detokenizer.push(token.id)),
                Event::Failed(error) => return Err(error.into()),
                Event::PromptDone { .. } | Event::Finished { .. } => {}
            }
        }
        show(&detokenizer.finish());
        show("\n");
        answer.truncate(answer.trim_end_matches('\n').len());
        self.messages.push(json!({"role": "assistant", "content": answer}));
        Ok(())
    }
}
