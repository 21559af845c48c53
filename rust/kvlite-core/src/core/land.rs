//! What becomes of an arrival: a request that goes on here, or blocks for whoever asks for its tokens next.
//!
//! A choice whose KV came along and that has a row runs at once; the next plan announces it. Any other waits like a
//! preempted one. What is given back leaves its full exact blocks in the tree: a copy that was cut short is a prefix hit
//! of the replay. Called by the binding and by `import.rs`.

use std::ops::Range;
use std::sync::Arc;

use super::import::{Arrival, open};
use super::manifest::{ChoiceState, Manifest};
use super::{Core, NO_SLOT, RequestState};
use crate::blend::Blend;
use crate::cache::Inserted;
use crate::error::CoreError;
use crate::ids::{BlockId, Label, TenantId, Token};
use crate::plan::{Cause, PlanWriter};
use crate::sequence::{Sequence, Status};

/// Tokens whose KV has arrived, from the first on: of the prompt, and of each choice.
struct Valid {
    prompt: u32,
    choices: Vec<u32>,
}

impl Core {
    /// The reservation becomes a request; returns its handle. Choices whose KV is here run from the next plan on, the others
    /// wait.
    ///
    /// Errors (nothing has changed then): no such reservation, a damaged manifest, one that is not final or of another
    /// request, a block that it counts on is neither a hit nor filled.
    pub fn import_commit(
        &mut self,
        ticket: u32,
        manifest: &[u8],
        method_id: Option<u32>,
        now_ms: i64,
    ) -> Result<i32, CoreError> {
        let manifest = self.read_manifest(manifest, method_id)?;
        let block_size = self.config.block_size;
        let arrival = open(&mut self.arrivals, ticket)?;
        arrival.accepts(&manifest)?;
        let runs = !arrival.rows.is_empty() && manifest.choices.iter().flatten().any(|choice| choice.kv_len > 0);
        if runs {
            arrival.check_filled(&manifest, block_size)?;
        }
        let mut arrival = self.arrivals.remove(&ticket).expect("just looked at");
        let missing = if runs { arrival.num_missing(&manifest, block_size) } else { 0 };
        let more = missing.saturating_sub(arrival.spare.len());
        let runs = runs && (more == 0 || self.cache.alloc(more, None, &mut arrival.spare));
        let request = self.found(&manifest, &arrival, runs, now_ms);
        if runs {
            self.settle_in(request, &manifest, &mut arrival);
        } else {
            let valid = Valid::of(&manifest);
            self.salvage(&mut arrival, &manifest, &valid);
        }
        self.release_rest(&mut arrival);
        for choice in 0..self.request(request).choices.len() {
            let slot = self.slot_of(request, choice);
            slot.filter(|&slot| self.seq(slot).status() == Status::Waiting)
                .into_iter()
                .for_each(|slot| self.enqueue(slot));
        }
        self.stats.migrations_in_total += 1;
        Ok(self.request(request).handle)
    }

    /// The request and its sequences, none of which has blocks yet.
    fn found(&mut self, manifest: &Manifest, arrival: &Arrival, runs: bool, now_ms: i64) -> u32 {
        let asked = manifest.request();
        let state = RequestState {
            announced: manifest.announced,
            num_unfinished: manifest.choices.iter().flatten().count() as u32,
            reuse: manifest.report.clone().map(Box::new),
            ..asked.state()
        };
        let deadline = manifest.time_left_ms.map(|left| now_ms.saturating_add(left));
        let request = self.register(state, deadline, now_ms);
        let num_sequences = if manifest.announced { manifest.choices.len() } else { 1 };
        for (choice, state) in manifest.choices.iter().take(num_sequences).enumerate() {
            let Some(state) = state else { continue };
            let mut seq = asked.sequence(choice as u32, arrival.rank);
            seq.tokens.extend_from_slice(&state.output);
            seq.preemptions = state.preemptions;
            seq.arrived = true;
            seq.logprobs_len = if choice == 0 { manifest.logprobs_len } else { 0 };
            seq.blend = self.blend_of(manifest, state, &seq, runs && state.kv_len > 0);
            self.join(request, seq);
        }
        self.request_mut(request).choices.resize(num_sequences, NO_SLOT);
        request
    }

