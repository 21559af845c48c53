//! Blended sequences: what they hit and reuse, their plans stage by stage, what completed scores decide.
//!
//! Row lists and choices are `blend.rs`'s; this file connects them with the cache, the budget and the plan. Invariants:
//! segments are in use from admission until the plan that placed them has completed; nothing is published before the
//! recipe is known; while scores are in flight the sequence is in no other plan. Called by `admit.rs`, `schedule.rs`,
//! `commit.rs`.

use std::sync::Arc;

use super::reuse::{ReuseReport, SpanOutcome};
use super::{Core, PlanEntry, PlanRecord};
use crate::blend::{Blend, Choice, Origin, Reused, Stage};
use crate::cache::{PartialHit, SegmentState};
use crate::ids::{Label, Lookup};
use crate::plan::{PlanWriter, Region, SAMPLE};
use crate::sched::{Budget, FULL_SHARE, Pass};
use crate::sequence::Sequence;

impl Core {
    /// What a blended sequence would come in with: full hits in `scratch_hits`, reused rows in its `reused`, spans whose
    /// segments are not there in `scratch_spans`. Returns the partial hit (none unless it `may_copy`) and the recipe that
    /// both go by.
    pub(super) fn survey(&mut self, slot: u32, may_copy: bool) -> (Option<PartialHit>, Option<u32>) {
        let block_size = self.config.block_size;
        let seq = &mut self.seqs[slot as usize];
        let tenant = seq.tenant();
        let blend = seq.blend.as_mut().expect("a blended sequence");
        let state = self.requests[seq.request as usize].as_ref().expect("a waiting sequence has its request");
        let tokens = &seq.tokens[..seq.tokens.len() - 1];
        let max_blocks = tokens.len() / block_size as usize;
        let options = match blend.recipe {
            Some(own) => vec![Some(own)],
            None if !state.use_cache => vec![None],
            None => {
                let is_hole = |at: u32| blend.origins[blend.rule.span_of(at)] == Origin::Hole;
                let mut found = self.recipes.candidates(tenant, &blend.rule, &seq.tokens);
                // The prompt's last row is always computed: under a recipe that reuses it, that would be other KV.
                let is_foreign = |range: &(u32, u32)| is_hole(range.0) || range.1 >= seq.prompt_len;
                found.retain(|&number| !self.recipes.get(number).reused.iter().any(is_foreign));
                [None].into_iter().chain(found.into_iter().map(Some)).collect()
            }
        };
        let (mut best, mut trial) = (None, std::mem::take(&mut self.scratch_blocks));
        for option in options {
            trial.clear();
            let recipe = option.map(|number| (Label::recipe(number), self.recipes.get(number).first_block(block_size)));
            let lookup = Lookup { own: seq.label, recipe };
            let partial =
                if state.use_cache { self.cache.match_prefix(lookup, tokens, max_blocks, &mut trial) } else { None };
            let partial = partial.filter(|hit| may_copy && !self.cache.is_arriving(hit.block));
            let reach = trial.len() as u32 * block_size + partial.map_or(0, |hit| hit.len);
            if best.is_none_or(|(best, _, _)| reach > best) {
                best = Some((reach, partial, option));
                std::mem::swap(&mut self.scratch_hits, &mut trial);
            }
        }
        trial.clear();
        self.scratch_blocks = trial;
        let (hit, partial, recipe) = best.expect("there is at least one option");

        let rule = Arc::clone(&blend.rule);
        let mut ranges: Vec<(u32, u32)> = match recipe {
            Some(number) => self.recipes.get(number).reused.to_vec(),
            None => rule.spans.iter().map(|&(start, len)| (start, start + len)).collect(),
        };
        ranges.iter_mut().for_each(|range| *range = (range.0.max(hit), range.1.min(seq.prompt_len - 1)));
        blend.reused.clear();
        self.scratch_spans.clear();
        for (start, end) in ranges.into_iter().filter(|&(start, end)| start < end) {
            let span = rule.span_of(start);
            if recipe.is_none() && blend.origins[span] == Origin::Hole {
                continue;
            }
            let offset = start - rule.spans[span].0;
            let found = self.cache.find_segment(tenant, &seq.tokens[rule.span(span)]);
            match found.filter(|&id| self.cache.segment(id).state == SegmentState::Ready) {
                Some(segment) => blend.reused.push(Reused { start, end, offset, segment }),
                None => self.scratch_spans.push(span),
            }
        }
        (self.split_hits(partial), recipe)
    }

