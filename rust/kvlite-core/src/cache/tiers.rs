//! The host tier: where cached blocks go that the device has no room for, and what is copied there and back.
//!
//! Owns the order of eviction on the host and which of its blocks repeat one of the device. Must not know requests, plans or
//! bytes: the core writes the copies into the plan and says how they ended. Invariants: below a block of the host hang blocks of
//! the host alone; one that a plan reads or writes is given to nobody before that plan is done. Called by `Cache`, and by `core`.
//!
//! ```text
//!   device   root - [b7] - [b2]              evicted, tail first: the copy takes the block's place in the tree
//!                     |      `- - - - .
//!   host              `--- [h9] - [h8] |     nodes: hits, to be copied back into blocks of the sequence's own
//!                                   [h3]     twin of b2: b2 came from here and goes back without a copy
//! ```
//! A sequence publishes what it copied back like anything that it computed; then its block takes the place of the
//! host's, which stays as the twin until the host needs the room: twins go first, then nodes, each longest unused first.

use super::evict::Lists;
use super::{BlockState, Cache, NONE};
use crate::cache::BlockCounts;
use crate::config::CoreConfig;
use crate::ids::BlockId;

/// The lists of the order of eviction, the first to go first.
const TWINS: usize = 0;
const NODES: usize = 1;
const NUM_LISTS: usize = 2;

/// A copy that the next plan owes: a block of the device that eviction took, and its place on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demotion {
    /// Its index; somebody else's block by now.
    pub source: u32,
    /// In transfer until `end_write`.
    pub target: BlockId,
}

/// What the tier remembers beside states and the tree. Blocks are named as in the pool, those of the host behind the others.
pub(super) struct Host {
    /// The first block of the host.
    first: u32,
    /// Twins and nodes that nobody reads, by their number on the host, as they were released.
    order: Lists,
    /// For a block of either tier the one with the same KV on the other one.
    twin: Vec<u32>,
    /// Copies to the host that the plan being written still has room for; 0 between steps.
    room: usize,
    /// Copies that it owes.
    owed: Vec<Demotion>,
    swap_cost_tokens: u64,
    attention_cost_tokens: u64,
}

impl Host {
    pub(super) fn new(config: &CoreConfig) -> Host {
        let (device, host) = (config.num_blocks as usize, config.host_blocks as usize);
        Host {
            first: config.num_blocks,
            order: Lists::new(host, NUM_LISTS),
            twin: vec![NONE; if host > 0 { device + host } else { 0 }],
            room: 0,
            owed: Vec::with_capacity(if host > 0 { config.max_blocks_per_seq() as usize } else { 0 }),
            swap_cost_tokens: config.swap_cost_tokens.into(),
            attention_cost_tokens: config.attention_cost_tokens.into(),
        }
    }

    /// Whether there is a tier.
    fn is_on(&self) -> bool {
        !self.twin.is_empty()
    }

    fn twin_of(&self, block: u32) -> Option<u32> {
        self.twin.get(block as usize).copied().filter(|&twin| twin != NONE)
    }

    fn pair(&mut self, device: u32, host: u32) {
        (self.twin[device as usize], self.twin[host as usize]) = (host, device);
    }

    fn part(&mut self, device: u32, host: u32) {
        (self.twin[device as usize], self.twin[host as usize]) = (NONE, NONE);
    }
}

impl Cache {
    /// A plan is being written that has room for `room` copies to the host. Without room, what is evicted is dropped, unless
    /// its twin is there.
    pub fn open_demotions(&mut self, room: usize) {
        self.host.room = if self.host.is_on() { room } else { 0 };
    }

    /// The copies that this plan owes, in order of eviction; nothing is demoted by copy until the next one is opened.
    pub fn take_demotions(&mut self) -> impl Iterator<Item = Demotion> {
        self.host.room = 0;
        self.host.owed.drain(..)
    }

    /// The plan that owed the copy into `block` is done. Not `done`: it has failed, and what would be below it is lost too.
    pub fn end_write(&mut self, block: BlockId, done: bool) {
        let index = self.pool.resolve(block);
        let state = self.pool.state(index);
        assert!(state == BlockState::InTransfer, "{block:?} is {state:?}, no copy into it is under way");
        if !done {
            self.forget_host(index);
        }
        self.pool.drop_ref(index);
        self.settle_host(index);
    }

