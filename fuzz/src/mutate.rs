//! Mutations that know the shape of what they change, and blind ones.

use rand::{RngExt, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

/// Seeded: a run can be repeated.
pub type Random = ChaCha8Rng;

/// Sizes at which arithmetic goes wrong.
pub const NUMBERS: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    63,
    64,
    127,
    128,
    255,
    256,
    0x7FFF,
    0xFFFF,
    0x1_0000,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    0x1_0000_0000,
    1 << 53,
    i64::MAX as u64,
    u64::MAX,
];

/// Larger inputs are cut: time is better spent on many than on long ones.
const MAX_BYTES: usize = 64 << 10;

/// One of [`NUMBERS`], a neighbour of one, or a small one.
pub fn number(random: &mut Random) -> u64 {
    let near = NUMBERS.choose(random).copied().unwrap_or(0);
    match random.random_range(0..4) {
        0 => near.wrapping_sub(1),
        1 => near.wrapping_add(1),
        2 => near,
        _ => random.random_range(0..40),
    }
}

/// A part of `0..len`, mostly a short one.
pub fn part(len: usize, random: &mut Random) -> std::ops::Range<usize> {
    if len == 0 {
        return 0..0;
    }
    let start = random.random_range(0..len);
    let most = if random.random_range(0..8) == 0 { len - start } else { 8.min(len - start) };
    start..start + random.random_range(0..=most)
}

/// One blind change.
pub fn bytes(data: &mut Vec<u8>, random: &mut Random) {
    if data.is_empty() {
        data.push(random.random());
        return;
    }
    let at = random.random_range(0..data.len());
    match random.random_range(0..9) {
        0 | 1 => data[at] ^= 1 << random.random_range(0..8),
        2 => data[at] = random.random(),
        3 => drop(data.drain(part(data.len(), random))),
        4 => {
            let copied = data[part(data.len(), random)].to_vec();
            data.splice(at..at, copied);
        }
        5 => data.insert(at, random.random()),
        6 => data.truncate(at),
        7 => {
            let other = part(data.len(), random);
            let copied = data[other].to_vec();
            let end = (at + copied.len()).min(data.len());
            data[at..end].copy_from_slice(&copied[..end - at]);
        }
        _ => {
            let width = [2, 4, 8][random.random_range(0..3)];
            let number = number(random).to_le_bytes();
            let end = (at + width).min(data.len());
            data[at..end].copy_from_slice(&number[..end - at]);
        }
    }
    data.truncate(MAX_BYTES);
}

/// One change of a text: words of its language come and go, parts are repeated.
pub fn text(data: &mut Vec<u8>, words: &[&str], random: &mut Random) {
    let at = if data.is_empty() { 0 } else { random.random_range(0..=data.len()) };
    match random.random_range(0..8) {
        0..3 => {
            let word = words.choose(random).copied().unwrap_or_default();
            data.splice(at..at, word.bytes());
        }
        3 => {
            let copied = data[part(data.len(), random)].to_vec();
            data.splice(at..at, copied);
        }
        4 => {
            let copied = data[part(data.len(), random)].repeat(random.random_range(2..50));
            data.splice(at..at, copied);
        }
        5 => {
            let replaced = part(data.len(), random);
            let word = words.choose(random).copied().unwrap_or_default();
            data.splice(replaced, word.bytes());
        }
        6 => drop(data.drain(part(data.len(), random))),
        _ => bytes(data, random),
    }
    data.truncate(MAX_BYTES);
}

/// One change of a JSON text: of a value, of its members, or of its bytes. `keys` are member names that mean
/// something.
pub fn json(data: &mut Vec<u8>, keys: &[&str], random: &mut Random) {
    let parsed = serde_json::from_slice::<Value>(data);
    let Ok(mut value) = parsed else { return bytes(data, random) };
    match random.random_range(0..12) {
        0 => return bytes(data, random),
        // What no writer of JSON would make.
        1 => {
            const ODD: [&str; 10] = [
                "\"\\ud800\"",
                "1e400",
                "-0",
                "\"\\u0000\"",
                "{\"a\":1,\"a\":2}",
                "99999999999999999999999",
                "NaN",
                "\u{feff}",
                "[[[[[[[[[[[[[[[[",
                "/**/",
            ];
            let at = random.random_range(0..=data.len());
            let odd = ODD.choose(random).copied().unwrap_or_default();
            data.splice(at..at, odd.bytes());
            return data.truncate(MAX_BYTES);
        }
        _ => json_value(&mut value, keys, random),
    }
    *data = value.to_string().into_bytes();
    if data.len() > MAX_BYTES {
        // Cut text is no JSON; a plain one is where the next change starts from.
        *data = b"{}".to_vec();
    }
}

