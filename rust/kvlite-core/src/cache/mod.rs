//! The cache: a pool of blocks, and a radix tree and a store of segments over them that share one set of indices.
//!
//! Owns every block of both tiers from `alloc` to `free` or eviction. Must not know requests, plans or the scheduler.
//! Invariants: each block is free, cached, owned or in transfer; a block in use protects its whole path; the tree holds
//! full blocks only; but for recipes and segments nothing allocates after `new`, output vectors belong to the caller. Called by `core`.

mod blocks;
mod evict;
mod free_map;
mod hash;
mod past;
mod radix;
mod segments;
mod tiers;
mod wants;
mod watch;

pub use blocks::{BlockCounts, BlockState};
pub use radix::MAX_PARTIAL_CANDIDATES;
pub use segments::{SegmentId, SegmentState, SegmentView};
pub use tiers::Demotion;
pub use wants::MAX_WATCHED;

use crate::config::CoreConfig;
use crate::ids::{BlockId, Label, Lookup, Token};
use blocks::BlockPool;
use evict::Evictor;
use radix::{Parent, Tree};
use segments::Segments;
use tiers::Host;
use wants::Wants;

/// No block, in the flat arrays of this module.
const NONE: u32 = u32::MAX;

/// What `insert` did with the caller's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The block is in the tree, in the place of the host's copy perhaps; the caller's use of it goes on as a pin.
    New,
    /// Somebody else's block holds the same tokens; that one is pinned for the caller, who still owns and later frees the other.
    Duplicate(BlockId),
}

/// A block in the tree of which only the first tokens fit; worth a copy, not a pin for the whole request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialHit {
    /// A child of the last full hit.
    pub block: BlockId,
    /// Tokens that fit, 1 to `block_size - 1`.
    pub len: u32,
}

/// The cache. A reference on a block is one user, or one child that is itself in use:
///
/// ```text
///   root - [a refs 1] - [b refs 2] - [c refs 1]  <- pinned by sequence 1
///                              `---- [d refs 1]  <- pinned by sequence 2, and so are b and a
/// ```
/// A sequence therefore pins only the end of its path. Pinning walks up while blocks pass from cached to owned, so it is
/// O(1) on a path already in use, and a block's state says at any moment whether eviction may take it.
pub struct Cache {
    pool: BlockPool,
    tree: Tree,
    evictor: Evictor,
    wants: Wants,
    segments: Segments,
    host: Host,
    /// False: a block that loses its last use is dropped at once, and nothing is ever found.
    keeps_released: bool,
}

impl Cache {
    /// A cache for a validated config. All memory is taken here.
    pub fn new(config: &CoreConfig) -> Cache {
        let (num_blocks, num_host) = (config.num_blocks as usize, config.host_blocks as usize);
        Cache {
            pool: BlockPool::new(num_blocks, num_host),
            tree: Tree::new(num_blocks + num_host, config.block_size as usize, config.hash_seed),
            evictor: Evictor::new(config),
            wants: Wants::new(num_blocks),
            segments: Segments::new(config),
            host: Host::new(config),
            keeps_released: config.enable_prefix_caching,
        }
    }

    /// Appends to `hits` the blocks of the longest stored path that begins `tokens` and that `lookup` may read, at most
    /// `max_blocks` of them, and returns the block behind the last one that shares most with the tokens that follow, if one
    /// shares any. Where a tenant's own block and a public one hold the same tokens, its own is followed.
    ///
    /// A caller that must compute the last token passes the tokens before it. Nothing is pinned: the names hold until the next call that
    /// changes the cache. Blocks of the host come behind those of the device (`split_hits`). Finds nothing when prefix caching is
    /// off. Cost: one compare of `block_size` tokens per hit.
    pub fn match_prefix(
        &self,
        lookup: Lookup,
        tokens: &[Token],
        max_blocks: usize,
        hits: &mut Vec<BlockId>,
    ) -> Option<PartialHit> {
        if !self.keeps_released {
            return None;
        }
        let (block, len) = self.tree.walk(lookup, tokens, max_blocks, |block| hits.push(self.pool.name(block)))?;
        Some(PartialHit { block: self.pool.name(block), len: len as u32 })
    }

    /// Adds a user to a block of the device in the tree, which protects the path above it. Amortised O(1): each step of the
    /// walk up undoes one that an `unpin` made; O(1) at once where the path is in use.
    pub fn pin(&mut self, block: BlockId) {
        let mut at = self.in_tree(block);
        while self.pool.add_ref(at) {
            self.pool.set_state(at, BlockState::Owned);
            self.wake(at);
            let Some(parent) = self.tree.parent(at) else { break };
            at = parent;
        }
    }

    /// Takes a user from a block in the tree. Blocks that nobody protects any more are cached, tail first.
    pub fn unpin(&mut self, block: BlockId) {
        let mut at = self.in_tree(block);
        while self.pool.drop_ref(at) {
            let parent = self.tree.parent(at);
            if self.keeps_released {
                self.pool.set_state(at, BlockState::Cached);
                self.rest(at);
            } else {
                self.drop_block(at);
            }
            let Some(parent) = parent else { break };
            at = parent;
        }
    }

