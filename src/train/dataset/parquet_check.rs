//! What a Parquet file claims about itself, checked before the Parquet crate acts on it.
//!
//! The crate reserves memory for the sizes that a file states, recurses through its schema, and expands
//! repeated values without a bound; a file of some bytes could end the process. The schema and the page headers
//! (Thrift, compact protocol) are therefore walked here first. What is left can at worst make the crate panic,
//! which [`super::parquet_read`] catches.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::limits::{
    MAX_PARQUET_FOOTER_BYTES, MAX_PARQUET_PAGE_HEADER_BYTES, MAX_PARQUET_SCHEMA_DEPTH,
    MAX_PARQUET_SCHEMA_NODES, MAX_PARQUET_VALUES_PER_BYTE, MIN_PARQUET_VALUES,
};

/// Snappy cannot make a page smaller than about 1/22; no compression leaves it as it is.
const MAX_INFLATION: u64 = 32;
/// PLAIN, PLAIN_DICTIONARY, RLE and RLE_DICTIONARY: what writers use unless told otherwise. The decoders of the
/// others trust lengths inside of the data.
const ENCODINGS: [i64; 4] = [0, 2, 3, 8];
/// Levels of structs and lists inside of a value that is skipped.
const MAX_DEPTH: usize = 16;

const BROKEN: &str = "is no Parquet file, or a damaged one";

/// Checks the schema in the footer of a file of `bytes` bytes.
///
/// # Errors
/// What is wrong, as the end of a sentence that begins with the name of the file.
pub(super) fn check_footer(file: &File, bytes: u64) -> Result<(), String> {
    let broken = |_| BROKEN.to_owned();
    let mut tail = [0; 8];
    let start = bytes.checked_sub(8).ok_or(BROKEN)?;
    file.read_exact_at(&mut tail, start).map_err(broken)?;
    let [a, b, c, d, ref magic @ ..] = tail;
    if magic != super::reader::PARQUET_MAGIC {
        return Err(BROKEN.to_owned());
    }
    let length = u64::from(u32::from_le_bytes([a, b, c, d]));
    if length > MAX_PARQUET_FOOTER_BYTES {
        return Err(format!("has a footer of more than {MAX_PARQUET_FOOTER_BYTES} bytes"));
    }
    let start = start.checked_sub(length).ok_or(BROKEN)?;
    let mut footer = vec![0; length as usize];
    file.read_exact_at(&mut footer, start).map_err(broken)?;
    let Schema { nodes, depth } = Schema::read(&footer).ok_or(BROKEN)?;
    if nodes > MAX_PARQUET_SCHEMA_NODES as u64 {
        return Err(format!(
            "has {nodes} columns and groups of columns; at most {MAX_PARQUET_SCHEMA_NODES} are read"
        ));
    }
    if depth > MAX_PARQUET_SCHEMA_DEPTH {
        return Err(format!(
            "has a schema of {depth} levels; at most {MAX_PARQUET_SCHEMA_DEPTH} are read"
        ));
    }
    Ok(())
}

/// The size of a schema, none of whose nodes claims more children than there are nodes.
#[derive(Debug, Default, PartialEq)]
struct Schema {
    nodes: u64,
    /// 0 when there are too many nodes to look at them.
    depth: usize,
}

impl Schema {
    fn read(footer: &[u8]) -> Option<Self> {
        let mut walk = Walk { bytes: footer, at: 0 };
        let mut schema = None;
        // The walk ends with the first schema: the crate ignores a second one.
        walk.fields(|walk, id, kind| {
            if id != 2 {
                return walk.skip(kind, 0);
            }
            let (nodes, _) = walk.list().filter(|(_, element)| *element == STRUCT)?;
            let few = nodes <= MAX_PARQUET_SCHEMA_NODES as u64;
            let depth = if few { Self::depth(walk, nodes)? } else { 0 };
            schema = Some(Self { nodes, depth });
            None
        });
        schema
    }

    /// Walks over `nodes` nodes, parents before their children.
    fn depth(walk: &mut Walk, nodes: u64) -> Option<usize> {
        let mut depth = 0;
        // How many children each node above the next one still waits for.
        let mut waiting: Vec<i64> = Vec::new();
        for _ in 0..nodes {
            let mut children = 0;
            walk.fields(|walk, id, kind| match (id, kind) {
                (5, I32) => {
                    children = walk.integer().filter(|n| (0..=nodes as i64).contains(n))?;
                    Some(())
                }
                _ => walk.skip(kind, 0),
            })?;
            while waiting.pop_if(|n| *n == 0).is_some() {}
            if let Some(parent) = waiting.last_mut() {
                *parent -= 1;
            }
            waiting.push(children);
            depth = depth.max(waiting.len());
        }
        Some(depth)
    }
}

/// How many values the pages of a file may still claim, and how many bytes its columns may still take.
pub(super) struct Budget {
    values: u64,
    bytes: u64,
}

impl Budget {
    pub fn new(file_bytes: u64) -> Self {
        let values = MIN_PARQUET_VALUES + MAX_PARQUET_VALUES_PER_BYTE * file_bytes;
        Self { values, bytes: file_bytes }
    }

