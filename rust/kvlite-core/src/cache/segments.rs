//! Segments: KV of texts that were computed alone behind the canonical prefix, to be placed anywhere in later prompts.
//!
//! Owns which text is stored in which blocks, its users and pins, and who leaves first. Must not know requests, plans or the
//! tree. Invariants: a digest nominates, the stored ids decide; a segment is found by its tenant, or by all if it is public;
//! what segments hold together stays within the quota; nobody evicts what is used, pinned or being made. Called by `core`.
//!
//! ```text
//!   open        fill          complete                  the last user leaves, or the pin
//!   ----> Wanted ----> Making --------> Ready, in use  <-------------------------------> Ready, cached ----> evicted
//!           ^  <-------  | empty           use, pin
//!           `- abandon --'
//! ```

mod audit;
mod store;

use std::fmt;

pub(super) use store::Segments;

use super::{BlockState, Cache, NONE};
use crate::ids::{BlockId, TenantId, Token};
use store::Entry;

/// A segment at one moment; a name that outlived it is caught at the next use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId {
    index: u32,
    generation: u32,
}

impl fmt::Debug for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}g{}", self.index, self.generation)
    }
}

/// How far a segment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentState {
    /// Its maker has no blocks yet.
    Wanted,
    /// Its maker writes into its blocks.
    Making,
    /// Complete plans have written all of it.
    Ready,
}

/// What is known of a segment.
#[derive(Clone, Copy, Debug)]
pub struct SegmentView<'a> {
    /// Who stored it; [`TenantId::PUBLIC`] for everybody's.
    pub tenant: TenantId,
    /// Its text.
    pub ids: &'a [Token],
    /// Tokens.
    pub len: u32,
    /// Where its KV is, in order; the last block may be filled in part. Empty while wanted.
    pub blocks: &'a [BlockId],
    /// How far it is.
    pub state: SegmentState,
    /// Uses that have not been released.
    pub users: u32,
    /// Whether eviction passes it by.
    pub pinned: bool,
    /// Whether it goes with its maker or its last user, and is not found any more.
    pub dropped: bool,
    /// Uses so far.
    pub hits: u32,
}

impl Cache {
    /// The segment of these ids, in any state: the tenant's own, else a public one. O(ids).
    pub fn find_segment(&self, tenant: TenantId, ids: &[Token]) -> Option<SegmentId> {
        let digest = self.segments.digest(ids);
        let own = self.segments.find(tenant, digest, ids);
        let index = own.or_else(|| self.segments.find(TenantId::PUBLIC, digest, ids))?;
        Some(self.segments.name(index))
    }

    /// A new segment, wanted by the caller, who makes or abandons it. One per caller's maker: their number is the caller's to
    /// bound. `ids` fit the store and are not the tenant's already.
    pub fn open_segment(&mut self, tenant: TenantId, ids: &[Token]) -> SegmentId {
        assert!(self.fits_segment(ids.len() as u32), "a segment of {} tokens can never be stored", ids.len());
        let segments = &mut self.segments;
        let digest = segments.digest(ids);
        let index = segments.vacant.pop().unwrap_or_else(|| {
            segments.entries.push(Entry::default());
            segments.entries.len() as u32 - 1
        });
        let before = segments.found.insert((tenant, digest), index);
        assert!(before.is_none(), "{:?} holds these ids already", before.map(|index| segments.name(index)));
        let generation = segments.entries[index as usize].generation;
        let state = Some(SegmentState::Wanted);
        segments.entries[index as usize] =
            Entry { generation, tenant, digest, ids: ids.into(), state, ..Entry::default() };
        segments.name(index)
    }

    /// Blocks that segments may hold together.
    pub fn segment_quota(&self) -> usize {
        self.segments.quota
    }

    /// Whether `len` tokens could ever be a segment, whatever is in use now: the quota alone decides.
    pub fn fits_segment(&self, len: u32) -> bool {
        len > 0 && self.segments.blocks_of(len as usize) <= self.segments.quota
    }

