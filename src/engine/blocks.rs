//! Blocks of the paged KV cache and the guards that hold them.
//!
//! A block is *free*, *used* (at least one sequence holds it) or *cached* (only the prefix cache knows
//! it, and gives it up when somebody needs it): `free + used + cached == total` at any time.

use std::cell::RefCell;
use std::rc::Rc;

use super::prefix_cache::{BlockTokens, Parent, PrefixCache, Root};

/// Token slots per block.
pub const BLOCK_TOKENS: usize = 16;

/// Blocks needed for `tokens`.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// How many blocks are in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCounts {
    pub free: usize,
    pub used: usize,
    pub cached: usize,
    pub total: usize,
}

impl BlockCounts {
    /// Whether every block is in exactly one state.
    pub fn add_up(&self) -> bool {
        self.free + self.used + self.cached == self.total
    }
}

/// All blocks of the KV cache. It lives on the engine thread; clones are the same pool.
#[derive(Debug, Clone)]
pub struct BlockPool {
    state: Rc<RefCell<State>>,
}

#[derive(Debug)]
struct State {
    /// Most recently freed last, so that warm memory is used again first.
    free: Vec<u32>,
    /// Tables that hold each block.
    holders: Vec<u32>,
    used: usize,
    cached: usize,
    cache: PrefixCache,
    /// Whether blocks stay in the cache when their last holder goes.
    keep: bool,
}

/// Blocks held by one sequence, in token order; they go back to the pool when this is dropped.
///
/// The first [`Self::shared`] of them are in the prefix cache, full, and must not be written again.
#[derive(Debug)]
pub struct BlockTable {
    blocks: Vec<u32>,
    shared: usize,
    root: Root,
    state: Rc<RefCell<State>>,
}

impl BlockPool {
    /// With `keep`, published blocks outlive their sequences until they are needed.
    pub fn new(total: usize, keep: bool) -> Self {
        let state = State {
            free: (0..total as u32).rev().collect(),
            holders: vec![0; total],
            used: 0,
            cached: 0,
            cache: PrefixCache::new(total),
            keep,
        };
        Self { state: Rc::new(RefCell::new(state)) }
    }

    pub fn counts(&self) -> BlockCounts {
        let state = self.state.borrow();
        BlockCounts {
            free: state.free.len(),
            used: state.used,
            cached: state.cached,
            total: state.holders.len(),
        }
    }

    /// Blocks that can be taken: the free ones and those only the cache knows.
    pub fn available(&self) -> usize {
        let state = self.state.borrow();
        state.free.len() + state.cached
    }

    /// A table without blocks, for a sequence that begins at `root`.
    pub fn table(&self, root: Root) -> BlockTable {
        BlockTable { blocks: Vec::new(), shared: 0, root, state: Rc::clone(&self.state) }
    }

    /// Recounts everything. For tests.
    #[cfg(test)]
    pub fn audit(&self) {
        let state = self.state.borrow();
        let counts = self.counts();
        assert!(counts.add_up(), "{counts:?}");
        let blocks = 0..counts.total as u32;
        let held = |block: u32| state.holders[block as usize] > 0;
        assert_eq!(blocks.clone().filter(|b| held(*b)).count(), counts.used);
        let idle = blocks.filter(|b| !held(*b) && state.cache.contains(*b));
        assert_eq!(idle.count(), counts.cached);
        assert!(state.free.iter().all(|b| !held(*b) && !state.cache.contains(*b)));
        state.cache.audit(held);
    }
}

impl State {
    fn take(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let block = self.cache.evict()?;
                self.cached -= 1;
                block
            }
        };
        self.holders[block as usize] = 1;
        self.used += 1;
        Some(block)
    }

    /// One more table holds a block of the cache.
    fn hold(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        *holders += 1;
        if *holders == 1 {
            self.used += 1;
            self.cached -= 1;
            self.cache.hold(block);
        }
    }

    /// One table less holds the block.
    fn release(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        self.used -= 1;
        match self.cache.contains(block) {
            true if self.keep => {
                self.cached += 1;
                self.cache.release(block);
                return;
            }
            true => self.cache.remove(block),
            false => {}
        }
        self.free.push(block);
    }
}

