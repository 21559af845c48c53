//! The plan's body: running decodes oldest first, then the partly done prefill, then admissions (`admit.rs`).
//!
//! The only writer of `scheduled_len`, and the only place that preempts. A sequence is named at most once per plan.
//! Called by `Core::step`, after commits and releases.

use std::ops::Range;

use super::{Core, Hold, PlanEntry, PlanRecord};
use crate::plan::{CopyDirection, PROMPT_LOGPROB, PlanWriter, Region, SAMPLE};
use crate::sched::{Budget, Candidate, victim};
use crate::sequence::{Sequence, Status};

impl Core {
    pub(super) fn schedule(&mut self, plan: &mut PlanWriter<'_>, record: &mut PlanRecord) {
        let preemptions = self.stats.preemptions_total;
        let mut prefill = std::mem::take(&mut self.scratch_prefill);
        for at in 0..self.running.len() {
            let slot = self.running[at];
            let seq = self.seq(slot);
            if seq.status() != Status::Running {
                continue;
            }
            if let Some(blend) = &seq.blend {
                if blend.is_active() {
                    prefill.push(slot);
                    continue;
                }
                if blend.unread > 0 {
                    continue; // Its next repairs depend on them.
                }
            }
            match seq.schedulable() {
                0 => {}
                1 => self.schedule_decode(slot, plan, record),
                _ => prefill.push(slot),
            }
        }
        let tokens = self.config.max_num_batched_tokens - plan.num_tokens() as u32;
        let mut budget = Budget::new(tokens, self.config.attention_cost_tokens);
        for slot in prefill.drain(..) {
            match self.seq(slot) {
                seq if seq.status() != Status::Running => {}
                seq if seq.is_blending() => self.schedule_blend(slot, plan, record, &mut budget, false),
                _ => self.schedule_chunk(slot, plan, record, &mut budget, false),
            }
        }
        self.scratch_prefill = prefill;
        if self.stats.preemptions_total == preemptions {
            self.admit(plan, record, &mut budget);
        } else {
            self.forget_departed(); // And nobody is admitted into the room of the victims in the same step.
        }
    }

    /// One token of a sequence whose other tokens are all planned: a decode, or the end of a prefill.
    fn schedule_decode(&mut self, slot: u32, plan: &mut PlanWriter<'_>, record: &mut PlanRecord) {
        let seq = self.seq(slot);
        let needs_block = seq.scheduled_len as usize == seq.blocks.len() * self.config.block_size as usize;
        let mut copied = false;
        if let Some(source) = seq.tail_source {
            let is_shared = |core: &Core| core.extra_owners[source.index as usize] > 0;
            if is_shared(self) && self.alloc_or_preempt(slot, record.number) {
                let target = *self.seq(slot).blocks.last().expect("just allocated");
                plan.block_copy(CopyDirection::OnDevice, source.index, target.index);
                record.holds.push(Hold::Private(source));
                copied = true;
            } else if is_shared(self) || self.seq(slot).tail_source.is_none() {
                return; // It waits for room, or made room itself.
            } else {
                self.seq_mut(slot).blocks.push(source); // Its last owner, since a victim left perhaps, needs no copy.
            }
            self.seq_mut(slot).tail_source = None;
        } else if needs_block && !self.alloc_or_preempt(slot, record.number) {
            return;
        }
        let rows = if self.seq(slot).repairs() { self.repairs(slot, plan) } else { Vec::new() };
        if rows.is_empty() {
            self.emit(slot, 1, plan, record, copied);
        } else {
            self.emit_repairs(slot, &rows, plan, record, copied);
        }
    }

