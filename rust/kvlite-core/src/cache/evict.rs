//! Which cached block goes first when free ones run out.
//!
//! Owns the order of cached blocks and nothing else: a policy orders, `Cache` evicts. Must not know tokens, users or time;
//! it sees blocks become cached (children before their parents) and cease to be. Called by `Cache` alone.

use super::NONE;

/// An order of eviction. The cache calls it with static dispatch.
///
/// Contract: `victim` names a cached block none of whose children is cached, or the tail behind it would become unreachable.
/// Children are released before their parents and reused after them, so any order that takes blocks as they were released keeps it.
pub trait EvictionPolicy {
    /// No block is cached yet; never allocates afterwards.
    fn new(num_blocks: usize) -> Self;
    /// `block` has lost its last use and is cached from now on. Its children were released before it.
    fn released(&mut self, block: u32);
    /// `block` is cached no more: it was pinned again, or taken.
    fn removed(&mut self, block: u32);
    /// The block to take next; none when nothing is cached.
    fn victim(&self) -> Option<u32>;
    /// Cached blocks in the order in which they would be taken, for audits.
    fn order(&self) -> impl Iterator<Item = u32>;
}

#[derive(Clone, Copy)]
struct Neighbours {
    older: u32,
    newer: u32,
}

/// Strict least-recently-released order, tail first. Each operation is O(1).
///
/// A path is released from its end upwards, and a parent cannot be cached while a child is in use; so a cached child is
/// always older than its parent, and the oldest block of all is a leaf:
///
/// ```text
///   oldest  [c2] [c1] [d5] [d4] [c0]  newest        root - c0 - c1 - c2
///             `- the only block without a cached child that was released before it
/// ```
pub struct Lru {
    /// An intrusive ring over all blocks; the entry after the last block closes it (its `newer` is the oldest block).
    ring: Vec<Neighbours>,
}

impl Lru {
    fn end(&self) -> u32 {
        (self.ring.len() - 1) as u32
    }
}

impl EvictionPolicy for Lru {
    fn new(num_blocks: usize) -> Lru {
        let end = num_blocks as u32;
        let mut ring = vec![Neighbours { older: NONE, newer: NONE }; num_blocks];
        ring.push(Neighbours { older: end, newer: end });
        Lru { ring }
    }

    fn released(&mut self, block: u32) {
        let end = self.end();
        let newest = self.ring[end as usize].older;
        self.ring[block as usize] = Neighbours { older: newest, newer: end };
        self.ring[newest as usize].newer = block;
        self.ring[end as usize].older = block;
    }

    fn removed(&mut self, block: u32) {
        let Neighbours { older, newer } = self.ring[block as usize];
        self.ring[older as usize].newer = newer;
        self.ring[newer as usize].older = older;
        self.ring[block as usize] = Neighbours { older: NONE, newer: NONE };
    }

    fn victim(&self) -> Option<u32> {
        self.order().next()
    }

    fn order(&self) -> impl Iterator<Item = u32> {
        let end = self.end();
        let mut at = end;
        std::iter::from_fn(move || {
            at = self.ring[at as usize].newer;
            (at != end).then_some(at)
        })
    }
}
