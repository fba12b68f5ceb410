//! The container of a `.pt` file: a zip of stored records, one of them the pickle that names the
//! others.

use std::{
    collections::HashMap,
    io::{Read, Seek},
};

use zip::{
    CompressionMethod, ZipArchive,
    read::{ArchiveOffset, Config},
};

use super::{
    CartridgeError, Intake, pickle, torch_layout,
    zip_directory::{Metered, check_record_counts},
};
use crate::limits;

/// Reads what `torch.save` wrote for a cartridge. `len` is the length of the file in bytes.
///
/// # Errors
/// Everything in the file that is not as torch writes it, or larger than a limit, is refused before
/// memory is taken for it; the error says what and where.
pub(super) fn read(
    source: impl Read + Seek,
    len: u64,
    intake: &mut Intake<'_>,
) -> Result<(), CartridgeError> {
    let mut records = Records::open(source, len)?;
    if let Some(order) = records.read_small("byteorder", 64)?
        && order != b"little"
    {
        let order = String::from_utf8_lossy(&order).into_owned();
        return Err(CartridgeError::invalid(format!("byte order `{order}`; only little is read")));
    }
    let pickled = records.read_small("data.pkl", limits::MAX_PICKLE_BYTES)?;
    let pickled = pickled.ok_or_else(|| CartridgeError::invalid("the zip has no data.pkl"))?;
    let layout = torch_layout::Layout::find(&pickle::parse(&pickled)?)?;
    drop(pickled);
    layout.load(&mut records, intake)
}

/// The records of a checked zip directory, by their name without the common stem.
pub(super) struct Records<R> {
    archive: ZipArchive<Metered<R>>,
    index: HashMap<String, usize>,
}

impl<R: Read + Seek> Records<R> {
    fn open(mut source: R, len: u64) -> Result<Self, CartridgeError> {
        check_record_counts(&mut source, len)?;
        let (source, meter) = Metered::new(source, limits::MAX_ZIP_DIRECTORY_BYTES);
        // torch puts nothing before the zip. Left to detect that, the reader searches for
        // signatures.
        let config = Config { archive_offset: ArchiveOffset::Known(0) };
        let opened = ZipArchive::with_config(config, source);
        if meter.is_exceeded() {
            let limit = limits::MAX_ZIP_DIRECTORY_BYTES;
            return Err(CartridgeError::too_large("bytes of zip directory", limit + 1, limit));
        }
        let mut archive = opened.map_err(|e| zip_error("open the zip", &e))?;
        meter.stop();
        if archive.has_duplicate_names() {
            return Err(CartridgeError::invalid("the zip has several records of one name"));
        }
        let mut names = Vec::with_capacity(archive.len());
        for i in 0..archive.len() {
            let entry = archive.by_index_data(i).map_err(|e| zip_error("list the zip", &e))?;
            let name = entry.name().map_err(|e| zip_error("list the zip", &e))?.into_owned();
            let (size, packed) = (entry.size(), entry.compressed_size());
            let shown: String = name.chars().take(80).collect();
            if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
                let reason = format!("record `{shown}` is compressed or encrypted; torch stores");
                return Err(CartridgeError::invalid(reason));
            }
            if size != packed || size > len {
                let reason = format!("record `{shown}` claims {size} bytes in {packed} of {len}");
                return Err(CartridgeError::invalid(reason));
            }
            names.push(name);
        }
        // Two records over the same bytes would let a small file claim a lot of memory.
        if archive.has_overlapping_entries().map_err(|e| zip_error("list the zip", &e))? {
            return Err(CartridgeError::invalid("records of the zip overlap"));
        }
        let index = without_stem(names)?;
        Ok(Self { archive, index })
    }

    pub fn size(&mut self, name: &str) -> Option<u64> {
        let index = *self.index.get(name)?;
        self.archive.by_index_data(index).ok().map(|entry| entry.size())
    }

    /// A whole record, its checksum verified. Sizes were checked against the file's length.
    pub fn read(&mut self, name: &str) -> Result<Vec<u8>, CartridgeError> {
        let index = self.index.get(name).copied();
        let index =
            index.ok_or_else(|| CartridgeError::invalid(format!("record `{name}` is missing")))?;
        let mut record = self.archive.by_index(index).map_err(|e| zip_error("read the zip", &e))?;
        let mut bytes = Vec::with_capacity(usize::try_from(record.size()).unwrap_or(0));
        let read = record.read_to_end(&mut bytes);
        let failed = |reason: String| CartridgeError::invalid(format!("record `{name}`: {reason}"));
        read.map_err(|e| failed(e.to_string()))?;
        if bytes.len() as u64 != record.size() {
            return Err(failed(format!("{} bytes of {}", bytes.len(), record.size())));
        }
        Ok(bytes)
    }

    fn read_small(&mut self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, CartridgeError> {
        match self.size(name) {
            None => Ok(None),
            Some(size) if size > limit => {
                Err(CartridgeError::too_large("bytes in a record of the zip", size, limit))
            }
            Some(_) => self.read(name).map(Some),
        }
    }
}

/// Every record lies below one folder, whatever its name; the folder of `data.pkl` is it.
fn without_stem(names: Vec<String>) -> Result<HashMap<String, usize>, CartridgeError> {
    let invalid = |reason: &str| Err(CartridgeError::invalid(reason));
    let mut stems = names.iter().filter_map(|name| name.strip_suffix("data.pkl"));
    let stems = (stems.next().map(str::to_owned), stems.next());
    let (Some(stem), None) = stems else {
        return invalid("a torch zip has exactly one data.pkl");
    };
    if !stem.ends_with('/') {
        return invalid("data.pkl does not lie in a folder of the zip");
    }
    let mut index = HashMap::with_capacity(names.len());
    for (i, name) in names.into_iter().enumerate() {
        let Some(inner) = name.strip_prefix(&stem) else {
            return invalid("records of the zip lie in different folders");
        };
        index.insert(inner.to_owned(), i);
    }
    Ok(index)
}

fn zip_error(doing: &str, error: &zip::result::ZipError) -> CartridgeError {
    match error {
        zip::result::ZipError::Io(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => {
            CartridgeError::io(doing, e)
        }
        other => CartridgeError::invalid(format!("failed to {doing}: {other}")),
    }
}
