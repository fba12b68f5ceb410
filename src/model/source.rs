//! Where a model's files are: built in, a folder, one `.gguf` file, or the Hugging Face hub.

use std::cell::OnceCell;
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
    /// `owner/name` or `owner/name/file.gguf` on the hub, with `@revision` or not.
    Hub {
        id: String,
        revision: String,
        /// The one `.gguf` file of the repository that is the model.
        gguf: Option<String>,
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
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.is_file() && is_gguf(name) {
            return Ok(Self::Gguf(path.to_owned()));
        }
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        let parts: Vec<&str> = id.split('/').collect();
        let is_part = |part: &&str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let gguf = match &parts[..] {
            [_, model] if !is_gguf(model) => Some(None),
            [_, _, file @ ..] if file.last().is_some_and(|f| is_gguf(f)) => {
                Some(Some(file.join("/")))
            }
            _ => None,
        };
        match (&parts[..], gguf) {
            ([owner, model, ..], Some(gguf)) if parts.iter().all(is_part) => Ok(Self::Hub {
                id: format!("{owner}/{model}"),
                revision: revision.to_owned(),
                gguf,
            }),
            _ => Err(ModelError::NotFound {
                name: name.to_owned(),
                reason: "no such path, and not of the form owner/name or owner/name/file.gguf"
                    .to_owned(),
            }),
        }
    }
}

fn is_gguf(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
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
            Self::Hub { gguf: Some(file), .. } => Path::new(file)
                .file_stem()
                .map_or_else(|| file.clone(), |s| s.to_string_lossy().into_owned()),
            Self::Hub { id, .. } => id.clone(),
        }
    }

    pub(super) fn files(&self) -> Result<ModelFiles, ModelError> {
        Ok(match self {
            Self::Demo => ModelFiles::Demo,
            // Files beside a .gguf (tokenizer.json, chat template) complete it where it lacks them.
            Self::Gguf(path) => {
                ModelFiles::Folder(path.parent().map_or_else(PathBuf::new, Path::to_owned))
            }
            Self::Folder(path) => ModelFiles::Folder(path.clone()),
            Self::Hub { id, revision, gguf } => {
                let marker = gguf.as_deref().unwrap_or("config.json");
                ModelFiles::Hub(Box::new(HubFiles::new(id, revision, marker)?))
            }
        })
    }

    /// Where the model's `.gguf` file is, downloaded if need be; `None` for a model in another format.
    pub(super) fn gguf(&self, files: &ModelFiles) -> Result<Option<PathBuf>, ModelError> {
        match (self, files) {
            (Self::Gguf(path), _) => Ok(Some(path.clone())),
            (Self::Hub { gguf: Some(file), .. }, ModelFiles::Hub(hub)) => match hub.get(file)? {
                Some(path) => Ok(Some(path)),
                None => Err(files.missing(file)),
            },
            _ => Ok(None),
        }
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
        self.read(name)?.ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::Invalid { file: self.describe(name), reason: "the file is missing".to_owned() }
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
            Self::Hub(hub) => match hub.unreachable.get() {
                None => format!("{}/{name}", hub.id),
                Some(why) => {
                    format!("{}/{name} (only the cache was read, the hub gave {why})", hub.id)
                }
            },
        }
    }
}

/// A hub repository; files are downloaded into the hub cache on first use (`HF_HOME`).
///
/// A model that is cached starts without network. What is not cached then counts as absent, which is known
/// to be so only once the file that is asked for last before the weights, `marker`, is there.
pub(super) struct HubFiles {
    id: String,
    repo: hf_hub::Repo,
    api: Option<ApiRepo>,
    marker: String,
    /// Set by the first answer of the hub: from then on a broken connection is an error.
    answered: OnceCell<()>,
    /// Why the hub was given up; it is not asked again.
    unreachable: OnceCell<String>,
}

impl HubFiles {
    /// Honours `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` (1: the cache only).
    fn new(id: &str, revision: &str, marker: &str) -> Result<Self, ModelError> {
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
        Ok(Self {
            id: id.to_owned(),
            repo,
            api,
            marker: marker.to_owned(),
            answered: OnceCell::new(),
            unreachable: OnceCell::new(),
        })
    }

    fn cached(&self, name: &str) -> Option<PathBuf> {
        hf_hub::Cache::from_env().repo(self.repo.clone()).get(name)
    }

    fn get(&self, name: &str) -> Result<Option<PathBuf>, ModelError> {
        if let Some(path) = self.cached(name) {
            return Ok(Some(path));
        }
        let Some(api) = self.api.as_ref().filter(|_| self.unreachable.get().is_none()) else {
            return Ok(None);
        };
        let error = match api.download(name) {
            Ok(path) => {
                let _ = self.answered.set(());
                return Ok(Some(path));
            }
            Err(ApiError::RequestError(error)) => *error,
            Err(error) => return Err(Self::not_found(&self.id, format!("{name}: {error}"))),
        };
        match error {
            ureq::Error::StatusCode(404) => {
                let _ = self.answered.set(());
                Ok(None)
            }
            ureq::Error::StatusCode(status @ (401 | 403)) => Err(Self::not_found(
                &self.id,
                format!(
                    "the hub answered {status}: there is no such model, or HF_TOKEN does not give \
                     access to it"
                ),
            )),
            ureq::Error::StatusCode(status) => Err(Self::not_found(
                &self.id,
                format!("the hub answered {status} for {name}; try again later"),
            )),
            error if self.answered.get().is_none() && self.cached(&self.marker).is_some() => {
                tracing::warn!(model = self.id, %error, "the hub is not reachable: using its cache");
                let _ = self.unreachable.set(error.to_string());
                Ok(None)
            }
            error => Err(Self::not_found(&self.id, format!("{name}: {error}"))),
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
        let hub = |id: &str, revision: &str, gguf: Option<&str>| ModelSource::Hub {
            id: id.to_owned(),
            revision: revision.to_owned(),
            gguf: gguf.map(str::to_owned),
        };
        assert_eq!("demo".parse::<ModelSource>().unwrap(), ModelSource::Demo);
        for (name, source) in [
            ("Qwen/Qwen3-4B", hub("Qwen/Qwen3-4B", "main", None)),
            ("a/b@v1.2", hub("a/b", "v1.2", None)),
            ("a/b/c-Q8_0.gguf", hub("a/b", "main", Some("c-Q8_0.gguf"))),
            ("a/b/sub/c.GGUF@v1", hub("a/b", "v1", Some("sub/c.GGUF"))),
        ] {
            assert_eq!(name.parse::<ModelSource>().unwrap(), source, "{name}");
        }
        for wrong in [
            "nothing-here",
            "missing/model.gguf",
            "../up",
            "a/b/c",
            "",
            "/a/b/c.gguf",
            "a/b/../c.gguf",
        ] {
            assert!(wrong.parse::<ModelSource>().is_err(), "{wrong}");
        }
    }
}
