//! What the closed pickle interpreter can build, and the list of Python names it knows.

use std::rc::Rc;

use super::{CartridgeError, error::UNNAMED};

/// Index of a [`Node`] in [`Pickle::nodes`].
pub(super) type NodeId = usize;

/// A value on the pickle stack. Containers live in an arena and are named by index, so that they
/// can be shared and changed after they were stored (as pickle does), and so that neither building
/// nor dropping a deeply nested file recurses.
#[derive(Debug, Clone)]
pub(super) enum Value {
    None,
    Bool,
    Int(i64),
    /// Its digits never matter to us.
    Float,
    Text(Rc<str>),
    /// Byte strings never matter to us.
    Bytes,
    Global(Global),
    Node(NodeId),
}

#[derive(Debug)]
pub(super) enum Node {
    Tuple(Vec<Value>),
    List(Vec<Value>),
    /// A dict or OrderedDict, in the order written; of equal keys the last one counts.
    Dict(Vec<(Value, Value)>),
    /// Sets only occur in the bookkeeping of torch modules.
    Set,
    /// `torch.nn.ParameterList`, with the state BUILD gave it.
    ParameterList(Option<NodeId>),
    Storage(StorageRef),
    Tensor(TensorRef),
}

/// One record of numbers in the zip file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StorageRef {
    pub element: Element,
    pub key: Rc<str>,
    /// Elements of the type above (bytes for an untyped storage).
    pub len: u64,
}

/// A strided view of a storage. Offset and strides count elements.
#[derive(Debug, Clone)]
pub(super) struct TensorRef {
    pub storage: StorageRef,
    pub element: Element,
    pub offset: u64,
    pub size: Vec<u64>,
    pub stride: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F16,
    BF16,
    F32,
    /// A storage of plain bytes; tensors on it carry their own type.
    Untyped,
    /// A number type no cartridge uses. Tensors of it may occur under keys that are ignored.
    Other(&'static str),
}

/// The Python names a cartridge file may mention. Everything else ends the reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    Set,
    Size,
    ParameterList,
    RebuildParameter,
    RebuildParameterWithState,
    RebuildTensorV2,
    RebuildTensorV3,
    /// `torch.FloatStorage` and its like.
    Storage(Element),
    /// `torch.float32` and its like.
    Dtype(Element),
}

impl Global {
    /// # Errors
    /// [`CartridgeError::Forbidden`] for a name that is not on the list.
    pub fn find(module: &str, name: &str) -> Result<Self, CartridgeError> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("__builtin__" | "builtins", "set") => Self::Set,
            ("torch", "Size") => Self::Size,
            ("torch.nn.modules.container", "ParameterList") => Self::ParameterList,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch._utils", "_rebuild_parameter_with_state") => Self::RebuildParameterWithState,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensorV2,
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensorV3,
            ("torch", "HalfStorage") => Self::Storage(Element::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Element::BF16),
            ("torch", "FloatStorage") => Self::Storage(Element::F32),
            ("torch", "DoubleStorage") => Self::Storage(Element::Other("float64")),
            ("torch", "LongStorage") => Self::Storage(Element::Other("int64")),
            ("torch", "IntStorage") => Self::Storage(Element::Other("int32")),
            ("torch", "ShortStorage") => Self::Storage(Element::Other("int16")),
            ("torch", "CharStorage") => Self::Storage(Element::Other("int8")),
            ("torch", "ByteStorage") => Self::Storage(Element::Other("uint8")),
            ("torch", "BoolStorage") => Self::Storage(Element::Other("bool")),
            ("torch.storage" | "torch", "UntypedStorage") => Self::Storage(Element::Untyped),
            ("torch", "float16") => Self::Dtype(Element::F16),
            ("torch", "bfloat16") => Self::Dtype(Element::BF16),
            ("torch", "float32") => Self::Dtype(Element::F32),
            ("torch", "float64") => Self::Dtype(Element::Other("float64")),
            ("torch", "int64") => Self::Dtype(Element::Other("int64")),
            ("torch", "uint16") => Self::Dtype(Element::Other("uint16")),
            ("torch", "uint32") => Self::Dtype(Element::Other("uint32")),
            ("torch", "uint64") => Self::Dtype(Element::Other("uint64")),
            _ => {
                let global: String = format!("{module}.{name}").chars().take(200).collect();
                return Err(CartridgeError::Forbidden { name: UNNAMED.to_owned(), global });
            }
        })
    }
}

/// A pickle that was read to its end.
#[derive(Debug)]
pub(super) struct Pickle {
    pub nodes: Vec<Node>,
    pub root: Value,
}

impl Pickle {
    /// The node a value stands for.
    pub fn node(&self, value: &Value) -> Option<&Node> {
        match value {
            Value::Node(id) => self.nodes.get(*id),
            _ => None,
        }
    }

    /// The entries of a dict.
    pub fn dict(&self, value: &Value) -> Option<&[(Value, Value)]> {
        match self.node(value)? {
            Node::Dict(entries) => Some(entries),
            _ => None,
        }
    }
}

/// The entry of a dict with this text as its key; the last one where a file has several, as in
/// Python.
pub(super) fn entry<'a>(entries: &'a [(Value, Value)], name: &str) -> Option<&'a Value> {
    let named = |(key, _): &&(Value, Value)| matches!(key, Value::Text(text) if **text == *name);
    entries.iter().rev().find(named).map(|(_, value)| value)
}
