//! Where a model's files are: built in, a folder, one `.gguf` file, or the Hugging Face hub.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};

use super::ModelError;
use super::weights::FileBytes;

/// A model as the user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The model inside this binary.
    Demo,
    /// A folder in Hugging Face layout.
    Folder(PathBuf),
    Gguf(PathBuf),
    /// `owner/name` or `owner/name@revision` on the hub.
    Hub {
        id: String,
        revision: String,
    },
}

impl FromStr for ModelSource {
    type Err = ModelError;

    /// `demo`, a path that exists, or a hub id, tried in this order.
    fn from_str(name: &str) -> Result<Self, ModelError> {
        if name == "demo" {
            return Ok(Self::Demo);
        }
        let path = Path::new(name);
        let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.is_file() && is_gguf {
            return Ok(Self::Gguf(path.to_owned()));
        }
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        let is_part = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        match id.split_once('/') {
            Some((owner, model)) if is_part(owner) && is_part(model) && !is_gguf => {
                Ok(Self::Hub { id: id.to_owned(), revision: revision.to_owned() })
            }
            _ => Err(ModelError::NotFound {
                name: name.to_owned(),
                reason: "no such path, and not of the form owner/name".to_owned(),
            }),
        }
    }
}

impl ModelSource {
    /// The name a server shows unless told otherwise.
    pub fn default_name(&self) -> String {
        let stem = |path: &Path| {
            path.canonicalize()
                .ok()
                .and_then(|p| p.file_stem().map(|s| s.to_string_lossy().into_owned()))
                .unwrap_or_else(|| "model".to_owned())
        };
        match self {
            Self::Demo => crate::demo::MODEL_NAME.to_owned(),
            Self::Folder(path) => path
                .canonicalize()
                .ok()
                .and_then(|p| p.file_name().map(|s| s.to_string_lossy().into_owned()))
                .unwrap_or_else(|| "model".to_owned()),
            Self::Gguf(path) => stem(path),
            Self::Hub { id, .. } => id.clone(),
        }
    }

    pub(super) fn files(&self) -> Result<ModelFiles, ModelError> {
        Ok(match self {
            Self::Demo => ModelFiles::Demo,
            // Files beside a .gguf (tokenizer.json, chat template) complete it.
            Self::Gguf(path) => {
                ModelFiles::Folder(path.parent().map_or_else(PathBuf::new, Path::to_owned))
            }
            Self::Folder(path) => ModelFiles::Folder(path.clone()),
            Self::Hub { id, revision } => ModelFiles::Hub(Box::new(HubFiles::new(id, revision)?)),
        })
    }
}

/// Access to a model's files by their name in the repository.
pub(super) enum ModelFiles {
    Demo,
    Folder(PathBuf),
    Hub(Box<HubFiles>),
}

impl ModelFiles {
    /// The content of a small file, `None` if the model has none of that name.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, ModelError> {
        let path = match self {
            Self::Demo => return Ok(crate::demo::model_file(name).map(<[u8]>::to_vec)),
            Self::Folder(folder) => folder.join(name),
            Self::Hub(hub) => match hub.get(name)? {
                Some(path) => path,
                None => return Ok(None),
            },
        };
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ModelError::Io { path, source }),
        }
    }

    /// Like [`Self::read`], for a file the model cannot do without.
    pub fn require(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        self.read(name)?.ok_or_else(|| ModelError::Invalid {
            file: self.describe(name),
            reason: "the file is missing".to_owned(),
        })
    }

    /// A large file, mapped into memory; `None` if there is none of that name.
    pub fn map(&self, name: &str) -> Result<Option<FileBytes>, ModelError> {
        let path = match self {
            Self::Demo => return Ok(crate::demo::model_file(name).map(FileBytes::Static)),
            Self::Folder(folder) => folder.join(name),
            Self::Hub(hub) => match hub.get(name)? {
                Some(path) => path,
                None => return Ok(None),
            },
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ModelError::Io { path, source }),
        };
        // SAFETY: the map is read while the model loads and dropped afterwards. A file cut short by
        // someone else in that time kills the process; model files are trusted not to change under us.
        let map = unsafe { memmap2::Mmap::map(&file) };
        map.map(|map| Some(FileBytes::Mapped(map)))
            .map_err(|source| ModelError::Io { path, source })
    }

    pub fn describe(&self, name: &str) -> String {
        match self {
            Self::Demo => format!("built-in {name}"),
            Self::Folder(folder) => folder.join(name).display().to_string(),
            Self::Hub(hub) => format!("{}/{name}", hub.id),
        }
    }
}

/// A hub repository; files are downloaded into the hub cache on first use (`HF_HOME`).
pub(super) struct HubFiles {
    id: String,
    repo: hf_hub::Repo,
    api: Option<ApiRepo>,
}

impl HubFiles {
    /// Honours `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` (1: the cache only).
    fn new(id: &str, revision: &str) -> Result<Self, ModelError> {
        let repo = hf_hub::Repo::with_revision(
            id.to_owned(),
            hf_hub::RepoType::Model,
            revision.to_owned(),
        );
        let flag = |name| std::env::var(name).is_ok_and(|v| !matches!(v.as_str(), "" | "0"));
        let api = if flag("HF_HUB_OFFLINE") || flag("TRANSFORMERS_OFFLINE") {
            None
        } else {
            let mut builder = ApiBuilder::from_env();
            if let Ok(token) = std::env::var("HF_TOKEN") {
                builder = builder.with_token(Some(token));
            }
            let api = builder.build().map_err(|e| Self::not_found(id, e.to_string()))?;
            Some(api.repo(repo.clone()))
        };
        Ok(Self { id: id.to_owned(), repo, api })
    }

    fn get(&self, name: &str) -> Result<Option<PathBuf>, ModelError> {
        let Some(api) = &self.api else {
            return Ok(hf_hub::Cache::from_env().repo(self.repo.clone()).get(name));
        };
        match api.get(name) {
            Ok(path) => Ok(Some(path)),
            Err(ApiError::RequestError(e)) if matches!(*e, ureq::Error::StatusCode(404)) => {
                Ok(None)
            }
            Err(e) => Err(Self::not_found(&self.id, e.to_string())),
        }
    }

    fn not_found(id: &str, reason: String) -> ModelError {
        ModelError::NotFound { name: id.to_owned(), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let hub = |id: &str, revision: &str| ModelSource::Hub {
            id: id.to_owned(),
            revision: revision.to_owned(),
        };
        assert_eq!("demo".parse::<ModelSource>().unwrap(), ModelSource::Demo);
        assert_eq!("Qwen/Qwen3-4B".parse::<ModelSource>().unwrap(), hub("Qwen/Qwen3-4B", "main"));
        assert_eq!("a/b@v1.2".parse::<ModelSource>().unwrap(), hub("a/b", "v1.2"));
        for wrong in ["nothing-here", "missing/model.gguf", "../up", "a/b/c", ""] {
            assert!(wrong.parse::<ModelSource>().is_err(), "{wrong}");
        }
    }
}
