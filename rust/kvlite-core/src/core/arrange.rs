//! `Arranged`: who waits, in the order of `sched::batching`: for the policy `prefix-grouped`, and while a whole workload is at
//! hand, whatever the policy.
//!
//! Owns that order, which is made anew when an eighth of it has changed, so an arrival costs a bounded number of times its
//! share of a sort; until then whoever comes stands behind it. Who was preempted, and makers of segments, go before it. Who
//! waits for a neighbour to compute a prefix is passed by others for the step, but keeps the row and the blocks that it is
//! going to need. Waiting bound: `max_passes`, as in every line; none while the whole workload is at hand, which ends. Called
//! by `admit.rs`, and by whatever moves sequences through `waiting.rs`.

use std::collections::{BTreeMap, BTreeSet};

use super::Core;
use crate::config::{CoreConfig, PolicyKind};
use crate::ids::Waiter;
use crate::sched::batching::Batching;
use crate::sched::{HOLD_LIMIT_STEPS, WORKLOAD_HOLD_LIMIT_STEPS};
use crate::sequence::{FinishReason, Status};

/// Held sequences that others may pass in one step: what bounds the looks at the cache.
const MAX_HELD: u32 = 256;
/// The order is made anew when this part of it has changed, one by so many.
const CHANGED_SHARE: usize = 8;

/// Before and behind whatever was arranged, whoever's rank it is added to.
const FAR: i64 = 1 << 62;

/// See the module's header.
#[derive(Debug)]
pub(super) struct Arranged {
    batching: Batching,
    is_policy: bool,
    /// What waits is one workload, known as a whole.
    is_workload: bool,
    /// (slot, serial): the first ones may have left.
    order: Vec<(u32, u64)>,
    /// Everybody before it has left.
    head: usize,
    /// Who is asked next in this step.
    cursor: usize,
    /// Arrivals and ends since the order was made.
    num_changes: usize,
    /// Go before the order: they have begun, or somebody waits for them.
    urgent: BTreeSet<Waiter>,
    held: Held,
    scratch: Vec<u32>,
}

/// What those who were passed in this step are going to need.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Held {
    pub num_seqs: u32,
    pub rows: usize,
    pub blocks: u64,
}

impl Arranged {
    pub fn new(config: &CoreConfig) -> Arranged {
        Arranged {
            batching: Batching::new(config.block_size),
            is_policy: config.policy == PolicyKind::PrefixGrouped,
            is_workload: false,
            order: Vec::new(),
            head: 0,
            cursor: 0,
            num_changes: 0,
            urgent: BTreeSet::new(),
            held: Held::default(),
            scratch: Vec::new(),
        }
    }

    /// Whether it decides who is next.
    pub fn is_on(&self) -> bool {
        self.is_policy || self.is_workload
    }

    /// The place that somebody had before it left the queue for a while and that nobody has passed since.
    fn place_of(&self, slot: u32, serial: u64, turn: i64) -> Option<i64> {
        let place = usize::try_from(turn).ok().filter(|&place| place >= self.head)?;
        (self.order.get(place) == Some(&(slot, serial))).then_some(turn)
    }

    /// What is kept for those who were passed.
    pub fn held(&self) -> Held {
        self.held
    }

    /// Steps for which somebody may be held back for a neighbour. The neighbour's prefill goes on in each of them.
    pub fn hold_limit(&self) -> u32 {
        if self.is_on() { WORKLOAD_HOLD_LIMIT_STEPS } else { HOLD_LIMIT_STEPS }
    }
}

impl Core {
    /// On: all that waits is one workload, known as a whole, for whose parts nobody waits; it is admitted group by group
    /// until this is switched off. What else waits takes part. O(waiting).
    pub fn set_workload(&mut self, is_workload: bool) {
        self.arranged.is_workload = is_workload;
        self.arranged.order.clear();
        (self.arranged.head, self.arranged.num_changes) = (0, self.queue.len());
        self.arranged.urgent.clear();
        self.refused = None;
        let mut slots = std::mem::take(&mut self.arranged.scratch);
        slots.extend(self.queue.slots());
        slots.drain(..).for_each(|slot| self.arrange_arrival(slot));
        self.arranged.scratch = slots;
        self.reorder_watched();
    }

    /// Somebody joins the queue.
    pub(super) fn arrange_arrival(&mut self, slot: u32) {
        let seq = &mut self.seqs[slot as usize];
        if !self.arranged.is_on() {
            seq.turn = seq.rank.0;
            return;
        }
        let has_begun = seq.makes.is_some() || seq.choice > 0 || seq.output_len() > 0 || seq.preemptions > 0;
        if has_begun {
            seq.turn = seq.rank.0 - FAR;
            self.arranged.urgent.insert(seq.waiter(slot));
        } else {
            let place = self.arranged.place_of(slot, seq.rank.1, seq.turn);
            seq.turn = place.unwrap_or(seq.rank.0 + FAR);
            self.arranged.num_changes += 1;
        }
    }

    /// Somebody leaves the queue.
    pub(super) fn arrange_departure(&mut self, slot: u32) {
        if !self.arranged.urgent.is_empty() {
            self.arranged.urgent.remove(&self.seqs[slot as usize].waiter(slot));
        }
    }

    /// Somebody is admitted; while nobody waits for a single answer, that passes nobody.
    pub(super) fn arrange_admission(&mut self, slot: u32) {
        self.arrange_departure(slot);
        if self.arranged.is_policy && !self.arranged.is_workload {
            let seq = &self.seqs[slot as usize];
            self.queue.pass_older(seq.tenant(), seq.waiter(slot));
        }
    }

