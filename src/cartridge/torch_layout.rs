//! From an unpickled dict to layers: which tensors make a cartridge, and where their numbers lie.

use std::{
    collections::HashMap,
    io::{Read, Seek},
    rc::Rc,
};

use candle_core::{DType, Tensor};

use super::{
    CartridgeError, Intake, KvShape, Outline, Provenance,
    artifact::tensor_from_bytes,
    pickle_value::{Node, Pickle, TensorRef, Value, entry},
    torch_file::Records,
    torch_view::{check_view, copy_head, dims, element_type},
};
use crate::limits;

/// Tensors may share numbers (frozen and trainable tokens as two views of one storage do), but a
/// small file must not stand for a lot of memory: this often at most is each stored byte read into
/// a cartridge.
const MAX_SHARING: u64 = 4;

/// Where the numbers of a cartridge lie in a file.
pub(super) struct Layout {
    keys: Vec<Side>,
    values: Vec<Side>,
    frozen: u64,
    tokens: u64,
    heads: u64,
    head_dim: u64,
    dtype: DType,
}

/// Keys or values of one layer.
struct Side {
    frozen: Option<TensorRef>,
    trainable: TensorRef,
}

impl Side {
    fn parts(&self) -> impl Iterator<Item = &TensorRef> {
        self.frozen.iter().chain([&self.trainable])
    }
}

impl Layout {
    /// Both generations of names are read: `frozen_*`, and where that is absent or empty `fixed_*`.
    /// Keys this reader does not know are ignored, as the trainers ignore them.
    pub fn find(pickle: &Pickle) -> Result<Self, CartridgeError> {
        let Some(top) = pickle.dict(&pickle.root) else {
            return Err(CartridgeError::invalid("the top level of the file is not a dict"));
        };
        let list = |name: &str| match entry(top, name) {
            Some(value) => tensors(pickle, name, value).map(Some),
            None => Ok(None),
        };
        let side = |what: &str| -> Result<Vec<Side>, CartridgeError> {
            let name = format!("trainable_{what}");
            let trainable = list(&name)?
                .ok_or_else(|| CartridgeError::invalid(format!("it has no `{name}`")))?;
            let mut frozen = list(&format!("frozen_{what}"))?.unwrap_or_default();
            if frozen.is_empty() {
                frozen = list(&format!("fixed_{what}"))?.unwrap_or_default();
            }
            if !frozen.is_empty() && frozen.len() != trainable.len() {
                let (have, need) = (frozen.len(), trainable.len());
                let reason = format!("{have} layers of frozen {what}, but {need} of `{name}`");
                return Err(CartridgeError::invalid(reason));
            }
            let mut frozen = frozen.into_iter();
            let pair = |trainable| Side { frozen: frozen.next(), trainable };
            Ok(trainable.into_iter().map(pair).collect())
        };
        let (keys, values) = (side("keys")?, side("values")?);
        if keys.len() != values.len() {
            let reason = format!("{} layers of keys, {} of values", keys.len(), values.len());
            return Err(CartridgeError::invalid(reason));
        }
        Self::agree(keys, values)
    }

    /// All tensors must agree with the first one in type, heads and head size, and over layers in
    /// tokens.
    fn agree(keys: Vec<Side>, values: Vec<Side>) -> Result<Self, CartridgeError> {
        let invalid = |reason: String| Err(CartridgeError::invalid(reason));
        let Some(first) = keys.first() else {
            return invalid("it has no layers".to_owned());
        };
        let [_, heads, trained, head_dim] = dims(&first.trainable, "layer 0 keys")?;
        let frozen = match &first.frozen {
            Some(tensor) => dims(tensor, "layer 0 frozen keys")?[2],
            None => 0,
        };
        let dtype = element_type(&first.trainable, "layer 0 keys")?;
        for (what, sides) in [("keys", &keys), ("values", &values)] {
            for (i, side) in sides.iter().enumerate() {
                let counts = [side.frozen.as_ref().map(|_| frozen), Some(trained)];
                for (tensor, count) in side.parts().zip(counts.into_iter().flatten()) {
                    let place = format!("layer {i} {what}");
                    let (have, need) = (dims(tensor, &place)?, [1, heads, count, head_dim]);
                    if have != need {
                        return invalid(format!("{place}: shape {have:?}, expected {need:?}"));
                    }
                    let (have, need) = (element_type(tensor, &place)?, dtype);
                    if have != need {
                        return invalid(format!("{place}: type {have:?}, expected {need:?}"));
                    }
                }
                if side.frozen.is_none() && frozen > 0 {
                    return invalid(format!(
                        "layer {i} {what}: its {frozen} frozen tokens are missing"
                    ));
                }
            }
        }
        let tokens = frozen + trained;
        if tokens > limits::MAX_CARTRIDGE_TOKENS as u64 {
            let limit = limits::MAX_CARTRIDGE_TOKENS as u64;
            return Err(CartridgeError::too_large("tokens", tokens, limit));
        }
        if tokens == 0 || heads == 0 || head_dim == 0 {
            return invalid(format!("empty: {heads} heads, {tokens} tokens, head size {head_dim}"));
        }
        Ok(Self { keys, values, frozen, tokens, heads, head_dim, dtype })
    }

