//! New files for an id, by way of the server: read and checked whole before they replace anything.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::PathBuf,
    sync::Arc,
};

use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Cartridge, CartridgeError, Generation, Intake, Keep, LocalFolder, Provenance, Registry, Source,
    format::{ZIP_MAGIC, read_file},
    names::NameKey,
    read_config_yaml,
    registry::interrupted,
    sources::NewFiles,
    staging::{Room, WithoutRoom},
};
use crate::limits;

/// What must be there for a change to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    Anything,
    Nothing,
    Generation(Generation),
}

/// A cartridge file on its way in: bytes are written to a temporary file in the cartridge directory, which
/// goes with this unless [`Registry::publish`] takes it.
#[derive(Debug)]
pub struct Upload {
    file: File,
    path: PathBuf,
    written: u64,
    limit: u64,
    config_yaml: Option<String>,
    _permit: OwnedSemaphorePermit,
}

impl Upload {
    /// The text of a `config.yaml` to put beside the cartridge. Without it one is written that says what the
    /// cartridge says.
    ///
    /// # Errors
    /// [`CartridgeError::Invalid`] if it is no YAML, or too large.
    pub fn set_config_yaml(&mut self, text: String) -> Result<(), CartridgeError> {
        read_config_yaml(&text).map_err(CartridgeError::invalid)?;
        self.config_yaml = Some(text);
        Ok(())
    }

    /// The next bytes of the file. Blocks.
    ///
    /// # Errors
    /// [`CartridgeError::TooLarge`] past the server's limit, or [`CartridgeError::Io`].
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), CartridgeError> {
        let written = self.written.saturating_add(bytes.len() as u64);
        if written > self.limit {
            return Err(CartridgeError::too_large("bytes", written, self.limit));
        }
        self.file.write_all(bytes).map_err(|e| CartridgeError::io("write the upload", &e))?;
        self.written = written;
        Ok(())
    }
}