    /// A survey in which nothing is missing. None: the sequence has gone outside the queue to wait for segments.
    pub(super) fn prepare(&mut self, slot: u32, may_copy: bool) -> Option<(Option<PartialHit>, Option<u32>)> {
        loop {
            let found = self.survey(slot, may_copy);
            if self.scratch_spans.is_empty() {
                return Some(found);
            }
            if self.wait_for_segments(slot) {
                return None;
            }
        }
    }

    /// Spans that are to be reused, or all of them, become new text: the recipe that asked for them is given up.
    pub(super) fn make_holes(&mut self, slot: u32, spans: impl IntoIterator<Item = usize>) {
        let blend = self.seqs[slot as usize].blend.as_mut().expect("a blended sequence");
        spans.into_iter().for_each(|span| blend.origins[span] = Origin::Hole);
        if let Some(recipe) = blend.recipe.take() {
            self.recipes.release(recipe, &self.cache);
        }
    }

    /// Protects what a surveyed sequence reads from eviction.
    pub(super) fn use_segments(&mut self, slot: u32) {
        let Some(blend) = &mut self.seqs[slot as usize].blend else { return };
        blend.uses_segments = true;
        blend.reused.iter().for_each(|range| self.cache.use_segment(range.segment));
    }

    /// Ends that.
    pub(super) fn release_segments(&mut self, slot: u32) {
        let Some(blend) = &mut self.seqs[slot as usize].blend else { return };
        if std::mem::take(&mut blend.uses_segments) {
            blend.reused.iter().for_each(|range| self.cache.release_segment(range.segment));
        }
    }

    /// Starts the stay of a sequence that was just admitted with what `survey` found.
    pub(super) fn begin_blend(&mut self, slot: u32, recipe: Option<u32>, is_first: bool) {
        let seq = &mut self.seqs[slot as usize];
        let (hit, len, prompt_len) = (seq.scheduled_len, seq.tokens.len() as u32, seq.prompt_len);
        let Some(blend) = &mut seq.blend else { return };
        if let Some(number) = recipe.filter(|_| blend.recipe.is_none()) {
            self.recipes.hold(number);
            blend.recipe = recipe;
        }
        let replayed = recipe.map(|number| Arc::clone(&self.recipes.get(number).chosen));
        if is_first || self.request(self.seq(slot).request).reuse.is_none() {
            self.report_reuse(slot, hit, replayed.as_ref().map(|choice| &*choice.rows));
        }
        let blend = self.seqs[slot as usize].blend.as_mut().expect("looked at above");
        if blend.reused.is_empty() {
            blend.stage = Stage::Done;
            blend.uses_segments = false;
        } else if let Some(choice) = replayed {
            blend.replay(hit, len, choice);
        } else if let Some(choice) = blend.begin(hit, len, prompt_len) {
            self.choose(slot, choice);
        }
    }

    /// Counts where the tokens of a prompt come from, once; work depends on lengths, so the counts are known by now.
    fn report_reuse(&mut self, slot: u32, hit: u32, replayed: Option<&[u32]>) {
        let seq = &self.seqs[slot as usize];
        let hit = hit.min(seq.prompt_len); // A replay's may reach into its output.
        let blend = seq.blend.as_ref().expect("a blended sequence");
        let reused = blend.num_reused();
        let recomputed =
            replayed.map_or_else(|| crate::blend::budget_of(blend.rule.ratio, reused), |chosen| blend.num_kept(chosen));
        let exact_end = blend.recipe.map_or(u32::MAX, |number| self.recipes.get(number).reused[0].0);
        let outcome = |(&(start, len), &origin): (&(u32, u32), &Origin)| {
            let end = start + len;
            match origin {
                Origin::Hole => SpanOutcome::Hole,
                _ if end <= hit && end <= exact_end => SpanOutcome::Prefix,
                _ if end <= hit => SpanOutcome::Recipe,
                _ if !blend.reused.iter().any(|range| start < range.end && range.start < end) => SpanOutcome::Hole,
                Origin::Made => SpanOutcome::Made,
                Origin::Store => SpanOutcome::Hit,
            }
        };
        let report = ReuseReport {
            prefix_tokens: hit,
            blended_tokens: (reused - recomputed) as u32,
            recomputed_tokens: recomputed as u32,
            computed_tokens: seq.prompt_len - hit - reused as u32,
            spans: blend.rule.spans.iter().zip(&blend.origins).map(outcome).collect(),
        };
        self.stats.segment_hit_tokens_total += reused as u64;
        self.stats.blended_tokens_total += u64::from(report.blended_tokens);
        self.stats.recomputed_tokens_total += u64::from(report.recomputed_tokens);
        let request = seq.request;
        self.request_mut(request).reuse = Some(Box::new(report));
    }

