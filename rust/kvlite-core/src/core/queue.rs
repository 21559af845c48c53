//! `Queue`: who waits, whose turn it is and who takes it.
//!
//! Owns the order of waiting sequences, how often each was passed, and what the last look at the cache found for it. Knows
//! numbers alone: `waiting.rs` looks for it. Invariants: a sequence is passed by later ones of its own line only, and at most
//! `max_passes` times in one stay; whoever was chosen stays chosen until it leaves, so nobody small starves somebody
//! large; one turn per sequence. Called by `waiting.rs`.
//!
//! ```text
//!   turn:  tenant 3's, by its oldest ticket      tenant 3's line, oldest first; the first WINDOW of it may be chosen
//!                                                [cold, passes 2] [96 % hit] [cold] [40 % hit] ...
//!   chosen: cost * (max_passes - passes), least first; whoever has max_passes passes goes before all that
//! ```

use std::collections::BTreeMap;

use super::turns::Turns;
use crate::config::CoreConfig;
use crate::ids::TenantId;
use crate::sched::policy::{Policy, Turn, Waiting, policy};
use crate::sequence::Rank;

/// Oldest sequences of a line among which the policy chooses: what bounds the work of a choice in a deep queue.
pub(super) const WINDOW: usize = 64;
/// Looks at the cache per step, the stalest of the window first; whoever is chosen is matched anew in any case.
const LOOKS_PER_STEP: usize = 16;

/// Where a sequence stands; unique, because choices of a request differ and every other rank does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub rank: Rank,
    pub choice: u32,
    pub slot: u32,
}

impl Place {
    const FIRST: Place = Place { rank: (i64::MIN, 0), choice: 0, slot: 0 };
}

/// What the queue remembers of one sequence.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Later ones of its line that were chosen since it came.
    passes: u32,
    /// As of the last look; until then, of a request that finds nothing.
    cost: u64,
    /// Number of the last look; 0: none.
    looked: u64,
}

/// See the module's header.
pub(super) struct Queue {
    policy: Box<dyn Policy>,
    max_passes: u32,
    /// By line, then in order of rank.
    entries: BTreeMap<(u32, Place), Entry>,
    turns: Turns,
    /// Who was chosen and has not left since.
    chosen: Option<(u32, Place)>,
    num_looks: u64,
    looks_left: usize,
    /// (last look, who), for a choice.
    scratch: Vec<(u64, Place)>,
}

