//! Options of the places cartridges are fetched from, and of the disk cache.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::CliError;
use crate::cartridge::transfer::TimeLimits;
use crate::cartridge::{Sources, SourcesOptions};

/// Options of remote cartridges. Access is set by the variables of the sources' own tools: HF_TOKEN,
/// HF_ENDPOINT, HF_HUB_OFFLINE, WANDB_API_KEY, WANDB_BASE_URL, WANDB_ENTITY, WANDB_PROJECT.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Cartridges from elsewhere")]
pub struct SourceFlags {
    /// Folder that keeps fetched cartridges; processes may share it
    /// [default: ~/.cache/cartouche/cartridges]
    #[arg(long, env = "CARTOUCHE_CARTRIDGE_CACHE_DIR")]
    pub cartridge_cache_dir: Option<PathBuf>,
    /// GiB of fetched cartridges kept; the least recently used leave first [default: 64]
    #[arg(long, env = "CARTOUCHE_CARTRIDGE_CACHE_GB")]
    pub cartridge_cache_gb: Option<f64>,
    /// Seconds a source may take to accept a connection [default: 10]
    #[arg(long, env = "CARTOUCHE_SOURCE_CONNECT_SECONDS")]
    pub source_connect_seconds: Option<u64>,
    /// Seconds a source may send nothing [default: 30]
    #[arg(long, env = "CARTOUCHE_SOURCE_IDLE_SECONDS")]
    pub source_idle_seconds: Option<u64>,
    /// Seconds one fetch may take in all; what came is kept and continued by the next [default: 3600]
    #[arg(long, env = "CARTOUCHE_SOURCE_TOTAL_SECONDS")]
    pub source_total_seconds: Option<u64>,
    /// Host that `source` = "http" may fetch from: name, name:port, or http://name:port for plain HTTP
    /// (repeatable) [default: none: off]
    #[arg(long, env = "CARTOUCHE_HTTP_SOURCE_HOST", value_delimiter = ',')]
    pub http_source_host: Option<Vec<String>>,
    /// Further host that the Hugging Face hub may send on to for its files, as a mirror does (repeatable)
    /// [default: those of huggingface.co and hf.co]
    #[arg(long, env = "CARTOUCHE_HUB_REDIRECT_HOST", value_delimiter = ',')]
    pub hub_redirect_host: Option<Vec<String>>,
    /// Fetch no cartridge: use what is in the cartridge directory and the disk cache
    #[arg(long, env = "CARTOUCHE_OFFLINE", num_args = 0..=1, default_missing_value = "true")]
    pub offline: Option<bool>,
}

impl SourceFlags {
    /// `max_file_bytes` is the limit of the registry.
    pub fn options(&self, max_file_bytes: Option<u64>) -> Result<SourcesOptions, CliError> {
        let default = TimeLimits::default();
        let seconds = |name: &str, value: Option<u64>, default| match value {
            Some(0) => Err(CliError::Usage(format!("{name} must be at least 1"))),
            value => Ok(value.map_or(default, Duration::from_secs)),
        };
        let gigabytes = self.cartridge_cache_gb;
        if gigabytes.is_some_and(|gb| !gb.is_finite() || gb <= 0.0) {
            return Err(CliError::Usage("--cartridge-cache-gb must be more than 0".to_owned()));
        }
        Ok(SourcesOptions {
            cache_dir: self.cartridge_cache_dir.clone(),
            // A cast of a float ends at the largest number there is.
            cache_bytes: gigabytes.map(|gb| (gb * f64::from(1 << 30)) as u64),
            max_file_bytes,
            times: TimeLimits {
                connect: seconds(
                    "--source-connect-seconds",
                    self.source_connect_seconds,
                    default.connect,
                )?,
                idle: seconds("--source-idle-seconds", self.source_idle_seconds, default.idle)?,
                total: seconds("--source-total-seconds", self.source_total_seconds, default.total)?,
            },
            http_hosts: self.http_source_host.clone().unwrap_or_default(),
            hub_hosts: self.hub_redirect_host.clone().unwrap_or_default(),
            offline: self.offline.unwrap_or(false),
        })
    }

    pub fn open(&self, max_file_bytes: Option<u64>) -> Result<Sources, CliError> {
        self.options(max_file_bytes)?.open().map_err(CliError::Usage)
    }
}
