//! The way out to another engine: what a request is (manifest), which blocks go in which stage, and its leaving.
//!
//! ```text
//!   export_begin -> export_stage* -> freeze -> (is_frozen) -> export_stage, export_final -> export_commit: it is gone
//!                      |  `- hold: the blocks stay until transfer_done                   `-> export_abort: it goes on
//! ```
//! A stage gives out full blocks whose KV completed plans have written; once frozen, partly filled last ones too. Full
//! blocks of the prompt go once for all choices, under the number of choice 0. A blend moves its KV only when nothing is
//! left to place, score or repair; before that it restarts where it arrives, as after a preemption.

use std::sync::Arc;

use super::manifest::{ChoiceState, Manifest, prefix_digest};
use super::{Core, Hold};
use crate::blend::Stage;
use crate::error::CoreError;
use crate::ids::{BlockId, Token};
use crate::sequence::{Sequence, Status};

/// Stages whose copies may run at once, over all requests.
pub const MAX_HOLDS: usize = 4096;

/// A block on its way: choice, index in the sequence, block of the pool.
pub type ExportRow = [i32; 3];

/// What has been given out of a request.
#[derive(Debug)]
pub(super) struct Export {
    /// Full prompt blocks that went or that the destination had.
    prompt_given: u32,
    /// Per choice, the first of its own blocks that has not gone.
    own_given: Vec<u32>,
    /// Per choice, which blend its KV was: after another one everything goes again.
    stamps: Vec<Option<(Option<u32>, u32)>>,
}

/// Which KV of a request can go, in tokens per choice; 0: none.
pub(super) struct Portion {
    pub lens: Vec<u32>,
    /// The choice whose sequence has most of the prompt.
    pub source: Option<u32>,
}

impl Core {
    /// Starts an export; returns the manifest as of now.
    ///
    /// Errors: a handle that names nothing that lives, a request that makes a segment, one that is being exported.
    pub fn export_begin(&mut self, handle: i32) -> Result<Vec<u8>, CoreError> {
        let request = self.movable(handle)?;
        if self.request(request).export.is_some() {
            return Err(CoreError::AlreadyExported { handle });
        }
        let num_choices = self.request(request).num_choices as usize;
        let export = Export { prompt_given: 0, own_given: vec![0; num_choices], stamps: self.stamps(request) };
        self.request_mut(request).export = Some(Box::new(export));
        Ok(self.manifest(request, false).encode())
    }

    /// The blocks that can go now and have not; the destination has the first `skip_blocks` of the prompt. They stay as they
    /// are until `transfer_done` with the number that is returned.
    ///
    /// Errors: as `export_begin`, no export begun; `TooManyHolds` is about capacity.
    pub fn export_stage(&mut self, handle: i32, skip_blocks: u32) -> Result<(u32, Vec<ExportRow>), CoreError> {
        let request = self.exported(handle)?;
        if self.exports.len() >= MAX_HOLDS {
            return Err(CoreError::TooManyHolds { count: self.exports.len(), max: MAX_HOLDS });
        }
        self.restart_stale(request);
        let export = self.export_mut(request);
        export.prompt_given = export.prompt_given.max(skip_blocks);
        let rows = self.export_rows(request);
        let holds = self.hold(request, &rows);
        let full = self.full_prompt_blocks(request);
        let export = self.export_mut(request);
        for &[choice, index, _] in &rows {
            let given =
                if (index as u32) < full { &mut export.prompt_given } else { &mut export.own_given[choice as usize] };
            *given = index as u32 + 1;
        }
        let number = self.next_hold;
        self.next_hold = (number + 1) & i32::MAX as u32;
        self.exports.insert(number, holds);
        Ok((number, rows))
    }

    /// How many blocks `export_stage` would give out now. Errors: as `export_stage`.
    pub fn export_left(&self, handle: i32) -> Result<usize, CoreError> {
        Ok(self.export_rows(self.exported(handle)?).len())
    }

    /// The copy of a stage has ended, well or not: its blocks are free to go. Also after the request has ended or moved.
    ///
    /// Errors: a number that no stage holds.
    pub fn transfer_done(&mut self, hold: u32) -> Result<(), CoreError> {
        let holds = self.exports.remove(&hold).ok_or(CoreError::UnknownHold { hold })?;
        for hold in holds {
            self.let_go(hold, true);
        }
        self.room_epoch += 1;
        Ok(())
    }

    /// The manifest of a frozen request: what `import_commit` takes. Errors: as `freeze`; it is not frozen.
    pub fn export_final(&self, handle: i32) -> Result<Vec<u8>, CoreError> {
        let request = self.movable(handle)?;
        if !self.is_at_rest(request) {
            return Err(CoreError::NotFrozen { handle });
        }
        Ok(self.manifest(request, true).encode())
    }

