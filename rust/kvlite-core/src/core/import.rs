//! The way in from another engine: room is reserved, blocks land, and `land.rs` makes a request of it or gives it back.
//!
//! ```text
//!   reserve -> (import_block -> copy -> import_filled)* -> import_commit: it runs, or waits like a preempted one
//!      `- ttl or import_cancel: rows and blocks are free; full exact blocks that landed stay cached, a replay hits them
//! ```
//! A block that a copy is writing into is in transfer and never given away: when the reservation expires meanwhile it
//! stays until `import_filled` or `import_cancel` says that the copy has ended. Whoever copies has one copy at a time into
//! a block: with a second under way the end of the first would free it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::manifest::{BlendState, Manifest, prefix_digest};
use super::{BlendRequest, Core, Request};
use crate::blend::Rule;
use crate::config::CoreConfig;
use crate::error::CoreError;
use crate::ids::{BlockId, Label, Lookup, TenantId};
use crate::sched::{Demand, reserve_of};
use crate::sequence::Rank;

/// Blocks reserved per choice beyond its known tokens: it goes on decoding while the first stage is copied.
const GROWTH_BLOCKS: u32 = 2;

/// A block of an arrival and whether its bytes are there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Landing {
    pub block: BlockId,
    pub filled: bool,
}

/// A request on its way in.
#[derive(Debug)]
pub(super) struct Arrival {
    pub deadline_ms: Option<i64>,
    /// As of the reservation.
    pub manifest: Manifest,
    pub rank: Rank,
    /// Prompt blocks that were here already, pinned through the last.
    pub hits: Vec<BlockId>,
    /// One per choice that lived, if its KV comes along.
    pub rows: Vec<u32>,
    /// Reserved blocks that nobody has asked for.
    pub spare: Vec<BlockId>,
    /// By choice and index; full prompt blocks under choice 0.
    pub landed: BTreeMap<(u32, u32), Landing>,
    /// Expired: what is left waits for its copies to end.
    pub is_cancelled: bool,
}

/// How many blocks the choices of a manifest need, together.
struct Needs {
    /// For known tokens, and a little growth.
    now: u64,
    /// With the reserve that admission leaves.
    soon: u64,
    /// At the declared end.
    end: u64,
}

impl Manifest {
    pub fn full_prompt_blocks(&self) -> u32 {
        self.prompt.len() as u32 / self.block_size
    }

    /// Tokens at the declared end of a choice.
    pub fn end_len(&self) -> u32 {
        self.prompt.len() as u32 + self.max_tokens
    }

    /// Blocks of one choice at its end.
    pub fn end_blocks(&self) -> u32 {
        (self.end_len() - 1).div_ceil(self.block_size)
    }

    /// Tokens from the beginning that no blend touches.
    pub fn exact_len(&self) -> u32 {
        self.rule.as_ref().and_then(|rule| rule.spans.first()).map_or(u32::MAX, |&(start, _)| start)
    }

    pub fn request(&self) -> Request<'_> {
        Request {
            prompt: &self.prompt,
            n: self.choices.len() as u32,
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            stop_token_ids: &self.stop_token_ids,
            priority: self.priority,
            deadline_ms: None,
            tenant: self.tenant,
            use_cache: self.use_cache,
            prompt_logprobs: self.prompt_logprobs,
            blend: self.rule.as_deref().map(|rule| BlendRequest {
                spans: &rule.spans,
                method_id: rule.method_id,
                ratio: rule.ratio,
                rounds: &rule.rounds,
                scores: rule.scores.as_deref(),
                decode_rows: rule.decode_rows,
            }),
        }
    }

    fn needs(&self, config: &CoreConfig) -> Needs {
        let full = self.full_prompt_blocks();
        let own = |tokens: u32| tokens.min(self.end_len() - 1).div_ceil(self.block_size).saturating_sub(full);
        let mut needs = Needs { now: full.into(), soon: full.into(), end: full.into() };
        for choice in self.choices.iter().flatten() {
            let known = (self.prompt.len() + choice.output.len()) as u32;
            let reserve = reserve_of(choice.preemptions, config.reserve_tokens, self.block_size);
            let end = own(u32::MAX);
            needs.now += u64::from((own(known) + GROWTH_BLOCKS).min(end));
            needs.soon += u64::from(own(known.saturating_add(reserve)));
            needs.end += u64::from(end);
        }
        needs
    }
}