    /// What a blended choice remembers; its recipe gets a number of this engine.
    fn blend_of(&mut self, from: &Manifest, choice: &ChoiceState, seq: &Sequence, is_done: bool) -> Option<Box<Blend>> {
        let (rule, state) = (from.rule.as_ref()?, choice.blend.as_ref()?);
        let mut blend = Blend::arrived(Arc::clone(rule), &state.holes, state.attempts, &state.repaired, is_done);
        blend.recipe = state.recipe.as_ref().map(|recipe| {
            let tokens = &seq.tokens[..recipe.tokens_len as usize];
            let reused = recipe.reused.clone().into();
            self.recipes.intern((seq.tenant(), rule), tokens, reused, recipe.choice(), &self.cache)
        });
        Some(Box::new(blend))
    }

    /// Rows and blocks for every choice whose KV is here, the one with the prompt first.
    fn settle_in(&mut self, request: u32, manifest: &Manifest, arrival: &mut Arrival) {
        let block_size = self.config.block_size;
        let full = manifest.full_prompt_blocks();
        let source = manifest.source().expect("somebody has KV");
        let source_slot = self.slot_of(request, source).expect("it was just made");
        let others = (0..manifest.choices.len()).filter(|&choice| choice != source);
        for choice in [source].into_iter().chain(others) {
            let Some(state) = manifest.choices[choice].as_ref().filter(|state| state.kv_len > 0) else { continue };
            let slot = self.slot_of(request, choice).expect("it was just made");
            let (row, hits) = (arrival.rows.pop().expect("a row per choice"), std::mem::take(&mut arrival.hits));
            let seq = &mut self.seqs[slot as usize];
            seq.become_(Status::Running);
            seq.row = row;
            seq.blocks.reserve_exact(seq.end_len.div_ceil(block_size) as usize);
            let hit_len = hits.len() as u32;
            if choice == source {
                (seq.hit_len, seq.tree_len) = (hit_len, hit_len);
                seq.blocks.extend(hits);
            } else {
                self.share_prompt(source_slot, slot);
            }
            let (known, kv_len) = (manifest.prompt.len() as u32 + state.output.len() as u32, state.kv_len);
            let committed = if choice == source { kv_len.max(hit_len * block_size) } else { kv_len };
            let seq = &mut self.seqs[slot as usize];
            for index in seq.blocks.len() as u32..blocks_to_hold(committed, known, block_size) {
                let key = (if index < full { 0 } else { choice as u32 }, index);
                let landed = arrival.landed.remove(&key).map(|landing| landing.block);
                seq.blocks.push(landed.or_else(|| arrival.spare.pop()).expect("they were counted before"));
            }
            (seq.committed_len, seq.scheduled_len) = (committed, committed);
            seq.prefill_until = if known - committed > 1 { known } else { 0 };
            self.num_arrived += 1;
            self.enter_running(slot);
            self.publish(slot);
        }
    }

    /// Names the rows of everybody who came with KV since the last plan.
    pub(super) fn announce(&mut self, plan: &mut PlanWriter<'_>) {
        if self.num_arrived == 0 {
            return;
        }
        for at in 0..self.running.len() {
            let seq = &mut self.seqs[self.running[at] as usize];
            if std::mem::take(&mut seq.arrived) {
                let (request, cached_len) = (seq.request, seq.committed_len.min(seq.prompt_len));
                let (choice, row) = (seq.choice, seq.row);
                plan.admitted(self.request(request).handle, choice, row, Cause::Imported, cached_len);
                self.num_arrived -= 1;
            }
        }
    }

    /// Gives an arrival back. `keeps_copies`: blocks that are being written stay until their copies have ended.
    pub(super) fn dissolve(&mut self, ticket: u32, keeps_copies: bool) {
        let mut arrival = self.arrivals.remove(&ticket).expect("the caller has looked it up");
        let valid = arrival.valid(self.config.block_size);
        let manifest = arrival.manifest.clone();
        if !arrival.is_cancelled {
            self.salvage(&mut arrival, &manifest, &valid);
        }
        let copies: Vec<_> =
            arrival.landed.iter().filter(|(_, landing)| !landing.filled).map(|(&key, _)| key).collect();
        let mut kept = std::collections::BTreeMap::new();
        for key in copies {
            let landing = arrival.landed[&key];
            if keeps_copies {
                arrival.landed.remove(&key);
                kept.insert(key, landing);
            } else {
                self.cache.end_transfer(landing.block);
            }
        }
        self.release_rest(&mut arrival);
        if !kept.is_empty() {
            (arrival.landed, arrival.is_cancelled, arrival.deadline_ms) = (kept, true, None);
            self.arrivals.insert(ticket, arrival);
        }
    }