impl BlockTable {
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// How many of the first blocks are in the prefix cache.
    pub fn shared(&self) -> usize {
        self.shared
    }

    /// Takes over the longest cached beginning of `tokens` (full blocks, in order). Returns its blocks.
    /// The table must be empty.
    pub fn attach(&mut self, tokens: impl Iterator<Item = BlockTokens>) -> usize {
        debug_assert!(self.blocks.is_empty());
        let mut state = self.state.borrow_mut();
        let mut parent = Parent::Root(self.root);
        for tokens in tokens {
            let Some(block) = state.cache.child(parent, &tokens) else { break };
            state.hold(block);
            self.blocks.push(block);
            parent = Parent::Block(block);
        }
        self.shared = self.blocks.len();
        self.shared
    }

    /// Adds blocks until there are `count`. False, and nothing taken, when fewer are available.
    #[must_use]
    pub fn grow_to(&mut self, count: usize) -> bool {
        let mut state = self.state.borrow_mut();
        let missing = count.saturating_sub(self.blocks.len());
        if missing > state.free.len() + state.cached {
            return false;
        }
        for _ in 0..missing {
            let Some(block) = state.take() else { return false };
            self.blocks.push(block);
        }
        true
    }

    /// Puts the blocks up to `full`, whose keys and values are complete, into the prefix cache.
    /// `tokens(i)` are the tokens of block `i`.
    ///
    /// Where another sequence was faster its block takes the place of this table's own, which goes free:
    /// what is equal is stored once, and whoever holds a cached block holds those before it.
    pub fn publish(&mut self, full: usize, tokens: impl Fn(usize) -> BlockTokens) {
        let mut state = self.state.borrow_mut();
        for index in self.shared..full.min(self.blocks.len()) {
            let parent = match index {
                0 => Parent::Root(self.root),
                _ => Parent::Block(self.blocks[index - 1]),
            };
            let (own, tokens) = (self.blocks[index], tokens(index));
            match state.cache.child(parent, &tokens) {
                Some(block) => {
                    state.hold(block);
                    self.blocks[index] = block;
                    state.release(own);
                }
                None => state.cache.insert(parent, tokens, own),
            }
            self.shared = index + 1;
        }
    }

