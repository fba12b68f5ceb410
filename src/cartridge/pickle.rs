//! A closed interpreter for the pickles torch writes.
//!
//! It builds lists, dicts and descriptions of tensors, knows a fixed list of Python names
//! ([`Global::find`]), and runs nothing: a pickle that asks for more is refused by name. Every
//! opcode handles a bounded amount of input and pushes at most one value, so the budgets on bytes
//! and opcodes bound memory and time; nothing recurses.

use std::collections::HashMap;

use super::{
    CartridgeError,
    pickle_value::{Global, Node, NodeId, Pickle, Value},
};
use crate::limits;

/// Newest pickle protocol understood. torch writes 2 unless told otherwise.
const MAX_PROTOCOL: u8 = 5;

/// Reads a whole pickle.
///
/// # Errors
/// [`CartridgeError::Forbidden`] for a Python name that is not on the list;
/// [`CartridgeError::TooLarge`] past [`limits::MAX_PICKLE_BYTES`] or
/// [`limits::MAX_PICKLE_OBJECTS`]; [`CartridgeError::Invalid`] with the byte offset for everything
/// else.
pub(super) fn parse(bytes: &[u8]) -> Result<Pickle, CartridgeError> {
    if bytes.len() as u64 > limits::MAX_PICKLE_BYTES {
        let size = bytes.len() as u64;
        return Err(CartridgeError::too_large("pickle bytes", size, limits::MAX_PICKLE_BYTES));
    }
    let mut machine = Machine { input: bytes, ..Machine::default() };
    for opcodes in 0.. {
        if opcodes > limits::MAX_PICKLE_OBJECTS {
            let limit = limits::MAX_PICKLE_OBJECTS as u64;
            return Err(CartridgeError::too_large("pickle opcodes", opcodes as u64, limit));
        }
        let offset = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => {
                return Ok(Pickle { nodes: machine.nodes, root });
            }
            Err(Fault::Refused(error)) => return Err(error),
            Err(Fault::Malformed(reason)) => {
                let reason = format!("pickle byte {offset}: {reason}");
                return Err(CartridgeError::invalid(reason));
            }
        }
    }
    Err(CartridgeError::invalid("pickle without end"))
}

pub(super) enum Fault {
    /// Wrong at the present offset.
    Malformed(String),
    Refused(CartridgeError),
}

impl From<&str> for Fault {
    fn from(reason: &str) -> Self {
        Self::Malformed(reason.to_owned())
    }
}

pub(super) type Step<T> = Result<T, Fault>;

#[derive(Default)]
pub(super) struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    pub stack: Vec<Value>,
    /// Stack heights at which MARK was called.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    pub nodes: Vec<Node>,
}

