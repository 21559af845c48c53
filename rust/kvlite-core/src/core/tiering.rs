//! The host tier in plans: what was found there and is copied back, and what eviction takes there.
//!
//! A copy back goes into a fresh block of the sequence's own, like the copy of a block that fits in part; it is published when its
//! plan is done, and a failed plan leaves nothing. Called by `admit.rs`, `blending.rs` and `Core::step`.

use super::{Core, Hold, PlanRecord};
use crate::cache::PartialHit;
use crate::ids::BlockId;
use crate::plan::{CopyDirection, PlanWriter, Region};

impl Core {
    /// Blocks that one plan demotes at most: as many as the longest sequence has.
    pub(super) fn max_demotions(&self) -> usize {
        self.config.max_blocks_per_seq() as usize
    }

    /// Moves hits on the host from `scratch_hits` to `scratch_host`. A partial hit stays one unless a copy into it or into a
    /// block before it is under way.
    pub(super) fn split_hits(&mut self, partial: Option<PartialHit>) -> Option<PartialHit> {
        self.hits_arrive = self.cache.split_hits(&mut self.scratch_hits, &mut self.scratch_host);
        partial.filter(|hit| !self.hits_arrive && !self.cache.is_arriving(hit.block))
    }

    /// Whether this plan can carry the copies that `scratch_host` asks for; the first admission of a plan always can.
    pub(super) fn may_copy_hits(&self, plan: &PlanWriter<'_>) -> bool {
        let wanted = self.scratch_host.len();
        let kept = self.max_demotions() + self.config.max_num_seqs as usize;
        wanted == 0 || plan.room(Region::BlockCopy) >= wanted + kept
    }

    /// Protects what was found from the evictions that make room for it.
    pub(super) fn pin_hits(&mut self, partial: Option<PartialHit>) {
        self.scratch_hits.last().into_iter().for_each(|&block| self.cache.pin(block));
        self.scratch_host.iter().for_each(|&block| self.cache.begin_read(block));
        match partial.map(|hit| hit.block) {
            Some(block) if self.cache.is_on_host(block) => self.cache.begin_read(block),
            Some(block) => self.cache.pin(block),
            None => {}
        }
    }

    /// Ends that.
    pub(super) fn unpin_hits(&mut self, partial: Option<PartialHit>) {
        match partial.map(|hit| hit.block) {
            Some(block) if self.cache.is_on_host(block) => self.cache.end_read(block),
            Some(block) => self.cache.unpin(block),
            None => {}
        }
        self.scratch_host.drain(..).rev().for_each(|block| self.cache.end_read(block));
        self.scratch_hits.last().into_iter().for_each(|&block| self.cache.unpin(block));
    }

    /// Copies what was found and cannot be read where it is into the first of a sequence's `fresh` blocks; what `pin_hits`
    /// protects stays so until the plan is done. Returns the tokens.
    pub(super) fn copy_hits(
        &mut self,
        fresh: &[BlockId],
        partial: Option<PartialHit>,
        plan: &mut PlanWriter<'_>,
        record: &mut PlanRecord,
    ) -> u32 {
        let (whole, rest) = fresh.split_at(self.scratch_host.len());
        let mut len = whole.len() as u32 * self.config.block_size;
        self.stats.promoted_blocks_total += whole.len() as u64;
        self.stats.host_hit_tokens_total += u64::from(len);
        for (source, target) in self.scratch_host.iter().zip(whole) {
            plan.block_copy(CopyDirection::FromHost, self.cache.host_index(*source), target.index);
        }
        if let Some(PartialHit { block, len: part }) = partial {
            let target = rest[0].index;
            len += part;
            if self.cache.is_on_host(block) {
                plan.block_copy(CopyDirection::FromHost, self.cache.host_index(block), target);
                record.holds.push(Hold::HostRead(block));
                self.stats.host_hit_tokens_total += u64::from(part);
            } else {
                plan.block_copy(CopyDirection::OnDevice, block.index, target);
                record.holds.push(Hold::InTree(block));
            }
        }
        record.holds.extend(self.scratch_host.drain(..).rev().map(Hold::HostRead));
        len
    }

    /// Writes the copies that this plan's allocations owe.
    pub(super) fn write_demotions(&mut self, plan: &mut PlanWriter<'_>, record: &mut PlanRecord) {
        for demotion in self.cache.take_demotions() {
            let target = demotion.target.index - self.config.num_blocks;
            plan.block_copy(CopyDirection::ToHost, demotion.source, target);
            record.holds.push(Hold::HostWrite(demotion.target));
            self.stats.demoted_blocks_total += 1;
        }
    }

    /// What a plan, or a copy to another engine, named is used no more. `done`: it was carried out.
    pub(super) fn let_go(&mut self, hold: Hold, done: bool) {
        match hold {
            Hold::Private(block) => self.free_private(block),
            Hold::InTree(block) => self.cache.unpin(block),
            Hold::HostRead(block) => self.cache.end_read(block),
            Hold::HostWrite(block) => self.cache.end_write(block, done),
        }
    }
}
