//! Simulated sequences: tokens, the digest each slot should hold, and the blocks it should be in.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::super::Priority;
use super::super::blocks::{BLOCK_TOKENS, BlockPool, BlockTable};
use super::super::prefix_cache::{BlockTokens, Root};
use super::super::scheduler::{Memory, SequenceId};

pub(super) struct Request {
    pub(super) first: SequenceId,
    pub(super) n: usize,
    pub(super) root: Root,
    pub(super) priority: Priority,
    pub(super) prompt: Vec<u32>,
}

pub(super) struct Sequence {
    pub(super) request: Rc<Request>,
    /// Prompt and generated tokens.
    pub(super) tokens: Vec<u32>,
    /// `digests[i]` is of the cartridges and tokens `0..=i`.
    pub(super) digests: Vec<u64>,
    /// Generated tokens after which it stops.
    pub(super) length: usize,
    pub(super) computed: usize,
    pub(super) table: BlockTable,
    pub(super) preemptions: usize,
    pub(super) started: bool,
    pub(super) counts_as: Priority,
    pub(super) born: usize,
}

impl Sequence {
    pub(super) fn push(&mut self, token: u32) {
        let before = self.digests.last().copied().unwrap_or_else(|| {
            let root = self.request.root;
            fold(root.request.unwrap_or(u64::MAX), &format!("{:?}", root.context))
        });
        self.tokens.push(token);
        self.digests.push(mix(before, u64::from(token)));
    }

    fn block(tokens: &[u32], block: usize) -> BlockTokens {
        std::array::from_fn(|i| tokens[block * BLOCK_TOKENS + i])
    }

    pub(super) fn publish(&mut self) {
        let tokens = &self.tokens;
        self.table.publish(self.computed / BLOCK_TOKENS, |block| Self::block(tokens, block));
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let x = (a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (x ^ (x >> 29)) >> 1 // never GARBAGE
}

fn fold(seed: u64, text: &str) -> u64 {
    text.bytes().fold(seed, |digest, byte| mix(digest, u64::from(byte)))
}

pub(super) struct Blocks<'a> {
    pub(super) sequences: &'a mut BTreeMap<SequenceId, Sequence>,
    pub(super) pool: &'a BlockPool,
}

impl Memory for Blocks<'_> {
    fn available(&self) -> usize {
        self.pool.available()
    }

    fn attach(&mut self, id: SequenceId) -> usize {
        let sequence = self.sequences.get_mut(&id).unwrap();
        let tokens = &sequence.tokens;
        let full = (tokens.len() - 1) / BLOCK_TOKENS;
        sequence.table.attach((0..full).map(|block| Sequence::block(tokens, block)))
    }

    fn reserve(&mut self, id: SequenceId, blocks: usize) {
        assert!(self.sequences.get_mut(&id).unwrap().table.grow_to(blocks), "not available");
    }

    fn release(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).unwrap();
        sequence.table.clear();
        sequence.computed = 0;
    }
}
