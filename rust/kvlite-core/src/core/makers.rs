//! Makers: the core's own requests that compute segments, and the clients' requests that wait for them.
//!
//! One maker per wanted segment, whoever wants it. It computes canonical prefix + ids in private blocks while its rows
//! are also stored, before RoPE, in the segment's blocks; it is never announced, draws nothing and publishes nothing.
//! Whoever waits is outside the queue and comes back at its own rank. Invariants: every segment that is not ready has one
//! maker, and somebody who waits or a pin. Called by `add.rs`, `admit.rs`, `end.rs`, `commit.rs`.

use std::sync::Arc;

use super::reuse::{ReuseReport, SegmentInfo};
use super::{Core, NO_HANDLE, RequestState};
use crate::blend::{Blend, Origin, Rule};
use crate::cache::{SegmentId, SegmentState};
use crate::error::CoreError;
use crate::ids::{Label, TenantId, Token};
use crate::sequence::{FinishReason, Sequence, Status};

/// Times that a request goes outside the queue; a segment still missing then is computed as new text.
const MAX_ATTEMPTS: u32 = 2;

/// The request that computes one segment.
#[derive(Debug)]
pub(super) struct Maker {
    pub slot: u32,
    /// Slots outside the queue, in the order in which they came.
    pub waiters: Vec<u32>,
}

impl Core {
    /// Computes a segment ahead of its use; the request ends with `stop` when it is ready. `pinned`: eviction spares it.
    ///
    /// Errors: no tokens, tokens outside the vocabulary, a tenant out of range, longer than the model or the store can
    /// hold; `QueueFull` and `Pinned` are about capacity.
    pub fn add_segment(
        &mut self,
        ids: &[Token],
        tenant: u32,
        pinned: bool,
        deadline_ms: Option<i64>,
        now_ms: i64,
    ) -> Result<i32, CoreError> {
        self.check_tokens(ids, tenant)?;
        let max = self.max_segment_len();
        if ids.len() > max as usize {
            return Err(CoreError::SegmentTooLong { len: ids.len(), max });
        }
        let pinned_blocks = self.cache.pinned_blocks();
        if !self.fits_alone(ids.len(), pinned_blocks) && self.segment(tenant, ids).is_none() {
            let (needed, pinned) = (self.segment_blocks(ids.len()), pinned_blocks as u32);
            return Err(CoreError::Pinned { needed, total: self.cache.segment_quota() as u32, pinned });
        }
        self.check_queue()?;
        let owner = TenantId(tenant);
        let existing = self.cache.find_segment(owner, ids).filter(|&id| self.cache.segment(id).tenant == owner);
        let is_pinned = existing.is_some_and(|id| self.cache.segment(id).pinned);
        if pinned && !is_pinned {
            self.check_pin(self.segment_blocks(ids.len()), existing)?;
        }
        let rule = Rule {
            spans: [(0, ids.len() as u32)].into(),
            method_id: 0,
            ratio: 0.0,
            rounds: [].into(),
            scores: None,
            decode_rows: 0,
        };
        let arrival = self.take_arrival();
        let rank = (self.queue.rank(arrival, 0), self.take_serial());
        let mut seq = Sequence::new(0, 0, Label::exact(owner), rank, ids, ids.len() as u32);
        seq.blend = Some(Box::new(Blend::new(Arc::new(rule))));
        let state = RequestState { precomputes: true, pins: pinned, ..RequestState::new(1) };
        let (handle, slot) = self.enlist(seq, state, deadline_ms, now_ms);
        self.stats.requests_total += 1;
        self.settle(slot);
        Ok(handle)
    }