    /// Frees rows and blocks that nobody needs; none of them is being written.
    fn release_rest(&mut self, arrival: &mut Arrival) {
        let landed = std::mem::take(&mut arrival.landed);
        for block in landed.into_values().map(|landing| landing.block).chain(arrival.spare.drain(..)) {
            self.cache.free(block);
        }
        self.free_rows.append(&mut arrival.rows);
        arrival.hits.drain(..).next_back().into_iter().for_each(|block| self.cache.unpin(block));
        self.room_epoch += 1;
    }

    /// Leaves full exact blocks in the tree, in unbroken order from the hits on.
    fn salvage(&mut self, arrival: &mut Arrival, manifest: &Manifest, valid: &Valid) {
        if !self.config.enable_prefix_caching {
            return;
        }
        let (block_size, full, exact) = (self.config.block_size, manifest.full_prompt_blocks(), manifest.exact_len());
        let num_hits = arrival.hits.len() as u32;
        let mut cursor = std::mem::take(&mut arrival.hits).last().copied();
        let range = num_hits..full.min(valid.prompt.min(exact) / block_size);
        let end = self.plant(arrival, (manifest.tenant, 0), &manifest.prompt, range, &mut cursor);
        for (choice, state) in manifest.choices.iter().enumerate() {
            let Some(state) = state.as_ref().filter(|_| end == full) else { continue };
            let tokens = [&manifest.prompt[..], &state.output].concat();
            let known = valid.choices[choice].min(exact).min(tokens.len() as u32);
            let mut own = cursor;
            own.into_iter().for_each(|block| self.cache.pin(block));
            self.plant(arrival, (manifest.tenant, choice as u32), &tokens, full..known / block_size, &mut own);
            own.into_iter().for_each(|block| self.cache.unpin(block));
        }
        cursor.into_iter().for_each(|block| self.cache.unpin(block));
    }

    /// Moves filled blocks of `range` into the tree below `cursor`, which is pinned, and the pin with them; returns the
    /// index behind the last.
    fn plant(
        &mut self,
        arrival: &mut Arrival,
        (tenant, choice): (u32, u32),
        tokens: &[Token],
        range: Range<u32>,
        cursor: &mut Option<BlockId>,
    ) -> u32 {
        let block_size = self.config.block_size as usize;
        let label = Label::exact(TenantId(tenant));
        for index in range.clone() {
            let Some(landing) = arrival.landed.get(&(choice, index)).copied().filter(|landing| landing.filled) else {
                return index;
            };
            arrival.landed.remove(&(choice, index));
            let text = &tokens[index as usize * block_size..][..block_size];
            let next = match self.cache.insert(label, *cursor, text, landing.block) {
                Inserted::New => {
                    self.follow(landing.block);
                    landing.block
                }
                Inserted::Duplicate(existing) => {
                    self.cache.free(landing.block);
                    existing
                }
            };
            if let Some(parent) = cursor.replace(next) {
                self.cache.unpin(parent);
            }
        }
        range.end.max(range.start)
    }
}

/// Blocks of a choice that is about to run: a prefill has room for all known tokens, a decode takes its next block itself.
fn blocks_to_hold(committed: u32, known: u32, block_size: u32) -> u32 {
    if known - committed > 1 { known.div_ceil(block_size) } else { committed.div_ceil(block_size) }
}

impl Valid {
    fn of(manifest: &Manifest) -> Valid {
        let choices: Vec<u32> =
            manifest.choices.iter().map(|choice| choice.as_ref().map_or(0, |choice| choice.kv_len)).collect();
        Valid { prompt: choices.iter().copied().max().unwrap_or(0), choices }
    }
}

