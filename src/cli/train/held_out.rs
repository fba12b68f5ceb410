//! The loss on held-out conversations, with targets of the same teacher.

use serde_json::{Value, json};

use super::conversations::Conversations;
use super::data_options::DataFlags;
use super::document::Document;
use super::lessons;
use super::options::TrainFlags;
use crate::cli::CliError;
use crate::cli::runtime::Runtime;
use crate::train::{HeldOut, Pack, RunDir};

/// Held-out conversations, packed.
pub struct HeldOutPacks {
    /// In the names of the metrics.
    name: String,
    pub packs: Vec<Pack>,
}

impl HeldOutPacks {
    /// Those of `--eval-conversations`: made once, then read from the run's folder.
    pub fn prepare(
        runtime: &Runtime,
        document: &Document,
        data: &DataFlags,
        flags: &TrainFlags,
        run_dir: &RunDir,
    ) -> Result<Option<Self>, CliError> {
        let Some(conversations) = Conversations::held_out(flags) else { return Ok(None) };
        let file = run_dir.eval_packs();
        let packs = lessons::packs(runtime, document, &conversations, (data, flags), &file)?;
        Ok(Some(Self { name: conversations.name(), packs }))
    }

    /// The line of metrics after `step` updates. Token counts are means per conversation, as in the original
    /// trainers.
    pub fn metrics(&self, step: u64, measured: &HeldOut) -> Value {
        let HeldOut { loss, macro_loss, kl, sequences, input_tokens, target_tokens } = *measured;
        let mean = |tokens: usize| tokens as f64 / sequences as f64;
        let names = [
            ("loss", json!(loss)),
            ("perplexity", json!(loss.exp())),
            ("macro_loss", json!(macro_loss)),
            ("macro_perplexity", json!(macro_loss.exp())),
            ("kl", json!(kl)),
            ("num_system_and_user_tokens", json!(mean(input_tokens - target_tokens))),
            ("num_assistant_tokens", json!(mean(target_tokens))),
            ("num_elements", json!(sequences)),
        ];
        let mut line = json!({ "train/optimizer_step": step });
        for (name, value) in names {
            line[format!("eval_{}/{name}", self.name)] = value;
        }
        line
    }
}