    /// One more plan reads a block of the host, which nobody writes.
    pub fn begin_read(&mut self, block: BlockId) {
        let index = self.pool.resolve(block);
        assert!(self.is_on_host(block), "{block:?} is read where it is");
        assert!(self.pool.state(index) != BlockState::InTransfer, "{block:?} is not written yet");
        if self.pool.add_ref(index) {
            self.leave_host_order(index);
            self.pool.set_state(index, BlockState::Owned);
        }
    }

    /// That plan is done, or was never written. Blocks of a path are let go tail first.
    pub fn end_read(&mut self, block: BlockId) {
        let index = self.pool.resolve(block);
        if self.pool.drop_ref(index) {
            self.settle_host(index);
        }
    }

    /// Whether a copy into a block is under way.
    pub fn is_arriving(&self, block: BlockId) -> bool {
        self.state(block) == BlockState::InTransfer
    }

    /// Whether a block is one of the host's.
    pub fn is_on_host(&self, block: BlockId) -> bool {
        self.pool.is_on_host(block.index)
    }

    /// The number of a block of the host there, from 0.
    pub fn host_index(&self, block: BlockId) -> u32 {
        block.index - self.host.first
    }

    /// Blocks of the host per state; O(1).
    pub fn host_counts(&self) -> BlockCounts {
        self.pool.host_counts()
    }

    /// Moves the hits that lie on the host to `on_host`; true: the path goes on, into a block that is being written.
    pub fn split_hits(&self, hits: &mut Vec<BlockId>, on_host: &mut Vec<BlockId>) -> bool {
        let first = hits.iter().rposition(|&block| !self.is_on_host(block)).map_or(0, |last| last + 1);
        on_host.clear();
        let is_written = |&block: &BlockId| !self.is_arriving(block);
        let whole = hits[first..].iter().all(is_written);
        on_host.extend(hits.drain(first..).take_while(is_written));
        !whole
    }

    /// Takes a cached block from the device: it moves to the host where that costs less than to compute it again, or where
    /// it would take others along that are there already; else it is dropped.
    pub(super) fn evict(&mut self, block: u32) {
        let parent = self.tree.parent(block);
        self.take_from_order(block);
        let host = if self.host.is_on() { self.place_on_host(block) } else { None };
        match host {
            Some(host) => {
                self.evictor.left(block);
                self.tree.replace(block, host);
                if self.pool.refs(host) == 0 {
                    self.settle_host(host);
                }
                self.pool.release(block);
            }
            None => self.drop_block(block),
        }
        if let Some(parent) = parent {
            self.lost_child(parent);
        }
    }

    /// Where on the host the KV of `block` is, or will be once the plan is done.
    fn place_on_host(&mut self, block: u32) -> Option<u32> {
        if let Some(twin) = self.host.twin_of(block) {
            self.host.part(block, twin);
            if self.pool.refs(twin) == 0 {
                self.host.order.remove(twin - self.host.first);
            }
            return Some(twin);
        }
        if self.host.room == 0 || !self.is_worth_a_copy(block) {
            return None;
        }
        let after = self.host.owed.last().map_or(0, |last| last.target.index);
        let host = self.pool.take_host(after).or_else(|| {
            self.evict_from_host().then(|| self.pool.take_host(after).expect("a block was just evicted"))
        })?;
        self.host.room -= 1;
        self.host.owed.push(Demotion { source: block, target: self.pool.name(host) });
        Some(host)
    }

    /// A token at depth d costs 1 + d / attention_cost_tokens of one at the beginning.
    fn is_worth_a_copy(&self, block: u32) -> bool {
        let (attention, block_size) = (self.host.attention_cost_tokens, self.tree.block_size() as u64);
        let recompute = block_size * (attention + u64::from(self.tree.depth(block)) * block_size);
        recompute > self.host.swap_cost_tokens * attention || self.tree.children(block).next().is_some()
    }

    /// False: everything there is being read or written.
    fn evict_from_host(&mut self) -> bool {
        let first = self.host.first;
        let Some(oldest) = [TWINS, NODES].into_iter().find_map(|list| self.host.order.iter(list).next()) else {
            return false;
        };
        self.forget_host(first + oldest);
        self.pool.release(first + oldest);
        true
    }