    /// As much of a prefill as the budget pays for; its blocks were allocated at admission. `copied`: this plan copies
    /// into one of its blocks.
    pub(super) fn schedule_chunk(
        &mut self,
        slot: u32,
        plan: &mut PlanWriter<'_>,
        record: &mut PlanRecord,
        budget: &mut Budget,
        copied: bool,
    ) {
        let seq = self.seq(slot);
        let start = seq.scheduled_len;
        let len = budget.chunk_len(start, seq.schedulable(), budget.is_untouched());
        if len > 0 && self.emit(slot, len, plan, record, copied) {
            budget.spend(start, len);
            self.stats.prefill_tokens_total += u64::from(len);
        }
    }

    /// Sends the device the block table's entries up to key `end`. False: not all of them fit into the plan; what did is
    /// sent, and rows follow in a later plan.
    pub(super) fn show(
        &mut self,
        slot: u32,
        end: u32,
        plan: &mut PlanWriter<'_>,
        record: &mut PlanRecord,
        copied: bool,
    ) -> bool {
        let block_size = self.config.block_size;
        let seq = &mut self.seqs[slot as usize];
        let is_shown = end <= seq.table_len * block_size;
        let backlog = if is_shown { 0 } else { end.div_ceil(block_size) - seq.table_len };
        // A long backlog leaves one entry per running sequence, so that decodes behind it go on.
        let kept = if backlog > 2 { self.config.max_num_seqs as usize } else { 0 };
        let sent = backlog.min(plan.room(Region::BlockUpdate).saturating_sub(kept) as u32);
        for index in seq.table_len..seq.table_len + sent {
            plan.block_update(seq.row, index, seq.blocks[index as usize].index);
        }
        if sent > 0 && seq.table_len < seq.tree_len {
            seq.shown_by = record.number;
        }
        seq.table_len += sent;
        let is_whole = sent == backlog;
        if !is_whole && (sent > 0 || copied) {
            let len_after = seq.scheduled_len;
            Core::name(seq, record, PlanEntry::of(slot, len_after));
        }
        is_whole
    }

    /// Records what the plan does to a sequence, which is in use until the plan has completed.
    pub(super) fn name(seq: &mut Sequence, record: &mut PlanRecord, entry: PlanEntry) {
        seq.outstanding += 1;
        seq.last_plan = record.number;
        record.entries.push(entry);
    }

    /// Writes `len` rows of a sequence and what they need; false: they follow in a later plan.
    fn emit(&mut self, slot: u32, len: u32, plan: &mut PlanWriter<'_>, record: &mut PlanRecord, copied: bool) -> bool {
        let block_size = self.config.block_size;
        let seq = &self.seqs[slot as usize];
        let (start, end) = (seq.scheduled_len, seq.scheduled_len + len);
        let is_shown = end <= seq.table_len * block_size;
        if !is_shown && !self.show(slot, end, plan, record, copied) {
            return false;
        }
        let seq = &self.seqs[slot as usize];
        let (first_row, first_sample) = (plan.num_tokens(), plan.next_sample());
        if len == 1 && seq.makes.is_none() {
            let id = seq.tokens.get(start as usize).copied().unwrap_or(-1);
            plan.token(id, start, seq.slot_at(start, block_size), -1);
        } else {
            self.write_rows(seq, start..end, plan);
        }
        let index = plan.sequence(seq.row, end);
        if seq.choice == 0 && start + 1 < seq.prompt_len {
            self.sample_prompt(seq, start..end, first_row, plan);
        }
        let seq = &mut self.seqs[slot as usize];
        let draws = end == seq.total_len() && seq.makes.is_none();
        if draws {
            plan.sample(plan.num_tokens() - 1, seq.row, SAMPLE);
            seq.samples_in_flight += 1;
        }
        seq.scheduled_len = end;
        let computes_prompt_end = seq.choice == 0 && end == seq.prompt_len;
        let num_samples = plan.next_sample() - first_sample;
        Core::name(seq, record, PlanEntry { first_sample, num_samples, draws, ..PlanEntry::of(slot, end) });
        self.may_group(slot, len, index);
        if computes_prompt_end {
            self.sample_forks(slot, plan.num_tokens() - 1, plan, record);
        }
        true
    }