    /// Appends `count` owned blocks to `out` and returns true; or changes nothing and returns false when fewer are available.
    ///
    /// Evicts exactly what the free blocks lack, to the host where it can (`tiers.rs`), or whole segments once no block of the
    /// tree is cached. Prefers the run that continues `after`, a block in use, then runs with room to grow. O(count), and
    /// O(num_blocks / 4096) words per new run.
    pub fn alloc(&mut self, count: usize, after: Option<BlockId>, out: &mut Vec<BlockId>) -> bool {
        let after = after.map(|block| self.pool.resolve(block));
        if count > self.available() {
            return false;
        }
        while self.pool.counts().free < count {
            match self.next_victim() {
                Some(victim) => self.evict(victim),
                None => self.evict_segment(),
            }
        }
        self.pool.take(count, after, out);
        true
    }

    /// Takes back an owned block that is not in the tree. Its name is stale afterwards.
    pub fn free(&mut self, block: BlockId) {
        let block = self.private(block);
        self.pool.release(block);
    }

    /// Publishes an owned block, whose KV a completed plan has written, as `tokens` below `parent` (a block that the caller protects;
    /// none: the root). The label says what the KV is; labels turn from public to own and from exact to a recipe's on the way
    /// down, never back.
    ///
    /// `New`: the caller's use goes on as a pin of `block`, which protects `parent`; so the caller unpins `parent` next.
    /// `Duplicate`: the block that is there already (for an exact label, a public one too) is pinned for the caller, `block` stays the caller's to free.
    /// What the host has of these tokens gives up its place, but for a public block to what a tenant computed. O(block_size).
    pub fn insert(&mut self, label: Label, parent: Option<BlockId>, tokens: &[Token], block: BlockId) -> Inserted {
        self.publish(label, parent, tokens, block, false)
    }

    /// The same of a block that is a copy of a public one, found on the host: it may take that one's place.
    pub fn restore(&mut self, label: Label, parent: Option<BlockId>, tokens: &[Token], block: BlockId) -> Inserted {
        self.publish(label, parent, tokens, block, true)
    }

    fn publish(
        &mut self,
        label: Label,
        parent: Option<BlockId>,
        tokens: &[Token],
        block: BlockId,
        is_copy: bool,
    ) -> Inserted {
        let (len, block_size) = (tokens.len(), self.tree.block_size());
        assert!(len == block_size, "the tree holds full blocks only: {len} tokens for blocks of {block_size}");
        let index = self.private(block);
        let above = match parent {
            None => Parent::ROOT,
            Some(parent) => {
                let above = self.in_tree(parent);
                assert!(self.pool.refs(above) > 0, "insert below {parent:?}, which nobody protects from eviction");
                Parent::block(above)
            }
        };
        let may_share = |public: u32| is_copy || !self.pool.is_on_host(public);
        match self.tree.link(above, label, tokens, index, may_share) {
            Err(existing) if !self.pool.is_on_host(existing) => {
                let existing = self.pool.name(existing);
                self.pin(existing);
                return Inserted::Duplicate(existing);
            }
            Err(existing) => self.take_place_of(existing, index),
            Ok(()) => {}
        }
        let label = self.tree.label(index).expect("it is in the tree now");
        self.evictor.entered(index, above.as_block(), label, tokens);
        if let Some(above) = above.as_block() {
            self.pool.add_ref(above);
        }
        Inserted::New
    }

    /// Marks an owned block outside the tree as the target of a copy; it is neither freed nor inserted until the copy ends.
    pub fn begin_transfer(&mut self, block: BlockId) {
        let block = self.private(block);
        self.pool.set_state(block, BlockState::InTransfer);
    }

    /// The copy into this block has ended: it is owned again.
    pub fn end_transfer(&mut self, block: BlockId) {
        let index = self.pool.resolve(block);
        let state = self.pool.state(index);
        assert!(state == BlockState::InTransfer, "{block:?} is {state:?}, no copy into it is under way");
        self.pool.set_state(index, BlockState::Owned);
    }

    /// Blocks of the device per state; O(1).
    pub fn counts(&self) -> BlockCounts {
        self.pool.counts()
    }

    /// Blocks that one `alloc` can return: free plus cached; O(1).
    pub fn available(&self) -> usize {
        self.counts().free + self.counts().cached
    }

    /// The state of a block that has not been freed since it was named.
    pub fn state(&self, block: BlockId) -> BlockState {
        self.pool.state(self.pool.resolve(block))
    }

    /// Whose or which recipe's KV `block` holds; none while it is not in the tree.
    pub fn label(&self, block: BlockId) -> Option<Label> {
        self.tree.label(self.pool.resolve(block))
    }