impl Queue {
    pub fn new(config: &CoreConfig) -> Queue {
        let policy = policy(config.policy);
        Queue {
            max_passes: config.max_passes,
            entries: BTreeMap::new(),
            turns: Turns::new(policy.turn(), (config.max_num_waiting + config.max_num_seqs) as usize),
            chosen: None,
            num_looks: 0,
            looks_left: 0,
            scratch: Vec::with_capacity(WINDOW),
            policy,
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Slots of all who wait, line by line.
    pub fn slots(&self) -> impl Iterator<Item = u32> {
        self.entries.keys().map(|&(_, place)| place.slot)
    }

    /// Whether a sequence waits at this place.
    pub fn holds(&self, tenant: TenantId, place: Place) -> bool {
        self.entries.contains_key(&(self.line(tenant), place))
    }

    /// The rank of whoever arrives now.
    pub fn rank(&self, arrival: u64, priority: i32) -> i64 {
        self.policy.rank(arrival, priority)
    }

    /// Lines are the tenants' where tenants take turns.
    fn line(&self, tenant: TenantId) -> u32 {
        if self.policy.turn() == Turn::Common { 0 } else { tenant.0 }
    }

    /// A sequence of `known` tokens comes to wait. O(log waiting), as every change.
    pub fn insert(&mut self, tenant: TenantId, place: Place, known: u32) {
        let line = self.line(tenant);
        let cost = self.policy.cost(&Waiting { known, ..Waiting::default() });
        let before = self.entries.insert((line, place), Entry { passes: 0, cost, looked: 0 });
        assert!(before.is_none(), "{place:?} waits once");
        self.turns.enter(line, place.rank);
    }

    /// It leaves without having been admitted; false: it did not wait here.
    pub fn remove(&mut self, tenant: TenantId, place: Place) -> bool {
        let line = self.line(tenant);
        let was_here = self.entries.remove(&(line, place)).is_some();
        if was_here {
            self.turns.withdraw(line, place.rank);
            self.chosen = self.chosen.filter(|&chosen| chosen != (line, place));
        }
        was_here
    }

    /// It is admitted: its line's turn is over.
    pub fn admit(&mut self, tenant: TenantId, place: Place) {
        let line = self.line(tenant);
        self.entries.remove(&(line, place)).expect("who is admitted has waited");
        self.turns.take(line);
        self.chosen = None;
    }

    /// `tokens` of service for a tenant, weighed as `fair` weighs them. O(1).
    #[inline]
    pub fn charge(&mut self, tenant: TenantId, tokens: u64) {
        self.turns.charge(tenant.0, tokens);
    }

    /// A step begins: the cache may be asked again.
    pub fn begin_step(&mut self) {
        self.looks_left = LOOKS_PER_STEP;
    }

    /// Whoever needs no choice: the head where the rank decides, or who was chosen before.
    pub fn settled(&self) -> Option<u32> {
        let head = || self.entries.first_key_value().filter(|_| !self.policy.compares());
        self.chosen.or_else(|| head().map(|(&key, _)| key)).map(|(_, place)| place.slot)
    }

    /// The oldest of `line`, among whom a choice is made.
    fn window(&self, line: u32) -> impl Iterator<Item = (Place, &Entry)> {
        let whole = self.entries.range((line, Place::FIRST)..);
        whole.take_while(move |((other, _), _)| *other == line).take(WINDOW).map(|(&(_, place), entry)| (place, entry))
    }

    /// Appends the slots whose costs are most out of date, as many as may be looked at in this step. None where there is
    /// no choice.
    pub fn stalest(&mut self, slots: &mut Vec<u32>) {
        let Some(line) = self.turns.next() else { return };
        let mut window = std::mem::take(&mut self.scratch);
        window.extend(self.window(line).map(|(place, entry)| (entry.looked, place)));
        let count = if window.len() > 1 { self.looks_left.min(window.len()) } else { 0 };
        window.sort_unstable();
        slots.extend(window.drain(..).take(count).map(|(_, place)| place.slot));
        self.looks_left -= count;
        self.scratch = window;
    }

    /// What a look at the cache found.
    pub fn saw(&mut self, tenant: TenantId, place: Place, waiting: &Waiting) {
        self.num_looks += 1;
        let (cost, looked) = (self.policy.cost(waiting), self.num_looks);
        let entry = self.entries.get_mut(&(self.line(tenant), place)).expect("who is looked at waits");
        (entry.cost, entry.looked) = (cost, looked);
    }

    /// Chooses whoever comes next and keeps to it: whoever is older in that line has been passed. O(`WINDOW`).
    pub fn choose(&mut self) -> Option<u32> {
        let line = self.turns.next()?;
        let urgency = |place: Place, entry: &Entry| {
            let left = u64::from(self.max_passes.saturating_sub(entry.passes));
            (left > 0, entry.cost.saturating_mul(left), place)
        };
        let (.., place) = self.window(line).map(|(place, entry)| urgency(place, entry)).min()?;
        for (_, older) in self.entries.range_mut((line, Place::FIRST)..(line, place)) {
            older.passes += 1;
        }
        self.chosen = Some((line, place));
        Some(place.slot)
    }

    /// Checks what the header promises; panics with a sentence.
    pub fn audit(&self) {
        let passes = self.entries.values().map(|entry| entry.passes).max().unwrap_or(0);
        assert!(
            passes <= self.max_passes,
            "somebody was passed {passes} times, at most {} are allowed",
            self.max_passes
        );
        if let Some(chosen) = self.chosen {
            assert!(self.entries.contains_key(&chosen), "{chosen:?} was chosen and waits");
        }
        self.turns.audit(self.entries.keys().map(|&(line, place)| (line, place.rank)));
    }
}
