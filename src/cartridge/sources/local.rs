//! Cartridges in folders below the cartridge directory.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use super::super::{
    CartridgeError, Intake, config_yaml::complete_from_config, format::read_file,
    sanitize::folder_name,
};
use super::{FileSource, Stamp};
use crate::limits;

/// Name of the file that says which id a folder belongs to, where the folder's name is ambiguous:
/// another id that leads to the same folder is refused.
pub(super) const ID_RECORD: &str = "cartridge.id";

/// `{dir}/{folder of the id}/`, which holds `cartridge.pt` or `cartridge.safetensors`, or a
/// training run's `cache-step{N}.pt` (the highest N counts), or just one `.pt` file.
#[derive(Debug)]
pub struct LocalFolder {
    pub(super) dir: PathBuf,
}

impl LocalFolder {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The folder and the file of an id, both resolved and below the directory.
    pub(super) fn locate(&self, id: &str) -> Result<Option<(PathBuf, PathBuf)>, CartridgeError> {
        let name = folder_name(id)?;
        let resolve = |path: &Path| match path.canonicalize() {
            Ok(path) => Ok(Some(path)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(CartridgeError::io("look into its folder", &e)),
        };
        let Some(root) = resolve(&self.dir)? else {
            return Ok(None);
        };
        let Some(folder) = resolve(&root.join(name))? else {
            return Ok(None);
        };
        if !folder.is_dir() {
            return Ok(None);
        }
        let Some(file) = choose_file(&folder)? else {
            return Ok(None);
        };
        let Some(file) = resolve(&file)? else {
            return Ok(None);
        };
        if !folder.starts_with(&root) || !file.starts_with(&root) {
            return Err(CartridgeError::InvalidId {
                id: id.to_owned(),
                reason: "its folder or file is a link out of the cartridge directory".to_owned(),
            });
        }
        check_id_record(&folder, id)?;
        Ok(Some((folder, file)))
    }
}

impl LocalFolder {
    /// Opens the file of an id; its folder comes with it. One that is replaced or removed at this very moment
    /// is looked for again.
    fn open(&self, id: &str) -> Result<(PathBuf, File, Stamp), CartridgeError> {
        let mut tries = OPEN_TRIES;
        loop {
            let Some((folder, path)) = self.locate(id)? else {
                return Err(not_found(id));
            };
            tries -= 1;
            match open_regular(&path) {
                Ok((file, stamp)) => return Ok((folder, file, stamp)),
                Err(error) if tries == 0 => return Err(error),
                Err(_) => {}
            }
        }
    }
}

impl FileSource for LocalFolder {
    fn stamp(&self, id: &str) -> Result<Option<Stamp>, CartridgeError> {
        let Some((_, file)) = self.locate(id).map_err(|e| e.named(id))? else {
            return Ok(None);
        };
        let failed = |e| CartridgeError::io("look at the file", &e).named(id);
        let metadata = fs::symlink_metadata(file).map_err(failed)?;
        Ok(Some(Stamp::from(&metadata)))
    }

    fn read(&self, id: &str, intake: &mut Intake<'_>) -> Result<Stamp, CartridgeError> {
        let mut read = || {
            let (folder, file, stamp) = self.open(id)?;
            let again = file.try_clone().map_err(|e| CartridgeError::io("open the file", &e))?;
            let read = read_file(file, intake);
            let same = is_unchanged(&again, stamp);
            if !same.map_err(|e| CartridgeError::io("read the file", &e))? {
                let reason = "its file was rewritten while it was read (replace files by rename)";
                return Err(CartridgeError::Busy { id: id.to_owned(), reason: reason.to_owned() });
            }
            read?;
            if let Some((tokens, provenance)) = intake.facts() {
                let path = folder.join("config.yaml");
                match read_small(&path, limits::MAX_CONFIG_YAML_BYTES) {
                    Ok(None) => {}
                    Ok(Some(text)) => complete_from_config(&text, id, tokens, provenance),
                    Err(error) => tracing::warn!(id, "config.yaml is ignored: {error}"),
                }
            }
            Ok(stamp)
        };
        read().map_err(|error| error.named(id))
    }

