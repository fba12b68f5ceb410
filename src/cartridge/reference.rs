//! How a request names a cartridge.

use serde::{Deserialize, Serialize};

/// Where a cartridge id is looked up. The wire names are those of Tokasaurus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A Weights & Biases run. The default on the wire, as in Tokasaurus.
    #[default]
    Wandb,
    /// A folder below the cartridge directory.
    Local,
    /// A Hugging Face model repository.
    Huggingface,
    /// A URL, where the operator allows its host.
    Http,
}

/// Where a listed cartridge comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Built in or made by this process: it has no file, and is found whatever [`Source`] a request
    /// names.
    Memory,
    /// A file below the cartridge directory.
    Local,
    /// Fetched from there, and kept in the cache on disk.
    Wandb,
    Huggingface,
    Http,
}

impl From<Source> for Origin {
    fn from(source: Source) -> Self {
        match source {
            Source::Local => Self::Local,
            Source::Wandb => Self::Wandb,
            Source::Huggingface => Self::Huggingface,
            Source::Http => Self::Http,
        }
    }
}

/// One entry of a request's `cartridges` list. Unknown keys are ignored, as in Tokasaurus.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CartridgeRef {
    pub id: String,
    #[serde(default)]
    pub source: Source,
    /// Fetch it again from a remote `source`, or else read the local file again, and serve its present
    /// content from this request on.
    #[serde(default)]
    pub force_redownload: bool,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Wandb => "wandb",
            Self::Local => "local",
            Self::Huggingface => "huggingface",
            Self::Http => "http",
        })
    }
}