    /// Reads the numbers, once `intake` admits them.
    pub fn load<R: Read + Seek>(
        self,
        records: &mut Records<R>,
        intake: &mut Intake<'_>,
    ) -> Result<(), CartridgeError> {
        let mut storages = self.check_storages(records)?;
        intake.begin(self.outline(&storages), Provenance::default())?;
        for side in self.in_order() {
            intake.tensor(&self.tensor(side, &mut storages, records)?)?;
        }
        intake.end().map(drop)
    }

    /// Keys and values layer by layer, as they are read.
    fn in_order(&self) -> impl Iterator<Item = &Side> {
        self.keys.iter().zip(&self.values).flat_map(|(keys, values)| [keys, values])
    }

    /// All sizes were checked against bytes that are there, so they fit the address space.
    fn outline(&self, storages: &HashMap<Rc<str>, Storage>) -> Outline {
        let (kv_heads, head_dim) = (self.heads as usize, self.head_dim as usize);
        let shape = KvShape { layers: self.keys.len(), kv_heads, head_dim };
        let mut outline = Outline {
            shape,
            tokens: self.tokens as usize,
            frozen_tokens: self.frozen as usize,
            dtype: self.dtype,
            biases: vec![false; self.keys.len()],
            scratch_bytes: 0,
        };
        let layer = outline.bytes_as(self.dtype) / self.keys.len().max(1) as u64;
        outline.scratch_bytes = self.peak_of_storages(storages).saturating_sub(layer);
        outline
    }

    /// The most bytes of storages that [`Self::load`] has in memory at a time: each from its first
    /// use to its last.
    fn peak_of_storages(&self, storages: &HashMap<Rc<str>, Storage>) -> u64 {
        let mut uses = HashMap::<&str, usize>::new();
        let (mut now, mut peak) = (0u64, 0);
        for view in self.in_order().flat_map(Side::parts) {
            let Some(storage) = storages.get(&view.storage.key).filter(|_| view.size[2] > 0) else {
                continue;
            };
            let used = uses.entry(&view.storage.key).or_default();
            if *used == 0 {
                now = now.saturating_add(storage.bytes);
                peak = peak.max(now);
            }
            *used += 1;
            if *used == storage.uses {
                now -= storage.bytes;
            }
        }
        peak
    }

    /// Checks every view against the record it points into, and the sum of all against the file,
    /// before anything is allocated. Counts how often each storage is used.
    fn check_storages<R: Read + Seek>(
        &self,
        records: &mut Records<R>,
    ) -> Result<HashMap<Rc<str>, Storage>, CartridgeError> {
        let mut storages = HashMap::<Rc<str>, Storage>::new();
        let (mut stored, mut wanted) = (0u64, 0u64);
        for side in self.keys.iter().chain(&self.values) {
            for tensor in side.parts().filter(|tensor| !tensor.size.contains(&0)) {
                let key = &tensor.storage.key;
                let storage = match storages.get_mut(key) {
                    Some(storage) => storage,
                    None => {
                        let size = records.size(&record_name(key));
                        let bytes = size.ok_or_else(|| {
                            CartridgeError::invalid(format!(
                                "storage `{key}` is missing in the zip"
                            ))
                        })?;
                        stored = stored.saturating_add(bytes);
                        storages.entry(Rc::clone(key)).or_insert(Storage {
                            bytes,
                            uses: 0,
                            data: None,
                        })
                    }
                };
                storage.uses += 1;
                let bytes = check_view(tensor, self.dtype, storage.bytes)?;
                wanted = wanted.saturating_add(bytes);
            }
        }
        let limit = stored.saturating_mul(MAX_SHARING);
        if wanted > limit {
            return Err(CartridgeError::too_large(
                "bytes of tensors that share storages",
                wanted,
                limit,
            ));
        }
        Ok(storages)
    }

