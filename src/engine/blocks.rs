//! Blocks of the paged KV cache and the guards that hold them.

use std::cell::RefCell;
use std::rc::Rc;

/// Token slots per block.
pub const BLOCK_TOKENS: usize = 16;

/// Blocks needed for `tokens`.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// The free list of the KV cache. It lives on the engine thread.
#[derive(Debug, Clone)]
pub struct BlockPool {
    /// Most recently freed last, so that warm memory is used again first.
    free: Rc<RefCell<Vec<u32>>>,
    total: usize,
}

/// Blocks held by one sequence, in token order; they go back to the pool when this is dropped.
#[derive(Debug)]
pub struct BlockTable {
    blocks: Vec<u32>,
    free: Rc<RefCell<Vec<u32>>>,
}

impl BlockPool {
    pub fn new(total: usize) -> Self {
        let free = (0..total as u32).rev().collect();
        Self { free: Rc::new(RefCell::new(free)), total }
    }

    pub fn total(&self) -> usize {
        self.total
    }

    pub fn free(&self) -> usize {
        self.free.borrow().len()
    }

    /// A table without blocks.
    pub fn table(&self) -> BlockTable {
        BlockTable { blocks: Vec::new(), free: Rc::clone(&self.free) }
    }
}

impl BlockTable {
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Adds blocks until there are `count`. False, and nothing taken, when fewer are free.
    #[must_use]
    pub fn grow_to(&mut self, count: usize) -> bool {
        let mut free = self.free.borrow_mut();
        let missing = count.saturating_sub(self.blocks.len());
        let Some(keep) = free.len().checked_sub(missing) else { return false };
        self.blocks.extend(free.drain(keep..).rev());
        true
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.blocks.reverse();
        self.free.borrow_mut().append(&mut self.blocks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_return_with_their_table_and_none_is_lent_twice() {
        let pool = BlockPool::new(10);
        let (mut a, mut b, mut c) = (pool.table(), pool.table(), pool.table());
        assert!(a.grow_to(1) && b.grow_to(6) && a.grow_to(4));
        assert!(!c.grow_to(1) && a.grow_to(2), "growing to less takes nothing");
        let mut all: Vec<u32> = a.blocks().iter().chain(b.blocks()).copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        drop(a);
        assert_eq!(pool.free(), 4);
        assert!(!c.grow_to(5));
        assert!(c.blocks().is_empty());
        drop(b);
        assert_eq!(pool.free(), pool.total());
    }
}