    /// Wanted to making: takes the blocks, evicting cached segments as far as the quota demands, then as `alloc` does.
    /// False, and nothing has changed: too much is in use, pinned or being made now.
    pub fn fill_segment(&mut self, id: SegmentId) -> bool {
        let len = self.segments.in_state(id, SegmentState::Wanted).ids.len();
        let count = self.segments.blocks_of(len);
        let kept = self.segments.num_held - self.segments.num_cached;
        if kept + count > self.segments.quota || count > self.available() {
            return false;
        }
        while self.segments.num_held + count > self.segments.quota {
            self.evict_segment();
        }
        let mut blocks = Vec::with_capacity(count);
        assert!(self.alloc(count, None, &mut blocks), "evicting segments leaves as much available as before");
        let segments = &mut self.segments;
        for block in &blocks {
            segments.owners[block.index as usize] = id.index;
        }
        segments.num_held += count;
        let entry = &mut segments.entries[id.index as usize];
        (entry.blocks, entry.state) = (blocks, Some(SegmentState::Making));
        true
    }

    /// Making to ready: complete plans have written it all. False: it was dropped in the meantime and is gone.
    pub fn complete_segment(&mut self, id: SegmentId) -> bool {
        self.segments.in_state(id, SegmentState::Making).state = Some(SegmentState::Ready);
        self.settle(id.index)
    }

    /// Wanted or making to gone: its maker has failed or given up.
    pub fn abandon_segment(&mut self, id: SegmentId) {
        let index = self.segments.resolve(id);
        let state = self.segments.entries[index as usize].state;
        assert!(state != Some(SegmentState::Ready), "{id:?} is ready: drop it instead");
        self.remove(index);
    }

    /// Making to wanted: its maker lost its place and will fill it again.
    pub fn empty_segment(&mut self, id: SegmentId) {
        self.segments.in_state(id, SegmentState::Making).state = Some(SegmentState::Wanted);
        self.free_blocks_of(id.index);
    }

    /// One more user of a ready segment, which protects it; counts a hit.
    pub fn use_segment(&mut self, id: SegmentId) {
        let entry = self.segments.in_state(id, SegmentState::Ready);
        entry.users += 1;
        entry.hits = entry.hits.saturating_add(1);
        self.settle(id.index);
    }

    /// One user less: no plan that reads the segment for this use is outstanding.
    pub fn release_segment(&mut self, id: SegmentId) {
        let entry = self.segments.in_state(id, SegmentState::Ready);
        assert!(entry.users > 0, "{id:?} is released more often than it was used");
        entry.users -= 1;
        self.settle(id.index);
    }

    /// Pins a segment or unpins it: eviction passes a pinned one by, from the moment it is ready.
    pub fn pin_segment(&mut self, id: SegmentId, pinned: bool) {
        let index = self.segments.resolve(id);
        let count = self.segments.blocks_of(self.segments.entries[index as usize].ids.len());
        let entry = &mut self.segments.entries[index as usize];
        assert!(!(pinned && entry.dropped), "{id:?} was dropped");
        if std::mem::replace(&mut entry.pinned, pinned) != pinned {
            self.segments.num_pinned =
                if pinned { self.segments.num_pinned + count } else { self.segments.num_pinned - count };
        }
        self.settle(index);
    }

    /// Forgets a segment, pinned or not: it is not found any more, and gone at once, or with its maker or its last user.
    pub fn drop_segment(&mut self, id: SegmentId) {
        self.pin_segment(id, false);
        let entry = &mut self.segments.entries[id.index as usize];
        if !std::mem::replace(&mut entry.dropped, true) {
            self.segments.found.remove(&(entry.tenant, entry.digest));
        }
        self.settle(id.index);
    }