impl Arrival {
    /// Blocks of one of its choices at its end.
    pub fn blocks_at_end(&self, block_size: u32) -> u32 {
        (self.manifest.end_len() - 1).div_ceil(block_size)
    }

    /// What it still takes soon, and until everything of it ends.
    pub fn demand(&self, config: &CoreConfig) -> (u64, Demand) {
        if self.rows.is_empty() {
            return (0, Demand { remaining: 0, held: 0 });
        }
        let needs = self.manifest.needs(config);
        let held = (self.spare.len() + self.landed.len()) as u64;
        let has = held + self.hits.len() as u64;
        (needs.soon.saturating_sub(has), Demand { remaining: needs.end.saturating_sub(has), held })
    }
}

impl Core {
    /// Makes room for a request of another engine: pins the prompt's exact prefix that is here, takes blocks for its known
    /// tokens and a little more, and a row per choice; without KV only a place in the queue. Returns the ticket and the
    /// number of prompt blocks that need not be sent. `method_id`: what this engine calls the manifest's method.
    ///
    /// Errors: a manifest that is damaged or does not fit this engine; `NoRows`, `NoBlocks`, `QueueFull`, `Pinned` are about
    /// capacity. O(prompt).
    pub fn reserve(
        &mut self,
        manifest: &[u8],
        method_id: Option<u32>,
        deadline_ms: Option<i64>,
    ) -> Result<(u32, u32), CoreError> {
        let manifest = self.read_manifest(manifest, method_id)?;
        let mut arrival = Arrival {
            deadline_ms,
            rank: (0, 0),
            hits: Vec::new(),
            rows: Vec::new(),
            spare: Vec::new(),
            landed: BTreeMap::new(),
            is_cancelled: false,
            manifest,
        };
        if arrival.manifest.choices.iter().flatten().any(|choice| choice.kv_len > 0) {
            self.check_live()?;
            self.make_room(&mut arrival)?;
        } else {
            self.check_queue()?;
        }
        arrival.rank = self.take_rank(arrival.manifest.priority);
        let (ticket, num_hits) = (self.next_ticket, arrival.hits.len() as u32);
        self.next_ticket = (ticket + 1) & i32::MAX as u32;
        self.arrivals.insert(ticket, arrival);
        Ok((ticket, num_hits))
    }

    /// Rows, hits and blocks, or nothing.
    fn make_room(&mut self, arrival: &mut Arrival) -> Result<(), CoreError> {
        let manifest = &arrival.manifest;
        let num_rows = manifest.choices.iter().flatten().count();
        if self.free_rows.len() < num_rows {
            return Err(CoreError::NoRows { needed: num_rows, free: self.free_rows.len() });
        }
        if manifest.use_cache {
            let max_blocks = manifest.exact_len().min(manifest.prompt.len() as u32) / self.config.block_size;
            let shortest = manifest.choices.iter().flatten().map(|choice| choice.output.len()).min().unwrap_or(0);
            let max_blocks = max_blocks.min((manifest.prompt.len() + shortest - 1) as u32 / self.config.block_size);
            let lookup = Lookup::exact(Label::exact(TenantId(manifest.tenant)));
            self.cache.match_prefix(lookup, &manifest.prompt, max_blocks as usize, &mut arrival.hits);
            self.cache.split_hits(&mut arrival.hits, &mut self.scratch_host); // What is on the host comes over the link.
        }
        let cursor = arrival.hits.last().copied();
        cursor.into_iter().for_each(|block| self.cache.pin(block));
        let needs = arrival.manifest.needs(&self.config);
        let (num_hits, held) = (arrival.hits.len() as u64, needs.now - arrival.hits.len() as u64);
        let is_alone = self.is_alone();
        let mut demands = std::mem::take(&mut self.scratch_demands);
        let promised = self.demands(&mut demands) + needs.soon.max(needs.now) - num_hits;
        demands.push(Demand { remaining: needs.end - needs.now, held });
        let has_room = is_alone || self.has_room_for(promised, held, &mut demands);
        self.scratch_demands = demands;
        if !has_room || !self.cache.alloc(held as usize, cursor, &mut arrival.spare) {
            cursor.into_iter().for_each(|block| self.cache.unpin(block));
            return Err(CoreError::NoBlocks { needed: held as usize, available: self.cache.available() });
        }
        arrival.spare.reverse(); // Taken from the end.
        arrival.rows = self.free_rows.split_off(self.free_rows.len() - num_rows);
        Ok(())
    }

