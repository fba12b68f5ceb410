//! The tree of computed blocks that lets equal beginnings be computed once.
//!
//! A node is one full block; its path from the root is what its keys and values depend on: the
//! cartridges, by content, and every token up to its own last. A hit therefore compares all of them and
//! cannot be stale. The tree knows blocks by number and holds neither memory nor cartridges.

use std::collections::{BTreeSet, HashMap};

use sha2::{Digest, Sha256};

use super::blocks::BLOCK_TOKENS;

/// The tokens of a full block.
pub type BlockTokens = [u32; BLOCK_TOKENS];

/// What precedes the first token of a sequence: a digest of its cartridges' generations, in order, and of
/// the salt it shares with those it may share blocks with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContextKey([u8; 32]);

impl ContextKey {
    pub fn new(generations: impl IntoIterator<Item = [u8; 32]>) -> Self {
        let mut digest = Sha256::new();
        generations.into_iter().for_each(|generation| digest.update(generation));
        Self(digest.finalize().into())
    }

    /// The same after a salt: equal only if the salts are equal too. None leaves it as it is.
    pub fn salted(self, salt: Option<&CacheSalt>) -> Self {
        let Some(CacheSalt(salt)) = salt else { return self };
        let digest = Sha256::new().chain_update(b"salted\0").chain_update(salt);
        Self(digest.chain_update(self.0).finalize().into())
    }
}

/// Requests share blocks of the prefix cache only with requests of the same salt, so that the time of an
/// answer tells nothing about prompts of others. A digest: the salt itself is a secret and is not kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CacheSalt([u8; 32]);

impl CacheSalt {
    /// Of what the server gave a client and what the client's request adds to it. The second never takes
    /// the place of the first: no request can enter the part of another client.
    pub fn new(given: Option<&str>, added: Option<&str>) -> Option<Self> {
        if given.is_none() && added.is_none() {
            return None;
        }
        let mut digest = Sha256::new();
        for part in [given, added] {
            digest.update([u8::from(part.is_some())]);
            digest.update((part.map_or(0, str::len) as u64).to_le_bytes());
            digest.update(part.unwrap_or_default());
        }
        Some(Self(digest.finalize().into()))
    }
}

impl std::fmt::Debug for CacheSalt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CacheSalt(..)")
    }
}

/// Where a path begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Root {
    pub context: ContextKey,
    /// Set when blocks are shared within one request only.
    pub request: Option<u64>,
}

/// What a block continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Parent {
    Root(Root),
    /// Unambiguous though block numbers are used again: a block leaves after everything below it.
    Block(u32),
}

#[derive(Debug)]
struct Node {
    parent: Parent,
    tokens: BlockTokens,
    /// Nodes right below this one.
    children: usize,
    /// Some sequence uses the block.
    held: bool,
    last_used: u64,
}

/// Finding and adding a block take constant time, evicting one the logarithm of the leaves.
///
/// Whoever holds a block holds everything above it, so what nobody holds can be evicted leaf by leaf.
#[derive(Debug)]
pub struct PrefixCache {
    children: HashMap<(Parent, BlockTokens), u32>,
    /// By block number.
    nodes: Vec<Option<Node>>,
    /// `(last_used, block)` of the leaves nobody holds.
    idle: BTreeSet<(u64, u32)>,
    /// Counts releases; the order of use.
    clock: u64,
}

impl PrefixCache {
    /// For block numbers below `blocks`.
    pub fn new(blocks: usize) -> Self {
        let nodes = (0..blocks).map(|_| None).collect();
        Self { children: HashMap::new(), nodes, idle: BTreeSet::new(), clock: 0 }
    }

    pub fn child(&self, parent: Parent, tokens: &BlockTokens) -> Option<u32> {
        self.children.get(&(parent, *tokens)).copied()
    }

    pub fn contains(&self, block: u32) -> bool {
        self.nodes[block as usize].is_some()
    }