/// One change somewhere inside of a value.
pub fn json_value(value: &mut Value, keys: &[&str], random: &mut Random) {
    let enter = random.random_range(0..4) != 0;
    match value {
        Value::Array(list) if enter && !list.is_empty() => {
            let at = random.random_range(0..list.len());
            json_value(&mut list[at], keys, random);
        }
        Value::Object(map) if enter && !map.is_empty() => {
            let at = random.random_range(0..map.len());
            if let Some(inner) = map.values_mut().nth(at) {
                json_value(inner, keys, random);
            }
        }
        Value::Array(list) => change_list(list, keys, random),
        Value::Object(map) => change_members(map, keys, random),
        other => match random.random_range(0..3) {
            0 => change_scalar(other, random),
            1 => *other = odd_value(random),
            _ => {
                let inner = other.take();
                *other = if random.random() { json!([inner]) } else { json!({"a": inner}) };
            }
        },
    }
}

fn change_list(list: &mut Vec<Value>, keys: &[&str], random: &mut Random) {
    match random.random_range(0..5) {
        0 => list.push(odd_value(random)),
        1 => drop(list.pop()),
        2 if !list.is_empty() => {
            let at = random.random_range(0..list.len());
            let copies = [1, 2, 20, 300][random.random_range(0..4)];
            let copied = list[at].clone();
            if copied.to_string().len() * copies < MAX_BYTES / 4 {
                list.extend(vec![copied; copies]);
            }
        }
        3 => list.reverse(),
        _ => {
            let mut object = Map::new();
            change_members(&mut object, keys, random);
            list.push(Value::Object(object));
        }
    }
}

fn change_members(map: &mut Map<String, Value>, keys: &[&str], random: &mut Random) {
    match random.random_range(0..4) {
        0 if !map.is_empty() => {
            let at = random.random_range(0..map.len());
            let key = map.keys().nth(at).cloned().unwrap_or_default();
            let value = map.remove(&key).unwrap_or_default();
            if random.random() {
                map.insert(keys.choose(random).copied().unwrap_or("a").to_owned(), value);
            }
        }
        1 => {
            let key = ["", "\u{0}", "é\r\n", "__proto__", "0"][random.random_range(0..5)];
            map.insert(key.to_owned(), odd_value(random));
        }
        _ => {
            let key = keys.choose(random).copied().unwrap_or("a");
            map.insert(key.to_owned(), odd_value(random));
        }
    }
}

fn change_scalar(value: &mut Value, random: &mut Random) {
    *value = match value {
        Value::Bool(flag) => Value::Bool(!*flag),
        Value::Number(n) => {
            let n = n.as_f64().unwrap_or(0.0);
            let changed = [n + 1.0, n - 1.0, -n, n * 1000.0, n / 3.0][random.random_range(0..5)];
            if changed.fract() == 0.0 { json!(changed as i64) } else { json!(changed) }
        }
        Value::String(text) => {
            let mut data = std::mem::take(text).into_bytes();
            bytes(&mut data, random);
            Value::String(String::from_utf8_lossy(&data).into_owned())
        }
        _ => odd_value(random),
    };
}

fn odd_value(random: &mut Random) -> Value {
    match random.random_range(0..16) {
        0 => Value::Null,
        1 => json!(random.random::<bool>()),
        2 | 3 => json!(number(random)),
        4 => json!(-(random.random_range(0..i64::MAX))),
        5 => json!([0.0, -0.0, 0.5, 1e-300, 1e308, -1.5][random.random_range(0..6)]),
        6 => json!(""),
        7 => json!("\u{0}\u{FFFD}😀\r\n\u{202e}\u{7f}"),
        8 => json!("x".repeat([1, 100, 1025, 5000][random.random_range(0..4)])),
        9 => json!([]),
        10 => json!({}),
        11 => json!(vec![number(random); random.random_range(1..20)]),
        12 => {
            let deep = [3, 100, 126, 128][random.random_range(0..4)];
            (0..deep).fold(json!(1), |inner, i| {
                if i % 2 == 0 { json!([inner]) } else { json!({ "a": inner }) }
            })
        }
        13 => json!("../../etc/passwd"),
        14 => json!("{{ messages }}{% for x in y %}<cartridge>{\"id\":\"a\"}</cartridge>"),
        _ => json!(vec!["x"; random.random_range(0..40)]),
    }
}
