//! The model, its engine and the cartridge registry, as every command that generates needs them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{CliError, device};
use crate::api::ServedModel;
use crate::cartridge::{Cartridge, Lease, Registry, RegistryOptions, read_cartridge_bytes};
use crate::engine::{EngineHandle, EngineOptions};
use crate::model::{Decoder, LoadOptions, ModelSource};
use crate::text::llama3_cartridge_prompt;
use crate::{demo, engine, limits, model};

/// Options of the model and the engine.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model and engine")]
pub struct RuntimeOptions {
    /// `demo`, a folder in Hugging Face layout, a .gguf file, or a hub id: owner/name[@revision] or
    /// owner/name/file.gguf[@revision] [default: demo]
    #[arg(long, env = "CARTOUCHE_MODEL")]
    pub model: Option<String>,
    /// Name the model is served under [default: its own]
    #[arg(long, env = "CARTOUCHE_SERVED_MODEL_NAME")]
    pub served_model_name: Option<String>,
    /// Quantise safetensors weights while loading: q8_0 or q4_k
    #[arg(long, env = "CARTOUCHE_QUANTIZE")]
    pub quantize: Option<String>,
    /// auto, cpu, cuda or cuda:N. A GPU computes in bf16, in programs built with --features cuda
    /// [default: auto: the first GPU if there is one]
    #[arg(long, env = "CARTOUCHE_DEVICE")]
    pub device: Option<String>,
    /// Threads that compute [default: the cores this process may use]
    #[arg(long, env = "CARTOUCHE_THREADS")]
    pub threads: Option<usize>,
    /// MiB of the KV cache; memory is taken as it fills, and with the prefix cache on it fills in time,
    /// however few requests run [default: 1024]
    #[arg(long, env = "CARTOUCHE_KV_CACHE_MIB")]
    pub kv_cache_mib: Option<u64>,
    /// Sequences decoded together [default: 64]
    #[arg(long, env = "CARTOUCHE_MAX_RUNNING_SEQUENCES")]
    pub max_running_sequences: Option<usize>,
    /// Prompt tokens computed per step, over all sequences [default: 512]
    #[arg(long, env = "CARTOUCHE_PREFILL_TOKENS_PER_STEP")]
    pub prefill_tokens_per_step: Option<usize>,
    /// Sequences (choices of requests) that may wait; more get 429 [default: 1024]
    #[arg(long, env = "CARTOUCHE_MAX_QUEUED_SEQUENCES")]
    pub max_queued_sequences: Option<usize>,
    /// Prompt tokens of requests that may wait; more get 429 [default: 1048576]
    #[arg(long, env = "CARTOUCHE_MAX_QUEUED_TOKENS")]
    pub max_queued_tokens: Option<usize>,
    /// Compute every prompt from its first token, even if one that began the same way is still stored
    #[arg(long, env = "CARTOUCHE_NO_PREFIX_CACHE", num_args = 0..=1, default_missing_value = "true")]
    pub no_prefix_cache: Option<bool>,
    /// Sequences that must share a cartridge for attention to read it once for all of them; the answers
    /// are the same [default: 2]
    #[arg(long, env = "CARTOUCHE_GROUP_MIN_SEQUENCES")]
    pub group_min_sequences: Option<usize>,
    /// On a GPU, compute prompts without cartridges by FlashAttention where a step holds nothing else:
    /// not measured yet, compare with `cartouche bench`
    #[cfg(feature = "flash-attn")]
    #[arg(long, env = "CARTOUCHE_FLASH_ATTN", num_args = 0..=1, default_missing_value = "true")]
    pub flash_attn: Option<bool>,
    /// Folder of cartridges: {dir}/{id}/cartridge.pt or .safetensors [default: cartridges]
    #[arg(long, env = "CARTOUCHE_CARTRIDGE_DIR")]
    pub cartridge_dir: Option<PathBuf>,
    /// MiB of cartridges kept in memory; the least recently used leave first [default: 2048]
    #[arg(long, env = "CARTOUCHE_CARTRIDGE_BUDGET_MIB")]
    pub cartridge_budget_mib: Option<u64>,
    /// GiB of host memory for cartridges that had to leave a GPU, so that they come back without their file
    /// being read; not used on the CPU [default: 8]
    #[arg(long, env = "CARTOUCHE_HOST_CACHE_GB")]
    pub host_cache_gb: Option<u64>,
    /// MiB of the largest cartridge file that is read [default: 8192]
    #[arg(long, env = "CARTOUCHE_MAX_CARTRIDGE_FILE_MIB")]
    pub max_cartridge_file_mib: Option<u64>,
}

/// A loaded model, ready to generate.
pub struct Runtime {
    pub source: ModelSource,
    pub model: Arc<ServedModel>,
    pub engine: EngineHandle,
    /// The very weights the engine computes with.
    pub decoder: Decoder,
    pub registry: Arc<Registry>,
    pub weight_bytes: u64,
}

impl RuntimeOptions {
    pub fn source(&self) -> Result<ModelSource, CliError> {
        Ok(self.model.as_deref().unwrap_or("demo").parse()?)
    }

