//! KVShare's decode stage: each decode step of a blended sequence also computes some reused rows again.
//!
//! Which ones, `blend.rs` says: weights are asked anew with every token, so while an answer is in flight the sequence is
//! in no other plan. Repairs write into blocks of the prompt: choices share none of them and nothing of them is
//! published. Called by `schedule.rs`, `admit.rs`. Source: KVShare (arXiv 2503.16525).

use super::{Core, PlanEntry, PlanRecord};
use crate::plan::{PlanWriter, Region, SAMPLE};
use crate::sequence::{Sequence, Status};

impl Core {
    /// Reused rows that the next decode step of `slot` repairs, as far as the plan has room beside everybody's decodes.
    pub(super) fn repairs(&self, slot: u32, plan: &PlanWriter<'_>) -> Vec<u32> {
        let Some(blend) = self.seq(slot).blend.as_ref().filter(|blend| blend.rule.decode_rows > 0) else {
            return Vec::new();
        };
        let tokens = self.config.max_num_batched_tokens - plan.num_tokens() as u32;
        let is_tight = tokens < blend.rule.decode_rows + self.config.max_num_seqs;
        if is_tight || plan.room(Region::Score) == 0 || plan.room(Region::Scored) < blend.hull().len() {
            return Vec::new();
        }
        blend.repairs()
    }

    /// A decode step that also computes `rows` again and asks anew what its own row attends to.
    pub(super) fn emit_repairs(
        &mut self,
        slot: u32,
        rows: &[u32],
        plan: &mut PlanWriter<'_>,
        record: &mut PlanRecord,
        copied: bool,
    ) {
        let block_size = self.config.block_size;
        let position = self.seq(slot).scheduled_len;
        if !self.show(slot, position + 1, plan, record, copied) {
            return;
        }
        let seq = &mut self.seqs[slot as usize];
        for &row in rows.iter().chain([&position]) {
            let id = seq.tokens.get(row as usize).copied().unwrap_or(-1);
            plan.token(id, row, seq.slot_at(row, block_size), -1);
        }
        let last = plan.num_tokens() - 1;
        let mut entry = PlanEntry::of(slot, position + 1);
        let blend = seq.blend.as_mut().expect("only blends are repaired");
        let (method_id, round) = (blend.rule.method_id, blend.rule.rounds.len() as u32);
        entry.scored = Some(plan.score(last..last + 1, blend.hull(), method_id, round));
        blend.unread += 1;
        blend.repair(rows);
        plan.sequence(seq.row, position + 1);
        (entry.first_sample, entry.num_samples, entry.draws) = (plan.sample(last, seq.row, SAMPLE), 1, true);
        seq.samples_in_flight += 1;
        seq.scheduled_len = position + 1;
        Core::name(seq, record, entry);
        self.stats.prefill_tokens_total += rows.len() as u64;
    }

    /// Gives a further choice its sequence and a place in the queue: it places its own copy of what is reused.
    pub(super) fn queue_choice(&mut self, parent: u32, choice: u32) {
        let mut fork = Sequence::forked_from(self.seq(parent), choice);
        fork.become_(Status::Waiting);
        let slot = self.join(fork.request, fork);
        self.join_queue(slot);
    }
}
