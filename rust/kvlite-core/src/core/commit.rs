//! What a completed plan changes: counters, output tokens, the tree, forks. The only writer of `committed_len`.
//!
//! A failed plan, or a row below 0, ends the requests concerned and publishes nothing of them. Called by `Core::step`.

use super::{Core, Hold, PlanEntry};
use crate::blend::Stage;
use crate::cache::Inserted;
use crate::ids::{BlockId, Token};
use crate::plan::Region;
use crate::sched::policy::OUTPUT_WEIGHT;
use crate::sequence::{FinishReason, Status, stop_bit};

impl Core {
    /// Commits the plan recorded for arena `idx`, whose inputs are in `arena`.
    pub(super) fn commit_plan(&mut self, idx: usize, arena: &[i32]) {
        let mut record = std::mem::take(&mut self.records[idx]);
        let failed = record.num_tokens > 0 && arena[self.layout.offset(Region::Status)] != 0;
        self.stats.failed_plans_total += u64::from(failed);
        // Before any block is published: what this plan copied from may be published (and unpinned) from now on. A plan without
        // rows is not run, so it copied nothing.
        let was_run = record.num_tokens > 0 && !failed;
        for hold in record.holds.drain(..) {
            self.let_go(hold, was_run);
        }
        let [sampled, scored] = [Region::Sampled, Region::Scored].map(|region| &arena[self.layout.offset(region)..]);
        for entry in &record.entries {
            let samples = &sampled[entry.first_sample as usize..][..entry.num_samples as usize];
            self.commit_entry(entry, samples, scored, failed);
        }
        record.entries.clear();
        record.number = 0;
        self.records[idx] = record;
    }

    fn commit_entry(&mut self, entry: &PlanEntry, samples: &[i32], scored: &[i32], failed: bool) {
        let slot = entry.slot;
        let seq = &mut self.seqs[slot as usize];
        seq.outstanding -= 1;
        seq.samples_in_flight -= u32::from(entry.draws);
        let (status, request) = (seq.status(), seq.request);
        let vocab_size = self.config.vocab_size;
        let is_fault = |&id: &i32| u32::try_from(id).map_or(true, |id| id >= vocab_size);
        if failed || (status != Status::Ending && samples.iter().any(is_fault)) {
            // The whole request: even if this choice has ended, further ones may wait for the prompt it computed.
            self.end_request(request, FinishReason::Error);
            return;
        }
        if status == Status::Ending {
            return; // A late sample of an ended sequence is discarded.
        }
        if status == Status::Forked {
            self.activate_fork(slot);
        } else {
            seq.committed_len = entry.len_after;
            seq.logprobs_len = seq.logprobs_len.max(entry.len_after.min(seq.prompt_len - 1));
            if seq.blend.is_some() {
                self.commit_blend(*entry, scored);
            }
            self.publish(slot);
        }
        let seq = self.seq(slot);
        if let Some(id) = seq.makes.filter(|_| seq.committed_len as usize == seq.tokens.len()) {
            self.finish_maker(slot, id);
        }
        if entry.draws {
            self.append(slot, samples[samples.len() - 1]);
        }
    }

    /// Commits one output token and applies the ends that depend on ids and counts alone.
    fn append(&mut self, slot: u32, token: Token) {
        let seq = &mut self.seqs[slot as usize];
        seq.tokens.push(token);
        let (output_len, tenant) = (seq.output_len(), seq.tenant());
        self.out_committed.push([seq.row as i32, output_len as i32 - 1, token]);
        self.stats.generated_tokens_total += 1;
        self.queue.charge(tenant, OUTPUT_WEIGHT);
        let at_end = seq.tokens.len() as u32 >= seq.end_len;
        let may_stop = seq.stop_mask & stop_bit(token) != 0;
        if may_stop && self.is_stop(slot, token) {
            self.end(slot, FinishReason::Stop);
        } else if at_end {
            self.end(slot, FinishReason::Length);
        }
    }

    fn is_stop(&self, slot: u32, token: Token) -> bool {
        let seq = self.seq(slot);
        let state = self.request(seq.request);
        seq.output_len() >= state.min_tokens && state.stop_token_ids.contains(&token)
    }

