//! `BlockPool`: every block's generation, state and reference count, and the exact number of blocks in each state.
//!
//! Owns the names of blocks: a `BlockId` is resolved here, and a stale one stops the program with a sentence.
//! Must not know tokens, the tree or the order of eviction. Invariant: each block is in exactly one state and the four
//! counts of its tier add up to the size of that. Blocks of the host come behind those of the device. Called by `Cache` alone.

use super::free_map::FreeMap;
use crate::ids::BlockId;

/// Where a block is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Holds nothing; `alloc` may give it away.
    Free,
    /// In the tree, or the host's copy of a block there, and in nobody's use: eviction may take it.
    Cached,
    /// In use: by a sequence, (in the tree) by a user further down the same path, or, on the host, by a plan that reads it.
    Owned,
    /// The target of a copy that has not ended; neither freed nor published until it has.
    InTransfer,
}

/// Blocks of one tier per state; they add up to its size at every moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Blocks in [`BlockState::Free`].
    pub free: usize,
    /// Blocks in [`BlockState::Cached`].
    pub cached: usize,
    /// Blocks in [`BlockState::Owned`].
    pub owned: usize,
    /// Blocks in [`BlockState::InTransfer`].
    pub in_transfer: usize,
}

impl BlockCounts {
    fn of(&mut self, state: BlockState) -> &mut usize {
        match state {
            BlockState::Free => &mut self.free,
            BlockState::Cached => &mut self.cached,
            BlockState::Owned => &mut self.owned,
            BlockState::InTransfer => &mut self.in_transfer,
        }
    }
}

#[derive(Clone, Copy)]
struct Record {
    /// Grows each time the block is freed; what makes an old name stale.
    generation: u32,
    /// Users plus protected children; 0 exactly for free and cached blocks.
    refs: u32,
    state: BlockState,
}

/// The pool: names, states, reference counts.
pub(super) struct BlockPool {
    records: Vec<Record>,
    num_device: usize,
    free: FreeMap,
    /// Blocks of the host, the last one first: eviction takes a path from its end, and its blocks shall lie in order again.
    host_free: FreeMap,
    counts: BlockCounts,
    host_counts: BlockCounts,
}

impl BlockPool {
    pub(super) fn new(num_device: usize, num_host: usize) -> BlockPool {
        BlockPool {
            records: vec![Record { generation: 0, refs: 0, state: BlockState::Free }; num_device + num_host],
            num_device,
            free: FreeMap::new(num_device),
            host_free: FreeMap::new(num_host),
            counts: BlockCounts { free: num_device, ..BlockCounts::default() },
            host_counts: BlockCounts { free: num_host, ..BlockCounts::default() },
        }
    }

    pub(super) fn counts(&self) -> BlockCounts {
        self.counts
    }

    pub(super) fn host_counts(&self) -> BlockCounts {
        self.host_counts
    }

    /// Blocks of both tiers.
    pub(super) fn num_blocks(&self) -> usize {
        self.records.len()
    }

    pub(super) fn is_on_host(&self, block: u32) -> bool {
        block as usize >= self.num_device
    }

    /// The block that `id` names. Panics when that block has been freed since the name was taken.
    pub(super) fn resolve(&self, id: BlockId) -> u32 {
        let now = self.records.get(id.index as usize).map(|record| record.generation);
        assert!(now == Some(id.generation), "stale block id {id:?}: its block is at generation {now:?} now");
        id.index
    }

    /// The present name of `block`.
    pub(super) fn name(&self, block: u32) -> BlockId {
        BlockId { index: block, generation: self.records[block as usize].generation }
    }

    pub(super) fn state(&self, block: u32) -> BlockState {
        self.records[block as usize].state
    }

    pub(super) fn refs(&self, block: u32) -> u32 {
        self.records[block as usize].refs
    }

