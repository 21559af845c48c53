//! Admission: whoever the queue says comes next, nobody past it; a failed attempt undoes itself.
//!
//! A request comes in with blocks for all its known tokens at once, so a prefill never stalls half way for memory.
//! Called by `Core::schedule` with what is left of the budget.

use super::{Core, PlanRecord};
use crate::cache::{PartialHit, SegmentId};
use crate::ids::{BlockId, Label, Lookup};
use crate::plan::{Cause, PlanWriter, Region};
use crate::sched::{Budget, Demand, everyone_can_finish, reserve_of};
use crate::sequence::{Sequence, Status};

/// What became of an attempt to admit.
enum Attempt {
    /// Admitted, or out of the queue, or changed so that it may be tried again.
    Done,
    /// A neighbour computes `shared` blocks for it.
    Held { num_rows: usize, shared: u64 },
    /// It stays at the head.
    Refused,
}

impl Core {
    pub(super) fn admit(&mut self, plan: &mut PlanWriter<'_>, record: &mut PlanRecord, budget: &mut Budget) {
        self.queue.begin_step();
        self.begin_arranged();
        while budget.tokens() > 0 && !self.free_rows.is_empty() {
            let Some(slot) = self.candidate() else { break };
            if !self.arranged.is_on() {
                let seq = self.seq(slot);
                let (tenant, waiter) = (seq.tenant(), seq.waiter(slot));
                self.queue.choose(tenant, waiter);
            }
            match self.try_admit(slot, true, plan, record, budget) {
                Attempt::Done => {}
                Attempt::Held { num_rows, shared } if self.pass_over(slot, num_rows, shared) => {}
                Attempt::Held { .. } | Attempt::Refused => break,
            }
        }
    }

    /// `may_copy`: a partial hit is worth its block.
    fn try_admit(
        &mut self,
        slot: u32,
        may_copy: bool,
        plan: &mut PlanWriter<'_>,
        record: &mut PlanRecord,
        budget: &mut Budget,
    ) -> Attempt {
        let makes = self.seq(slot).makes;
        let state = self.request(self.seq(slot).request);
        let num_rows = if state.announced || self.seq(slot).repairs() { 1 } else { state.num_choices as usize };
        let is_alone = self.is_alone();
        let held = self.arranged.held();
        if self.refused == Some((slot, self.room_epoch)) && !is_alone {
            return Attempt::Refused;
        }
        if plan.room(Region::Admitted) < num_rows {
            return Attempt::Refused;
        }
        if !self.has_rows(slot, num_rows, held.rows) {
            return Attempt::Refused;
        }
        let is_blend = self.seq(slot).blend.is_some();
        let found =
            if is_blend { self.prepare(slot, may_copy) } else { Some((self.find_prefix(slot, may_copy), None)) };
        let Some((partial, recipe)) = found else { return Attempt::Done };
        if self.hits_arrive || !self.may_copy_hits(plan) {
            return Attempt::Refused; // In the next plan, or the one behind it.
        }
        if let Some(shared) = self.waits_for_neighbour(slot) {
            self.seq_mut(slot).held_steps += 1;
            return Attempt::Held { num_rows, shared };
        }
        let known = self.seq(slot).tokens.len() as u32;
        let num_hits = self.scratch_hits.len() as u32;
        let num_whole = num_hits + self.scratch_host.len() as u32;
        let cached = num_whole * self.config.block_size + partial.map_or(0, |hit| hit.len);
        let is_paid = budget.chunk_len(cached, known - cached, budget.is_untouched()) > 0;
        if !is_paid || (is_blend && !self.may_begin_blend(slot, plan, *budget)) {
            return Attempt::Refused;
        }
        let cursor = self.scratch_hits.last().copied();
        let copies = partial.is_some() || num_whole > num_hits;
        self.pin_hits(partial);
        self.use_segments(slot);
        let wanted = (known.div_ceil(self.config.block_size) - num_hits) as usize;
        let mut fresh = std::mem::take(&mut self.scratch_blocks);
        let fits = (is_alone || self.has_room(slot, num_rows)) && self.obtain(makes, wanted, cursor, &mut fresh);
        if fits {
            self.take_in(slot, &mut fresh, partial, recipe, plan, record);
            if self.seq(slot).is_blending() {
                self.schedule_blend(slot, plan, record, budget, copies);
            } else {
                self.schedule_chunk(slot, plan, record, budget, copies);
            }
        } else {
            self.release_segments(slot);
            self.unpin_hits(partial);
            self.refused = Some((slot, self.room_epoch)).filter(|_| held.num_seqs == 0);
        }
        self.scratch_blocks = fresh;
        if !fits && is_alone && partial.is_some() {
            // The source of the copy may be the block that is missing. What a blend places depends on how far its hit
            // reaches, so it is surveyed anew.
            return self.try_admit(slot, false, plan, record, budget);
        }
        if fits || (is_alone && self.ask_for_less(slot)) { Attempt::Done } else { Attempt::Refused }
    }