    /// It stays: thawed, back to where it was. False: it has ended.
    pub fn export_abort(&mut self, handle: i32) -> bool {
        let Ok(request) = self.movable(handle) else { return false };
        self.request_mut(request).export = None;
        self.thaw(request);
        true
    }

    /// It lives elsewhere: rows, blocks and places in the queue are free, no end is reported. What the tree holds stays
    /// cached. False: it has ended. Errors: it is not frozen.
    pub fn export_commit(&mut self, handle: i32) -> Result<bool, CoreError> {
        let Ok(request) = self.movable(handle) else { return Ok(false) };
        if !self.is_at_rest(request) {
            return Err(CoreError::NotFrozen { handle });
        }
        let deadline = self.request_mut(request).deadline_ms.take();
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, request));
        }
        // Forks that wait for choice 0 go before it does, or they would be sent back to the queue.
        for choice in (0..self.request(request).choices.len()).rev() {
            let Some(slot) = self.slot_of(request, choice) else { continue };
            match self.seq(slot).status() {
                Status::Shelved => self.num_shelved -= 1,
                Status::Ending => {
                    self.num_leaving -= 1;
                    self.give_back(slot);
                }
                _ => {
                    self.seq_mut(slot).become_(Status::Ending);
                    self.give_back(slot);
                }
            }
            self.vacate(slot);
            if self.requests[request as usize].is_none() {
                break; // Its last choice took it along.
            }
        }
        self.forget_departed();
        self.out_finished.retain(|row| row[0] != handle);
        self.stats.migrations_out_total += 1;
        Ok(true)
    }

    fn exported(&self, handle: i32) -> Result<u32, CoreError> {
        let request = self.movable(handle)?;
        let is_exported = self.request(request).export.is_some();
        is_exported.then_some(request).ok_or(CoreError::NotExported { handle })
    }

    fn export_mut(&mut self, request: u32) -> &mut Export {
        self.request_mut(request).export.as_mut().expect("looked at before")
    }

    fn live(&self, request: u32, choice: usize) -> Option<&Sequence> {
        let seq = self.seq(self.slot_of(request, choice)?);
        (seq.status() != Status::Ending).then_some(seq)
    }

    fn full_prompt_blocks(&self, request: u32) -> u32 {
        let state = self.request(request);
        let any = (0..state.choices.len()).find_map(|choice| self.live(request, choice));
        any.expect("a request that lives has a choice that does").prompt_len / self.config.block_size
    }

    /// Tokens whose KV could go of one choice alone.
    fn kv_len(seq: &Sequence) -> u32 {
        let is_settled = |seq: &Sequence| {
            let blend = seq.blend.as_ref();
            blend.is_none_or(|blend| blend.stage == Stage::Done && blend.rule.decode_rows == 0)
        };
        let has_kv = matches!(seq.status(), Status::Running | Status::Preempting | Status::Frozen) && is_settled(seq);
        if has_kv { seq.committed_len } else { 0 }
    }

    /// Choices share the prompt of the one that has most of it; another one's KV goes when it has all of those blocks, made
    /// by the same recipe.
    pub(super) fn portion(&self, request: u32) -> Portion {
        let num_choices = self.request(request).num_choices as usize;
        let mut lens: Vec<u32> =
            (0..num_choices).map(|choice| self.live(request, choice).map_or(0, Core::kv_len)).collect();
        let prompt_of = |choice: usize| self.live(request, choice).map_or(0, |seq| seq.prompt_len.min(lens[choice]));
        let recipe_of = |choice: usize| self.live(request, choice)?.blend.as_ref()?.recipe;
        let source = (0..num_choices).rev().max_by_key(|&choice| prompt_of(choice)).filter(|&at| lens[at] > 0);
        let Some(source) = source else { return Portion { lens, source: None } };
        let shared = self.full_prompt_blocks(request) * self.config.block_size;
        for (choice, len) in lens.iter_mut().enumerate() {
            let fits = *len >= shared && recipe_of(choice) == recipe_of(source);
            if choice != source && !fits {
                *len = 0;
            }
        }
        Portion { lens, source: Some(source as u32) }
    }

    /// What may go now, in the order prompt, choice 0, choice 1, ..
    fn export_rows(&self, request: u32) -> Vec<ExportRow> {
        let Portion { lens, source } = self.portion(request);
        let export = self.request(request).export.as_ref().expect("looked at before");
        let (Some(source), block_size) = (source, self.config.block_size) else { return Vec::new() };
        let is_stale = export.stamps != self.stamps(request);
        let after = |given: u32| if is_stale { 0 } else { given };
        let at_rest = self.is_at_rest(request);
        let end = |len: u32| if at_rest { len.div_ceil(block_size) } else { len / block_size };
        let full = self.full_prompt_blocks(request);
        let mut rows = Vec::new();
        let mut add = |choice: u32, of: u32, from: u32, end: u32| {
            let seq = self.live(request, of as usize).expect("only live choices have KV");
            let row = |index: u32| [choice, index, seq.block_at(index).index].map(|number| number as i32);
            rows.extend((from..end).map(row));
        };
        add(0, source, after(export.prompt_given), end(lens[source as usize]).min(full));
        for (choice, &len) in lens.iter().enumerate().filter(|&(_, &len)| len > 0) {
            add(choice as u32, choice as u32, after(export.own_given[choice]).max(full), end(len));
        }
        rows
    }

    /// Keeps the blocks of `rows`: of what lies in the tree the end of each path, of the rest every block.
    fn hold(&mut self, request: u32, rows: &[ExportRow]) -> Vec<Hold> {
        let source = self.portion(request).source.unwrap_or(0);
        let full = self.full_prompt_blocks(request);
        let mut holds = Vec::new();
        let mut ends: Vec<(u32, BlockId)> = Vec::new();
        for &[choice, index, _] in rows {
            let (choice, index) = (choice as u32, index as u32);
            let of = if index < full { source } else { choice };
            let seq = self.live(request, of as usize).expect("only live choices have KV");
            let block = seq.block_at(index);
            if index < seq.tree_len {
                match ends.iter_mut().find(|(choice, _)| *choice == of) {
                    Some(end) => end.1 = block,
                    None => ends.push((of, block)),
                }
            } else {
                holds.push(Hold::Private(block));
            }
        }
        holds.extend(ends.into_iter().map(|(_, block)| Hold::InTree(block)));
        for hold in &holds {
            match *hold {
                Hold::Private(block) => self.extra_owners[block.index as usize] += 1,
                Hold::InTree(block) => self.cache.pin(block),
                Hold::HostRead(_) | Hold::HostWrite(_) => unreachable!("only what lies on the device is sent"),
            }
        }
        holds
    }

    fn stamps(&self, request: u32) -> Vec<Option<(Option<u32>, u32)>> {
        let stamp = |choice: usize| {
            let seq = self.live(request, choice)?;
            seq.blend.as_ref().map(|blend| (blend.recipe, seq.preemptions))
        };
        (0..self.request(request).num_choices as usize).map(stamp).collect()
    }

    /// A blend that was preempted meanwhile may have been made anew from other rows: what went before is worthless.
    fn restart_stale(&mut self, request: u32) {
        let stamps = self.stamps(request);
        let export = self.export_mut(request);
        if export.stamps != stamps {
            export.prompt_given = 0;
            export.own_given.fill(0);
        }
        export.stamps = stamps;
    }

    fn manifest(&self, request: u32, is_final: bool) -> Manifest {
        let state = self.request(request);
        let lens = self.portion(request).lens;
        let num_choices = state.num_choices as usize;
        let any = (0..state.choices.len()).find_map(|choice| self.live(request, choice));
        let any = any.expect("a request that lives has a choice that does");
        let choice = |choice: usize| {
            if !state.announced {
                return Some(ChoiceState::fresh(self.blend_state(any)));
            }
            let seq = self.live(request, choice)?;
            Some(ChoiceState {
                output: seq.tokens[seq.prompt_len as usize..].to_vec(),
                kv_len: lens[choice],
                preemptions: seq.preemptions,
                blend: self.blend_state(seq),
            })
        };
        let prompt: Vec<Token> = any.tokens[..any.prompt_len as usize].to_vec();
        Manifest {
            model_digest: self.config.model_digest,
            prefix_digest: prefix_digest(&self.config),
            block_size: self.config.block_size,
            vocab_size: self.config.vocab_size,
            is_final,
            announced: state.announced,
            use_cache: state.use_cache,
            prompt_logprobs: state.prompt_logprobs,
            max_tokens: any.end_len - any.prompt_len,
            min_tokens: state.min_tokens,
            priority: state.priority,
            tenant: any.tenant().0,
            time_left_ms: state.deadline_ms.map(|deadline| deadline.saturating_sub(self.now_ms).max(0)),
            stop_token_ids: state.stop_token_ids.to_vec(),
            prompt,
            logprobs_len: self.live(request, 0).map_or(0, |seq| seq.logprobs_len),
            choices: (0..num_choices).map(choice).collect(),
            rule: any.blend.as_ref().map(|blend| Arc::clone(&blend.rule)),
            report: state.reuse.as_deref().cloned(),
        }
    }
}
