//! The remote sources of a process, as its options ask for them.

use std::{path::PathBuf, sync::Arc};

use super::{
    Cached, HttpFiles, HuggingFace, RemoteSource, Wandb, not_found,
    transfer::{TimeLimits, Transfer},
};
use crate::{
    cartridge::{CartridgeError, Source, Store},
    limits,
};

/// Where from and where to. Access and addresses of the hub and of W&B are taken from the variables that
/// their own tools read.
#[derive(Debug, Clone, Default)]
pub struct SourcesOptions {
    /// Folder of the disk cache; `None`: `cartouche` below `XDG_CACHE_HOME` or `~/.cache`.
    pub cache_dir: Option<PathBuf>,
    /// Bytes of the disk cache; `None`: [`limits::DEFAULT_CARTRIDGE_CACHE_BYTES`].
    pub cache_bytes: Option<u64>,
    /// Bytes of the largest file; `None`: [`limits::DEFAULT_MAX_CARTRIDGE_FILE_BYTES`].
    pub max_file_bytes: Option<u64>,
    pub times: TimeLimits,
    /// Hosts of `source` = `http`; none: that source is off.
    pub http_hosts: Vec<String>,
    /// Hosts, besides its own, that the hub may send on to.
    pub hub_hosts: Vec<String>,
    /// Nothing is asked for; the disk cache alone is used.
    pub offline: bool,
}

/// The remote sources, over one cache and one way to the network.
#[derive(Debug, Clone)]
pub struct Sources {
    pub store: Arc<Store>,
    pub transfer: Transfer,
    pub huggingface: Arc<Cached<HuggingFace>>,
    pub wandb: Arc<Cached<Wandb>>,
    pub http: Arc<Cached<HttpFiles>>,
}

impl SourcesOptions {
    /// Nothing is written or asked for yet.
    ///
    /// # Errors
    /// A sentence about an option or a variable that cannot be used.
    pub fn open(&self) -> Result<Sources, String> {
        let dir = match &self.cache_dir {
            Some(dir) => dir.clone(),
            None => default_dir().ok_or("--cartridge-cache-dir must be given: HOME is not set")?,
        };
        let bytes = self.cache_bytes.unwrap_or(limits::DEFAULT_CARTRIDGE_CACHE_BYTES);
        let store = Arc::new(Store::new(dir, bytes));
        let transfer = Transfer::new(self.times);
        let max = self.max_file_bytes.unwrap_or(limits::DEFAULT_MAX_CARTRIDGE_FILE_BYTES);
        let huggingface = HuggingFace::from_env(&self.hub_hosts, self.offline)?;
        let wandb = Wandb::from_env(self.offline)?;
        let http = HttpFiles::new(&self.http_hosts, self.offline)?;
        let parts = || (transfer.clone(), Arc::clone(&store));
        let ((a, b), (c, d), (e, f)) = (parts(), parts(), parts());
        Ok(Sources {
            huggingface: Arc::new(Cached::new(huggingface, a, b, max)),
            wandb: Arc::new(Cached::new(wandb, c, d, max)),
            http: Arc::new(Cached::new(http, e, f, max)),
            store,
            transfer,
        })
    }
}

impl Sources {
    /// For a registry.
    pub fn list(&self) -> Vec<(Source, Arc<dyn RemoteSource>)> {
        vec![
            (Source::Huggingface, Arc::clone(&self.huggingface) as Arc<dyn RemoteSource>),
            (Source::Wandb, Arc::clone(&self.wandb) as Arc<dyn RemoteSource>),
            (Source::Http, Arc::clone(&self.http) as Arc<dyn RemoteSource>),
        ]
    }

    /// As [`Cached::fetch`], of the source that is named.
    ///
    /// # Errors
    /// Those of [`Cached::fetch`]; [`CartridgeError::NotFound`] for [`Source::Local`].
    pub fn fetch(&self, source: Source, id: &str) -> Result<(), CartridgeError> {
        match source {
            Source::Huggingface => self.huggingface.fetch(id),
            Source::Wandb => self.wandb.fetch(id),
            Source::Http => self.http.fetch(id),
            Source::Local => Err(not_found(id)),
        }
    }

    /// Ends what is under way, so that a process that ends does not wait for a source.
    pub fn stop(&self) {
        self.transfer.stop();
    }
}

fn default_dir() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    Some(cache?.join("cartouche").join("cartridges"))
}