    /// The rows to compute again are known: so is the recipe.
    fn choose(&mut self, slot: u32, choice: Choice) {
        let seq = &mut self.seqs[slot as usize];
        let (prompt_len, tenant) = (seq.prompt_len, seq.tenant());
        let blend = seq.blend.as_mut().expect("a blended sequence");
        blend.recompute(&blend.with_repaired(&choice.rows));
        let scored_len = if choice.ran.is_empty() { blend.rule.spans_end() } else { prompt_len };
        let reused = blend.reused.iter().map(|range| (range.start, range.end)).collect();
        let tokens = &seq.tokens[..scored_len as usize];
        let number = self.recipes.intern((tenant, &blend.rule), tokens, reused, choice, &self.cache);
        blend.recipe = Some(number);
    }

    /// Whether this plan has room for places and scores of a surveyed sequence, and the budget pays for its first row.
    pub(super) fn may_begin_blend(&self, slot: u32, plan: &PlanWriter<'_>, mut budget: Budget) -> bool {
        let seq = &self.seqs[slot as usize];
        let blend = seq.blend.as_ref().expect("a blended sequence");
        let is_untouched = budget.is_untouched();
        budget.spend_keys(blend.place_cost());
        let has_room = plan.room(Region::Score) > 0 && plan.room(Region::Scored) >= blend.hull().len();
        let last = seq.tokens.len() as u32 - 1;
        has_room && self.may_place(blend, plan) && budget.take_rows(&[last], Pass::FULL, is_untouched) > 0
    }

    fn may_place(&self, blend: &Blend, plan: &PlanWriter<'_>) -> bool {
        let blocks = |range: &Reused| (range.offset + range.end - range.start).div_ceil(self.config.block_size);
        let sources = blend.reused.iter().map(blocks).sum::<u32>() as usize;
        plan.room(Region::Place) >= blend.reused.len() && plan.room(Region::SourceBlocks) >= sources
    }

    /// As many rows of the stage as the budget pays for, after placing what is reused.
    pub(super) fn schedule_blend(
        &mut self,
        slot: u32,
        plan: &mut PlanWriter<'_>,
        record: &mut PlanRecord,
        budget: &mut Budget,
        copied: bool,
    ) {
        let seq = &self.seqs[slot as usize];
        let blend = seq.blend.as_ref().expect("a blended sequence");
        let round = match blend.stage {
            Stage::Score(round) => Some(round),
            _ => None,
        };
        let has_room =
            round.is_none() || (plan.room(Region::Score) > 0 && plan.room(Region::Scored) >= blend.hull().len());
        if blend.unread > 0 || !has_room {
            return;
        }
        let mut trial = *budget;
        if !blend.placed {
            if !self.may_place(blend, plan) {
                return;
            }
            trial.spend_keys(blend.place_cost());
        }
        let is_untouched = budget.is_untouched();
        let share = round
            .map_or(FULL_SHARE, |round| ((blend.rule.rounds[round].cost * FULL_SHARE as f64).ceil() as u64).max(1));
        let (scoring, score_keys) =
            round.map_or((usize::MAX, 0), |round| (blend.first_scoring(round), blend.score_keys(round)));
        let (silent, asking) = blend.rows.split_at(scoring.clamp(blend.next, blend.rows.len()));
        let mut count = trial.take_rows(&silent[blend.next..], Pass { share, keys: 0 }, is_untouched);
        if blend.next + count == silent.len() && !asking.is_empty() {
            let mut further = trial;
            let more = further.take_rows(asking, Pass { share, keys: score_keys }, is_untouched && count == 0);
            if count == 0 || more == asking.len() {
                (count, trial) = (count + more, further); // Rows that score go into one plan where they can.
            }
        }
        if count > 0 && self.emit_rows(slot, count, scoring, plan, record, copied) {
            *budget = trial;
            self.stats.prefill_tokens_total += count as u64;
        }
    }

