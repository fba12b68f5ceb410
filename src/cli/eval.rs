//! `cartouche eval`: ask held-out questions in several ways and compare the answers.

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::CliError;
use super::ask::{Answer, ask};
use super::runtime::{Runtime, RuntimeOptions};
use crate::cartridge::{Lease, read_cartridge_bytes};
use crate::demo::{self, Question};

/// Longest answer of the demo model, in tokens, with room to spare.
const MAX_ANSWER_TOKENS: usize = 64;

/// Measure answers to held-out questions without the document, with it, and with its cartridge
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The built-in demo model, documents and questions
    #[arg(long, required = true)]
    demo: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeOptions,
}

/// What the model is given besides the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    None,
    LongContext,
    /// With the keys and values of the whole document as a cartridge.
    ExactKv,
    /// With the trained cartridge, a twentieth of its size.
    Trained,
}

/// The cartridges of a document.
struct Cartridges {
    exact: Lease,
    trained: Lease,
}

impl Cartridges {
    fn of(document: &demo::Document) -> Result<Self, CliError> {
        let lease = |bytes| -> Result<Lease, CliError> {
            Ok(Lease::detached(document.name, &read_cartridge_bytes(bytes, document.name)?)?)
        };
        Ok(Self { exact: lease(document.cartridge)?, trained: lease(document.trained)? })
    }
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Row {
    mode: Mode,
    /// Questions asked, about facts in the document and about others.
    questions: usize,
    /// Share of the questions about facts in the document that were answered exactly.
    accuracy: f64,
    /// Share of refusals where refusing is right: all questions in mode `none`, elsewhere those about
    /// facts that are not in the document.
    refusals: f64,
    /// Mean prompt tokens; a cartridge's tokens are not part of the prompt.
    prompt_tokens: f64,
    /// Mean bytes of keys and values the first answer token attends to, cartridge included.
    kv_bytes: f64,
    /// Median milliseconds from submitting to the first token, one request at a time.
    ttft_ms: f64,
}

/// One question answered.
struct Answered {
    text: String,
    prompt_tokens: usize,
    kv_tokens: usize,
    ttft_ms: f64,
}

pub fn run(args: EvalArgs) -> Result<(), CliError> {
    if args.runtime.model.as_deref().is_some_and(|model| model != "demo") {
        return Err(CliError::Usage("--demo evaluates the demo model; drop --model".to_owned()));
    }
    args.runtime.set_threads()?;
    let runtime = args.runtime.start()?;
    let rows = evaluate(&runtime)?;
    if args.json {
        println!("{}", json!({ "model": runtime.model.name, "rows": rows }));
        return Ok(());
    }
    println!(
        "{:<14} {:>9} {:>9} {:>9} {:>14} {:>12} {:>9}",
        "mode", "questions", "accuracy", "refusals", "prompt tokens", "KV bytes", "TTFT ms"
    );
    for row in &rows {
        let mode = serde_json::to_value(row.mode).unwrap_or_default();
        println!(
            "{:<14} {:>9} {:>8.1}% {:>8.1}% {:>14.1} {:>12.0} {:>9.2}",
            mode.as_str().unwrap_or_default(),
            row.questions,
            row.accuracy * 100.0,
            row.refusals * 100.0,
            row.prompt_tokens,
            row.kv_bytes,
            row.ttft_ms
        );
    }
    Ok(())
}

/// Asks every question of every document in every mode. The modes take turns question by question, so
/// that a machine that slows down slows all of them.
fn evaluate(runtime: &Runtime) -> Result<Vec<Row>, CliError> {
    let modes = [Mode::None, Mode::LongContext, Mode::ExactKv, Mode::Trained];
    // Questions with the refusal that is right where they cannot be answered.
    let mut asked: Vec<(Question, String)> = Vec::new();
    let mut answers: Vec<Vec<Answered>> = modes.iter().map(|_| Vec::new()).collect();
    for document in demo::DOCUMENTS {
        let broken = |e| CliError::Usage(format!("the questions of {}: {e}", document.name));
        let questions = document.questions().map_err(broken)?;
        let cartridges = Cartridges::of(document)?;
        for question in questions.questions {
            for (mode, answers) in modes.iter().zip(&mut answers) {
                answers.push(put(runtime, *mode, document.text, &cartridges, &question.question)?);
            }
            asked.push((question, questions.refusal.clone()));
        }
    }
    Ok(modes
        .iter()
        .zip(answers)
        .map(|(mode, answers)| row(runtime, *mode, &asked, &answers))
        .collect())
}

fn row(runtime: &Runtime, mode: Mode, asked: &[(Question, String)], answers: &[Answered]) -> Row {
    let shape = runtime.engine.info().kv_shape;
    let token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * size_of::<f32>();
    let pairs = || asked.iter().zip(answers);
    let share = |hits: usize, of: usize| if of == 0 { 0.0 } else { hits as f64 / of as f64 };
    let known = pairs().filter(|((question, _), _)| question.in_document);
    let (known, exact) = known.fold((0, 0), |(n, hits), ((question, _), answer)| {
        (n + 1, hits + usize::from(answer.text == question.answer))
    });
    let unknown = pairs().filter(|((q, _), _)| mode == Mode::None || !q.in_document);
    let (unknown, refused) = unknown.fold((0, 0), |(n, hits), ((_, refusal), answer)| {
        (n + 1, hits + usize::from(answer.text == *refusal))
    });
    let mean = |values: &dyn Fn(&Answered) -> usize| {
        answers.iter().map(values).sum::<usize>() as f64 / answers.len().max(1) as f64
    };
    let mut ttft: Vec<f64> = answers.iter().map(|a| a.ttft_ms).collect();
    ttft.sort_by(f64::total_cmp);
    Row {
        mode,
        questions: answers.len(),
        accuracy: share(exact, known),
        refusals: share(refused, unknown),
        prompt_tokens: mean(&|a| a.prompt_tokens),
        kv_bytes: mean(&|a| a.kv_tokens) * token_bytes as f64,
        ttft_ms: ttft.get(ttft.len() / 2).copied().unwrap_or_default(),
    }
}

fn put(
    runtime: &Runtime,
    mode: Mode,
    document: &str,
    cartridges: &Cartridges,
    question: &str,
) -> Result<Answered, CliError> {
    let mut messages: Vec<Value> = Vec::new();
    if mode == Mode::LongContext {
        messages.push(json!({"role": "system", "content": document.trim_end()}));
    }
    messages.push(json!({"role": "user", "content": question}));
    let cartridge = match mode {
        Mode::ExactKv => Some(cartridges.exact.clone()),
        Mode::Trained => Some(cartridges.trained.clone()),
        Mode::None | Mode::LongContext => None,
    };
    let prompt = runtime.chat_prompt(&messages, cartridge.is_some())?;
    let prompt_tokens = prompt.len();
    let kv_tokens = prompt_tokens + cartridge.iter().map(|c| c.tokens()).sum::<usize>();
    let cartridges = cartridge.into_iter().collect();
    let Answer { text, ttft_ms } =
        ask(runtime, prompt, cartridges, MAX_ANSWER_TOKENS)?.answer(runtime)?;
    Ok(Answered { text, prompt_tokens, kv_tokens, ttft_ms })
}
