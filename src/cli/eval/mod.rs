//! `cartouche eval`: ask held-out questions in several ways and compare the answers.

mod kl;

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use self::kl::{Divergence, Prompts, Teacher};
use super::CliError;
use super::ask::{Answer, ask};
use super::runtime::{Runtime, RuntimeOptions};
use crate::cartridge::{Cartridge, Lease, read_cartridge_bytes};
use crate::demo::{self, Question};

/// Longest answer of the demo model, in tokens, with room to spare.
const MAX_ANSWER_TOKENS: usize = 64;

/// Measure answers to held-out questions without the document, with it, and with its cartridge
///
/// KL is that from the teacher, the model with the document in its prompt, to each way of asking: in nats, over
/// the whole vocabulary, the mean over the tokens of the teacher's greedy answers, end tokens included.
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

const MODES: [Mode; 4] = [Mode::None, Mode::LongContext, Mode::ExactKv, Mode::Trained];

/// The mode whose prompts the teacher answers.
const TEACHER: usize = 1;

impl Mode {
    /// As in JSON.
    fn name(self) -> String {
        let name = serde_json::to_value(self).unwrap_or_default();
        name.as_str().unwrap_or_default().to_owned()
    }
}

/// What a mode gives the model of a document.
struct Context {
    /// In a system message.
    text: Option<&'static str>,
    cartridge: Option<Given>,
}

/// A cartridge, and the same for the engine.
struct Given {
    cartridge: Cartridge,
    lease: Lease,
}