    /// Checks the page headers of the column chunk at `start`, of `bytes` bytes.
    ///
    /// # Errors
    /// As [`check_footer`].
    pub fn check_chunk(&mut self, file: &File, start: u64, bytes: u64) -> Result<(), String> {
        self.bytes = self.bytes.checked_sub(bytes).ok_or(BROKEN)?;
        let end = start.checked_add(bytes).ok_or(BROKEN)?;
        let mut at = start;
        let mut window = vec![0; MAX_PARQUET_PAGE_HEADER_BYTES];
        while at < end {
            let length = window.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let window = &mut window[..length];
            file.read_exact_at(window, at).map_err(|_| BROKEN)?;
            let (page, length) = Page::read(window).ok_or_else(|| {
                format!(
                    "has a damaged page header at byte {at}, or one of more than \
                     {MAX_PARQUET_PAGE_HEADER_BYTES} bytes"
                )
            })?;
            if page.encodings.iter().any(|encoding| !ENCODINGS.contains(encoding)) {
                return Err(format!(
                    "uses a page encoding (number {:?}) that is not read; write it with plain and \
                     dictionary encoding, the default of pyarrow",
                    page.encodings
                ));
            }
            if page.inflated > 1024 + MAX_INFLATION * page.stored {
                return Err(format!("has a damaged page at byte {at}"));
            }
            self.values = self
                .values
                .checked_sub(page.values)
                .ok_or("holds far more values than its size allows, as a damaged file may say")?;
            at = at.saturating_add(length as u64).saturating_add(page.stored);
        }
        Ok(())
    }
}

/// What a page header says.
#[derive(Debug, Default, PartialEq)]
struct Page {
    inflated: u64,
    stored: u64,
    values: u64,
    encodings: Vec<i64>,
}

impl Page {
    /// The header at the beginning of `bytes`, and its length.
    fn read(bytes: &[u8]) -> Option<(Self, usize)> {
        let mut walk = Walk { bytes, at: 0 };
        let mut page = Self::default();
        walk.fields(|walk, id, kind| {
            match (id, kind) {
                (2, I32) => page.inflated = u64::try_from(walk.integer()?).ok()?,
                (3, I32) => page.stored = u64::try_from(walk.integer()?).ok()?,
                // Headers of data pages, of dictionary pages and of data pages of version 2.
                (5 | 7 | 8, STRUCT) => {
                    let encoding_id = if id == 8 { 4 } else { 2 };
                    walk.fields(|walk, id, kind| {
                        match (id, kind) {
                            (1, I32) => page.values += u64::try_from(walk.integer()?).ok()?,
                            (id, I32) if id == encoding_id => page.encodings.push(walk.integer()?),
                            _ => walk.skip(kind, 0)?,
                        }
                        Some(())
                    })?;
                }
                _ => walk.skip(kind, 0)?,
            }
            Some(())
        })?;
        Some((page, walk.at))
    }
}

const I32: u8 = 5;
const STRUCT: u8 = 12;

/// A place in bytes of Thrift's compact protocol. Every method gives `None` at what is not of it.
struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn advance(&mut self, bytes: u64) -> Option<()> {
        let at = self.at.checked_add(usize::try_from(bytes).ok()?)?;
        self.at = Some(at).filter(|at| *at <= self.bytes.len())?;
        Some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn integer(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Length of a list and kind of its elements.
    fn list(&mut self) -> Option<(u64, u8)> {
        let header = self.byte()?;
        let count = match header >> 4 {
            15 => self.varint()?,
            count => count.into(),
        };
        Some((count, header & 0x0F))
    }

    /// The fields of a struct: `visit` gets id and kind of each and must walk over its value.
    fn fields(&mut self, mut visit: impl FnMut(&mut Self, i64, u8) -> Option<()>) -> Option<()> {
        let mut id = 0;
        loop {
            let header = self.byte()?;
            let kind = header & 0x0F;
            if kind == 0 {
                return Some(());
            }
            id = match header >> 4 {
                0 => self.integer()?,
                delta => id + i64::from(delta),
            };
            visit(self, id, kind)?;
        }
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        match kind {
            1 | 2 => Some(()),
            3 => self.advance(1),
            4..=6 => self.varint().map(drop),
            7 => self.advance(8),
            8 => {
                let length = self.varint()?;
                self.advance(length)
            }
            9 | 10 => {
                let (count, kind) = self.list()?;
                self.skip_elements(count, &[kind], depth)
            }
            11 => match self.varint()? {
                0 => Some(()),
                count => {
                    let kinds = self.byte()?;
                    self.skip_elements(count, &[kinds >> 4, kinds & 0x0F], depth)
                }
            },
            STRUCT => {
                // Without a closure, which would be of a new type at each depth.
                loop {
                    let header = self.byte()?;
                    if header & 0x0F == 0 {
                        return Some(());
                    }
                    if header >> 4 == 0 {
                        self.varint()?;
                    }
                    self.skip(header & 0x0F, depth + 1)?;
                }
            }
            _ => None,
        }
    }

    fn skip_elements(&mut self, count: u64, kinds: &[u8], depth: usize) -> Option<()> {
        for _ in 0..count {
            for &kind in kinds {
                match kind {
                    // A bool takes a byte here, unlike as a field: nothing is skipped without advancing.
                    1 | 2 => self.advance(1)?,
                    kind => self.skip(kind, depth + 1)?,
                }
            }
        }
        Some(())
    }
}

#[cfg(test)]
#[path = "parquet_check_tests.rs"]
mod tests;