    /// Rows of a prefill; those of a segment that is being made go there too.
    fn write_rows(&self, seq: &Sequence, positions: Range<u32>, plan: &mut PlanWriter<'_>) {
        let block_size = self.config.block_size;
        let made = seq.makes.map_or(&[][..], |id| self.cache.segment(id).blocks);
        let made_start = self.config.canonical_prefix.len() as u32;
        let made_slot = |position: u32| match position.checked_sub(made_start) {
            Some(at) if !made.is_empty() => {
                (made[(at / block_size) as usize].index * block_size + at % block_size) as i32
            }
            _ => -1,
        };
        let (mut index, mut offset) = (positions.start / block_size, positions.start % block_size);
        for position in positions {
            let id = seq.tokens.get(position as usize).copied().unwrap_or(-1);
            plan.token(id, position, seq.blocks[index as usize].index * block_size + offset, made_slot(position));
            offset += 1;
            if offset == block_size {
                (index, offset) = (index + 1, 0);
            }
        }
    }

    /// Asks for the log-probabilities of the prompt's tokens behind `positions`, whose rows begin at `first_row`, where
    /// the request wants them and has not got them.
    fn sample_prompt(&self, seq: &Sequence, positions: Range<u32>, first_row: usize, plan: &mut PlanWriter<'_>) {
        if self.request(seq.request).prompt_logprobs {
            for position in positions.start.max(seq.logprobs_len)..positions.end.min(seq.prompt_len - 1) {
                plan.sample(first_row + (position - positions.start) as usize, seq.row, PROMPT_LOGPROB);
            }
        }
    }

    /// Samples the last prompt row once more for every choice that waits for it.
    pub(super) fn sample_forks(&mut self, slot: u32, row: usize, plan: &mut PlanWriter<'_>, record: &mut PlanRecord) {
        let request = self.seq(slot).request;
        for choice in 1..self.request(request).choices.len() {
            let Some(slot) = self.slot_of(request, choice) else { continue };
            let fork = &mut self.seqs[slot as usize];
            if fork.status() != Status::Forked {
                continue;
            }
            let first_sample = plan.next_sample();
            plan.sample(row, fork.row, SAMPLE);
            fork.samples_in_flight += 1;
            let entry = PlanEntry { first_sample, num_samples: 1, draws: true, ..PlanEntry::of(slot, fork.prompt_len) };
            Core::name(fork, record, entry);
        }
    }

    /// One more block for a running sequence, at the price of others if need be: least computed first, never the leader,
    /// nobody who is in this plan already. False: not in this step (room is on its way, or the sequence itself had to go).
    fn alloc_or_preempt(&mut self, slot: u32, plan_number: u64) -> bool {
        loop {
            let blocks = &mut self.seqs[slot as usize].blocks;
            let after = blocks.last().copied();
            if self.cache.alloc(1, after, blocks) {
                return true;
            }
            if self.num_leaving > 0 {
                return false;
            }
            let Some(loser) = self.pick_victim(plan_number) else { return false };
            self.preempt(loser);
            if loser == slot {
                return false;
            }
        }
    }

    fn pick_victim(&self, plan_number: u64) -> Option<u32> {
        let alive = |&(_, slot): &(usize, &u32)| matches!(self.seq(*slot).status(), Status::Running | Status::Forked);
        let candidates = self.running.iter().enumerate().filter(alive).skip(1).filter_map(|(position, &slot)| {
            let seq = self.seq(slot);
            let is_free = seq.status() == Status::Running && seq.last_plan != plan_number;
            is_free.then_some(Candidate { computed: seq.committed_len, position })
        });
        victim(candidates).map(|candidate| self.running[candidate.position])
    }

    fn preempt(&mut self, slot: u32) {
        self.stats.preemptions_total += 1;
        if self.seq(slot).outstanding == 0 {
            self.park(slot);
        } else {
            self.seq_mut(slot).become_(Status::Preempting);
            self.num_leaving += 1;
        }
    }
}