impl Manifest {
    /// The choice with most of the prompt's KV: the others share its full blocks.
    pub fn source(&self) -> Option<usize> {
        let kv_len = |choice: usize| self.choices[choice].as_ref().map_or(0, |state| state.kv_len);
        let of_prompt = |&choice: &usize| kv_len(choice).min(self.prompt.len() as u32);
        (0..self.choices.len()).rev().max_by_key(of_prompt).filter(|&choice| kv_len(choice) > 0)
    }
}

impl Arrival {
    /// Whether `manifest` is this request at its end, and no copy is under way.
    fn accepts(&self, manifest: &Manifest) -> Result<(), CoreError> {
        let what = match &self.manifest {
            _ if !manifest.is_final => Some("it is not the one of a frozen request"),
            old if (old.tenant, old.max_tokens, old.choices.len(), old.use_cache)
                != (manifest.tenant, manifest.max_tokens, manifest.choices.len(), manifest.use_cache)
                || old.prompt != manifest.prompt =>
            {
                Some("it is of another request than the reservation")
            }
            old if (old.choices.iter().zip(&manifest.choices)).any(|(old, new)| old.is_none() && new.is_some()) => {
                Some("a choice lives again")
            }
            _ => None,
        };
        if let Some(what) = what {
            return Err(CoreError::Manifest { what });
        }
        match self.landed.iter().find(|(_, landing)| !landing.filled) {
            Some((&(choice, index), _)) => Err(CoreError::NotFilled { choice, index }),
            None => Ok(()),
        }
    }

    /// Whether everything that the manifest counts on is a hit or has landed.
    fn check_filled(&self, manifest: &Manifest, block_size: u32) -> Result<(), CoreError> {
        let full = manifest.full_prompt_blocks();
        let source = manifest.source().expect("somebody has KV");
        for (choice, state) in manifest.choices.iter().enumerate() {
            let Some(state) = state.as_ref().filter(|state| state.kv_len > 0) else { continue };
            if choice != source && state.kv_len < full * block_size {
                return Err(CoreError::Manifest { what: "a choice has less KV than it shares" });
            }
            let first = if choice == source { self.hits.len() as u32 } else { full };
            for index in first..state.kv_len.div_ceil(block_size) {
                let key = (if index < full { 0 } else { choice as u32 }, index);
                if !self.landed.contains_key(&key) {
                    return Err(CoreError::NotFilled { choice: key.0, index });
                }
            }
        }
        Ok(())
    }

    /// Blocks that `settle_in` will need beyond hits and what has landed.
    fn num_missing(&self, manifest: &Manifest, block_size: u32) -> usize {
        let full = manifest.full_prompt_blocks();
        let hits = self.hits.len() as u32;
        let source = manifest.source().expect("somebody has KV");
        let of_choice = |(choice, state): (usize, &Option<ChoiceState>)| {
            let Some(state) = state.as_ref().filter(|state| state.kv_len > 0) else { return 0 };
            let known = (manifest.prompt.len() + state.output.len()) as u32;
            let (first, committed) =
                if choice == source { (hits, state.kv_len.max(hits * block_size)) } else { (full, state.kv_len) };
            let is_missing =
                |&index: &u32| !self.landed.contains_key(&(if index < full { 0 } else { choice as u32 }, index));
            (first..blocks_to_hold(committed, known, block_size)).filter(is_missing).count()
        };
        manifest.choices.iter().enumerate().map(of_choice).sum()
    }

    /// What has arrived for sure: the last block of each run may be filled in part.
    fn valid(&self, block_size: u32) -> Valid {
        let full = self.manifest.full_prompt_blocks();
        let last = |choice: u32, low: u32, high: u32| {
            self.landed.range((choice, low)..(choice, high)).next_back().map(|(&(_, index), _)| index * block_size)
        };
        let own = |choice: usize| last(choice as u32, full, u32::MAX);
        let num_choices = self.manifest.choices.len();
        let prompt = match (0..num_choices).find_map(own) {
            Some(_) => full * block_size,
            None => last(0, 0, full).unwrap_or(0),
        };
        Valid { prompt, choices: (0..num_choices).map(|choice| own(choice).unwrap_or(0)).collect() }
    }
}