    /// Gives all blocks back.
    pub fn clear(&mut self) {
        let mut state = self.state.borrow_mut();
        self.shared = 0;
        // The last first: a block leaves the cache after those below it.
        while let Some(block) = self.blocks.pop() {
            state.release(block);
        }
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::prefix_cache::ContextKey;
    use super::*;
    use proptest::prelude::*;

    fn root(generation: u8) -> Root {
        Root { context: ContextKey::new([[generation; 32]]), request: None }
    }

    /// Block `i` of the sequence of tokens 0, 1, 2, … shifted by `first`.
    fn tokens(first: u32) -> impl Fn(usize) -> BlockTokens {
        move |i| std::array::from_fn(|t| first + (i * BLOCK_TOKENS + t) as u32)
    }

    fn published(pool: &BlockPool, root: Root, first: u32, blocks: usize) -> BlockTable {
        let mut table = pool.table(root);
        table.attach((0..blocks).map(tokens(first)));
        assert!(table.grow_to(blocks));
        table.publish(blocks, tokens(first));
        table
    }

    fn hits(pool: &BlockPool, root: Root, first: u32, blocks: usize) -> usize {
        pool.table(root).attach((0..blocks).map(tokens(first)))
    }

    #[test]
    fn blocks_return_with_their_table_and_none_is_lent_twice() {
        let pool = BlockPool::new(10, true);
        let table = || pool.table(root(0));
        let (mut a, mut b, mut c) = (table(), table(), table());
        assert!(a.grow_to(1) && b.grow_to(6) && a.grow_to(4));
        assert!(!c.grow_to(1) && a.grow_to(2), "growing to less takes nothing");
        let mut all: Vec<u32> = a.blocks().iter().chain(b.blocks()).copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        drop(a);
        assert_eq!(pool.available(), 4);
        assert!(!c.grow_to(5));
        assert!(c.blocks().is_empty());
        drop(b);
        assert_eq!(pool.counts().free, 10, "nothing was published");
    }

    #[test]
    fn only_the_same_cartridges_and_tokens_hit() {
        let pool = BlockPool::new(10, true);
        drop(published(&pool, root(1), 5, 3));
        assert_eq!(pool.counts(), BlockCounts { free: 7, used: 0, cached: 3, total: 10 });
        assert_eq!(hits(&pool, root(1), 5, 3), 3);
        assert_eq!(hits(&pool, root(1), 5, 2), 2);
        assert_eq!(hits(&pool, root(2), 5, 3), 0);
        assert_eq!(hits(&pool, root(1), 6, 3), 0);
        let other_order = |a: u8, b: u8| ContextKey::new([[a; 32], [b; 32]]);
        assert_ne!(other_order(1, 2), other_order(2, 1));
        // The same tokens one block later are another path.
        let mut table = pool.table(root(1));
        assert_eq!(table.attach((1..3).map(tokens(5))), 0);
        pool.audit();
    }

    #[test]
    fn the_least_recently_used_leaf_goes_first() {
        let pool = BlockPool::new(4, true);
        drop(published(&pool, root(1), 0, 2));
        drop(published(&pool, root(2), 0, 2));
        assert_eq!(hits(&pool, root(1), 0, 2), 2, "used again");
        let mut table = pool.table(root(3));
        assert!(table.grow_to(1));
        assert_eq!((hits(&pool, root(1), 0, 2), hits(&pool, root(2), 0, 2)), (2, 1));
        assert!(table.grow_to(4));
        assert_eq!(pool.counts().cached, 0);
        pool.audit();
    }

    #[test]
    fn what_two_compute_at_once_is_kept_once() {
        let pool = BlockPool::new(8, true);
        let (mut a, mut b) = (pool.table(root(1)), pool.table(root(1)));
        assert!(a.grow_to(2) && b.grow_to(3));
        a.publish(2, tokens(0));
        b.publish(3, tokens(0));
        assert_eq!(a.blocks(), &b.blocks()[..2]);
        assert_eq!(pool.counts(), BlockCounts { free: 5, used: 3, cached: 0, total: 8 });
        drop(a);
        assert_eq!(pool.counts().used, 3);
        drop(b);
        assert_eq!(pool.counts().cached, 3);
        pool.audit();
    }

    #[test]
    fn without_a_cache_blocks_are_free_with_their_last_holder() {
        let pool = BlockPool::new(8, false);
        let a = published(&pool, root(1), 0, 2);
        let b = published(&pool, root(1), 0, 3);
        assert_eq!(pool.counts().used, 3);
        drop(a);
        assert_eq!((pool.counts().used, hits(&pool, root(1), 0, 3)), (3, 3));
        drop(b);
        assert_eq!((pool.counts().free, hits(&pool, root(1), 0, 3)), (8, 0));
    }

    proptest! {
        /// Against a list of the published beginnings: a hit was published, and counts always add up.
        #[test]
        fn hits_were_published_and_nothing_leaks(
            operations in prop::collection::vec((0usize..4, 0u8..2, 0u32..3, 1usize..6), 1..200),
            keep: bool,
        ) {
            let pool = BlockPool::new(12, keep);
            let mut tables: Vec<BlockTable> = Vec::new();
            let mut longest = std::collections::HashMap::new();
            for (operation, generation, first, blocks) in operations {
                if operation == 0 && !tables.is_empty() {
                    tables.remove(blocks % tables.len());
                } else {
                    let mut table = pool.table(root(generation));
                    let hit = table.attach((0..blocks).map(tokens(first)));
                    let known = longest.entry((generation, first)).or_insert(0);
                    prop_assert!(hit <= *known);
                    if table.grow_to(blocks) {
                        let publish = if operation == 1 { blocks } else { blocks / 2 };
                        table.publish(publish, tokens(first));
                        *known = publish.max(*known);
                        tables.push(table);
                    }
                }
                pool.audit();
            }
            drop(tables);
            let counts = pool.counts();
            prop_assert_eq!(counts.free + counts.cached, 12);
            prop_assert!(keep || counts.cached == 0);
        }
    }
}