/// An error's source is the [`CartridgeError`].
impl Write for Upload {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.append(bytes).map_err(std::io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Published, it is no longer there.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// An upload that was read whole and fits the model.
struct Checked {
    generation: Generation,
    /// In memory, if there was room.
    cartridge: Option<Arc<Cartridge>>,
    is_zip: bool,
    config_yaml: String,
}

impl Registry {
    /// A file to write a cartridge to, for [`Self::publish`]. Blocks.
    ///
    /// # Errors
    /// [`CartridgeError::Busy`] while too many are under way; [`CartridgeError::Io`] if the cartridge directory
    /// cannot be written.
    pub fn upload(&self) -> Result<Upload, CartridgeError> {
        let permit = Arc::clone(&self.uploads).try_acquire_owned().map_err(|_| {
            let reason = format!("{} uploads are under way", limits::MAX_CONCURRENT_UPLOADS);
            CartridgeError::Busy { id: "upload".to_owned(), reason }
        })?;
        let (file, path) = self.folder("upload")?.upload_file()?;
        let (limit, config_yaml) = (self.max_file_bytes(), None);
        Ok(Upload { file, path, written: 0, limit, config_yaml, _permit: permit })
    }

    /// Makes an uploaded file the cartridge of `id`, for requests from now on; those that run keep theirs. The
    /// file is read whole and checked against the model before it replaces anything, and of two publications
    /// that expect the same, one fails. What this process registered as `id` is replaced too.
    ///
    /// # Errors
    /// [`CartridgeError::Conflict`] if not what was expected is there; all that [`Self::acquire`] has for a
    /// file, of the uploaded one. Then everything is as before.
    pub async fn publish(
        self: &Arc<Self>,
        id: &str,
        upload: Upload,
        expect: Expect,
    ) -> Result<Generation, CartridgeError> {
        let key = NameKey::new(Source::Local, id)?;
        let permit = self.load_permits.acquire().await.map_err(|_| interrupted(id))?;
        let (this, name) = (Arc::clone(self), id.to_owned());
        let check = move || this.check_upload(upload).map_err(|error| error.named(&name));
        let checked = tokio::task::spawn_blocking(check).await;
        drop(permit);
        let (upload, checked) = checked.unwrap_or_else(|_| Err(interrupted(id)))?;
        self.change(id, key, expect, move |registry, folder, key, id| {
            registry.switch(folder, key, id, &upload, &checked)
        })
        .await
    }

    /// Removes the local files of `id`, and what this process registered under it. Running requests keep
    /// theirs.
    ///
    /// # Errors
    /// [`CartridgeError::NotFound`], or [`CartridgeError::Conflict`] if not what was expected is there.
    pub async fn delete(self: &Arc<Self>, id: &str, expect: Expect) -> Result<(), CartridgeError> {
        let key = NameKey::new(Source::Local, id)?;
        if self.folder.is_none() {
            return self.delete_inserted(id, expect);
        }
        self.change(id, key, expect, |registry, folder, key, id| {
            let removed = folder.remove(id);
            let mut residents = registry.lock();
            let was_inserted = residents.names.inserted(id).is_some();
            match removed {
                Err(CartridgeError::NotFound { .. }) if was_inserted => {}
                other => other?,
            }
            residents.names.edited(key, id);
            residents.remove_inserted(id);
            residents.forget(key);
            Ok(())
        })
        .await
    }

    /// One change of a name at a time: compares, then acts, on a thread that may block, and to the end even if
    /// the caller gives up.
    async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        id: &str,
        key: NameKey,
        expect: Expect,
        act: impl FnOnce(&Self, &LocalFolder, &NameKey, &str) -> Result<T, CartridgeError>
        + Send
        + 'static,
    ) -> Result<T, CartridgeError> {
        let folder = self.folder(id)?;
        let lock = Arc::clone(&self.edits[key.number() % self.edits.len()]);
        let turn = lock.lock_owned().await;
        let (this, name) = (Arc::clone(self), id.to_owned());
        let change = move || {
            let _turn = turn;
            let changed = || {
                let _lock = folder.lock()?;
                this.compare(&key, &name, expect)?;
                act(&this, &folder, &key, &name)
            };
            changed().map_err(|error| error.named(&name))
        };
        let changed = tokio::task::spawn_blocking(change).await;
        changed.unwrap_or_else(|_| Err(interrupted(id)))
    }

    fn folder(&self, id: &str) -> Result<Arc<LocalFolder>, CartridgeError> {
        self.folder.clone().ok_or_else(|| CartridgeError::SourceUnavailable {
            id: id.to_owned(),
            from: Source::Local,
            reason: "this server has no cartridge directory".to_owned(),
        })
    }

    /// Reads the upload as [`Self::acquire`] would, and keeps what it read if there is room.
    fn check_upload(&self, mut upload: Upload) -> Result<(Upload, Checked), CartridgeError> {
        let failed = |e| CartridgeError::io("read the upload", &e);
        upload.file.sync_all().map_err(|e| CartridgeError::io("write the upload", &e))?;
        let mut magic = Vec::with_capacity(ZIP_MAGIC.len());
        upload.file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let start = Read::by_ref(&mut upload.file).take(ZIP_MAGIC.len() as u64);
        { start }.read_to_end(&mut magic).map_err(failed)?;
        upload.file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let file = upload.file.try_clone().map_err(failed)?;
        let (mut intake, room) = self.intake(self.max_file_bytes(), WithoutRoom::Check);
        read_file(file, &mut intake)?;
        let config_yaml = match &upload.config_yaml {
            Some(text) => {
                let config = read_config_yaml(text).map_err(CartridgeError::invalid)?;
                if let Some(provenance) = intake.facts().map(|(_, provenance)| provenance) {
                    provenance.model = provenance.model.take().or(config.model);
                }
                text.clone()
            }
            None => intake.config_yaml(),
        };
        let (generation, cartridge) = intake.finish()?;
        let cartridge = match room.take() {
            Some(Room::Refused(_)) => self.lock().touch(generation),
            room => Some(self.settle((generation, cartridge), room)?),
        };
        let is_zip = magic == ZIP_MAGIC;
        Ok((upload, Checked { generation, cartridge, is_zip, config_yaml }))
    }

    /// Puts the checked file in place, and the name on it.
    fn switch(
        &self,
        folder: &LocalFolder,
        key: &NameKey,
        id: &str,
        upload: &Upload,
        checked: &Checked,
    ) -> Result<Generation, CartridgeError> {
        let Checked { generation, is_zip, config_yaml, .. } = checked;
        let (cartridge, is_zip) = (&*upload.path, *is_zip);
        let stamp = folder.replace(id, &NewFiles { cartridge, is_zip, config_yaml })?;
        let mut residents = self.lock();
        residents.names.edited(key, id);
        residents.remove_inserted(id);
        if checked.cartridge.is_some() {
            let epoch = residents.names.epoch(key);
            residents.point(key, id, (*generation, stamp), epoch);
        } else {
            residents.forget(key);
        }
        Ok(*generation)
    }

    fn delete_inserted(&self, id: &str, expect: Expect) -> Result<(), CartridgeError> {
        let mut residents = self.lock();
        let found = residents.names.inserted(id);
        check_expected(id, expect, found.map(Ok))?;
        if found.is_none() {
            return Err(super::sources::not_found(id));
        }
        residents.remove_inserted(id);
        Ok(())
    }

    fn compare(&self, key: &NameKey, id: &str, expect: Expect) -> Result<(), CartridgeError> {
        if expect == Expect::Anything {
            return Ok(());
        }
        let inserted = self.lock().names.inserted(id);
        let found = match inserted {
            Some(generation) => Some(Ok(generation)),
            None => self.generation_on_disk(key, id)?,
        };
        check_expected(id, expect, found)
    }

    /// Of the local file of `id`, which is read if it is not in memory. An inner error: the file is bad.
    fn generation_on_disk(
        &self,
        key: &NameKey,
        id: &str,
    ) -> Result<Option<Result<Generation, CartridgeError>>, CartridgeError> {
        let Some(files) = &self.local else { return Ok(None) };
        let stamp = match files.stamp(id) {
            Ok(None) => return Ok(None),
            Ok(Some(stamp)) => stamp,
            Err(error @ CartridgeError::Invalid { .. }) => return Ok(Some(Err(error))),
            Err(error) => return Err(error),
        };
        let residents = self.lock();
        if let Some(file) = residents.names.file(key).filter(|file| file.stamp == stamp) {
            return Ok(Some(Ok(file.generation)));
        }
        drop(residents);
        let mut intake = Intake::new(u64::MAX, |_| Ok(Keep::Nothing));
        let read = files.read(id, &mut intake).and_then(|_| intake.end());
        Ok(Some(read))
    }
}

fn check_expected(
    id: &str,
    expect: Expect,
    found: Option<Result<Generation, CartridgeError>>,
) -> Result<(), CartridgeError> {
    let holds = match (&expect, &found) {
        (Expect::Anything, _) | (Expect::Nothing, None) => true,
        (Expect::Generation(expected), Some(Ok(found))) => expected == found,
        _ => false,
    };
    if holds {
        return Ok(());
    }
    let generation = |generation: &Generation| format!("generation {generation}");
    Err(CartridgeError::Conflict {
        id: id.to_owned(),
        expected: match &expect {
            Expect::Generation(expected) => generation(expected),
            _ => "no cartridge".to_owned(),
        },
        found: match &found {
            None => "no cartridge".to_owned(),
            Some(Ok(found)) => generation(found),
            Some(Err(error)) => format!("a bad file ({error})"),
        },
    })
}

impl Intake<'_> {
    /// What a `config.yaml` says of the announced cartridge, as JSON, which is YAML.
    fn config_yaml(&self) -> String {
        let Some((tokens, frozen, Provenance { model, .. })) = self.outline_facts() else {
            return String::new();
        };
        let mut config = json!({
            "kv_cache_initializer": { "max_tokens": tokens, "num_frozen_tokens": frozen },
        });
        if let Some(model) = model {
            config["model"] = json!({ "pretrained_model_name_or_path": model });
        }
        config.to_string() + "\n"
    }
}