    /// Rows for whoever is tried, beside those that are `kept` for others.
    fn has_rows(&mut self, slot: u32, num_rows: usize, kept: usize) -> bool {
        let fits = self.free_rows.len() >= num_rows + kept;
        if !fits && kept == 0 {
            self.refused = Some((slot, self.room_epoch));
        }
        fits
    }

    /// Whether the whole pool is there for whoever comes next.
    pub(super) fn is_alone(&self) -> bool {
        self.running.is_empty() && self.arrivals.is_empty() && self.exports.is_empty()
    }

    /// Blocks for an admission; a maker's segment gets its own beside them, or neither gets any.
    fn obtain(
        &mut self,
        makes: Option<SegmentId>,
        wanted: usize,
        cursor: Option<BlockId>,
        fresh: &mut Vec<BlockId>,
    ) -> bool {
        if makes.is_some_and(|id| !self.cache.fill_segment(id)) {
            return false;
        }
        let fits = self.cache.alloc(wanted, cursor, fresh);
        if let Some(id) = makes.filter(|_| !fits) {
            self.cache.empty_segment(id);
        }
        fits
    }

    /// What does not fit even alone: a maker is given up, a blend computes as new text what it would have read. False:
    /// neither helps.
    fn ask_for_less(&mut self, slot: u32) -> bool {
        let seq = self.seq(slot);
        if seq.makes.is_some() {
            self.give_up_maker(slot);
            return true;
        }
        let Some(blend) = seq.blend.as_ref().filter(|blend| !blend.reused.is_empty()) else { return false };
        let spans: Vec<usize> = blend.reused.iter().map(|range| blend.rule.span_of(range.start)).collect();
        self.make_holes(slot, spans);
        true
    }

    /// Full hits go to `scratch_hits` and `scratch_host`; at least one token is left to compute.
    pub(super) fn find_prefix(&mut self, slot: u32, may_copy: bool) -> Option<PartialHit> {
        self.scratch_hits.clear();
        self.scratch_host.clear();
        self.hits_arrive = false;
        let seq = &self.seqs[slot as usize];
        let state = self.requests[seq.request as usize].as_ref().expect("a waiting sequence has its request");
        if !state.use_cache {
            return None;
        }
        let tokens = &seq.tokens[..seq.tokens.len() - 1];
        let max_blocks = tokens.len() / self.config.block_size as usize;
        let lookup = Lookup::exact(seq.label);
        let partial = self.cache.match_prefix(lookup, tokens, max_blocks, &mut self.scratch_hits);
        self.split_hits(partial).filter(|_| may_copy)
    }