    pub fn load_options(&self) -> Result<LoadOptions, CliError> {
        let quantize = self.quantize.as_deref().map(str::parse).transpose();
        Ok(LoadOptions {
            quantize: quantize.map_err(|e| CliError::Usage(format!("--quantize: {e}")))?,
            name: self.served_model_name.clone(),
            placement: device::placement(self.device.as_deref().unwrap_or("auto"))?,
        })
    }

    /// Fixes the number of computing threads. Call it first: candle and rayon read it once.
    pub fn set_threads(&self) -> Result<(), CliError> {
        // candle would count the machine's cores; a container may be allowed fewer.
        let available = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = self.threads.unwrap_or_else(available);
        // SAFETY: commands call this before they start any thread, so nobody reads the environment.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .map_err(|e| CliError::Usage(format!("--threads {threads}: {e}")))
    }

    fn engine_options(&self) -> EngineOptions {
        let default = EngineOptions::default();
        EngineOptions {
            kv_bytes: self.kv_cache_mib.map_or(default.kv_bytes, mib),
            max_running_sequences: self
                .max_running_sequences
                .unwrap_or(default.max_running_sequences),
            prefill_tokens_per_step: self
                .prefill_tokens_per_step
                .unwrap_or(default.prefill_tokens_per_step),
            max_queued_sequences: self.max_queued_sequences.unwrap_or(default.max_queued_sequences),
            max_queued_tokens: self.max_queued_tokens.unwrap_or(default.max_queued_tokens),
            prefix_cache: !self.no_prefix_cache.unwrap_or(!default.prefix_cache),
            max_unread_events: default.max_unread_events,
            group_min_sequences: self.group_min_sequences.unwrap_or(default.group_min_sequences),
            #[cfg(feature = "flash-attn")]
            flash_attn: self.flash_attn.unwrap_or(default.flash_attn),
        }
    }

    /// Loads the model, starts its engine and opens the registry; the demo model brings its cartridges.
    pub fn start(&self) -> Result<Runtime, CliError> {
        let source = self.source()?;
        let options = self.load_options()?;
        let loaded = model::load(&source, &options)?;
        let config = loaded.decoder.config().clone();
        let weight_bytes = loaded.decoder.weight_bytes();
        let registry = Registry::new(RegistryOptions {
            dir: Some(self.cartridge_dir.clone().unwrap_or_else(|| PathBuf::from("cartridges"))),
            shape: config.kv_shape(),
            model: loaded.name.clone(),
            rope_theta: Some(config.rope_theta),
            rope_scaling: config.rope_scaling_json.clone(),
            max_positions: config.max_positions,
            device: options.placement.device,
            dtype: options.placement.dtype,
            byte_budget: self
                .cartridge_budget_mib
                .map_or(limits::DEFAULT_CARTRIDGE_BUDGET_BYTES, mib),
            host_budget: self
                .host_cache_gb
                .map_or(limits::DEFAULT_HOST_CACHE_BYTES, |gib| gib.saturating_mul(1 << 30)),
            max_file_bytes: self
                .max_cartridge_file_mib
                .map_or(limits::DEFAULT_MAX_CARTRIDGE_FILE_BYTES, mib),
            revalidate: Duration::from_millis(limits::DEFAULT_REVALIDATE_MILLISECONDS),
        });
        if source == ModelSource::Demo {
            for document in demo::DOCUMENTS {
                let cartridges = [
                    (document.name, document.cartridge),
                    (document.trained_name, document.trained),
                ];
                for (name, bytes) in cartridges {
                    registry.insert(name, read_cartridge_bytes(bytes, name)?)?;
                }
            }
        }
        let decoder = loaded.decoder.clone();
        let (engine, _) = engine::start(loaded.decoder, &self.engine_options())?;
        let model = Arc::new(ServedModel {
            name: loaded.name,
            tokenizer: loaded.tokenizer,
            chat_template: loaded.chat_template,
            eos_token_ids: loaded.eos_token_ids,
            is_llama3: loaded.is_llama3,
        });
        Ok(Runtime { source, model, engine, decoder, registry, weight_bytes })
    }
}

impl Runtime {
    /// A cartridge that the registry does not know, where the engine can read it.
    pub fn lease(&self, name: &str, cartridge: &Cartridge) -> Result<Lease, CliError> {
        let placed = cartridge.to(self.decoder.device(), self.decoder.dtype())?;
        Ok(Lease::detached(name, &placed)?)
    }

    /// Token ids of a chat, ready for the assistant's answer.
    pub fn chat_prompt(
        &self,
        messages: &[Value],
        has_cartridges: bool,
    ) -> Result<Vec<u32>, CliError> {
        let text = match has_cartridges && self.model.is_llama3 {
            true => llama3_cartridge_prompt(messages, true, false)?,
            false => self.render(messages, true)?,
        };
        Ok(self.model.tokenizer.encode(&text, false)?)
    }

    /// A chat as the model's template writes it.
    pub fn render(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
    ) -> Result<String, CliError> {
        let Some(template) = &self.model.chat_template else {
            let name = &self.model.name;
            return Err(CliError::Usage(format!("model {name} has no chat template")));
        };
        Ok(template.render_chat(messages, add_generation_prompt)?)
    }
}

fn mib(count: u64) -> u64 {
    count.saturating_mul(1 << 20)
}