    pub(super) fn set_state(&mut self, block: u32, to: BlockState) {
        let counts = if self.is_on_host(block) { &mut self.host_counts } else { &mut self.counts };
        let state = &mut self.records[block as usize].state;
        *counts.of(*state) -= 1;
        *counts.of(to) += 1;
        *state = to;
    }

    /// One more reference; true when it is the first.
    pub(super) fn add_ref(&mut self, block: u32) -> bool {
        let refs = &mut self.records[block as usize].refs;
        *refs += 1;
        *refs == 1
    }

    /// One reference less; true when it was the last.
    pub(super) fn drop_ref(&mut self, block: u32) -> bool {
        let refs = &mut self.records[block as usize].refs;
        assert!(*refs > 0, "block {block} is unpinned more often than it was pinned");
        *refs -= 1;
        *refs == 0
    }

    /// Gives away `count` free blocks, which must exist: owned, one reference each. Continues the run after `after`, then
    /// every run it has started itself.
    pub(super) fn take(&mut self, count: usize, after: Option<u32>, out: &mut Vec<BlockId>) {
        let mut previous = after;
        for _ in 0..count {
            let block = match previous {
                Some(previous) if self.free.contains(previous + 1) => previous + 1,
                _ => self.free.start_of_run().expect("the caller has counted the free blocks"),
            };
            self.free.remove(block);
            self.set_state(block, BlockState::Owned);
            self.records[block as usize].refs = 1;
            out.push(self.name(block));
            previous = Some(block);
        }
    }

    /// Gives away a free block of the host as the target of a copy, with one reference; before `after` where that is free.
    pub(super) fn take_host(&mut self, after: u32) -> Option<u32> {
        if self.host_counts.free == 0 {
            return None;
        }
        let next = after.checked_sub(1).filter(|&block| self.is_on_host(block)).map(|block| self.mirrored(block));
        let at = match next.filter(|&at| self.host_free.contains(at)) {
            Some(at) => at,
            None => self.host_free.start_of_run().expect("free blocks were counted"),
        };
        self.host_free.remove(at);
        let block = self.mirrored(at);
        self.set_state(block, BlockState::InTransfer);
        self.records[block as usize].refs = 1;
        Some(block)
    }

    /// Takes a block back, whatever it was; every name of it is stale from now on.
    pub(super) fn release(&mut self, block: u32) {
        self.set_state(block, BlockState::Free);
        let record = &mut self.records[block as usize];
        record.refs = 0;
        record.generation = record.generation.wrapping_add(1);
        if self.is_on_host(block) {
            self.host_free.insert(self.mirrored(block));
        } else {
            self.free.insert(block);
        }
    }

    /// A block of the host as `host_free` counts it, from the last one on; and the way back.
    fn mirrored(&self, block: u32) -> u32 {
        (self.records.len() - 1) as u32 - block
    }

    /// Checks counts, references and the free maps against the states.
    pub(super) fn audit(&self) {
        let mut seen = [BlockCounts::default(); 2];
        for (block, record) in self.records.iter().enumerate() {
            let (block, state, refs) = (block as u32, record.state, record.refs);
            let is_on_host = self.is_on_host(block);
            *seen[usize::from(is_on_host)].of(state) += 1;
            let is_used = matches!(state, BlockState::Owned | BlockState::InTransfer);
            assert!((refs > 0) == is_used, "block {block} is {state:?} with {refs} references");
            let is_free =
                if is_on_host { self.host_free.contains(self.mirrored(block)) } else { self.free.contains(block) };
            assert!(is_free == (state == BlockState::Free), "the free map is wrong about block {block}");
        }
        let counted = [self.counts, self.host_counts];
        assert!(seen == counted, "blocks are counted as {counted:?} but are {seen:?}");
        let in_maps = [self.free.audit(), self.host_free.audit()];
        let free = seen.map(|counts| counts.free);
        assert!(in_maps == free, "the free maps hold {in_maps:?} blocks, {free:?} are free");
    }
}
