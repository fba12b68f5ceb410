//! Bounds on the directory of a zip file. The zip reader takes memory for as many records as the
//! directory claims, and only then tells how many there are.

use std::{
    cell::Cell,
    io::{self, Read, Seek, SeekFrom},
    rc::Rc,
};

use super::CartridgeError;
use crate::limits;

const END: &[u8] = b"PK\x05\x06";
const LOCATOR64: &[u8] = b"PK\x06\x07";
const END64: &[u8] = b"PK\x06\x06";
const END_BYTES: usize = 22;
const LOCATOR64_BYTES: usize = 20;
const END64_BYTES: usize = 56;
/// A zip reader looks for the end record here: the record, and the longest comment after it.
const TAIL_BYTES: u64 = (END_BYTES + LOCATOR64_BYTES + (1 << 16) + 4) as u64;

/// Refuses a zip that claims more records than a cartridge can have, in any of the end records that
/// a zip reader might take for the true one. Records of 16 bits cannot claim too many.
pub(super) fn check_record_counts(
    source: &mut (impl Read + Seek),
    len: u64,
) -> Result<(), CartridgeError> {
    let counted = largest_count(source, len).and_then(|count| {
        source.seek(SeekFrom::Start(0))?;
        Ok(count)
    });
    let count = counted.map_err(|e| CartridgeError::io("read the zip directory", &e))?;
    let limit = limits::MAX_ZIP_RECORDS as u64;
    if count > limit {
        return Err(CartridgeError::too_large("zip records", count, limit));
    }
    Ok(())
}

fn largest_count(source: &mut (impl Read + Seek), len: u64) -> io::Result<u64> {
    let start = len.saturating_sub(TAIL_BYTES);
    source.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    Read::by_ref(source).take(TAIL_BYTES).read_to_end(&mut tail)?;
    let mut largest = 0;
    for at in (LOCATOR64_BYTES..tail.len()).filter(|at| tail[*at..].starts_with(END)) {
        let locator = &tail[at - LOCATOR64_BYTES..at];
        if !locator.starts_with(LOCATOR64) {
            continue;
        }
        let (Some(offset), mut end) = (u64_at(locator, 8), Vec::new()) else {
            continue;
        };
        source.seek(SeekFrom::Start(offset.min(len)))?;
        Read::by_ref(source).take(END64_BYTES as u64).read_to_end(&mut end)?;
        if end.starts_with(END64) {
            // Records on this disk, and records in all.
            let counts = [u64_at(&end, 24), u64_at(&end, 32)];
            largest = counts.into_iter().flatten().fold(largest, u64::max);
        }
    }
    Ok(largest)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|number| u64::from_le_bytes(*number))
}

/// Ends the reading of a directory that is longer than a limit, whatever its records claim.
pub(super) struct Metered<R> {
    inner: R,
    left: Rc<Cell<Option<u64>>>,
}

/// Bytes that may still be read; `None` once any number may.
pub(super) struct Meter(Rc<Cell<Option<u64>>>);

impl Meter {
    pub fn is_exceeded(&self) -> bool {
        self.0.get() == Some(0)
    }

    pub fn stop(&self) {
        self.0.set(None);
    }
}

impl<R> Metered<R> {
    pub fn new(inner: R, limit: u64) -> (Self, Meter) {
        let left = Rc::new(Cell::new(Some(limit)));
        (Self { inner, left: Rc::clone(&left) }, Meter(left))
    }
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some(left) = self.left.get() else {
            return self.inner.read(out);
        };
        if left == 0 {
            return Err(io::Error::other("the zip directory is too long"));
        }
        let most = usize::try_from(left).map_or(out.len(), |left| left.min(out.len()));
        let count = self.inner.read(&mut out[..most])?;
        self.left.set(Some(left - count as u64));
        Ok(count)
    }
}

impl<R: Seek> Seek for Metered<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}