impl Context {
    fn of(runtime: &Runtime, document: &demo::Document, mode: Mode) -> Result<Self, CliError> {
        let given = |bytes| -> Result<Self, CliError> {
            let cartridge = read_cartridge_bytes(bytes, document.name)?;
            let lease = runtime.lease(document.name, &cartridge)?;
            Ok(Self { text: None, cartridge: Some(Given { cartridge, lease }) })
        };
        match mode {
            Mode::None => Ok(Self { text: None, cartridge: None }),
            Mode::LongContext => Ok(Self { text: Some(document.text.trim_end()), cartridge: None }),
            Mode::ExactKv => given(document.cartridge),
            Mode::Trained => given(document.trained),
        }
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
    /// Mean KL divergence from the teacher per token of its answers, in nats.
    kl: f64,
    /// Median milliseconds from submitting to the first token, one request at a time.
    ttft_ms: f64,
}

/// One question answered in one mode.
struct Answered {
    text: String,
    prompt: Vec<u32>,
    kv_tokens: usize,
    ttft_ms: f64,
    divergence: Divergence,
}

/// One question, with its answers in the order of [`MODES`].
struct Asked {
    document: &'static str,
    question: Question,
    /// What is right where it cannot be answered.
    refusal: String,
    answers: Vec<Answered>,
}

pub fn run(args: EvalArgs) -> Result<(), CliError> {
    if args.runtime.model.as_deref().is_some_and(|model| model != "demo") {
        return Err(CliError::Usage("--demo evaluates the demo model; drop --model".to_owned()));
    }
    args.runtime.set_threads()?;
    let runtime = args.runtime.start()?;
    let asked = evaluate(&runtime)?;
    let rows: Vec<Row> =
        MODES.iter().enumerate().map(|(i, mode)| row(&runtime, *mode, i, &asked)).collect();
    if args.json {
        let per_question: Vec<Value> = asked.iter().map(per_question).collect();
        let result =
            json!({ "model": runtime.model.name, "rows": rows, "per_question": per_question });
        println!("{result}");
        return Ok(());
    }
    println!(
        "{:<14} {:>9} {:>9} {:>9} {:>14} {:>12} {:>9} {:>9}",
        "mode", "questions", "accuracy", "refusals", "prompt tokens", "KV bytes", "KL", "TTFT ms"
    );
    for row in &rows {
        println!(
            "{:<14} {:>9} {:>8.1}% {:>8.1}% {:>14.1} {:>12.0} {:>9.4} {:>9.2}",
            row.mode.name(),
            row.questions,
            row.accuracy * 100.0,
            row.refusals * 100.0,
            row.prompt_tokens,
            row.kv_bytes,
            row.kl,
            row.ttft_ms
        );
    }
    Ok(())
}

/// Asks every question of every document in every mode. The modes take turns question by question, so
/// that a machine that slows down slows all of them. Divergences are measured apart, since that would slow
/// the next question.
fn evaluate(runtime: &Runtime) -> Result<Vec<Asked>, CliError> {
    let mut asked = Vec::new();
    for document in demo::DOCUMENTS {
        let broken = |e| CliError::Usage(format!("the questions of {}: {e}", document.name));
        let questions = document.questions().map_err(broken)?;
        let contexts = MODES.iter().map(|mode| Context::of(runtime, document, *mode));
        let contexts = contexts.collect::<Result<Vec<_>, _>>()?;
        let first = asked.len();
        for question in questions.questions {
            let answers = contexts.iter().map(|context| put(runtime, context, &question.question));
            let answers = answers.collect::<Result<_, CliError>>()?;
            let refusal = questions.refusal.clone();
            asked.push(Asked { document: document.name, question, refusal, answers });
        }
        let asked = &mut asked[first..];
        let prompts = contexts.iter().enumerate().map(|(mode, context)| {
            let prompts = asked.iter().map(|asked| asked.answers[mode].prompt.clone()).collect();
            Prompts::new(runtime, context.cartridge.as_ref().map(|c| &c.cartridge), prompts)
        });
        let prompts = prompts.collect::<Result<Vec<_>, _>>()?;
        let teacher = Teacher::answers(runtime, &prompts[TEACHER])?;
        for (question, asked) in asked.iter_mut().enumerate() {
            for (answer, prompts) in asked.answers.iter_mut().zip(&prompts) {
                answer.divergence = teacher.divergence(prompts, question)?;
            }
        }
    }
    Ok(asked)
}

/// The line of mode `index`.
fn row(runtime: &Runtime, mode: Mode, index: usize, asked: &[Asked]) -> Row {
    let info = runtime.engine.info();
    let (shape, number) = (info.kv_shape, info.kv_dtype.size_in_bytes());
    let token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * number;
    let answers = || asked.iter().map(|asked| &asked.answers[index]);
    let share = |of: &dyn Fn(&Asked) -> bool, right: &dyn Fn(&Asked) -> &str| {
        let (hits, all) = asked.iter().filter(|asked| of(asked)).fold((0, 0), |(hits, all), a| {
            (hits + usize::from(a.answers[index].text == right(a)), all + 1)
        });
        if all == 0 { 0.0 } else { hits as f64 / all as f64 }
    };
    let mean = |value: &dyn Fn(&Answered) -> usize| {
        answers().map(value).sum::<usize>() as f64 / asked.len().max(1) as f64
    };
    let mut ttft: Vec<f64> = answers().map(|a| a.ttft_ms).collect();
    ttft.sort_by(f64::total_cmp);
    Row {
        mode,
        questions: asked.len(),
        accuracy: share(&|a| a.question.in_document, &|a| &a.question.answer),
        refusals: share(&|a| mode == Mode::None || !a.question.in_document, &|a| &a.refusal),
        prompt_tokens: mean(&|a| a.prompt.len()),
        kv_bytes: mean(&|a| a.kv_tokens) * token_bytes as f64,
        kl: answers().map(|a| a.divergence).sum::<Divergence>().per_token(),
        ttft_ms: ttft.get(ttft.len() / 2).copied().unwrap_or_default(),
    }
}

/// A question in all modes, as JSON.
fn per_question(asked: &Asked) -> Value {
    let kl: serde_json::Map<String, Value> = MODES
        .iter()
        .zip(&asked.answers)
        .map(|(mode, answer)| (mode.name(), answer.divergence.per_token().into()))
        .collect();
    let answer_tokens = asked.answers.first().map_or(0, |answer| answer.divergence.tokens);
    json!({
        "document": asked.document,
        "question": asked.question.question,
        "in_document": asked.question.in_document,
        "answer_tokens": answer_tokens,
        "kl": kl,
    })
}

fn put(runtime: &Runtime, context: &Context, question: &str) -> Result<Answered, CliError> {
    let mut messages: Vec<Value> = Vec::new();
    if let Some(text) = context.text {
        messages.push(json!({"role": "system", "content": text}));
    }
    messages.push(json!({"role": "user", "content": question}));
    let prompt = runtime.chat_prompt(&messages, context.cartridge.is_some())?;
    let cartridges = context.cartridge.iter().map(|c| c.lease.clone()).collect();
    let kv_tokens =
        prompt.len() + context.cartridge.iter().map(|c| c.lease.tokens()).sum::<usize>();
    let Answer { text, ttft_ms } =
        ask(runtime, prompt.clone(), cartridges, MAX_ANSWER_TOKENS)?.answer(runtime)?;
    Ok(Answered { text, prompt, kv_tokens, ttft_ms, divergence: Divergence::default() })
}