    /// The segment with these ids that `tenant` would reuse: its own, else a public one.
    pub fn segment(&self, tenant: u32, ids: &[Token]) -> Option<SegmentInfo> {
        if tenant >= 1 << 31 {
            return None;
        }
        let view = self.cache.segment(self.cache.find_segment(TenantId(tenant), ids)?);
        Some(SegmentInfo {
            len: view.len,
            num_blocks: view.blocks.len() as u32,
            state: view.state,
            num_users: view.users,
            num_hits: view.hits.into(),
            pinned: view.pinned,
            tenant: view.tenant.0,
        })
    }

    /// Spares a segment of `tenant`'s own from eviction, or no longer. False: there is none. Errors: `Pinned`.
    pub fn pin_segment(&mut self, tenant: u32, ids: &[Token], pinned: bool) -> Result<bool, CoreError> {
        let Some(id) = self.own_segment(tenant, ids) else { return Ok(false) };
        if pinned && !self.cache.segment(id).pinned {
            self.check_pin(self.segment_blocks(ids.len()), Some(id))?;
        }
        self.cache.pin_segment(id, pinned);
        self.room_epoch += 1;
        if !pinned {
            self.dismiss_maker(id);
        }
        Ok(true)
    }

    /// Forgets a segment of `tenant`'s own: nobody finds it from now on, its blocks go when the last plan has read them.
    /// Precomputing it is cancelled; blended requests that wait for it have it made anew. False: there is none.
    pub fn drop_segment(&mut self, tenant: u32, ids: &[Token]) -> bool {
        let Some(id) = self.own_segment(tenant, ids) else { return false };
        self.cache.drop_segment(id);
        if let Some(maker) = self.makers.get(&id) {
            for waiter in maker.waiters.clone() {
                if self.request(self.seq(waiter).request).precomputes {
                    self.end(waiter, FinishReason::Cancelled);
                }
            }
            if let Some(maker) = self.makers.get(&id) {
                self.end(maker.slot, FinishReason::Cancelled);
            }
        }
        self.room_epoch += 1;
        true
    }

    /// Where the tokens of a blended prompt came from: known from the step that reports `admitted` on, while it lives.
    pub fn reuse_report(&self, handle: i32) -> Option<&ReuseReport> {
        self.request(*self.by_handle.get(&handle)?).reuse.as_deref()
    }

    fn own_segment(&self, tenant: u32, ids: &[Token]) -> Option<SegmentId> {
        if tenant >= 1 << 31 {
            return None;
        }
        let id = self.cache.find_segment(TenantId(tenant), ids)?;
        (self.cache.segment(id).tenant.0 == tenant).then_some(id)
    }

    pub(super) fn segment_blocks(&self, len: usize) -> u32 {
        (len as u32).div_ceil(self.config.block_size)
    }

    /// Whether a segment of `len` tokens could be made beside `pinned` blocks, with nothing else in the pool.
    fn fits_alone(&self, len: usize, pinned: usize) -> bool {
        let behind = self.config.canonical_prefix.len() + len;
        let needed = self.segment_blocks(len) as usize + self.segment_blocks(behind) as usize;
        behind <= self.config.max_model_len as usize
            && self.segment_blocks(len) as usize + pinned <= self.cache.segment_quota()
            && needed + pinned <= self.config.num_blocks as usize
    }

    /// The longest segment that an empty store and pool can make; 0: none.
    fn max_segment_len(&self) -> u32 {
        let (mut fits, mut limit) = (0, self.config.max_model_len as usize);
        while fits < limit {
            let middle = limit - (limit - fits) / 2;
            if self.fits_alone(middle, 0) { fits = middle } else { limit = middle - 1 }
        }
        fits as u32
    }

