//! A remote source and what the disk cache holds of it.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::{
    FileSource, RemoteSource, Stamp,
    transfer::{Delivered, Expected, Failure, Request, Transfer},
};
use crate::{
    cartridge::{
        CartridgeError, Intake, Keep, Source,
        config_yaml::complete_from_config,
        format::read_file,
        store::{Finished, Record, Store, hex},
    },
    limits,
};

/// What an id is at its source at this moment.
#[derive(Debug, Clone)]
pub struct Remote {
    pub request: Request,
    /// Name of the file.
    pub file: String,
    pub expected: Expected,
    pub revision: Option<String>,
    /// The source's name for this content, where it is known before the content comes.
    pub etag: Option<String>,
    /// A `config.yaml` beside the file.
    pub config: Option<Request>,
}

/// What differs from source to source.
pub trait Fetch: Send + Sync + 'static {
    fn source(&self) -> Source;

    /// Asks where the file of `id` is, and what is known of it.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`], [`CartridgeError::NotFound`], [`CartridgeError::SourceUnavailable`].
    fn locate(
        &self,
        id: &str,
        transfer: &Transfer,
        deadline: Instant,
    ) -> Result<Remote, CartridgeError>;

    /// The error for a transfer that failed.
    fn told(&self, id: &str, failure: Failure) -> CartridgeError;
}

/// Files of a remote source. As a [`FileSource`] it is what the cache holds; only [`Self::fetch`] uses the
/// network.
#[derive(Debug)]
pub struct Cached<F> {
    remote: F,
    transfer: Transfer,
    store: Arc<Store>,
    max_file_bytes: u64,
}

impl<F: Fetch> Cached<F> {
    pub fn new(remote: F, transfer: Transfer, store: Arc<Store>, max_file_bytes: u64) -> Self {
        Self { remote, transfer, store, max_file_bytes }
    }

    /// Brings the present content of `id` into the cache, in place of what was there. Content that is there
    /// already is not sent again. Ends within the total time limit; another process that fetches the same is
    /// waited for.
    ///
    /// # Errors
    /// Any of [`CartridgeError`]. What the cache had stays, also if what came is no cartridge.
    pub fn fetch(&self, id: &str) -> Result<(), CartridgeError> {
        self.bring(id).map_err(|error| error.named(id))
    }

