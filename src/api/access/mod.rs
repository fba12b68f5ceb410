//! Who may do what: API keys, what each of them may use, and the gate that every request passes.
//!
//! Keys come from files, which are read again when they change, and from the environment. Of a key only its
//! SHA-256 is kept, and neither is ever shown: what logs, errors and metrics name is the key's name.

mod gate;
mod key_file;
mod ring;
mod scope;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use axum::{extract::FromRequestParts, http::request::Parts};

pub use gate::Need;
pub(super) use gate::{authenticate, require_admin};
pub use key_file::KeyError;
pub use scope::Scope;

use super::error::ApiError;
use key_file::{FileStamp, KeyFile};
use ring::{Key, KeyRing};

/// How often key files are looked at.
const POLL: Duration = Duration::from_secs(1);

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Uses models and cartridges.
    User,
    /// Also loads, replaces and deletes cartridges.
    Admin,
}

/// What one key may do. Holds nothing secret but the salt, which [`std::fmt::Debug`] leaves out.
pub struct Rights {
    /// For the log; unique.
    pub name: String,
    pub role: Role,
    /// The cartridges it may name.
    pub scope: Scope,
    /// Keeps its prompts in the prefix cache apart from those of other salts.
    pub cache_salt: Option<String>,
    /// Whether its requests may say `force_redownload`.
    pub force_redownload: bool,
}

impl Rights {
    /// Those of a key that nothing more is said about.
    pub fn of(name: impl Into<String>, role: Role) -> Self {
        Self {
            name: name.into(),
            role,
            scope: Scope::default(),
            cache_salt: None,
            force_redownload: true,
        }
    }
}

impl std::fmt::Debug for Rights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rights").field("name", &self.name).field("role", &self.role).finish()
    }
}

/// Whoever sent a request. Handlers take it as an argument; that there is one is the proof that the request
/// has passed the gate.
#[derive(Debug, Clone)]
pub struct Caller(Arc<Rights>);

impl std::ops::Deref for Caller {
    type Target = Rights;

    fn deref(&self) -> &Rights {
        &self.0
    }
}

impl Caller {
    /// A caller of a server without keys, or in a test.
    pub fn new(rights: Rights) -> Self {
        Self(Arc::new(rights))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let caller = parts.extensions.get::<Self>().cloned();
        caller.ok_or_else(|| ApiError::internal("a route is not behind the gate"))
    }
}

/// Where keys come from.
#[derive(Default)]
pub struct KeySources {
    pub user_file: Option<PathBuf>,
    pub admin_file: Option<PathBuf>,
    /// Comma separated, as in the environment.
    pub user_keys: Option<String>,
    pub admin_keys: Option<String>,
}

/// The keys of a server, and how it is reached.
pub struct Access {
    files: Vec<KeyFile>,
    fixed: Vec<Key>,
    ring: RwLock<Arc<KeyRing>>,
    /// The files as they were before they were last read.
    seen: Mutex<Vec<Option<FileStamp>>>,
    /// Only this machine can connect.
    loopback: bool,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("keys", &self.ring().len()).finish_non_exhaustive()
    }
}

impl Access {
    /// Without keys: everybody who can connect is a user, and an admin if `loopback`.
    pub fn open(loopback: bool) -> Self {
        let (ring, seen) = (RwLock::default(), Mutex::default());
        Self { files: Vec::new(), fixed: Vec::new(), ring, seen, loopback }
    }

    /// Reads all keys. Blocks.
    ///
    /// # Errors
    /// A file that cannot be read, a key that is none, and one given twice. No error shows a key.
    pub fn new(sources: KeySources, loopback: bool) -> Result<Self, KeyError> {
        let file = |path: PathBuf, role| KeyFile { path, role };
        let files = [
            sources.user_file.map(|path| file(path, Role::User)),
            sources.admin_file.map(|path| file(path, Role::Admin)),
        ];
        let mut fixed = Vec::new();
        for (name, list, role) in [
            ("CARTOUCHE_API_KEY", sources.user_keys, Role::User),
            ("CARTOUCHE_ADMIN_KEY", sources.admin_keys, Role::Admin),
        ] {
            if let Some(list) = list {
                fixed.extend(key_file::comma_separated(name, &list, role)?);
            }
        }
        let files = files.into_iter().flatten().collect();
        let access = Self { files, fixed, ..Self::open(loopback) };
        access.reload()?;
        Ok(access)
    }

    /// Reads the files again; how many keys there are now. On an error all stays as it was. Blocks.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub fn reload(&self) -> Result<usize, KeyError> {
        // Before the read: what changes during it is seen the next time.
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = self.stamps();
        let mut keys = self.fixed.clone();
        for file in &self.files {
            keys.extend(file.read()?);
        }
        let ring = Arc::new(KeyRing::new(keys)?);
        let count = ring.len();
        *self.ring.write().unwrap_or_else(PoisonError::into_inner) = ring;
        Ok(count)
    }

    /// Takes changes of the files up for ever, and at once whenever `hurry` resolves.
    pub async fn watch<F: Future<Output = ()>>(self: Arc<Self>, mut hurry: impl FnMut() -> F) {
        if self.files.is_empty() {
            return;
        }
        loop {
            let asked = tokio::select! {
                () = tokio::time::sleep(POLL) => false,
                () = hurry() => true,
            };
            let this = Arc::clone(&self);
            let work = move || (asked || this.has_changed()).then(|| this.reload());
            match tokio::task::spawn_blocking(work).await {
                Ok(None) => {}
                Ok(Some(Ok(keys))) => tracing::info!(keys, "API keys were read again"),
                Ok(Some(Err(error))) => {
                    tracing::error!(%error, "the changed API keys are not usable; the old ones stay");
                }
                Err(_) => tracing::error!("API keys could not be read; the old ones stay"),
            }
        }
    }

    fn stamps(&self) -> Vec<Option<FileStamp>> {
        self.files.iter().map(KeyFile::stamp).collect()
    }

    fn has_changed(&self) -> bool {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) != self.stamps()
    }

    /// Whether requests need a key.
    pub fn has_keys(&self) -> bool {
        self.ring().len() > 0
    }

    /// Whether there is a key that may change things.
    pub fn has_admin_key(&self) -> bool {
        self.ring().has_admin()
    }

    fn ring(&self) -> Arc<KeyRing> {
        Arc::clone(&self.ring.read().unwrap_or_else(PoisonError::into_inner))
    }
}