impl<'a> Machine<'a> {
    /// Runs one opcode; the result is there at STOP.
    fn step(&mut self) -> Step<Option<Value>> {
        let opcode = self.take(1)?[0];
        match opcode {
            0x80 => {
                let protocol = self.take(1)?[0];
                if protocol > MAX_PROTOCOL {
                    return Err(Fault::Malformed(format!("protocol {protocol} is unknown")));
                }
            }
            // FRAME announces how many bytes follow; only its own eight are read here.
            0x95 => {
                let length = u64::from_le_bytes(self.array()?);
                if length > self.rest() {
                    return Err("a frame longer than the pickle".into());
                }
            }
            b'.' => {
                return match (self.stack.pop(), self.stack.is_empty(), self.marks.is_empty()) {
                    (Some(root), true, true) => Ok(Some(root)),
                    _ => Err("STOP with a stack that does not hold exactly one value".into()),
                };
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.pop()?;
                self.stack.push(top.clone());
                self.stack.push(top);
            }
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(number.into()));
            }
            b'K' => {
                let number = self.take(1)?[0];
                self.stack.push(Value::Int(number.into()));
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(number.into()));
            }
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Float);
            }
            b'X' | 0x8c | 0x8d => {
                let length = self.length(opcode)?;
                let text = std::str::from_utf8(self.take(length)?);
                let text = text.map_err(|_| Fault::from("text that is not UTF-8"))?;
                self.stack.push(Value::Text(text.into()));
            }
            b'B' | b'C' | b'T' | b'U' | 0x8e => {
                let length = self.length(opcode)?;
                self.take(length)?;
                self.stack.push(Value::Bytes);
            }
            b'q' | b'r' | b'h' | b'j' | 0x94 => self.memo(opcode)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => self.global(&module, &name)?,
                _ => return Err("STACK_GLOBAL without two texts".into()),
            },
            b'}' => self.push_node(Node::Dict(Vec::new())),
            b']' => self.push_node(Node::List(Vec::new())),
            b')' => self.push_node(Node::Tuple(Vec::new())),
            0x8f => self.push_node(Node::Set),
            b't' | b'l' | 0x91 => {
                let items = self.pop_mark()?;
                self.push_node(match opcode {
                    b't' => Node::Tuple(items),
                    b'l' => Node::List(items),
                    _ => Node::Set,
                });
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let mut items = (0..count).map(|_| self.pop()).collect::<Step<Vec<_>>>()?;
                items.reverse();
                self.push_node(Node::Tuple(items));
            }
            b'a' | b'e' | 0x90 => {
                let items = if opcode == b'a' { vec![self.pop()?] } else { self.pop_mark()? };
                match (self.top_node()?, opcode) {
                    (Node::List(list), b'a' | b'e') => list.extend(items),
                    (Node::Set, 0x90) => {}
                    _ => return Err("items added to something that is no list or set".into()),
                }
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set_items(items)?;
            }
            b'Q' => self.persistent_id()?,
            b'R' => {
                let (arguments, callee) = (self.pop()?, self.pop()?);
                let result = self.call(&callee, &arguments)?;
                self.stack.push(result);
            }
            0x81 => match (self.pop()?, self.pop()?) {
                (arguments, Value::Global(Global::ParameterList))
                    if self.tuple(&arguments)?.is_empty() =>
                {
                    self.push_node(Node::ParameterList(None));
                }
                _ => return Err("NEWOBJ of something other than an empty ParameterList".into()),
            },
            b'b' => self.build()?,
            other => {
                let shown = char::from(other).escape_default();
                let reason =
                    format!("opcode 0x{other:02x} (`{shown}`) has no place in a cartridge");
                return Err(Fault::Malformed(reason));
            }
        }
        Ok(None)
    }

    // Input

    fn rest(&self) -> u64 {
        (self.input.len() - self.at) as u64
    }

    fn take(&mut self, count: usize) -> Step<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.input.len());
        let Some(end) = end else {
            return Err("the pickle ends in the middle of an opcode, or without STOP".into());
        };
        let taken = &self.input[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| Fault::from("the pickle is truncated"))
    }

    /// The length that precedes a text or byte string; its width depends on the opcode.
    fn length(&mut self, opcode: u8) -> Step<usize> {
        let length = match opcode {
            0x8c | b'C' | b'U' => u64::from(self.take(1)?[0]),
            0x8d | 0x8e => u64::from_le_bytes(self.array()?),
            _ => u64::from(u32::from_le_bytes(self.array()?)),
        };
        match usize::try_from(length) {
            Ok(length) if length as u64 <= self.rest() => Ok(length),
            _ => Err("a string longer than the pickle".into()),
        }
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.input[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\n');
        let end = end.ok_or_else(|| Fault::from("a name without its line end"))?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| "a name that is not UTF-8".into())
    }

    /// LONG1: a little-endian two's complement number of the given count of bytes.
    fn long(&mut self) -> Step<()> {
        let count = usize::from(self.take(1)?[0]);
        let bytes = self.take(count)?;
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut number = [if negative { 0xff } else { 0 }; 8];
        let Some(low) = number.get_mut(..count) else {
            return Err("an integer of more than 64 bits".into());
        };
        low.copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(number)));
        Ok(())
    }

    // Stack

    /// Pops a value, but never one that lies below the last mark.
    pub(super) fn pop(&mut self) -> Step<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(value) if self.stack.len() >= floor => Ok(value),
            _ => Err("a value is missing on the stack".into()),
        }
    }

    fn pop_mark(&mut self) -> Step<Vec<Value>> {
        let mark = self.marks.pop().ok_or_else(|| Fault::from("a mark is missing"))?;
        if mark > self.stack.len() {
            return Err("a mark above the stack".into());
        }
        Ok(self.stack.split_off(mark))
    }

    pub(super) fn push_node(&mut self, node: Node) {
        self.stack.push(Value::Node(self.nodes.len()));
        self.nodes.push(node);
    }

    pub(super) fn new_node(&mut self, node: Node) -> Value {
        self.nodes.push(node);
        Value::Node(self.nodes.len() - 1)
    }

    pub(super) fn node_id(&self, value: &Value) -> Option<NodeId> {
        match value {
            Value::Node(id) if *id < self.nodes.len() => Some(*id),
            _ => None,
        }
    }

    pub(super) fn top_node(&mut self) -> Step<&mut Node> {
        let id = self.stack.last().and_then(|top| self.node_id(top));
        id.and_then(|id| self.nodes.get_mut(id)).ok_or_else(|| "no container on the stack".into())
    }

    pub(super) fn tuple(&self, value: &Value) -> Step<&[Value]> {
        match self.node_id(value).map(|id| &self.nodes[id]) {
            Some(Node::Tuple(items)) => Ok(items),
            _ => Err("a tuple was expected".into()),
        }
    }

    fn set_items(&mut self, items: Vec<Value>) -> Step<()> {
        if !items.len().is_multiple_of(2) {
            return Err("a dict key without a value".into());
        }
        let Node::Dict(entries) = self.top_node()? else {
            return Err("items set on something that is no dict".into());
        };
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            entries.push((key, value));
        }
        Ok(())
    }

    fn memo(&mut self, opcode: u8) -> Step<()> {
        let index = match opcode {
            b'q' | b'h' => u32::from(self.take(1)?[0]),
            b'r' | b'j' => u32::from_le_bytes(self.array()?),
            _ => u32::try_from(self.memo.len()).map_err(|_| Fault::from("memo overflow"))?,
        };
        if matches!(opcode, b'h' | b'j') {
            let value = self.memo.get(&index).cloned();
            let value = value.ok_or_else(|| Fault::Malformed(format!("memo {index} is empty")))?;
            self.stack.push(value);
        } else {
            let top = self.stack.last().cloned();
            self.memo.insert(index, top.ok_or_else(|| Fault::from("nothing to memoise"))?);
        }
        Ok(())
    }
}