    /// What the cache knows of `id`.
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`].
    pub fn record(&self, id: &str) -> Result<Option<Record>, CartridgeError> {
        let record = self.store.record(self.remote.source(), id)?;
        Ok(record.filter(|record| self.store.blob(record).is_some()))
    }

    fn bring(&self, id: &str) -> Result<(), CartridgeError> {
        let source = self.remote.source();
        let deadline = self.transfer.deadline();
        let is_stopped = || self.transfer.is_stopped();
        let patience = self.transfer.limits().total;
        let lock = self.store.lock_name(source, id, patience, &is_stopped)?;
        let Some(_lock) = lock else {
            let reason = "another process has been fetching it for long".to_owned();
            return Err(CartridgeError::Busy { id: id.to_owned(), reason });
        };
        let old = self.record(id)?;
        let remote = self.remote.locate(id, &self.transfer, deadline)?;
        if let Some(size) = remote.expected.size.filter(|size| *size > self.max_file_bytes) {
            return Err(CartridgeError::too_large("bytes", size, self.max_file_bytes));
        }
        let config_yaml = self.config(&remote, deadline);
        if let Some(known) = self.known(&remote, old.as_ref()) {
            let record = self.record_of(id, &remote, known, config_yaml.clone());
            if self.store.adopt(source, &record)? {
                return Ok(());
            }
        }
        self.store.make_room(remote.expected.size.unwrap_or(0))?;
        let mut partial = self.store.partial(source, id, &origin(&remote))?;
        let mut request = remote.request.clone();
        let old_etag = old.as_ref().and_then(|old| old.etag.as_deref());
        if let Some(etag) = old_etag.filter(|etag| etag.starts_with('"') && partial.is_empty()) {
            request = request.with("if-none-match", etag);
        }
        let (expected, limit) = (&remote.expected, self.max_file_bytes);
        let got = self.transfer.download(&request, expected, &mut partial, limit, deadline);
        match (got.map_err(|failure| self.remote.told(id, failure))?, old) {
            (Delivered::NotModified, Some(old)) => {
                partial.discard();
                let record = self.record_of(id, &remote, old, config_yaml);
                self.store.adopt(source, &record)?;
                Ok(())
            }
            (Delivered::NotModified, None) => {
                Err(CartridgeError::invalid("its source says that it did not change, unasked"))
            }
            (Delivered::Whole(etag), _) => {
                let finished = partial.finish()?;
                let (generation, tokens) = match self.look_into(&finished) {
                    Ok(facts) => facts,
                    Err(error) => {
                        finished.discard();
                        return Err(error);
                    }
                };
                let known = Record {
                    digest: hex(&finished.sha256),
                    size: finished.len,
                    generation,
                    tokens,
                    etag,
                    ..self.record_of(id, &remote, blank(), None)
                };
                let record = self.record_of(id, &remote, known, config_yaml);
                self.store.commit(source, finished, &record)
            }
        }
    }

    /// The record of a file that is in the cache and is what the source has now.
    fn known(&self, remote: &Remote, old: Option<&Record>) -> Option<Record> {
        if let Some(sha256) = remote.expected.sha256 {
            return self.store.with_digest(&hex(&sha256));
        }
        let is_same = |old: &&Record| {
            remote.etag.is_some()
                && old.etag == remote.etag
                && remote.expected.size.is_none_or(|size| size == old.size)
        };
        old.filter(is_same).cloned()
    }

    /// The record of `id`, with the content of `known`.
    fn record_of(
        &self,
        id: &str,
        remote: &Remote,
        known: Record,
        config_yaml: Option<String>,
    ) -> Record {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Record {
            id: id.to_owned(),
            file: remote.file.clone(),
            from: remote.request.address.to_string(),
            revision: remote.revision.clone(),
            etag: remote.etag.clone().or(known.etag),
            fetched_at: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
            config_yaml,
            ..known
        }
    }

    /// Reads what came before it may take the place of anything: its generation and its tokens.
    fn look_into(&self, finished: &Finished) -> Result<(String, usize), CartridgeError> {
        let mut tokens = 0;
        let mut intake = Intake::new(self.max_file_bytes, |outline| {
            tokens = outline.tokens;
            Ok(Keep::Nothing)
        });
        read_file(finished.open()?, &mut intake)?;
        let generation = intake.end()?.to_hex();
        drop(intake);
        Ok((generation, tokens))
    }

    /// The text of the `config.yaml`; it is advisory, so trouble with it is a warning.
    fn config(&self, remote: &Remote, deadline: Instant) -> Option<String> {
        let request = remote.config.as_ref()?;
        let bytes = match self.transfer.get(request, limits::MAX_CONFIG_YAML_BYTES, deadline) {
            Ok(bytes) => bytes,
            Err(failure) => {
                tracing::warn!(%failure, "config.yaml is ignored");
                return None;
            }
        };
        String::from_utf8(bytes).ok()
    }

    /// Removes a file that is not what it was when it came.
    fn damaged(&self, record: &Record) -> CartridgeError {
        tracing::warn!(id = record.id, digest = record.digest, "cache: a damaged file is removed");
        match self.store.discard(record) {
            Ok(()) => CartridgeError::Busy {
                id: record.id.clone(),
                reason: "its file in the cartridge cache was damaged and is removed; it will be \
                         fetched again"
                    .to_owned(),
            },
            Err(error) => error,
        }
    }

    fn take_in(&self, id: &str, intake: &mut Intake<'_>) -> Result<Stamp, CartridgeError> {
        let source = self.remote.source();
        let absent = || CartridgeError::NotFound {
            id: id.to_owned(),
            hint: format!("the cartridge cache has nothing of that id from {source}"),
        };
        let record = self.store.record(source, id)?.ok_or_else(absent)?;
        let file = self.store.open(&record)?.ok_or_else(absent)?;
        let metadata = file.metadata().map_err(|e| CartridgeError::io("look at the file", &e))?;
        match read_file(file, intake).and_then(|()| intake.end()) {
            Ok(generation) if generation.to_hex() == record.generation => {}
            Ok(_) => return Err(self.damaged(&record)),
            Err(
                error @ (CartridgeError::Invalid { .. }
                | CartridgeError::Forbidden { .. }
                | CartridgeError::Io { .. }),
            ) => {
                let is_sound = self.store.verify(&record)?;
                return Err(if is_sound { error } else { self.damaged(&record) });
            }
            Err(error) => return Err(error),
        }
        if let (Some(text), Some((tokens, provenance))) = (&record.config_yaml, intake.facts()) {
            complete_from_config(text, id, tokens, provenance);
        }
        self.store.touch(source, id);
        Ok(Stamp::from(&metadata))
    }
}

impl<F: Fetch> RemoteSource for Cached<F> {
    fn fetch(&self, id: &str) -> Result<(), CartridgeError> {
        Cached::fetch(self, id)
    }
}

impl<F: Fetch> FileSource for Cached<F> {
    fn stamp(&self, id: &str) -> Result<Option<Stamp>, CartridgeError> {
        let source = self.remote.source();
        let Some(record) = self.store.record(source, id)? else { return Ok(None) };
        let Some(metadata) = self.store.blob(&record) else { return Ok(None) };
        self.store.touch(source, id);
        Ok(Some(Stamp::from(&metadata)))
    }

    fn read(&self, id: &str, intake: &mut Intake<'_>) -> Result<Stamp, CartridgeError> {
        self.take_in(id, intake).map_err(|error| error.named(id))
    }

    fn list(&self) -> Vec<String> {
        let source = self.remote.source();
        let records = self.store.records().into_iter().filter(|(from, _)| *from == source);
        records.map(|(_, record)| record.id).collect()
    }
}

/// Which content a partial download is part of.
fn origin(remote: &Remote) -> String {
    let Expected { size, sha256, md5 } = &remote.expected;
    let digest = sha256.map(|d| hex(&d)).or(md5.map(|d| hex(&d)));
    // Of content that is known by its digest, a part is a part wherever it came from.
    let place = match &digest {
        Some(_) => String::new(),
        None => format!("{} {}", remote.request.address, remote.revision.as_deref().unwrap_or("")),
    };
    format!("{place} {size:?} {}", digest.unwrap_or_default())
}

fn blank() -> Record {
    Record {
        id: String::new(),
        digest: String::new(),
        size: 0,
        file: String::new(),
        from: String::new(),
        revision: None,
        etag: None,
        fetched_at: 0,
        generation: String::new(),
        tokens: 0,
        config_yaml: None,
    }
}