    /// A choice ended: what its group is known for.
    pub(super) fn arrange_end(&mut self, slot: u32, reason: FinishReason) {
        let seq = &self.seqs[slot as usize];
        if self.arranged.is_on() && matches!(reason, FinishReason::Stop | FinishReason::Length) && seq.makes.is_none() {
            self.arranged.batching.ended(seq.home, seq.output_len());
            self.arranged.num_changes += 1;
        }
    }

    /// A step begins: everybody may be asked again, in a new order if enough has changed.
    pub(super) fn begin_arranged(&mut self) {
        let arranged = &mut self.arranged;
        arranged.held = Held::default();
        if !arranged.is_on() {
            return;
        }
        let left = arranged.order.len() - arranged.head;
        if arranged.num_changes > 0 && arranged.num_changes * CHANGED_SHARE >= left {
            self.arrange();
        }
        self.arranged.cursor = self.arranged.head;
    }

    /// Makes the order of everybody who waits and has not begun.
    fn arrange(&mut self) {
        let arranged = &mut self.arranged;
        let mut slots = std::mem::take(&mut arranged.scratch);
        let is_urgent = |slot: u32| arranged.urgent.contains(&self.seqs[slot as usize].waiter(slot));
        slots.extend(self.queue.slots().filter(|&slot| !is_urgent(slot)));
        slots.sort_unstable_by_key(|&slot| self.seqs[slot as usize].order());
        arranged.batching.clear();
        for &slot in &slots {
            let seq = &self.seqs[slot as usize];
            let num_choices = self.requests[seq.request as usize].as_ref().map_or(1, |state| state.num_choices);
            let output = (seq.end_len - seq.prompt_len).saturating_mul(num_choices);
            arranged.batching.add(seq.label, &seq.tokens[..seq.prompt_len as usize], output);
        }
        for &slot in &self.running {
            let seq = &self.seqs[slot as usize];
            arranged.batching.add(seq.label, &seq.tokens[..seq.prompt_len as usize], 0);
        }
        arranged.order.clear();
        let serial = |slot: u32| self.seqs[slot as usize].rank.1;
        let order = arranged.batching.arrange(self.running.len()).iter();
        arranged.order.extend(order.map(|&at| (slots[at as usize], serial(slots[at as usize]))));
        for (&slot, &home) in slots.iter().zip(arranged.batching.homes()) {
            self.seqs[slot as usize].home = home;
        }
        for (place, &(slot, _)) in arranged.order.iter().enumerate() {
            self.seqs[slot as usize].turn = place as i64;
        }
        slots.clear();
        arranged.scratch = slots;
        (arranged.head, arranged.num_changes) = (0, 0);
        self.reorder_watched();
    }

    /// Slots of all who wait, in the order in which they will be served as far as that is known; for audits.
    pub(super) fn service_order(&self) -> Vec<u32> {
        let mut slots: Vec<u32> = self.queue.slots().collect();
        slots.sort_unstable_by_key(|&slot| self.seq(slot).order());
        if self.arranged.is_on() {
            let order = self.arranged.order.iter().enumerate().skip(self.arranged.head);
            let places: BTreeMap<_, _> = order.map(|(place, entry)| (entry, place)).collect();
            let is_urgent = |slot: u32| self.arranged.urgent.contains(&self.seq(slot).waiter(slot));
            let place = |slot: u32| places.get(&(slot, self.seq(slot).rank.1)).copied().unwrap_or(usize::MAX);
            slots.sort_by_key(|&slot| if is_urgent(slot) { (0, 0) } else { (1, place(slot)) });
        }
        slots
    }

    fn overdue(&self) -> Option<u32> {
        if self.arranged.is_workload { None } else { self.queue.overdue() }
    }

    /// Who is to be admitted next: who was passed too often, who has begun, then the order.
    pub(super) fn next_arranged(&mut self) -> Option<u32> {
        let first = self.overdue().or_else(|| self.arranged.urgent.first().map(|waiter| waiter.slot));
        if first.is_some() {
            return first;
        }
        loop {
            let Some(&(slot, serial)) = self.arranged.order.get(self.arranged.cursor) else {
                if self.arranged.num_changes == 0 || self.arranged.held.num_seqs > 0 {
                    return None;
                }
                self.arrange(); // Few have come since, but everybody else has left.
                self.arranged.cursor = 0;
                continue;
            };
            let seq = &self.seqs[slot as usize];
            if seq.status() == Status::Waiting && seq.rank.1 == serial {
                return Some(slot);
            }
            self.arranged.head += usize::from(self.arranged.head == self.arranged.cursor);
            self.arranged.cursor += 1;
        }
    }

    /// Whether others may pass `slot`, which waits for a neighbour that computes `shared` blocks for it. Its row and its own
    /// blocks are kept for it.
    pub(super) fn pass_over(&mut self, slot: u32, num_rows: usize, shared: u64) -> bool {
        let seq = &self.seqs[slot as usize];
        let at = self.arranged.order.get(self.arranged.cursor);
        let is_in_order = self.arranged.is_on() && at == Some(&(slot, seq.rank.1)) && self.overdue().is_none();
        if !is_in_order || self.arranged.held.num_seqs >= MAX_HELD {
            return false;
        }
        let blocks = (num_rows as u64) * self.soon(seq).saturating_sub(shared);
        let held = &mut self.arranged.held;
        held.num_seqs += 1;
        held.rows += num_rows;
        held.blocks += blocks;
        self.arranged.cursor += 1;
        true
    }
}
