//! Advisory locks on files, between threads and between processes.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long a waiter sleeps between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// A lock that is held until it is dropped, or the process ends.
#[derive(Debug)]
pub struct FileLock {
    file: File,
    /// Removed with the lock.
    path: Option<PathBuf>,
}

impl FileLock {
    /// `None` if it was not free within `patience`, or `stopped` said so.
    pub(super) fn acquire(
        path: &Path,
        patience: Duration,
        stopped: &dyn Fn() -> bool,
    ) -> io::Result<Option<Self>> {
        let started = Instant::now();
        loop {
            let file = File::options().append(true).create(true).open(path)?;
            match file.try_lock() {
                Ok(()) if is_at(&file, path) => {
                    return Ok(Some(Self { file, path: None }));
                }
                // The holder removed it: the file at the path is another one by now.
                Ok(()) => {}
                Err(TryLockError::Error(error)) => return Err(error),
                Err(TryLockError::WouldBlock) => {
                    if stopped() || started.elapsed() >= patience {
                        return Ok(None);
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    /// The same, and its file leaves with the lock: names come and go, their locks would pile up.
    pub(super) fn acquire_removed(
        path: &Path,
        patience: Duration,
        stopped: &dyn Fn() -> bool,
    ) -> io::Result<Option<Self>> {
        let mut lock = Self::acquire(path, patience, stopped)?;
        if let Some(lock) = &mut lock {
            lock.path = cfg!(unix).then(|| path.to_owned());
        }
        Ok(lock)
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
        // After the removal: who gets the lock now finds that its file is gone, and takes a new one.
        let _ = self.file.unlock();
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let (Ok(held), Ok(there)) = (file.metadata(), fs::metadata(path)) else { return false };
        (held.dev(), held.ino()) == (there.dev(), there.ino())
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        true
    }
}
