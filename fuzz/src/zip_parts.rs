//! Zip files taken apart and put together again with right checksums, and where each field of them lies,
//! so that a mutation changes a field and nothing else.

use rand::RngExt;

use crate::mutate::{self, Random};

/// One stored record.
#[derive(Clone, Debug, Default)]
pub struct Record {
    pub name: Vec<u8>,
    pub data: Vec<u8>,
    /// Extra fields of the directory's entry.
    pub extra: Vec<u8>,
}

impl Record {
    pub fn new(name: &str, data: Vec<u8>) -> Self {
        Self { name: name.as_bytes().to_vec(), data, extra: Vec::new() }
    }
}

/// A place in the bytes of a zip.
pub type Field = std::ops::Range<usize>;

/// The checksum that zip files use.
pub fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut value, mut bit) = (i as u32, 0);
            while bit < 8 {
                value = if value & 1 == 1 { 0xEDB8_8320 ^ (value >> 1) } else { value >> 1 };
                bit += 1;
            }
            table[i] = value;
            i += 1;
        }
        table
    };
    let step = |crc: u32, byte: &u8| TABLE[((crc ^ u32::from(*byte)) & 0xFF) as usize] ^ (crc >> 8);
    !bytes.iter().fold(!0, step)
}

/// The records of an honest zip; `None` of another.
pub fn parse(bytes: &[u8]) -> Option<Vec<Record>> {
    let int = |at: usize, width: usize| -> Option<usize> {
        let field = bytes.get(at..at.checked_add(width)?)?;
        Some(field.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    let end = bytes.len().checked_sub(22)?;
    let end = (0..=end).rev().take(200).find(|at| bytes[*at..].starts_with(b"PK\x05\x06"))?;
    let (count, mut at) = (int(end + 10, 2)?, int(end + 16, 4)?);
    let mut records = Vec::new();
    for _ in 0..count.min(1000) {
        let (name, extra, comment) = (int(at + 28, 2)?, int(at + 30, 2)?, int(at + 32, 2)?);
        let (size, local) = (int(at + 20, 4)?, int(at + 42, 4)?);
        let start = local.checked_add(30 + int(local + 26, 2)? + int(local + 28, 2)?)?;
        records.push(Record {
            name: bytes.get(at + 46..at + 46 + name)?.to_vec(),
            data: bytes.get(start..start.checked_add(size)?)?.to_vec(),
            extra: bytes.get(at + 46 + name..at + 46 + name + extra)?.to_vec(),
        });
        at += 46 + name + extra + comment;
    }
    Some(records)
}

/// A zip of the records, and its fields.
pub fn build(records: &[Record]) -> (Vec<u8>, Vec<Field>) {
    let (mut out, mut directory, mut fields) = (Vec::new(), Vec::new(), Vec::new());
    let mut inner = Vec::new();
    for record in records {
        let (crc, size) = (crc32(&record.data), record.data.len() as u32);
        let (name, offset) = (record.name.len() as u16, out.len() as u32);
        let common = |out: &mut Vec<u8>, fields: &mut Vec<Field>| {
            // Version, flags, method, time, date.
            for value in [20u16, 0, 0, 0, 0x21] {
                put(out, fields, &value.to_le_bytes());
            }
            for value in [crc, size, size] {
                put(out, fields, &value.to_le_bytes());
            }
            put(out, fields, &name.to_le_bytes());
        };
        put(&mut out, &mut fields, b"PK\x03\x04");
        common(&mut out, &mut fields);
        put(&mut out, &mut fields, &[0; 2]);
        put(&mut out, &mut fields, &record.name);
        out.extend(&record.data);
        put(&mut directory, &mut inner, b"PK\x01\x02");
        put(&mut directory, &mut inner, &[20, 0]);
        common(&mut directory, &mut inner);
        let extra = record.extra.len() as u16;
        // Lengths of extra fields and comment, disk, attributes.
        for value in [extra, 0, 0, 0, 0, 0] {
            put(&mut directory, &mut inner, &value.to_le_bytes());
        }
        put(&mut directory, &mut inner, &offset.to_le_bytes());
        put(&mut directory, &mut inner, &record.name);
        put(&mut directory, &mut inner, &record.extra);
    }
    let (start, count) = (out.len() as u32, records.len() as u16);
    fields.extend(inner.into_iter().map(|f| f.start + out.len()..f.end + out.len()));
    let size = directory.len() as u32;
    out.extend(directory);
    put(&mut out, &mut fields, b"PK\x05\x06");
    for value in [0, 0, count, count] {
        put(&mut out, &mut fields, &value.to_le_bytes());
    }
    put(&mut out, &mut fields, &size.to_le_bytes());
    put(&mut out, &mut fields, &start.to_le_bytes());
    put(&mut out, &mut fields, &[0; 2]);
    (out, fields)
}

fn put(out: &mut Vec<u8>, fields: &mut Vec<Field>, bytes: &[u8]) {
    fields.push(out.len()..out.len() + bytes.len());
    out.extend(bytes);
}

/// The end records of zip64, with their fields, between a directory and its end record.
fn zip64_end(zip: &mut Vec<u8>, fields: &mut Vec<Field>) {
    let Some(end) = zip.len().checked_sub(22) else { return };
    let end = zip.split_off(end);
    fields.retain(|field| field.end <= zip.len());
    let wide = |from: &[u8]| [from, &[0; 8][from.len()..]].concat();
    let at = zip.len() as u64;
    put(zip, fields, b"PK\x06\x06");
    put(zip, fields, &44u64.to_le_bytes());
    put(zip, fields, &[45, 0, 45, 0]);
    put(zip, fields, &[0; 8]);
    for from in [&end[8..10], &end[10..12], &end[12..16], &end[16..20]] {
        put(zip, fields, &wide(from));
    }
    put(zip, fields, b"PK\x06\x07");
    put(zip, fields, &[0; 4]);
    put(zip, fields, &at.to_le_bytes());
    put(zip, fields, &1u32.to_le_bytes());
    put(zip, fields, b"PK\x05\x06\0\0\0\0");
    put(zip, fields, &[0xff; 12]);
    put(zip, fields, &[0; 2]);
}

const NAMES: [&str; 12] = [
    "x/data.pkl",
    "x/../data.pkl",
    "/etc/passwd",
    "x\\data.pkl",
    "x/data/0",
    "x/data/00",
    "x/byteorder",
    "y/version",
    "",
    "x/",
    "x/data.pkl\0",
    "é/data.pkl",
];

/// One change of the records or fields of a zip; those that cannot be taken apart are changed blindly.
pub fn mutate(zip: &mut Vec<u8>, random: &mut Random) {
    let parsed = if random.random_range(0..6) == 0 { None } else { parse(zip) };
    let Some(mut records) = parsed.filter(|records| !records.is_empty()) else {
        return mutate::bytes(zip, random);
    };
    let at = random.random_range(0..records.len());
    match random.random_range(0..14) {
        0 => drop(records.remove(at)),
        1 => {
            let copied = records[at].clone();
            records.push(copied);
        }
        2 => {
            let name = NAMES[random.random_range(0..NAMES.len())];
            records[at].name = name.as_bytes().to_vec();
        }
        3 => {
            let other = random.random_range(0..records.len());
            records.swap(at, other);
        }
        4 => mutate::bytes(&mut records[at].data, random),
        5 => mutate::bytes(&mut records[at].name, random),
        // An extra field, of zip64 for instance.
        6 => {
            let kind = [1u16, 0x7075, 0x9901, 0xFFFF][random.random_range(0..4)];
            let body: Vec<u8> = (0..3).flat_map(|_| mutate::number(random).to_le_bytes()).collect();
            let length = if random.random() { body.len() as u16 } else { random.random() };
            records[at].extra = [&kind.to_le_bytes()[..], &length.to_le_bytes(), &body].concat();
        }
        _ => {}
    }
    let (mut out, mut fields) = build(&records);
    if random.random_range(0..5) == 0 {
        zip64_end(&mut out, &mut fields);
    }
    for _ in 0..random.random_range(0..3) {
        let field = fields[random.random_range(0..fields.len())].clone();
        match random.random_range(0..4) {
            // The value of another field: a size for an offset, an offset for another one.
            0 => {
                let other = fields[random.random_range(0..fields.len())].clone();
                let width = field.len().min(other.len());
                out.copy_within(other.start..other.start + width, field.start);
            }
            1 if !field.is_empty() => out[field.start] ^= 1 << random.random_range(0..8),
            _ => {
                let width = field.len().min(8);
                let number = mutate::number(random).to_le_bytes();
                out[field.start..field.start + width].copy_from_slice(&number[..width]);
            }
        }
    }
    match random.random_range(0..12) {
        0 => out.splice(0..0, *b"prefix").for_each(drop),
        1 => out.extend(b"PK\x05\x06 a comment"),
        _ => {}
    }
    out.truncate(64 << 10);
    *zip = out;
}
