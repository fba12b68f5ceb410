//! Files in and out, whatever their format: chosen by content when read, replaced as a whole when
//! written.

use std::{
    fs::{self, File},
    io::{BufReader, BufWriter, Cursor, Read, Seek, SeekFrom},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{Cartridge, CartridgeError, Intake, safetensors_file, torch_file};

/// Every zip file with records starts so.
pub(super) const ZIP_MAGIC: &[u8] = b"PK\x03\x04";

/// Reads a cartridge file: a torch zip (`.pt`) or safetensors, by its content. Of a larger file
/// than `max_bytes` nothing is read.
///
/// A `.pt` file does not say which model it is for; [`super::read_config_yaml`] may.
///
/// # Errors
/// Any of [`CartridgeError`] that reading can give, with the file's name (not its path).
pub fn read_cartridge(path: &Path, max_bytes: u64) -> Result<Cartridge, CartridgeError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let opened = || {
        let kind = fs::metadata(path).map_err(|e| CartridgeError::io("open the file", &e))?;
        if !kind.is_file() {
            return Err(CartridgeError::invalid("it is not a regular file"));
        }
        let file = File::open(path).map_err(|e| CartridgeError::io("open the file", &e))?;
        let mut intake = Intake::as_stored(max_bytes);
        read_file(file, &mut intake)?;
        intake.into_cartridge()
    };
    opened().map_err(|error| error.named(&name))
}

/// Reads a cartridge that is in memory, for instance built into the program. `name` is for errors.
pub fn read_cartridge_bytes(bytes: &[u8], name: &str) -> Result<Cartridge, CartridgeError> {
    let len = bytes.len() as u64;
    let mut intake = Intake::as_stored(len);
    let read = read(Cursor::new(bytes), len, &mut intake).and_then(|()| intake.into_cartridge());
    read.map_err(|error| error.named(name))
}

/// Reads an open file. It is read with ordinary reads, not mapped: a file cut short under a mapping
/// would end the process.
pub(super) fn read_file(file: File, intake: &mut Intake<'_>) -> Result<(), CartridgeError> {
    let len = file.metadata().map_err(|e| CartridgeError::io("read the file", &e))?.len();
    if len > intake.max_bytes() {
        return Err(CartridgeError::too_large("bytes", len, intake.max_bytes()));
    }
    read(BufReader::new(file), len, intake)
}

fn read(
    mut source: impl Read + Seek,
    len: u64,
    intake: &mut Intake<'_>,
) -> Result<(), CartridgeError> {
    let failed = |e| CartridgeError::io("read the file", &e);
    let mut magic = Vec::with_capacity(ZIP_MAGIC.len());
    let start = Read::by_ref(&mut source).take(ZIP_MAGIC.len() as u64).read_to_end(&mut magic);
    start.and_then(|_| source.seek(SeekFrom::Start(0))).map_err(failed)?;
    if magic == ZIP_MAGIC {
        return torch_file::read(source, len, intake);
    }
    safetensors_file::read(source, len, intake)
}

/// Replaces `path` as a whole: readers see the old file or the new one, never a part, also after a
/// crash.
pub(crate) fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), CartridgeError>,
) -> Result<(), CartridgeError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_file_name(format!(".{name}.{}-{number}.tmp", std::process::id()));
    let failed = |e| CartridgeError::io("write the file", &e);
    let written = || {
        let mut file = BufWriter::new(File::create_new(&temporary).map_err(failed)?);
        write(&mut file)?;
        let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        fs::rename(&temporary, path).map_err(failed)?;
        sync_folder(path.parent().unwrap_or(Path::new(""))).map_err(failed)
    };
    written().map_err(|error| {
        // Nothing can be done about a temporary file that cannot be removed.
        let _ = fs::remove_file(&temporary);
        error.named(&name)
    })
}

/// Makes renames in a folder last. Only Unix lets a folder be synchronised.
pub(super) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)?.sync_all()?;
    }
    let _ = folder;
    Ok(())
}
