//! How a cartridge is named on the command line.

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use crate::cartridge::Source;

/// `hf:owner/name[@revision]`, `wandb:entity/project/run`, `https://…`, or something on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Remote(Source, String),
    /// A path, or an id in the cartridge directory.
    Here(String),
}

impl FromStr for Target {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let prefixes = [("hf:", Source::Huggingface), ("wandb:", Source::Wandb)];
        let named = prefixes.into_iter().find_map(|(prefix, source)| {
            Some(Self::Remote(source, text.strip_prefix(prefix)?.to_owned()))
        });
        let is_address = text.starts_with("https://") || text.starts_with("http://");
        let address = || is_address.then(|| Self::Remote(Source::Http, text.to_owned()));
        Ok(named.or_else(address).unwrap_or_else(|| Self::Here(text.to_owned())))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Remote(Source::Huggingface, id) => write!(f, "hf:{id}"),
            Self::Remote(Source::Wandb, id) => write!(f, "wandb:{id}"),
            Self::Remote(_, id) | Self::Here(id) => f.write_str(id),
        }
    }
}