    /// Puts every full block whose KV is written into the tree. A block that is there already replaces ours.
    pub(super) fn publish(&mut self, slot: u32) {
        let block_size = self.config.block_size as usize;
        let seq = &self.seqs[slot as usize];
        let is_short = (seq.committed_len as usize) < (seq.tree_len as usize + 1) * block_size;
        if is_short || !self.config.enable_prefix_caching || seq.makes.is_some() {
            return;
        }
        let full = seq.committed_len as usize / block_size;
        for at in seq.tree_len as usize..full {
            let seq = &self.seqs[slot as usize];
            let block = seq.blocks[at];
            if self.extra_owners[block.index as usize] > 0 {
                return; // Still the source of a fork's copy; published once it is ours alone.
            }
            let parent = at.checked_sub(1).map(|above| seq.blocks[above]);
            let tokens = &seq.tokens[at * block_size..][..block_size];
            let Some(label) = self.label_of(seq, at) else { return };
            let inserted = match at < seq.found_len as usize {
                true => self.cache.restore(label, parent, tokens, block),
                false => self.cache.insert(label, parent, tokens, block),
            };
            if let Some(parent) = parent {
                self.cache.unpin(parent); // The child protects it now.
            }
            let seq = &mut self.seqs[slot as usize];
            seq.tree_len = at as u32 + 1;
            if inserted == Inserted::New {
                self.follow(block);
            } else if let Inserted::Duplicate(existing) = inserted {
                self.grouping.forget();
                seq.blocks[at] = existing;
                seq.table_len = seq.table_len.min(at as u32);
                self.retire(block);
            }
        }
    }

    /// Frees a merged duplicate once no plan in flight reads it.
    fn retire(&mut self, block: BlockId) {
        match self.newest_in_flight() {
            Some(record) => record.holds.push(Hold::Private(block)),
            None => self.free_private(block),
        }
    }

    /// Starts a further choice on the prompt that choice 0 has computed: full blocks are shared, the partly filled one is
    /// the source of a copy in the next plan that has room for it.
    ///
    /// ```text
    ///   choice 0   [p p p p][p p p p][p p o .]     o: own output; written at or after prompt_len, so the copy of the
    ///   choice 1    shared   shared  [p p . .]     prompt's part is right whenever it is made
    /// ```
    fn activate_fork(&mut self, slot: u32) {
        let block_size = self.config.block_size;
        let parent_slot =
            self.slot_of(self.seq(slot).request, 0).expect("choice 0 is held until its plan is committed");
        let [parent, fork] =
            self.seqs.get_disjoint_mut([parent_slot as usize, slot as usize]).expect("choice 0 is another sequence");
        let (prompt_len, is_frozen) =
            (fork.prompt_len, self.requests[fork.request as usize].as_ref().is_some_and(|state| state.frozen));
        fork.become_(Status::Running);
        if is_frozen {
            fork.become_(Status::Frozen);
        }
        if let (Some(theirs), Some(blend)) = (&parent.blend, &mut fork.blend) {
            blend.stage = Stage::Done;
            blend.recipe = theirs.recipe;
            theirs.recipe.iter().for_each(|&recipe| self.recipes.hold(recipe));
        }
        fork.scheduled_len = prompt_len;
        fork.committed_len = prompt_len;
        if prompt_len % block_size != 0 {
            let tail = parent.blocks[(prompt_len / block_size) as usize];
            self.extra_owners[tail.index as usize] += 1;
            fork.tail_source = Some(tail);
        }
        self.share_prompt(parent_slot, slot);
    }

    /// Gives a choice without blocks the full prompt blocks of another one, which has computed them.
    pub(super) fn share_prompt(&mut self, parent: u32, slot: u32) {
        let [parent, fork] =
            self.seqs.get_disjoint_mut([parent as usize, slot as usize]).expect("a choice shares with another one");
        let full = (fork.prompt_len / self.config.block_size) as usize;
        fork.blocks.extend_from_slice(&parent.blocks[..full]);
        fork.tree_len = parent.tree_len.min(full as u32);
        fork.hit_len = full as u32;
        if let Some(cursor) = fork.tree_len.checked_sub(1) {
            self.cache.pin(fork.blocks[cursor as usize]);
        }
        for block in &fork.blocks[fork.tree_len as usize..] {
            self.extra_owners[block.index as usize] += 1;
        }
    }
}