    /// Whether `blocks` more may be pinned: the largest live request must still fit into the pool beside them, and the
    /// largest segment that is wanted into the store.
    fn check_pin(&self, blocks: u32, own: Option<SegmentId>) -> Result<(), CoreError> {
        let live = self.seqs.iter().filter(|seq| seq.status() != Status::Vacant);
        let arriving = self.arrivals.values().map(|arrival| arrival.blocks_at_end(self.config.block_size));
        let needed = live.map(|seq| self.blocks_of(seq, own)).chain(arriving).max().unwrap_or(0);
        let others = self.makers.keys().filter(|&&id| Some(id) != own);
        let views = others.map(|&id| self.cache.segment(id)).filter(|view| !view.pinned);
        let wanted = views.map(|view| self.segment_blocks(view.len as usize)).max().unwrap_or(0);
        let pinned = self.cache.pinned_blocks() as u32 + blocks;
        for (needed, total) in [(needed, self.config.num_blocks), (wanted, self.cache.segment_quota() as u32)] {
            if needed + pinned > total {
                return Err(CoreError::Pinned { needed, total, pinned });
            }
        }
        Ok(())
    }

    /// Blocks of a sequence at its end; those of segment `own` are counted by the caller.
    fn blocks_of(&self, seq: &Sequence, own: Option<SegmentId>) -> u32 {
        // A maker that ends has given up its segment before it has left.
        let made = seq.makes.filter(|id| Some(*id) != own && self.makers.contains_key(id));
        let made = made.map_or(0, |id| self.segment_blocks(self.cache.segment(id).len as usize));
        (seq.end_len - 1).div_ceil(self.config.block_size) + made
    }

    /// Sends for the segments of `scratch_spans`. True: the sequence is outside the queue until they are there; false:
    /// none can be had, and those spans are holes now.
    pub(super) fn wait_for_segments(&mut self, slot: u32) -> bool {
        let spans = std::mem::take(&mut self.scratch_spans);
        let may_wait = self.blend(slot).attempts < MAX_ATTEMPTS;
        for &span in &spans {
            let len = self.blend(slot).rule.span(span).len();
            if may_wait && self.fits_alone(len, self.cache.pinned_blocks()) {
                self.want(slot, span);
            } else {
                self.make_holes(slot, [span]);
            }
        }
        self.scratch_spans = spans;
        let waits = !self.blend(slot).waits.is_empty();
        if waits {
            self.leave_queue(slot);
            self.seq_mut(slot).become_(Status::Outside);
            self.num_outside += 1;
            self.blend(slot).attempts += 1;
        }
        waits
    }

    fn blend(&mut self, slot: u32) -> &mut Blend {
        self.seqs[slot as usize].blend.as_mut().expect("only blended sequences wait for segments")
    }

    /// Makes `slot` a waiter for the segment of its span, which gets a maker if it has none.
    fn want(&mut self, slot: u32, span: usize) {
        let seq = &self.seqs[slot as usize];
        let tenant = seq.tenant();
        let blend = seq.blend.as_ref().expect("only blended sequences want segments");
        let ids: Box<[Token]> = seq.tokens[blend.rule.span(span)].into();
        let rank = seq.rank.0;
        let id = match self.cache.find_segment(tenant, &ids) {
            Some(id) => id,
            None => {
                let id = self.cache.open_segment(tenant, &ids);
                self.enlist_maker(id, tenant, &ids, rank);
                id
            }
        };
        let blend = self.blend(slot);
        blend.origins[span] = Origin::Made;
        if !blend.waits.contains(&id) {
            blend.waits.push(id);
            self.makers.get_mut(&id).expect("a segment that is not ready has a maker").waiters.push(slot);
        }
    }

    fn enlist_maker(&mut self, id: SegmentId, tenant: TenantId, ids: &[Token], rank: i64) {
        let mut tokens = self.config.canonical_prefix.clone();
        tokens.extend_from_slice(ids);
        let rank = (rank, self.take_serial());
        // One more than it computes: a sequence is planned while it is shorter than its end.
        let mut seq = Sequence::new(0, 0, Label::exact(tenant), rank, &tokens, tokens.len() as u32 + 1);
        seq.makes = Some(id);
        let (_, slot) = self.enlist(seq, RequestState { handle: NO_HANDLE, ..RequestState::new(1) }, None, 0);
        self.makers.insert(id, Maker { slot, waiters: Vec::new() });
        self.join_queue(slot);
    }

