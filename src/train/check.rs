//! Refuses a pack or a prefix that the model cannot compute, before anything is.

use candle_core::DType;

use super::{Pack, PrefixLayer, TrainError};
use crate::model::ModelConfig;

/// Sequences must cover the tokens, ids be in the vocabulary, and targets name rows of the pack.
pub(super) fn check_pack(pack: &Pack, config: &ModelConfig) -> Result<(), TrainError> {
    let refuse = |reason| Err(TrainError::Pack { reason });
    let (tokens, ends, targets) = (pack.tokens.len(), &pack.cu_seqlens, &pack.targets);
    if ends.first() != Some(&0) || ends.last().is_none_or(|end| *end as usize != tokens) {
        return refuse(format!("cu_seqlens does not go from 0 to its {tokens} tokens"));
    }
    if let Some(i) = ends.windows(2).position(|ends| ends[0] >= ends[1]) {
        return refuse(format!("sequence {i} of cu_seqlens has no token"));
    }
    let outside = |id: &&u32| **id as usize >= config.vocab_size;
    if let Some(id) = pack.tokens.iter().find(outside) {
        return refuse(format!("token id {id} is outside the vocabulary of {}", config.vocab_size));
    }
    if let Some(id) = targets.ids.iter().find(outside) {
        return refuse(format!(
            "target id {id} is outside the vocabulary of {}",
            config.vocab_size
        ));
    }
    if targets.is_empty() {
        return refuse("it has no target, so its loss is not defined".to_owned());
    }
    if targets.ids.len() != targets.len() || targets.probs.len() != targets.len() {
        return refuse(format!(
            "targets have {} rows, {} ids and {} probabilities",
            targets.len(),
            targets.ids.len(),
            targets.probs.len()
        ));
    }
    if !targets.rows.is_sorted() {
        return refuse("the rows of its targets do not ascend".to_owned());
    }
    match targets.rows.last() {
        Some(row) if *row as usize >= tokens => {
            refuse(format!("a target names row {row} of {tokens}"))
        }
        _ => Ok(()),
    }
}

/// One layer of keys and values for each of the model's, or none at all. Returns the prefix's tokens.
pub(super) fn check_prefix(
    prefix: &[PrefixLayer],
    config: &ModelConfig,
) -> Result<usize, TrainError> {
    let refuse = |reason| Err(TrainError::Prefix { reason });
    let Some(first) = prefix.first() else { return Ok(0) };
    if prefix.len() != config.layers {
        return refuse(format!("{} layers for the model's {}", prefix.len(), config.layers));
    }
    let tokens = first.keys.dims().get(1).copied().unwrap_or(0);
    let want = [config.kv_heads, tokens, config.head_dim];
    for (index, layer) in prefix.iter().enumerate() {
        for (kind, tensor) in [("keys", &layer.keys), ("values", &layer.values)] {
            if tokens == 0 || tensor.dims() != want {
                let (got, [heads, _, dim]) = (tensor.dims(), want);
                return refuse(format!(
                    "{kind} of layer {index} are {got:?}, not [{heads}, tokens, {dim}] with one \
                     number of tokens, at least 1, for all layers"
                ));
            }
            if tensor.dtype() != DType::F32 {
                return refuse(format!("{kind} of layer {index} are not f32"));
            }
        }
    }
    Ok(tokens)
}