    /// Blocks that this sequence also begins with and a running neighbour computes, if there are more of them than hits: then
    /// a step of patience saves computing them twice. Bounded by `Arranged::hold_limit`.
    fn waits_for_neighbour(&self, slot: u32) -> Option<u64> {
        let seq = self.seq(slot);
        if !self.config.enable_prefix_caching
            || seq.held_steps >= self.arranged.hold_limit()
            || !self.request(seq.request).use_cache
        {
            return None;
        }
        let own = &seq.tokens[..seq.tokens.len() - 1];
        let block_size = self.config.block_size as usize;
        let shared = |other: &Sequence| {
            let theirs = &other.tokens[..(other.prefill_until as usize).min(other.exact_len())];
            own.iter().zip(theirs).take_while(|(a, b)| a == b).count() / block_size
        };
        let is_computing = |other: &&Sequence| {
            let is_prefill = other.status() == Status::Running && other.in_prefill();
            is_prefill && other.makes.is_none() && other.label == seq.label
        };
        let neighbours = self.running.iter().map(|&slot| self.seq(slot)).filter(is_computing);
        let found = self.scratch_hits.len() + self.scratch_host.len();
        neighbours.map(shared).find(|&blocks| blocks > found).map(|blocks| blocks as u64)
    }

    /// Memory-centric admission: what everybody needs soon (known tokens and the reserve; shared prefixes once, because
    /// hits are pinned, not promised) stays below the watermark, and the banker finds an order for all declared ends.
    fn has_room(&mut self, slot: u32, num_rows: usize) -> bool {
        let block_size = self.config.block_size;
        let blocks = |tokens: u32| u64::from(tokens.div_ceil(block_size));
        let mut demands = std::mem::take(&mut self.scratch_demands);
        let mut promised = self.demands(&mut demands);
        let seq = self.seq(slot);
        let hits = self.scratch_hits.len() as u64;
        let own = blocks(seq.tokens.len() as u32) - hits;
        let now = own + self.made_blocks(seq);
        let (end, shared) = (blocks(seq.end_len - 1), u64::from(seq.prompt_len / block_size));
        let soon = self.soon(seq);
        promised +=
            self.arranged.held().blocks + soon - hits + self.made_blocks(seq) + (num_rows as u64 - 1) * (soon - shared);
        demands.push(Demand { remaining: end - hits - own, held: now });
        demands.extend((1..num_rows).map(|_| Demand { remaining: end - shared, held: 0 }));

        let fits = self.has_room_for(promised, now, &mut demands);
        self.scratch_demands = demands;
        fits
    }

    /// Blocks that a sequence needs for its known tokens and the reserve.
    pub(super) fn soon(&self, seq: &Sequence) -> u64 {
        let block_size = self.config.block_size;
        let reserve = reserve_of(seq.preemptions, self.config.reserve_tokens, block_size);
        seq.total_len().saturating_add(reserve).min(seq.end_len - 1).div_ceil(block_size).into()
    }

    /// What everybody who runs or arrives still takes, into `demands`; returns what of it is promised for soon.
    pub(super) fn demands(&self, demands: &mut Vec<Demand>) -> u64 {
        let block_size = self.config.block_size;
        demands.clear();
        let mut promised = 0;
        for seq in self.running.iter().map(|&slot| self.seq(slot)) {
            let (has, is_own) = match seq.status() {
                Status::Running | Status::Frozen => (seq.blocks.len() as u64, true),
                Status::Forked => (u64::from(seq.prompt_len / block_size), false),
                _ => continue,
            };
            promised += self.soon(seq).saturating_sub(has);
            let held = if is_own { has.saturating_sub(seq.hit_len.into()) + self.made_blocks(seq) } else { 0 };
            let end = u64::from((seq.end_len - 1).div_ceil(block_size));
            demands.push(Demand { remaining: end.saturating_sub(has), held });
        }
        for arrival in self.arrivals.values() {
            let (soon, demand) = arrival.demand(&self.config);
            promised += soon;
            demands.push(demand);
        }
        promised
    }

    /// Whether `promised` blocks stay below the watermark and, once `now` of them are taken, everybody can finish.
    pub(super) fn has_room_for(&self, promised: u64, now: u64, demands: &mut [Demand]) -> bool {
        let available = self.cache.available() as u64;
        let total = f64::from(self.config.num_blocks);
        let kept_free = (total * (1.0 - self.config.watermark_ratio)).floor() as u64;
        promised + kept_free <= available && now <= available && everyone_can_finish(available - now, demands)
    }