    /// A block of the device has come for what lies at `host`: it takes that place, and the other is its twin.
    pub(super) fn take_place_of(&mut self, host: u32, block: u32) {
        self.leave_host_order(host);
        self.tree.replace(host, block);
        self.host.pair(block, host);
        if self.pool.refs(host) == 0 {
            self.settle_host(host);
        }
    }

    /// Takes what lies on the host below `block`, and its twin, out of tree and tier.
    pub(super) fn drop_from_host(&mut self, block: u32) {
        if !self.host.is_on() {
            return;
        }
        let mut at = block;
        loop {
            if let Some(child) = self.tree.children(at).next() {
                at = child;
                continue;
            }
            if at == block {
                break;
            }
            let parent = self.tree.parent(at).expect("it hangs below the block");
            self.leave_host_order(at);
            self.tree.unlink(at);
            self.free_unread(at);
            at = parent;
        }
        if let Some(twin) = self.host.twin_of(block) {
            self.leave_host_order(twin);
            self.host.part(block, twin);
            self.free_unread(twin);
        }
    }

    /// Nothing there is a hit or a twin any more; what plans read or write now is free when they are done. O(host blocks).
    pub(super) fn clear_host(&mut self) {
        for host in self.host.first..self.pool.num_blocks() as u32 {
            if self.pool.state(host) != BlockState::Free {
                self.forget_host(host);
                self.free_unread(host);
            }
        }
    }

    /// A block of the host is no hit and no twin any more; the block itself stays.
    fn forget_host(&mut self, host: u32) {
        self.leave_host_order(host);
        if let Some(device) = self.host.twin_of(host) {
            self.host.part(device, host);
        } else if self.tree.label(host).is_some() {
            self.drop_from_host(host);
            self.tree.unlink(host);
        }
    }

    /// A block of the host that nobody reads or writes: it takes its place among nodes or twins, or is free.
    fn settle_host(&mut self, host: u32) {
        let number = host - self.host.first;
        if self.tree.label(host).is_some() {
            self.host.order.push(NODES, number);
        } else if self.host.twin_of(host).is_some() {
            self.host.order.push(TWINS, number);
        } else {
            return self.pool.release(host);
        }
        self.pool.set_state(host, BlockState::Cached);
    }

    /// Without effect on a block that is in none.
    fn leave_host_order(&mut self, host: u32) {
        if self.pool.state(host) != BlockState::Cached {
            return;
        }
        self.host.order.remove(host - self.host.first);
    }

    /// What is read or written now is free when that ends.
    fn free_unread(&mut self, host: u32) {
        if self.pool.refs(host) == 0 {
            self.pool.release(host);
        }
    }

    /// Checks the tier; part of `Cache::audit`.
    pub(super) fn audit_host(&self) {
        let counts = self.host_counts();
        let (mut num_ordered, mut num_targets) = (0, 0);
        for (list, is_twin) in [(NODES, false), (TWINS, true)] {
            for number in self.host.order.iter(list) {
                num_ordered += 1;
                let host = self.host.first + number;
                let (state, has_twin) = (self.pool.state(host), self.host.twin_of(host).is_some());
                assert!(state == BlockState::Cached, "host block {number} would be evicted but is {state:?}");
                assert!(has_twin == is_twin, "host block {number} is in the wrong order: {is_twin}");
            }
        }
        assert!(num_ordered == counts.cached, "{num_ordered} host blocks can be evicted, {} are cached", counts.cached);
        for block in 0..self.pool.num_blocks() as u32 {
            let in_tree = self.tree.label(block).is_some();
            if let Some(twin) = self.host.twin_of(block) {
                assert!(self.host.twin_of(twin) == Some(block), "{block} and {twin} do not agree to be twins");
                assert!(in_tree != self.pool.is_on_host(block), "{block} is a twin in the wrong place");
            }
            if !self.pool.is_on_host(block) {
                continue;
            }
            let (state, below) =
                (self.pool.state(block), self.tree.children(block).find(|&child| child < self.host.first));
            assert!(below.is_none(), "{below:?} of the device hangs below {block} of the host");
            assert!(!in_tree || state != BlockState::Free, "host block {block} is free and in the tree");
            num_targets += usize::from(state == BlockState::InTransfer);
        }
        assert!(num_targets >= self.host.owed.len(), "a copy is owed into a block that is not in transfer");
    }
}
