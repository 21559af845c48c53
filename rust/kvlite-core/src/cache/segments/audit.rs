//! What must hold among segments, each as a sentence: every block in one segment, states that agree, the quota, the order.
//!
//! O(num_blocks + tokens stored); for tests and debugging. Called by `Cache::audit`.

use super::SegmentState;
use super::store::Segments;
use crate::cache::blocks::BlockPool;
use crate::cache::{BlockState, NONE};

impl Segments {
    /// Checks everything; returns the number of cached blocks.
    pub(in crate::cache) fn audit(&self, pool: &BlockPool) -> usize {
        let mut owners = vec![NONE; self.owners.len()];
        let (mut num_cached, mut num_pinned, mut num_found, mut num_vacant) = (0, 0, 0, 0);
        for (index, entry) in self.entries.iter().enumerate() {
            let Some(state) = entry.state else {
                num_vacant += 1;
                continue;
            };
            let needed = self.blocks_of(entry.ids.len());
            let expected = if state == SegmentState::Wanted { 0 } else { needed };
            let has = entry.blocks.len();
            assert!(has == expected, "segment {index} is {state:?} with {has} of {needed} blocks");
            assert!(state == SegmentState::Ready || entry.users == 0, "segment {index} is used before it is ready");
            let is_cached = state == SegmentState::Ready && entry.users == 0 && !entry.pinned;
            assert!(!(is_cached && entry.dropped), "segment {index} was dropped and nobody keeps it");
            let rank = entry.rank;
            assert!(rank.is_some() == is_cached, "segment {index} has place {rank:?} in the order of eviction");
            let is_ordered = rank.is_none_or(|rank| rank.2 == index as u32 && self.order.contains(&rank));
            assert!(is_ordered, "segment {index} is not in the order of eviction");
            for &block in &entry.blocks {
                let owner = std::mem::replace(&mut owners[pool.resolve(block) as usize], index as u32);
                assert!(owner == NONE, "{block:?} is in the segments {owner} and {index}");
                let state = pool.state(block.index);
                let expected = if is_cached { BlockState::Cached } else { BlockState::Owned };
                assert!(state == expected, "{block:?} of segment {index} is {state:?}, not {expected:?}");
            }
            assert!(entry.digest == self.digest(&entry.ids), "segment {index} has another text's digest");
            let found = self.find(entry.tenant, entry.digest, &entry.ids);
            assert!((found == Some(index as u32)) != entry.dropped, "segment {index} is found as {found:?}");
            num_found += usize::from(!entry.dropped);
            num_pinned += if entry.pinned { needed } else { 0 };
            num_cached += if is_cached { has } else { 0 };
        }
        assert!(owners == self.owners, "a block names a segment that does not have it");
        let num_held = owners.iter().filter(|&&owner| owner != NONE).count();
        assert!(num_held <= self.quota, "segments hold {num_held} blocks, the quota is {}", self.quota);
        let counted = [self.num_held, self.num_cached, self.num_pinned, self.found.len(), self.vacant.len()];
        let seen = [num_held, num_cached, num_pinned, num_found, num_vacant];
        assert!(
            counted == seen,
            "segments count {counted:?} (held, cached, pinned, found, vacant), there are {seen:?}"
        );
        let num_ranked = self.entries.iter().filter(|entry| entry.rank.is_some()).count();
        assert!(self.order.len() == num_ranked, "{} places for {num_ranked} cached segments", self.order.len());
        num_cached
    }
}
