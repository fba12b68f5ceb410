//! What the pickle interpreter makes of the names and calls it admits: storages, tensors, parameter
//! lists.

use std::rc::Rc;

use super::{
    pickle::{Fault, Machine, Step},
    pickle_value::{Element, Global, Node, StorageRef, TensorRef, Value},
};

/// Dimensions of a tensor; cartridges have 4.
const MAX_DIMS: usize = 16;

impl Machine<'_> {
    pub(super) fn global(&mut self, module: &str, name: &str) -> Step<()> {
        let global = Global::find(module, name).map_err(Fault::Refused)?;
        self.stack.push(Value::Global(global));
        Ok(())
    }

    pub(super) fn persistent_id(&mut self) -> Step<()> {
        let id = self.pop()?;
        let [Value::Text(kind), Value::Global(Global::Storage(element)), Value::Text(key), _, len] =
            self.tuple(&id)?
        else {
            return Err("a persistent id that is no storage".into());
        };
        if **kind != *"storage" {
            return Err("a persistent id that is no storage".into());
        }
        let storage = StorageRef { element: *element, key: Rc::clone(key), len: natural(len)? };
        self.push_node(Node::Storage(storage));
        Ok(())
    }

    /// The few calls that occur in a cartridge. Each makes data, none has a side effect.
    pub(super) fn call(&mut self, callee: &Value, arguments: &Value) -> Step<Value> {
        let Value::Global(callee) = callee else {
            return Err("a call of something that is no known function".into());
        };
        let arguments = self.tuple(arguments)?;
        match (callee, arguments) {
            (Global::OrderedDict, []) => Ok(self.new_node(Node::Dict(Vec::new()))),
            (Global::Set, [] | [_]) => Ok(self.new_node(Node::Set)),
            (Global::Size, [size]) => Ok(size.clone()),
            (Global::RebuildParameter, [tensor, _, _])
            | (Global::RebuildParameterWithState, [tensor, _, _, _]) => {
                match self.node_id(tensor).map(|id| &self.nodes[id]) {
                    Some(Node::Tensor(_)) => Ok(tensor.clone()),
                    _ => Err("a Parameter around something that is no tensor".into()),
                }
            }
            (Global::RebuildTensorV2, [storage, offset, size, stride, _, _])
            | (Global::RebuildTensorV2, [storage, offset, size, stride, _, _, _]) => {
                let tensor = self.tensor([storage, offset, size, stride], None)?;
                Ok(self.new_node(Node::Tensor(tensor)))
            }
            (Global::RebuildTensorV3, [storage, offset, size, stride, _, _, dtype])
            | (Global::RebuildTensorV3, [storage, offset, size, stride, _, _, dtype, _]) => {
                let Value::Global(Global::Dtype(element)) = dtype else {
                    return Err("a tensor without a number type".into());
                };
                let tensor = self.tensor([storage, offset, size, stride], Some(*element))?;
                Ok(self.new_node(Node::Tensor(tensor)))
            }
            _ => Err(Fault::Malformed(format!("{callee:?} called with unexpected arguments"))),
        }
    }

    fn tensor(&self, parts: [&Value; 4], element: Option<Element>) -> Step<TensorRef> {
        let [storage, offset, size, stride] = parts;
        let Some(Node::Storage(storage)) = self.node_id(storage).map(|id| &self.nodes[id]) else {
            return Err("a tensor without a storage".into());
        };
        let list = |value| -> Step<Vec<u64>> {
            let items = self.tuple(value)?;
            if items.len() > MAX_DIMS {
                return Err("a tensor of too many dimensions".into());
            }
            items.iter().map(natural).collect()
        };
        let (size, stride) = (list(size)?, list(stride)?);
        if size.len() != stride.len() {
            return Err("a tensor with as many sizes as strides was expected".into());
        }
        let element = element.unwrap_or(storage.element);
        Ok(TensorRef { storage: storage.clone(), element, offset: natural(offset)?, size, stride })
    }

    /// BUILD: gives a ParameterList its attributes. On an OrderedDict (torch hangs `_metadata`
    /// there) the attributes are dropped.
    pub(super) fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let state = self.node_id(&state).filter(|id| matches!(self.nodes[*id], Node::Dict(_)));
        match (self.top_node()?, state) {
            (Node::ParameterList(slot), Some(state)) => *slot = Some(state),
            (Node::Dict(_), Some(_)) => {}
            _ => return Err("BUILD on something other than a ParameterList".into()),
        }
        Ok(())
    }
}

/// A size, offset or stride.
fn natural(value: &Value) -> Step<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number)
            .map_err(|_| Fault::Malformed(format!("negative size, offset or stride {number}"))),
        _ => Err("a whole number was expected".into()),
    }
}