    /// Adds a block somebody holds. `parent` must be present and must not have such a child yet.
    pub fn insert(&mut self, parent: Parent, tokens: BlockTokens, block: u32) {
        if let Some(parent) = self.parent_node(parent) {
            parent.children += 1;
        }
        self.children.insert((parent, tokens), block);
        let node = Node { parent, tokens, children: 0, held: true, last_used: 0 };
        self.nodes[block as usize] = Some(node);
    }

    /// A sequence uses the block, which nobody held.
    pub fn hold(&mut self, block: u32) {
        if let Some(node) = &mut self.nodes[block as usize] {
            node.held = true;
            self.idle.remove(&(node.last_used, block));
        }
    }

    /// Nobody uses the block any more.
    pub fn release(&mut self, block: u32) {
        self.clock += 1;
        if let Some(node) = &mut self.nodes[block as usize] {
            node.held = false;
            node.last_used = self.clock;
            if node.children == 0 {
                self.idle.insert((node.last_used, block));
            }
        }
    }

    /// Takes out the leaf that nobody has used for longest.
    pub fn evict(&mut self) -> Option<u32> {
        let (_, block) = self.idle.pop_first()?;
        self.remove(block);
        Some(block)
    }

    /// Takes out a leaf.
    pub fn remove(&mut self, block: u32) {
        let Some(node) = self.nodes[block as usize].take() else { return };
        debug_assert_eq!(node.children, 0, "a block leaves after everything below it");
        self.idle.remove(&(node.last_used, block));
        self.children.remove(&(node.parent, node.tokens));
        let Parent::Block(above) = node.parent else { return };
        if let Some(parent) = self.parent_node(node.parent) {
            parent.children -= 1;
            if parent.children == 0 && !parent.held {
                let key = (parent.last_used, above);
                self.idle.insert(key);
            }
        }
    }

    fn parent_node(&mut self, parent: Parent) -> Option<&mut Node> {
        match parent {
            Parent::Root(_) => None,
            Parent::Block(block) => self.nodes[block as usize].as_mut(),
        }
    }

    /// Recounts everything; `held` says who is used. For tests.
    #[cfg(test)]
    pub fn audit(&self, held: impl Fn(u32) -> bool) {
        let mut children = vec![0; self.nodes.len()];
        let nodes = || (0u32..).zip(&self.nodes).filter_map(|(i, n)| Some((i, n.as_ref()?)));
        for (block, node) in nodes() {
            assert_eq!(self.child(node.parent, &node.tokens), Some(block));
            assert_eq!(node.held, held(block));
            if let Parent::Block(above) = node.parent {
                let parent = self.nodes[above as usize].as_ref().expect("a parent leaves last");
                assert!(parent.held || !node.held, "who holds a block holds those above");
                children[above as usize] += 1;
            }
        }
        for (block, node) in nodes() {
            assert_eq!(node.children, children[block as usize]);
            let idle = !node.held && node.children == 0;
            assert_eq!(self.idle.contains(&(node.last_used, block)), idle);
        }
        assert_eq!(self.children.len(), nodes().count());
        assert!(self.idle.len() <= nodes().count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn salts_are_equal_only_part_by_part() {
        let parts = [None, Some(""), Some("a"), Some("b"), Some("ab")];
        let mut seen = Vec::new();
        for given in parts {
            for added in parts {
                let key = ContextKey::new([[1; 32]]).salted(CacheSalt::new(given, added).as_ref());
                assert!(!seen.contains(&key), "{given:?} {added:?}");
                seen.push(key);
            }
        }
        assert_eq!(seen[0], ContextKey::new([[1; 32]]), "no salt at all changes nothing");
        let salt = CacheSalt::new(Some("a"), None);
        assert_ne!(
            ContextKey::new([[1; 32]]).salted(salt.as_ref()),
            ContextKey::new([[2; 32]]).salted(salt.as_ref())
        );
        assert!(!format!("{:?}", CacheSalt::new(Some("secret"), None)).contains("secret"));
    }
}