    /// Blocks of the segment that a maker fills: evictable once it is done.
    fn made_blocks(&self, seq: &Sequence) -> u64 {
        seq.makes.map_or(0, |id| self.segment_blocks(self.cache.segment(id).len as usize).into())
    }

    /// Moves a waiting sequence to a row, with its hits and fresh blocks; on first admission its further choices too.
    fn take_in(
        &mut self,
        slot: u32,
        fresh: &mut Vec<BlockId>,
        partial: Option<PartialHit>,
        recipe: Option<u32>,
        plan: &mut PlanWriter<'_>,
        record: &mut PlanRecord,
    ) {
        let block_size = self.config.block_size;
        let row = self.free_rows.pop().expect("rows were counted before");
        self.unwatch(slot);
        let seq = &mut self.seqs[slot as usize];
        self.queue.admit(seq.tenant(), seq.waiter(slot));
        self.arrange_admission(slot);
        let seq = &mut self.seqs[slot as usize];
        seq.become_(Status::Running);
        seq.row = row;
        seq.blocks.reserve_exact(seq.end_len.div_ceil(block_size) as usize);
        seq.blocks.append(&mut self.scratch_hits);
        seq.hit_len = seq.blocks.len() as u32;
        seq.tree_len = seq.hit_len;
        seq.committed_len = seq.hit_len * block_size;
        seq.scheduled_len = seq.committed_len;
        seq.prefill_until = seq.tokens.len() as u32;
        let is_public = |&&block: &&BlockId| self.cache.label(block) == Some(Label::PUBLIC);
        seq.found_len = seq.hit_len + self.scratch_host.iter().take_while(is_public).count() as u32;
        let copied = self.copy_hits(fresh, partial, plan, record);
        let seq = &mut self.seqs[slot as usize];
        seq.scheduled_len += copied;
        seq.blocks.append(fresh);
        let cached_len = seq.scheduled_len.min(seq.prompt_len);
        let (request, choice, prompt_len, is_maker) = (seq.request, seq.choice, seq.prompt_len, seq.makes.is_some());
        let state = self.request_mut(request);
        let (handle, is_first) = (state.handle, !state.announced);
        state.announced = true;
        let cause = match (std::mem::take(&mut self.seqs[slot as usize].arrived), is_first) {
            (true, _) => Cause::Imported,
            (false, true) => Cause::New,
            (false, false) => Cause::Resumed,
        };
        self.enter_running(slot);
        if is_first {
            let (tenant, work) = (self.seq(slot).tenant(), self.waiting(slot, cached_len).work());
            self.queue.charge(tenant, work.into());
        }
        if is_maker {
            return;
        }
        plan.admitted(handle, choice, row, cause, cached_len);
        self.begin_blend(slot, recipe, is_first);
        if is_first {
            self.stats.prompt_tokens_total += u64::from(prompt_len);
            self.stats.prefix_hit_tokens_total += u64::from(cached_len);
            for choice in 1..self.request(request).num_choices {
                if self.seq(slot).repairs() {
                    self.queue_choice(slot, choice);
                    continue;
                }
                let row = self.reserve_fork(slot, choice);
                plan.admitted(handle, choice, row, Cause::Forked, cached_len);
            }
        }
    }

    /// Gives a further choice its sequence and its row.
    fn reserve_fork(&mut self, parent: u32, choice: u32) -> u32 {
        let row = self.free_rows.pop().expect("rows were counted before");
        let mut fork = Sequence::forked_from(self.seq(parent), choice);
        fork.row = row;
        fork.blocks.reserve_exact(fork.end_len.div_ceil(self.config.block_size) as usize);
        let slot = self.join(fork.request, fork);
        self.enter_running(slot);
        row
    }

    pub(super) fn enter_running(&mut self, slot: u32) {
        self.grouping.forget();
        let order = self.seq(slot).order();
        let at = self.running.partition_point(|&other| self.seq(other).order() < order);
        self.running.insert(at, slot);
    }
}
