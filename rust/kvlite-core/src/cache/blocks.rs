//! `BlockPool`: every block's generation, state and reference count, and the exact number of blocks in each state.
//!
//! Owns the names of blocks: a `BlockId` is resolved here, and a stale one stops the program with a sentence.
//! Must not know tokens, the tree or the order of eviction. Invariant: each block is in exactly one state and the four
//! counts add up to the size of the pool. Called by `Cache` alone.

use super::free_map::FreeMap;
use crate::ids::BlockId;

/// Where a block is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Holds nothing; `alloc` may give it away.
    Free,
    /// In the tree and in nobody's use: eviction may take it.
    Cached,
    /// In use: by a sequence, or (in the tree) by a user further down the same path.
    Owned,
    /// The target of a copy that has not ended; neither freed nor published until it has.
    InTransfer,
}

/// Blocks per state; they add up to `num_blocks` at every moment.
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
    free: FreeMap,
    counts: BlockCounts,
}

impl BlockPool {
    pub(super) fn new(num_blocks: usize) -> BlockPool {
        BlockPool {
            records: vec![Record { generation: 0, refs: 0, state: BlockState::Free }; num_blocks],
            free: FreeMap::new(num_blocks),
            counts: BlockCounts { free: num_blocks, ..BlockCounts::default() },
        }
    }

    pub(super) fn counts(&self) -> BlockCounts {
        self.counts
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.records.len()
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
        let state = &mut self.records[block as usize].state;
        *self.counts.of(*state) -= 1;
        *self.counts.of(to) += 1;
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

    /// Takes a block back, whatever it was; every name of it is stale from now on.
    pub(super) fn release(&mut self, block: u32) {
        self.set_state(block, BlockState::Free);
        let record = &mut self.records[block as usize];
        record.refs = 0;
        record.generation = record.generation.wrapping_add(1);
        self.free.insert(block);
    }

    /// Checks counts, references and the free map against the states.
    pub(super) fn audit(&self) {
        let mut seen = BlockCounts::default();
        for (block, record) in self.records.iter().enumerate() {
            *seen.of(record.state) += 1;
            let is_used = matches!(record.state, BlockState::Owned | BlockState::InTransfer);
            assert!(
                (record.refs > 0) == is_used,
                "block {block} is {:?} with {} references",
                record.state,
                record.refs
            );
            let is_free = record.state == BlockState::Free;
            assert!(self.free.contains(block as u32) == is_free, "the free map is wrong about block {block}");
        }
        assert!(seen == self.counts, "blocks are counted as {:?} but are {seen:?}", self.counts);
        assert!(self.free.audit() == seen.free, "the free map holds blocks that the pool does not have");
    }
}