    /// `[heads, tokens, head_dim]`: for each head its frozen tokens, then its trainable ones.
    fn tensor<R: Read + Seek>(
        &self,
        side: &Side,
        storages: &mut HashMap<Rc<str>, Storage>,
        records: &mut Records<R>,
    ) -> Result<Tensor, CartridgeError> {
        let dims = [self.heads as usize, self.tokens as usize, self.head_dim as usize];
        let width = self.dtype.size_in_bytes();
        let row = dims[2] * width;
        tensor_from_bytes(self.dtype, &dims, |out| {
            let mut first_token = 0;
            for view in side.parts().filter(|view| view.size[2] > 0) {
                let missing = || CartridgeError::invalid("a storage is missing");
                let storage = storages.get_mut(&view.storage.key).ok_or_else(missing)?;
                let data = match storage.data.take() {
                    Some(data) => data,
                    None => records.read(&record_name(&view.storage.key))?,
                };
                let tokens = view.size[2] as usize;
                for head in 0..dims[0] {
                    let start = (head * dims[1] + first_token) * row;
                    copy_head(view, head, width, &data, &mut out[start..][..tokens * row]);
                }
                first_token += tokens;
                storage.uses -= 1;
                if storage.uses > 0 {
                    storage.data = Some(data);
                }
            }
            Ok(())
        })
    }
}

/// A record with numbers, kept in memory from its first use to its last.
struct Storage {
    bytes: u64,
    uses: usize,
    data: Option<Vec<u8>>,
}

fn record_name(key: &str) -> String {
    format!("data/{key}")
}

/// The tensors of a list, tuple or `ParameterList`, in the order of layers.
fn tensors(pickle: &Pickle, name: &str, value: &Value) -> Result<Vec<TensorRef>, CartridgeError> {
    let invalid = |reason: &str| CartridgeError::invalid(format!("`{name}` {reason}"));
    let items: Vec<&Value> = match pickle.node(value) {
        Some(Node::List(items) | Node::Tuple(items)) => items.iter().collect(),
        Some(Node::ParameterList(Some(state))) => {
            let state = pickle.dict(&Value::Node(*state)).unwrap_or_default();
            let parameters = entry(state, "_parameters").and_then(|value| pickle.dict(value));
            let parameters =
                parameters.ok_or_else(|| invalid("is a ParameterList without data"))?;
            numbered(parameters)
                .ok_or_else(|| invalid("has parameters not numbered 0, 1, 2, ..."))?
        }
        Some(Node::ParameterList(None)) => Vec::new(),
        _ => return Err(invalid("is neither a list nor a ParameterList")),
    };
    if items.len() > limits::MAX_CARTRIDGE_LAYERS {
        let (size, limit) = (items.len() as u64, limits::MAX_CARTRIDGE_LAYERS as u64);
        return Err(CartridgeError::too_large("layers", size, limit));
    }
    let tensor = |item: &&Value| match pickle.node(item) {
        Some(Node::Tensor(tensor)) => Ok(tensor.clone()),
        _ => Err(invalid("holds something that is no tensor")),
    };
    items.iter().map(tensor).collect()
}

/// Values of a dict with the keys "0", "1", ... in numerical order.
fn numbered(entries: &[(Value, Value)]) -> Option<Vec<&Value>> {
    let mut items = entries
        .iter()
        .map(|(key, value)| match key {
            Value::Text(text) => Some((text.parse::<usize>().ok()?, value)),
            _ => None,
        })
        .collect::<Option<Vec<_>>>()?;
    items.sort_by_key(|(number, _)| *number);
    let in_order = items.iter().enumerate().all(|(i, (number, _))| i == *number);
    in_order.then(|| items.into_iter().map(|(_, value)| value).collect())
}