    /// Writes the next `count` rows of the stage; those from list index `scoring` on score. False: the table's entries
    /// did not fit, so rows follow in a later plan.
    fn emit_rows(
        &mut self,
        slot: u32,
        count: usize,
        scoring: usize,
        plan: &mut PlanWriter<'_>,
        record: &mut PlanRecord,
        copied: bool,
    ) -> bool {
        let block_size = self.config.block_size;
        let known = self.seq(slot).tokens.len() as u32;
        if !self.show(slot, known, plan, record, copied) {
            return false;
        }
        let seq = &mut self.seqs[slot as usize];
        let mut blend = seq.blend.take().expect("a blended sequence");
        let mut entry = PlanEntry::of(slot, seq.scheduled_len);
        if !blend.placed {
            for range in &blend.reused {
                let len = range.end - range.start;
                let blocks = self.cache.segment(range.segment).blocks.iter().map(|block| block.index);
                let used = (range.offset + len).div_ceil(block_size) as usize;
                plan.place(seq.row, range.start, len, range.offset, blocks.take(used));
            }
            (blend.placed, entry.places) = (true, true);
        }
        let (first, end, first_row) = (blend.next, blend.next + count, plan.num_tokens());
        for &position in &blend.rows[first..end] {
            let id = seq.tokens[position as usize];
            plan.token(id, position, seq.slot_at(position, block_size), -1);
        }
        if let Stage::Score(round) = blend.stage
            && scoring < end
        {
            let rows = first_row + scoring.max(first) - first..first_row + count;
            entry.scored = Some(plan.score(rows, blend.hull(), blend.rule.method_id, round as u32));
            blend.unread += 1;
        }
        plan.sequence(seq.row, blend.rows[end - 1] + 1);
        blend.next = end;
        let is_last = blend.stage == Stage::Recompute && end == blend.rows.len();
        entry.first_sample = plan.next_sample();
        if blend.stage == Stage::Recompute {
            seq.scheduled_len = blend.rows.get(end).copied().unwrap_or(known);
            entry.len_after = seq.scheduled_len;
        }
        if is_last {
            blend.end_stage();
            plan.sample(first_row + count - 1, seq.row, SAMPLE);
            (entry.draws, entry.num_samples) = (true, 1);
            seq.samples_in_flight += 1;
        }
        seq.blend = Some(blend);
        let computes_prompt_end = is_last && seq.choice == 0 && known == seq.prompt_len;
        Core::name(seq, record, entry);
        if computes_prompt_end {
            self.sample_forks(slot, first_row + count - 1, plan, record);
        }
        true
    }

    /// What a completed plan means for a blend: segments are free again, scores choose.
    pub(super) fn commit_blend(&mut self, entry: PlanEntry, scored: &[i32]) {
        if entry.places {
            self.release_segments(entry.slot);
        }
        let Some(first) = entry.scored else { return self.end_round(entry.slot) };
        let blend = self.seqs[entry.slot as usize].blend.as_mut().expect("only blends are scored");
        blend.unread -= 1;
        let answer = &scored[2 * first as usize..][..2 * blend.hull().len()];
        if blend.stage == Stage::Done {
            blend.rescore(answer);
        } else {
            blend.add_scores(answer);
            self.end_round(entry.slot);
        }
    }

    fn end_round(&mut self, slot: u32) {
        let blend = self.seqs[slot as usize].blend.as_mut().expect("only blends have rounds");
        if blend.is_round_over()
            && let Some(choice) = blend.finish_round()
        {
            self.choose(slot, choice);
        }
    }

    /// Whose label block `at` of a sequence carries once it is published; none while its rows are not chosen.
    pub(super) fn label_of(&self, seq: &Sequence, at: usize) -> Option<Label> {
        let Some(blend) = &seq.blend else { return Some(seq.label) };
        match blend.recipe {
            Some(number) if at >= self.recipes.get(number).first_block(self.config.block_size) => {
                // What decode steps repair belongs to no prompt.
                (blend.rule.decode_rows == 0).then(|| Label::recipe(number))
            }
            None if blend.is_active() => None,
            _ => Some(seq.label),
        }
    }
}