    /// The pool's block for block `index` of `choice` (full prompt blocks: of choice 0), to be written until `import_filled`;
    /// asked for again, after a copy that ended well or not, the same one. Beyond the reservation where there is room.
    ///
    /// Errors: no such reservation, a block that the request never has or that is here already; `NoBlocks`.
    pub fn import_block(&mut self, ticket: u32, choice: u32, index: u32) -> Result<u32, CoreError> {
        let arrival = open(&mut self.arrivals, ticket)?;
        let manifest = &arrival.manifest;
        let full = manifest.full_prompt_blocks();
        let is_wanted = if index < full {
            choice == 0 && index as usize >= arrival.hits.len()
        } else {
            index < manifest.end_blocks() && manifest.choices.get(choice as usize).is_some_and(Option::is_some)
        };
        if !is_wanted {
            return Err(CoreError::NotAwaited { ticket, choice, index });
        }
        if let Some(landing) = arrival.landed.get_mut(&(choice, index)) {
            let block = landing.block;
            if std::mem::take(&mut landing.filled) {
                self.cache.begin_transfer(block);
            }
            return Ok(block.index);
        }
        let block = match arrival.spare.pop() {
            Some(block) => block,
            None => {
                let mut taken = Vec::with_capacity(1);
                if !self.cache.alloc(1, None, &mut taken) {
                    return Err(CoreError::NoBlocks { needed: 1, available: self.cache.available() });
                }
                taken[0]
            }
        };
        self.cache.begin_transfer(block);
        arrival.landed.insert((choice, index), Landing { block, filled: false });
        Ok(block.index)
    }

    /// The copy into that block has ended well.
    ///
    /// Errors: no copy into it is under way; the reservation has expired, then the block is free now.
    pub fn import_filled(&mut self, ticket: u32, choice: u32, index: u32) -> Result<(), CoreError> {
        let arrival = self.arrivals.get_mut(&ticket).ok_or(CoreError::UnknownTicket { ticket })?;
        let landing = arrival.landed.get_mut(&(choice, index)).filter(|landing| !landing.filled);
        let landing = landing.ok_or(CoreError::NotAwaited { ticket, choice, index })?;
        landing.filled = true;
        let block = landing.block;
        self.cache.end_transfer(block);
        if arrival.is_cancelled {
            self.dissolve(ticket, true);
            return Err(CoreError::UnknownTicket { ticket });
        }
        Ok(())
    }

    /// Another deadline for a reservation; none: it stays until it is committed or cancelled. Errors: no such reservation.
    pub fn import_extend(&mut self, ticket: u32, deadline_ms: Option<i64>) -> Result<(), CoreError> {
        open(&mut self.arrivals, ticket)?.deadline_ms = deadline_ms;
        Ok(())
    }

    /// Gives a reservation back; the caller's copies into its blocks have ended. False: there is none.
    pub fn import_cancel(&mut self, ticket: u32) -> bool {
        let Some(arrival) = self.arrivals.get(&ticket) else { return false };
        let is_first = !arrival.is_cancelled;
        self.stats.imports_cancelled_total += u64::from(is_first);
        self.dissolve(ticket, false);
        is_first
    }

    /// Cancels the reservations whose deadline has come.
    pub(super) fn expire_arrivals(&mut self, now_ms: i64) {
        if self.arrivals.is_empty() {
            return;
        }
        let is_due = |arrival: &Arrival| arrival.deadline_ms.is_some_and(|deadline| deadline <= now_ms);
        let due: Vec<u32> =
            self.arrivals.iter().filter(|(_, arrival)| is_due(arrival)).map(|(&ticket, _)| ticket).collect();
        for ticket in due {
            self.stats.imports_cancelled_total += 1;
            self.dissolve(ticket, true);
        }
    }

    /// Decodes and checks everything that the rest of the core relies on.
    pub(super) fn read_manifest(&self, bytes: &[u8], method_id: Option<u32>) -> Result<Manifest, CoreError> {
        let mut manifest = Manifest::decode(bytes, &self.config)?;
        let config = &self.config;
        let fingerprint = [
            ("model_digest", manifest.model_digest, config.model_digest),
            ("canonical_prefix digest", manifest.prefix_digest, prefix_digest(config)),
            ("block_size", manifest.block_size.into(), config.block_size.into()),
            ("vocab_size", manifest.vocab_size.into(), config.vocab_size.into()),
        ];
        for (field, value, expected) in fingerprint {
            if value != expected {
                return Err(CoreError::OtherEngine { field, value, expected });
            }
        }
        if let (Some(rule), Some(method_id)) = (&mut manifest.rule, method_id) {
            let rule = Arc::get_mut(rule).expect("just read");
            rule.method_id = method_id;
        }
        self.check(&manifest.request())?;
        match self.find_contradiction(&manifest) {
            Some(what) => Err(CoreError::Manifest { what }),
            None => Ok(manifest),
        }
    }