    /// Blocks in the tree with a recipe's label; O(1).
    pub fn labelled(&self, label: Label) -> usize {
        assert!(!label.is_exact(), "blocks are counted by recipe, {label:?} is none");
        self.tree.labelled(label)
    }

    /// The block of the tree that eviction would take next.
    pub fn victim(&self) -> Option<BlockId> {
        self.next_victim().map(|block| self.pool.name(block))
    }

    /// Uses of a block in the tree that the order of eviction knows of, at most 255: its own stay and, as far as they are
    /// remembered, those before it was last evicted. O(1).
    pub fn uses(&self, block: BlockId) -> u8 {
        self.evictor.uses(self.in_tree(block))
    }

    /// Drops every cached block of both tiers, segments' too; what is in use or pinned stays. O(cached blocks).
    pub fn clear(&mut self) {
        while let Some(victim) = self.next_victim() {
            self.evict(victim);
        }
        self.clear_host();
        self.clear_segments();
    }

    /// Checks every invariant in O(num_blocks); panics with a sentence about the first that does not hold.
    pub fn audit(&self) {
        self.pool.audit();
        self.tree.audit();
        let cached_in_segments = self.segments.audit(&self.pool);
        self.audit_host();
        let num_blocks = self.pool.num_blocks();
        for block in (0..num_blocks as u32).filter(|&block| !self.pool.is_on_host(block)) {
            let (state, refs) = (self.pool.state(block), self.pool.refs(block));
            if self.tree.label(block).is_none() {
                let is_private = (state != BlockState::Cached || self.segments.holds(block)) && refs <= 1;
                assert!(is_private, "block {block} is {state:?} with {refs} references outside the tree");
                continue;
            }
            assert!(!self.segments.holds(block), "block {block} is in the tree and in a segment");
            let on_device = |&child: &u32| !self.pool.is_on_host(child);
            let in_use = self.tree.children(block).filter(on_device).filter(|&child| self.pool.refs(child) > 0).count();
            assert!(refs as usize >= in_use, "block {block} has {refs} references for {in_use} children in use");
            let expected = if refs > 0 { BlockState::Owned } else { BlockState::Cached };
            assert!(state == expected, "block {block} is {state:?} in the tree with {refs} references");
        }
        self.audit_orders(cached_in_segments);
    }

    /// Each cached block is in one order of eviction, and none goes before its child.
    fn audit_orders(&self, cached_in_segments: usize) {
        let num_blocks = self.pool.num_blocks();
        let is_cached = |block: u32| self.pool.state(block) == BlockState::Cached;
        let mut rank = vec![usize::MAX; num_blocks];
        let mut num_ordered = 0;
        for block in self.evictor.order() {
            assert!(rank[block as usize] == usize::MAX, "block {block} is twice in the order of eviction");
            assert!(is_cached(block), "block {block} would be evicted but is not cached");
            assert!(!self.wants.is_wanted(block), "block {block} is wanted and in the order of those that are not");
            let is_gone = |child: u32| self.pool.is_on_host(child) || rank[child as usize] != usize::MAX;
            let all_gone = self.tree.children(block).all(is_gone);
            assert!(all_gone, "block {block} would be evicted before its child");
            rank[block as usize] = num_ordered;
            num_ordered += 1;
        }
        assert!(self.evictor.order().first().copied() == self.evictor.victim(), "the victim is first in the order");
        let is_wanted = |&block: &u32| !self.pool.is_on_host(block) && is_cached(block) && self.wants.is_wanted(block);
        let wanted = (0..num_blocks as u32).filter(is_wanted);
        let evictable = num_ordered + wanted.count() + cached_in_segments;
        let cached = self.counts().cached;
        assert!(evictable == cached, "{evictable} blocks can be evicted, {cached} are cached");
        self.wants.audit(|block| self.tree.parent(block), |block| is_cached(block) && self.is_end(block));
    }

    /// What nobody waits for, in the policy's order; then what is needed last.
    fn next_victim(&self) -> Option<u32> {
        self.evictor.victim().or_else(|| self.wants.victim())
    }

    /// Forgets a block that is in the tree and in nobody's use, and what lies on the host below it.
    fn drop_block(&mut self, block: u32) {
        self.drop_from_host(block);
        self.evictor.left(block);
        self.tree.unlink(block);
        self.pool.release(block);
    }

    /// The index of a block that must be in the tree.
    fn in_tree(&self, block: BlockId) -> u32 {
        let index = self.pool.resolve(block);
        assert!(self.tree.label(index).is_some(), "{block:?} is not in the tree");
        index
    }

    /// The index of a block that must be owned and outside the tree.
    fn private(&self, block: BlockId) -> u32 {
        let index = self.pool.resolve(block);
        let state = self.pool.state(index);
        assert!(state == BlockState::Owned, "{block:?} is {state:?}, not owned by the caller");
        assert!(self.tree.label(index).is_none(), "{block:?} is in the tree: unpin it instead");
        assert!(!self.segments.holds(index), "{block:?} belongs to a segment");
        index
    }
}