    fn list(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let id = |name: String| {
            let id = match read_small(&self.dir.join(&name).join(ID_RECORD), ID_BYTES) {
                Ok(Some(id)) => id,
                _ => name,
            };
            // A folder that no id leads to, or that holds no cartridge, is not listed.
            self.stamp(&id).ok().flatten().map(|_| id)
        };
        let mut ids: Vec<_> = names.filter_map(id).collect();
        ids.sort();
        ids
    }
}

/// How often a file is looked for that is gone, or another, when it is opened.
const OPEN_TRIES: usize = 3;

const ID_BYTES: u64 = limits::MAX_CARTRIDGE_ID_BYTES as u64;

pub(in super::super) fn not_found(id: &str) -> CartridgeError {
    let hint = match folder_name(id) {
        Ok(folder) => {
            format!("no folder `{folder}` with a cartridge file in the cartridge directory")
        }
        Err(error) => error.to_string(),
    };
    CartridgeError::NotFound { id: id.to_owned(), hint }
}

fn choose_file(folder: &Path) -> Result<Option<PathBuf>, CartridgeError> {
    for name in ["cartridge.pt", "cartridge.safetensors"] {
        let path = folder.join(name);
        if path.symlink_metadata().is_ok() {
            return Ok(Some(path));
        }
    }
    let entries = fs::read_dir(folder).map_err(|e| CartridgeError::io("list its folder", &e))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut files: Vec<String> = names.filter(|name| name.ends_with(".pt")).collect();
    let step = |name: &String| -> Option<u64> {
        name.strip_prefix("cache-step")?.strip_suffix(".pt")?.parse().ok()
    };
    let newest = files.iter().filter(|name| step(name).is_some()).max_by_key(|name| step(name));
    let chosen = match (newest, files.len()) {
        (Some(name), _) => Some(name.clone()),
        (None, 0 | 1) => files.pop(),
        (None, count) => {
            let reason = format!("its folder has {count} .pt files; name one `cartridge.pt`");
            return Err(CartridgeError::invalid(reason));
        }
    };
    Ok(chosen.map(|name| folder.join(name)))
}

pub(super) fn check_id_record(folder: &Path, id: &str) -> Result<(), CartridgeError> {
    match read_small(&folder.join(ID_RECORD), ID_BYTES) {
        Ok(Some(recorded)) if recorded != id => Err(CartridgeError::InvalidId {
            id: id.to_owned(),
            reason: format!("its folder belongs to the id `{recorded}`, which is written alike"),
        }),
        _ => Ok(()),
    }
}

/// Opens a file that was already resolved, and makes sure that the file opened is the one that was
/// looked at: it must not have been swapped for a link, a pipe or a device in between.
fn open_regular(path: &Path) -> Result<(File, Stamp), CartridgeError> {
    let failed = |e| CartridgeError::io("open the file", &e);
    let seen = fs::symlink_metadata(path).map_err(failed)?;
    if !seen.is_file() {
        return Err(CartridgeError::invalid("it is not a regular file"));
    }
    let mut options = fs::OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // Without O_NONBLOCK, opening a pipe waits for its other end, perhaps for ever.
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC);
    }
    let file = options.open(path).map_err(failed)?;
    let opened = file.metadata().map_err(failed)?;
    let stamp = Stamp::from(&opened);
    if !opened.is_file() || stamp.inode[..2] != Stamp::from(&seen).inode[..2] {
        return Err(CartridgeError::invalid("its file was swapped while it was opened"));
    }
    Ok((file, stamp))
}

/// Whether an open file still has the content it was opened with. Replacing or removing it under its name
/// marks the inode as changed too, since it has a link less, but what was opened stays as it was.
fn is_unchanged(file: &File, opened: Stamp) -> std::io::Result<bool> {
    let now = file.metadata()?;
    let (mut expected, now_stamp) = (opened, Stamp::from(&now));
    #[cfg(unix)]
    if std::os::unix::fs::MetadataExt::nlink(&now) == 0 {
        expected.inode[2] = now_stamp.inode[2];
    }
    Ok(now_stamp == expected)
}

/// A small regular text file; `None` where there is none.
fn read_small(path: &Path, limit: u64) -> Result<Option<String>, CartridgeError> {
    use std::io::Read;
    if path.symlink_metadata().is_err() {
        return Ok(None);
    }
    let (file, stamp) = open_regular(path)?;
    if stamp.len > limit {
        return Err(CartridgeError::too_large("bytes", stamp.len, limit));
    }
    let mut text = String::new();
    let read = file.take(limit).read_to_string(&mut text);
    read.map_err(|e| CartridgeError::io("read the file", &e))?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::super::super::Keep;
    use super::*;

    #[test]
    fn a_file_replaced_by_rename_while_it_is_read_is_not_taken_for_a_rewritten_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&path, "one").unwrap();
        let (file, stamp) = open_regular(&path).unwrap();
        assert!(is_unchanged(&file, stamp).unwrap());
        std::fs::write(&other, "two").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert!(is_unchanged(&file, stamp).unwrap());
        let (file, stamp) = open_regular(&path).unwrap();
        std::fs::write(&path, "three").unwrap();
        assert!(!is_unchanged(&file, stamp).unwrap(), "rewritten in place");
        std::fs::remove_file(&path).unwrap();
        assert!(!is_unchanged(&file, stamp).unwrap(), "rewritten, then removed");
    }

    /// Nothing is wrong with such a cartridge: the next try finds it whole.
    #[test]
    fn a_file_rewritten_in_place_while_it_is_read_is_busy_not_broken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a").join("cartridge.safetensors");
        std::fs::create_dir(dir.path().join("a")).unwrap();
        let content = crate::demo::DOCUMENTS[0].cartridge;
        std::fs::write(&path, content).unwrap();
        let longer = [content, b"more"].concat();
        let files = LocalFolder::new(dir.path().to_owned());
        for other in [&content[..1000], &longer] {
            let mut intake = Intake::new(u64::MAX, |_| {
                std::fs::write(&path, other).unwrap();
                Ok(Keep::Nothing)
            });
            let error = files.read("a", &mut intake).unwrap_err();
            assert!(matches!(&error, CartridgeError::Busy { id, .. } if id == "a"), "{error}");
            std::fs::write(&path, content).unwrap();
        }
    }
}