    fn find_contradiction(&self, manifest: &Manifest) -> Option<&'static str> {
        let prompt_len = manifest.prompt.len() as u32;
        let in_vocabulary = |&token: &i32| u32::try_from(token).is_ok_and(|id| id < self.config.vocab_size);
        let live: Vec<_> = manifest.choices.iter().flatten().collect();
        if live.is_empty() {
            return Some("every choice has ended");
        }
        if manifest.logprobs_len >= prompt_len {
            return Some("more log-probabilities were delivered than the prompt has");
        }
        let is_untouched = live.len() == manifest.choices.len()
            && live.iter().all(|choice| choice.output.len() as u32 + choice.kv_len == 0);
        if !manifest.announced && !is_untouched {
            return Some("a request that never ran has computed something");
        }
        let with_kv: Vec<_> = live.iter().filter(|choice| choice.kv_len > 0).collect();
        for choice in &live {
            if choice.output.len() as u32 >= manifest.max_tokens || !choice.output.iter().all(in_vocabulary) {
                return Some("an output is too long or leaves the vocabulary");
            }
            if choice.kv_len >= prompt_len + choice.output.len() as u32 {
                return Some("KV of tokens that are not known");
            }
            match (&manifest.rule, &choice.blend) {
                (None, None) => {}
                (Some(rule), Some(blend)) => {
                    let known = prompt_len + choice.output.len() as u32;
                    if !blend.fits(rule, prompt_len, known) || (choice.kv_len > 0 && rule.decode_rows > 0) {
                        return Some("a blend that contradicts its rule");
                    }
                }
                _ => return Some("a rule without a blend, or a blend without a rule"),
            }
        }
        let recipe = |at: usize| with_kv[at].blend.as_ref().and_then(|blend| blend.recipe.as_ref());
        if (1..with_kv.len()).any(|at| recipe(at) != recipe(0)) {
            return Some("choices with KV go by different recipes");
        }
        let spans = manifest.rule.as_ref().map_or(0, |rule| rule.spans.len());
        let fits = manifest.report.as_ref().is_none_or(|report| report.spans.len() == spans);
        if fits { None } else { Some("a report that contradicts the rule") }
    }
}

/// The reservation with this ticket.
pub(super) fn open(arrivals: &mut BTreeMap<u32, Arrival>, ticket: u32) -> Result<&mut Arrival, CoreError> {
    let arrival = arrivals.get_mut(&ticket).filter(|arrival| !arrival.is_cancelled);
    arrival.ok_or(CoreError::UnknownTicket { ticket })
}

impl BlendState {
    /// Whether everything lies where `rule` allows it.
    fn fits(&self, rule: &Rule, prompt_len: u32, known: u32) -> bool {
        let in_span = |&(start, end): &(u32, u32)| {
            let span = rule.spans.iter().find(|&&(at, len)| at <= start && start < at + len);
            start < end && end < prompt_len + 1 && span.is_some_and(|&(at, len)| end <= at + len)
        };
        let is_reused = |ranges: &[(u32, u32)], row: u32| ranges.iter().any(|range| range.0 <= row && row < range.1);
        let all: Vec<(u32, u32)> = rule.spans.iter().map(|&(start, len)| (start, start + len)).collect();
        let recipe_fits = self.recipe.as_ref().is_none_or(|recipe| {
            let ascend = |rows: &[u32]| {
                rows.is_sorted_by(|a, b| a < b) && rows.iter().all(|&row| is_reused(&recipe.reused, row))
            };
            let reused = &recipe.reused;
            !reused.is_empty()
                && reused.iter().all(in_span)
                && reused.is_sorted_by(|a, b| a.1 <= b.0)
                && recipe.ran.len() <= rule.rounds.len()
                && recipe.ran.iter().all(|rows| ascend(rows))
                && ascend(&recipe.rows)
                && (rule.spans_end()..=known).contains(&recipe.tokens_len)
        });
        let repairs_fit =
            self.repaired.iter().all(|&row| is_reused(&all, row)) && (self.repaired.is_empty() || rule.decode_rows > 0);
        self.holes.len() == rule.spans.len() && recipe_fits && repairs_fit
    }
}