    /// What is known of a segment.
    pub fn segment(&self, id: SegmentId) -> SegmentView<'_> {
        let entry = &self.segments.entries[self.segments.resolve(id) as usize];
        SegmentView {
            tenant: entry.tenant,
            ids: &entry.ids,
            len: entry.ids.len() as u32,
            blocks: &entry.blocks,
            state: entry.state.expect("a name that resolves has its segment"),
            users: entry.users,
            pinned: entry.pinned,
            dropped: entry.dropped,
            hits: entry.hits,
        }
    }

    /// Whether `id` still names a segment.
    pub fn has_segment(&self, id: SegmentId) -> bool {
        self.segments.entries.get(id.index as usize).is_some_and(|entry| entry.generation == id.generation)
    }

    /// Segments in every state; O(1).
    pub fn num_segments(&self) -> usize {
        self.segments.entries.len() - self.segments.vacant.len()
    }

    /// Blocks that segments hold; O(1).
    pub fn segment_blocks(&self) -> usize {
        self.segments.num_held
    }

    /// Blocks that pinned segments hold or will hold; O(1).
    pub fn pinned_blocks(&self) -> usize {
        self.segments.num_pinned
    }

    /// The cached segment that eviction would take next.
    pub fn segment_victim(&self) -> Option<SegmentId> {
        self.segments.order.first().map(|&(_, _, index)| self.segments.name(index))
    }

    /// Takes the blocks of the cached segment that saves least.
    pub(super) fn evict_segment(&mut self) {
        let &(priority, _, index) = self.segments.order.first().expect("the caller has counted the cached segments");
        self.segments.clock = priority;
        self.remove(index);
    }

    /// Drops every cached segment.
    pub(super) fn clear_segments(&mut self) {
        while let Some(&(_, _, index)) = self.segments.order.first() {
            self.remove(index);
        }
    }

    /// Brings the blocks' state in line with users and pins, O(blocks) where it changes; false: nothing kept the segment.
    fn settle(&mut self, index: u32) -> bool {
        let segments = &mut self.segments;
        let entry = &segments.entries[index as usize];
        let is_idle = entry.state == Some(SegmentState::Ready) && entry.users == 0 && !entry.pinned;
        if is_idle && entry.dropped {
            self.remove(index);
            return false;
        }
        match entry.rank {
            None if is_idle => {
                segments.num_released += 1;
                let rank = (segments.priority(entry), segments.num_released, index);
                segments.order.insert(rank);
                let entry = &mut segments.entries[index as usize];
                entry.rank = Some(rank);
                segments.num_cached += entry.blocks.len();
                for block in &entry.blocks {
                    self.pool.drop_ref(block.index);
                    self.pool.set_state(block.index, BlockState::Cached);
                }
            }
            Some(_) if !is_idle => {
                self.leave_order(index);
                for block in &self.segments.entries[index as usize].blocks {
                    self.pool.add_ref(block.index);
                    self.pool.set_state(block.index, BlockState::Owned);
                }
            }
            _ => (),
        }
        true
    }

    fn leave_order(&mut self, index: u32) {
        let entry = &mut self.segments.entries[index as usize];
        if let Some(rank) = entry.rank.take() {
            self.segments.order.remove(&rank);
            self.segments.num_cached -= entry.blocks.len();
        }
    }

    fn free_blocks_of(&mut self, index: u32) {
        for block in std::mem::take(&mut self.segments.entries[index as usize].blocks) {
            self.segments.owners[block.index as usize] = NONE;
            self.segments.num_held -= 1;
            self.pool.release(block.index);
        }
    }

    /// Forgets a segment that nobody uses; its names are stale afterwards.
    fn remove(&mut self, index: u32) {
        self.leave_order(index);
        self.free_blocks_of(index);
        let segments = &mut self.segments;
        let entry = std::mem::take(&mut segments.entries[index as usize]);
        assert!(entry.users == 0, "a segment that is in use goes with its last user");
        if entry.pinned {
            segments.num_pinned -= segments.blocks_of(entry.ids.len());
        }
        if !entry.dropped {
            segments.found.remove(&(entry.tenant, entry.digest));
        }
        segments.entries[index as usize].generation = entry.generation.wrapping_add(1);
        segments.vacant.push(index);
    }
}