    /// A request that precomputes: ends when its segment is ready or cannot be had, else waits for it.
    fn settle(&mut self, slot: u32) {
        let seq = self.seq(slot);
        let (tenant, pins) = (seq.tenant(), self.request(seq.request).pins);
        let found = self.cache.find_segment(tenant, &seq.tokens);
        if found.is_none_or(|id| self.cache.segment(id).state != SegmentState::Ready) {
            self.scratch_spans.clear();
            self.scratch_spans.push(0);
            if !self.wait_for_segments(slot) {
                self.end(slot, FinishReason::Error);
                return;
            }
        }
        if pins && let Some(id) = self.own_segment(tenant.0, &self.seq(slot).tokens) {
            let view = self.cache.segment(id);
            if !view.pinned && self.check_pin(self.segment_blocks(view.len as usize), Some(id)).is_err() {
                self.end(slot, FinishReason::Error); // Its pin was lost for a time, and others need the room since.
                return;
            }
            self.cache.pin_segment(id, true);
        }
        if self.seq(slot).status() == Status::Waiting {
            self.end(slot, FinishReason::Stop);
        }
    }

    /// The maker's last row is computed: its segment is ready, whoever waited goes on.
    pub(super) fn finish_maker(&mut self, slot: u32, id: SegmentId) {
        self.cache.complete_segment(id); // If it was dropped meanwhile it is gone, and those who waited look again.
        self.stats.segments_made_total += 1;
        let maker = self.makers.remove(&id).expect("it is made by its maker");
        self.end(slot, FinishReason::Stop);
        maker.waiters.into_iter().for_each(|waiter| self.wake(waiter, id));
    }

    /// A maker that ended before its time and holds nothing any more: whoever waited looks again.
    pub(super) fn abandon_maker(&mut self, slot: u32) {
        let Some(id) = self.seq(slot).makes else { return };
        if self.makers.get(&id).is_some_and(|maker| maker.slot == slot) {
            let maker = self.makers.remove(&id).expect("just looked at");
            self.cache.abandon_segment(id);
            maker.waiters.into_iter().for_each(|waiter| self.wake(waiter, id));
        }
    }

    /// A maker that could not run even alone: its waiters compute the span themselves.
    pub(super) fn give_up_maker(&mut self, slot: u32) {
        let id = self.seq(slot).makes.expect("a maker");
        for waiter in self.makers[&id].waiters.clone() {
            self.blend(waiter).attempts = MAX_ATTEMPTS;
        }
        self.end(slot, FinishReason::Error);
    }

    fn wake(&mut self, slot: u32, id: SegmentId) {
        let blend = self.blend(slot);
        blend.waits.retain(|&other| other != id);
        if !blend.waits.is_empty() {
            return;
        }
        self.num_outside -= 1;
        let seq = &mut self.seqs[slot as usize];
        seq.become_(Status::Waiting);
        if self.request(self.seq(slot).request).precomputes {
            self.settle(slot);
        } else {
            self.join_queue(slot);
        }
    }

    /// A sequence outside the queue ends: makers that nobody needs any more end too.
    pub(super) fn stop_waiting(&mut self, slot: u32) {
        self.num_outside -= 1;
        for id in std::mem::take(&mut self.blend(slot).waits) {
            let maker = self.makers.get_mut(&id).expect("it is waited for while it is made");
            maker.waiters.retain(|&waiter| waiter != slot);
            self.dismiss_maker(id);
        }
    }

    fn dismiss_maker(&mut self, id: SegmentId) {
        if let Some(maker) = self.makers.get(&id).filter(|maker| maker.waiters.is_empty())
            && !self.cache.segment(id).pinned
        {
            self.end(maker.slot, FinishReason::Cancelled);
        }
    }
}
