//! Elements laid end to end into packs of bounded length.
//!
//! Packs hold what Gen-2's hold, less its padding: that has no targets and nothing sees it, so it is left
//! out. The order of the elements is another, since it comes from another random generator.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::dataset::Element;
use super::{Pack, Targets};
use crate::limits::MAX_ELEMENT_TOKENS;

/// What happens with an element that is longer than what is left of a pack.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum PackingMode {
    /// It begins the next pack.
    #[default]
    Pad,
    /// It is cut; its rest is never seen. Into a pack that is exactly full nothing is cut.
    Truncate,
}

/// How elements are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Tokens of a pack at most, from 2 to [`MAX_ELEMENT_TOKENS`]. A longer element is cut.
    pub packed_seq_length: usize,
    pub mode: PackingMode,
    /// Of the order in which elements are packed.
    pub seed: u64,
}

/// Why nothing can be packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackingError {
    #[error("packed_seq_length is {0}; it must be from 2 to {MAX_ELEMENT_TOKENS}")]
    Length(usize),
    #[error("there are no training rows")]
    NoElements,
    #[error(
        "none of the {elements} training rows has anything to learn within {packed_seq_length} tokens; \
         use a larger packed_seq_length"
    )]
    NothingLeft { elements: usize, packed_seq_length: usize },
}

/// The beginning of an element, as a part of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the element.
    pub element: usize,
    /// How many of its tokens are in the pack.
    pub tokens: usize,
}

/// Which elements go into which pack: fixed for the whole training; only the order of the packs changes
/// ([`epoch_order`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackPlan {
    packs: Vec<Vec<Piece>>,
    /// Elements of which nothing to learn was left, because they had nothing or were cut before it.
    pub dropped: usize,
    /// Elements that are in a pack without their end.
    pub cut: usize,
}

impl PackPlan {
    /// # Errors
    /// [`PackingError`] for a length out of range, or when no element is left.
    pub fn new(elements: &[Element], packing: &Packing) -> Result<Self, PackingError> {
        let limit = packing.packed_seq_length;
        if !(2..=MAX_ELEMENT_TOKENS).contains(&limit) {
            return Err(PackingError::Length(limit));
        }
        if elements.is_empty() {
            return Err(PackingError::NoElements);
        }
        let mut order: Vec<usize> = (0..elements.len()).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(packing.seed));

        let mut plan = Self { packs: Vec::new(), dropped: 0, cut: 0 };
        let mut pack: Vec<Piece> = Vec::new();
        let mut room = limit;
        for element in order {
            let length = elements[element].tokens.len();
            let begins_next = packing.mode == PackingMode::Pad || room == 0;
            if length > room && begins_next && !pack.is_empty() {
                plan.packs.push(std::mem::take(&mut pack));
                room = limit;
            }
            let tokens = length.min(room);
            if !elements[element].is_supervised_within(tokens) {
                plan.dropped += 1;
            } else {
                plan.cut += usize::from(tokens < length);
                pack.push(Piece { element, tokens });
                room -= tokens;
            }
            // Gen-2 ends a pack with the element it cuts.
            if tokens < length && !pack.is_empty() {
                plan.packs.push(std::mem::take(&mut pack));
                room = limit;
            }
        }
        plan.packs.extend(Some(pack).filter(|pack| !pack.is_empty()));
        if plan.packs.is_empty() {
            let elements = elements.len();
            return Err(PackingError::NothingLeft { elements, packed_seq_length: limit });
        }
        Ok(plan)
    }

    /// Number of packs: the micro-steps of an epoch.
    pub fn len(&self) -> usize {
        self.packs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.packs.is_empty()
    }

    /// What pack `index` is made of, if there is one.
    pub fn pieces(&self, index: usize) -> Option<&[Piece]> {
        self.packs.get(index).map(Vec::as_slice)
    }

    /// Pack `index` of the elements the plan was made of, if there is one. Targets of tokens beyond a cut
    /// are left out.
    pub fn pack(&self, index: usize, elements: &[Element]) -> Option<Pack> {
        let mut pack = Pack {
            tokens: Vec::new(),
            cu_seqlens: vec![0],
            targets: Targets::default(),
            dataset_rows: Vec::new(),
        };
        for piece in self.pieces(index)? {
            let element = elements.get(piece.element)?;
            let begin = pack.tokens.len() as u32;
            pack.tokens.extend(element.tokens.iter().take(piece.tokens));
            pack.cu_seqlens.push(pack.tokens.len() as u32);
            pack.dataset_rows.push(element.row as u32);
            let Targets { rows, ids, probs } = &element.targets;
            let kept = rows.partition_point(|&row| row as usize + 1 < piece.tokens);
            for ((&row, &id), &prob) in rows[..kept].iter().zip(ids).zip(probs) {
                pack.targets.push(begin + row, id, prob);
            }
        }
        Some(pack)
    }
}

/// The order of the packs in an epoch, from 0: another one for each, the same whenever it is asked for.
pub fn epoch_order(seed: u64, epoch: u64, packs: usize) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // Stream 0 is that of the packing.
    random.set_stream(epoch.wrapping_add(1));
    let mut order: Vec<usize> = (0..packs).collect();
    order.shuffle(&mut random);
    order
}

#[cfg(test)]
#[path = "packing_tests.rs"]
mod tests;
