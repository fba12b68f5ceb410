//! Pickles as lists of opcodes, so that a mutation changes an instruction and not half of one.

use rand::{RngExt, seq::IndexedRandom};

use crate::mutate::{self, Random};

/// One opcode and what follows it.
#[derive(Clone, Debug)]
pub struct Op {
    pub code: u8,
    pub argument: Vec<u8>,
}

/// All names that the reader knows, and some that it must not.
pub const NAMES: [(&str, &str); 36] = [
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("__builtin__", "set"),
    ("torch", "Size"),
    ("torch.nn.modules.container", "ParameterList"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch", "HalfStorage"),
    ("torch", "BFloat16Storage"),
    ("torch", "FloatStorage"),
    ("torch", "DoubleStorage"),
    ("torch", "LongStorage"),
    ("torch", "IntStorage"),
    ("torch", "ShortStorage"),
    ("torch", "CharStorage"),
    ("torch", "ByteStorage"),
    ("torch", "BoolStorage"),
    ("torch", "UntypedStorage"),
    ("torch.storage", "UntypedStorage"),
    ("torch", "float16"),
    ("torch", "bfloat16"),
    ("torch", "float32"),
    ("torch", "float64"),
    ("torch", "int64"),
    ("torch", "uint16"),
    ("torch", "uint32"),
    ("torch", "uint64"),
    ("posix", "system"),
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "__import__"),
    ("torch", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("collections.OrderedDict", ""),
];
/// How many of [`NAMES`] a cartridge may mention: the first ones.
pub const KNOWN: usize = 29;

const CODES: &[u8] = b"\x80\x95.(012N\x88\x89JKM\x8aGX\x8c\x8dBCTU\x8eqrhj\x94c\x93}])\x8ftl\x91\x85\x86\x87ae\x90suQR\x81bioIFLSVgpPd\x82\x83\x84\x8b\x92\x96\x97\x98";

/// Where the argument of an opcode ends in `rest`.
fn argument(code: u8, rest: &[u8]) -> usize {
    let length = |width: usize| {
        let mut bytes = [0; 8];
        let have = width.min(rest.len());
        bytes[..have].copy_from_slice(&rest[..have]);
        width.saturating_add(usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(usize::MAX))
    };
    let line = |from: usize| {
        let tail = rest.get(from..).unwrap_or_default();
        from + tail.iter().position(|b| *b == b'\n').map_or(tail.len(), |at| at + 1)
    };
    let end = match code {
        0x80 | b'K' | b'q' | b'h' => 1,
        b'M' => 2,
        b'J' | b'r' | b'j' => 4,
        b'G' | 0x95 => 8,
        0x8a | 0x8c | b'C' | b'U' => length(1),
        b'X' | b'B' | b'T' => length(4),
        0x8d | 0x8e => length(8),
        b'c' => line(line(0)),
        _ => 0,
    };
    end.min(rest.len())
}

/// Splits a pickle into opcodes; bytes that are none stand as one without an argument.
pub fn split(pickle: &[u8]) -> Vec<Op> {
    let (mut ops, mut at) = (Vec::new(), 0);
    while let Some((&code, rest)) = pickle.get(at..).and_then(<[u8]>::split_first) {
        let end = argument(code, rest);
        ops.push(Op { code, argument: rest[..end].to_vec() });
        at += 1 + end;
    }
    ops
}

pub fn join(ops: &[Op]) -> Vec<u8> {
    ops.iter().flat_map(|op| [&[op.code], &op.argument[..]].concat()).collect()
}

/// The module and name of every GLOBAL.
pub fn globals(ops: &[Op]) -> impl Iterator<Item = (String, String)> {
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or(b"")).into_owned();
    ops.iter().filter(|op| op.code == b'c').map(move |op| {
        let mut lines = op.argument.split(|b| *b == b'\n');
        (text(lines.next()), text(lines.next()))
    })
}

fn global(random: &mut Random) -> Vec<u8> {
    let (module, name) = NAMES.choose(random).copied().unwrap_or_default();
    format!("{module}\n{name}\n").into_bytes()
}

fn random_op(random: &mut Random) -> Op {
    let code = CODES.choose(random).copied().unwrap_or(b'N');
    let number = mutate::number(random).to_le_bytes();
    let text = ["", "0", "storage", "trainable_keys", "_parameters", "x\u{0}"];
    let text = text.choose(random).copied().unwrap_or_default().as_bytes();
    let with_length = |width: usize| [&(text.len() as u64).to_le_bytes()[..width], text].concat();
    let argument = match code {
        0x80 | b'K' | b'q' | b'h' => number[..1].to_vec(),
        b'M' => number[..2].to_vec(),
        b'J' | b'r' | b'j' => number[..4].to_vec(),
        b'G' | 0x95 => number.to_vec(),
        0x8a => [&[8], &number[..]].concat(),
        0x8c | b'C' | b'U' => with_length(1),
        b'X' | b'B' | b'T' => with_length(4),
        0x8d | 0x8e => with_length(8),
        b'c' => global(random),
        _ => Vec::new(),
    };
    Op { code, argument }
}

/// One change of a pickle.
pub fn mutate(pickle: &mut Vec<u8>, random: &mut Random) {
    if random.random_range(0..6) == 0 {
        return mutate::bytes(pickle, random);
    }
    let mut ops = split(pickle);
    if ops.is_empty() {
        ops.push(random_op(random));
    }
    let at = random.random_range(0..ops.len());
    match random.random_range(0..9) {
        0 => drop(ops.remove(at)),
        1 => ops.insert(at, random_op(random)),
        2 => ops[at] = random_op(random),
        3 => {
            let part = mutate::part(ops.len(), random);
            let copied = ops[part].to_vec();
            ops.splice(at..at, copied);
        }
        4 => {
            let other = random.random_range(0..ops.len());
            ops.swap(at, other);
        }
        5 => drop(ops.drain(mutate::part(ops.len(), random))),
        // An argument of an opcode that has one: numbers become others, names other names.
        _ => {
            let with: Vec<usize> =
                (0..ops.len()).filter(|i| !ops[*i].argument.is_empty()).collect();
            if let Some(op) = with.choose(random).and_then(|i| ops.get_mut(*i)) {
                match op.code {
                    b'c' => op.argument = global(random),
                    b'K' | b'M' | b'J' | b'r' | b'j' | b'q' | b'h' | 0x95 => {
                        let number = mutate::number(random).to_le_bytes();
                        let width = op.argument.len().min(8);
                        op.argument[..width].copy_from_slice(&number[..width]);
                    }
                    _ => mutate::bytes(&mut op.argument, random),
                }
            }
        }
    }
    *pickle = join(&ops);
    pickle.truncate(32 << 10);
}
