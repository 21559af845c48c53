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
use crate::ids::{TenantId, Waiter};
use crate::sched::policy::{Lines, Policy, Waiting, policy};

/// Oldest sequences of a line among which the policy chooses: what bounds the work of a choice in a deep queue.
pub(super) const WINDOW: usize = 64;
/// Looks at the cache per step, the stalest of the window first; whoever is chosen is matched anew in any case.
const LOOKS_PER_STEP: usize = 16;

/// Before whoever waits.
const FIRST: Waiter = Waiter { rank: (i64::MIN, 0), choice: 0, slot: 0 };

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
    entries: BTreeMap<(u32, Waiter), Entry>,
    turns: Turns,
    /// Who was chosen and has not left since.
    chosen: Option<(u32, Waiter)>,
    num_looks: u64,
    looks_left: usize,
    /// (last look, who), for a choice.
    scratch: Vec<(u64, Waiter)>,
}

impl Queue {
    pub fn new(config: &CoreConfig) -> Queue {
        let policy = policy(config.policy);
        Queue {
            max_passes: config.max_passes,
            entries: BTreeMap::new(),
            turns: Turns::new(policy.lines(), (config.max_num_waiting + config.max_num_seqs) as usize),
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
        self.entries.keys().map(|&(_, waiter)| waiter.slot)
    }

    /// Whether this one waits.
    pub fn holds(&self, tenant: TenantId, waiter: Waiter) -> bool {
        self.entries.contains_key(&(self.line(tenant), waiter))
    }

    /// The rank of whoever arrives now.
    pub fn rank(&self, arrival: u64, priority: i32) -> i64 {
        self.policy.rank(arrival, priority)
    }

    /// Lines are the tenants' where tenants take turns.
    fn line(&self, tenant: TenantId) -> u32 {
        if self.policy.lines() == Lines::Common { 0 } else { tenant.0 }
    }

    /// A sequence of `known` tokens comes to wait. O(log waiting), as every change.
    pub fn insert(&mut self, tenant: TenantId, waiter: Waiter, known: u32) {
        let line = self.line(tenant);
        let cost = self.policy.cost(&Waiting { known, ..Waiting::default() });
        // Where nobody is chosen here, who comes back before others was passed by whoever passed them: see `overdue`.
        let next = self.entries.range((line, waiter)..).next().filter(|_| !self.policy.compares());
        let passes = next.map_or(0, |(_, entry)| entry.passes);
        let before = self.entries.insert((line, waiter), Entry { passes, cost, looked: 0 });
        assert!(before.is_none(), "{waiter:?} waits once");
        self.turns.enter(line, waiter.rank);
    }

    /// It leaves without having been admitted; false: it did not wait here.
    pub fn remove(&mut self, tenant: TenantId, waiter: Waiter) -> bool {
        let line = self.line(tenant);
        let was_here = self.entries.remove(&(line, waiter)).is_some();
        if was_here {
            self.turns.withdraw(line, waiter.rank);
            self.chosen = self.chosen.filter(|&chosen| chosen != (line, waiter));
        }
        was_here
    }

    /// It is admitted: its line's turn is over.
    pub fn admit(&mut self, tenant: TenantId, waiter: Waiter) {
        let line = self.line(tenant);
        self.entries.remove(&(line, waiter)).expect("who is admitted has waited");
        self.turns.take(line);
        self.chosen = None;
    }

    /// Whoever is older in its line has been passed.
    pub fn pass_older(&mut self, tenant: TenantId, waiter: Waiter) {
        let line = self.line(tenant);
        for (_, older) in self.entries.range_mut((line, FIRST)..(line, waiter)) {
            older.passes += 1;
        }
    }

    /// The oldest sequence of all, if it may not be passed any more. It was passed most, so nobody else is overdue before.
    pub fn overdue(&self) -> Option<u32> {
        let (&(_, waiter), entry) = self.entries.first_key_value()?;
        (entry.passes >= self.max_passes).then_some(waiter.slot)
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
        self.chosen.or_else(|| head().map(|(&key, _)| key)).map(|(_, waiter)| waiter.slot)
    }

    /// The oldest of `line`, among whom a choice is made.
    fn window(&self, line: u32) -> impl Iterator<Item = (Waiter, &Entry)> {
        let whole = self.entries.range((line, FIRST)..);
        whole
            .take_while(move |((other, _), _)| *other == line)
            .take(WINDOW)
            .map(|(&(_, waiter), entry)| (waiter, entry))
    }

    /// Appends the slots whose costs are most out of date, as many as may be looked at in this step. None where there is
    /// no choice.
    pub fn stalest(&mut self, slots: &mut Vec<u32>) {
        let Some(line) = self.turns.next() else { return };
        let mut window = std::mem::take(&mut self.scratch);
        window.extend(self.window(line).map(|(waiter, entry)| (entry.looked, waiter)));
        let count = if window.len() > 1 { self.looks_left.min(window.len()) } else { 0 };
        window.sort_unstable();
        slots.extend(window.drain(..).take(count).map(|(_, waiter)| waiter.slot));
        self.looks_left -= count;
        self.scratch = window;
    }

    /// What a look at the cache found.
    pub fn saw(&mut self, tenant: TenantId, waiter: Waiter, waiting: &Waiting) {
        self.num_looks += 1;
        let (cost, looked) = (self.policy.cost(waiting), self.num_looks);
        let entry = self.entries.get_mut(&(self.line(tenant), waiter)).expect("who is looked at waits");
        (entry.cost, entry.looked) = (cost, looked);
    }

    /// Who comes next as far as is known now. O(`WINDOW`).
    pub fn best(&mut self) -> Option<u32> {
        let line = self.turns.next()?;
        let urgency = |waiter: Waiter, entry: &Entry| {
            let left = u64::from(self.max_passes.saturating_sub(entry.passes));
            (left > 0, entry.cost.saturating_mul(left), waiter)
        };
        let best = self.window(line).map(|(waiter, entry)| urgency(waiter, entry)).min();
        best.map(|(.., waiter)| waiter.slot)
    }

    /// Keeps to the best one until it leaves: whoever is older in its line has been passed.
    pub fn choose(&mut self, tenant: TenantId, waiter: Waiter) {
        let line = self.line(tenant);
        if !self.policy.compares() || self.chosen == Some((line, waiter)) {
            return;
        }
        assert!(self.chosen.is_none(), "whoever was chosen stays chosen");
        self.pass_older(tenant, waiter);
        self.chosen = Some((line, waiter));
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
        self.turns.audit(self.entries.keys().map(|&(line, waiter)| (line, waiter.rank)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PolicyKind;
    use crate::sequence::Rank;

    /// The same order, from a list that is searched from end to end each time.
    #[derive(Default)]
    struct Naive {
        /// Line, waiter, passes, cost, last look.
        waiting: Vec<(u32, Waiter, u32, u64, u64)>,
        /// When it is due, its number, whose it is.
        tickets: Vec<(Rank, usize, u32)>,
        num_tickets: usize,
        num_looks: u64,
        looks_left: usize,
        chosen: Option<(u32, Waiter)>,
    }

    impl Naive {
        fn insert(&mut self, line: u32, waiter: Waiter, cost: u64) {
            self.waiting.push((line, waiter, 0, cost, 0));
            self.tickets.push((waiter.rank, self.num_tickets, line));
            self.num_tickets += 1;
        }

        fn leave(&mut self, line: u32, waiter: Waiter, due: Rank) {
            self.waiting.retain(|&(_, other, ..)| other != waiter);
            self.tickets.sort_unstable();
            let at = self.tickets.iter().position(|&(rank, _, owner)| owner == line && rank >= due).expect("a ticket");
            self.tickets.remove(at);
            self.chosen = self.chosen.filter(|&(_, chosen)| chosen != waiter);
        }

        fn pick(&mut self, compares: bool, max_passes: u32, cost: impl Fn(u32) -> u64) -> Option<(u32, Waiter)> {
            if self.chosen.is_some() {
                return self.chosen;
            }
            self.waiting.sort_unstable();
            let line = self.tickets.iter().min()?.2;
            let mut window: Vec<usize> = (0..self.waiting.len()).filter(|&at| self.waiting[at].0 == line).collect();
            window.truncate(WINDOW);
            if !compares {
                return window.first().map(|&at| (line, self.waiting[at].1));
            }
            let mut stale = window.clone();
            stale.sort_by_key(|&at| (self.waiting[at].4, self.waiting[at].1));
            stale.truncate(if window.len() > 1 { self.looks_left } else { 0 });
            self.looks_left -= stale.len();
            for at in stale {
                self.num_looks += 1;
                let entry = &mut self.waiting[at];
                (entry.3, entry.4) = (cost(entry.1.slot), self.num_looks);
            }
            let overdue = window.iter().copied().find(|&at| self.waiting[at].2 >= max_passes);
            let aged = |&at: &usize| self.waiting[at].3 * u64::from(max_passes.saturating_sub(self.waiting[at].2));
            let best = overdue.or_else(|| window.iter().copied().min_by_key(aged)).expect("its line's turn");
            let waiter = self.waiting[best].1;
            self.waiting.iter_mut().filter(|entry| entry.0 == line && entry.1 < waiter).for_each(|entry| entry.2 += 1);
            self.chosen = Some((line, waiter));
            self.chosen
        }
    }

    /// splitmix64.
    fn draw(state: &mut u64, below: u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % below
    }

    /// What a look finds; it changes with time.
    fn found(slot: u32, time: u64) -> Waiting {
        let known = 10 + slot * 7 % 200;
        Waiting { known, cached: (slot + (time / 50) as u32) * 13 % known, blended: 0, recomputed: 0 }
    }

    fn config(policy: PolicyKind, max_passes: u32) -> CoreConfig {
        CoreConfig { policy, max_passes, ..crate::config::small() }
    }

    /// Runs a queue and its twin for a while; returns how often the head was passed.
    fn compare(policy: PolicyKind, seed: u64) -> usize {
        let mut state = seed;
        let max_passes = [0, 1, 3, 64][draw(&mut state, 4) as usize];
        let mut queue = Queue::new(&config(policy, max_passes));
        let (mut naive, mut num_passes) = (Naive::default(), 0);
        let compares = queue.policy.compares();
        let mut left: Vec<(u32, Waiter)> = Vec::new();
        for time in 0..400u64 {
            let (slot, tenant) = (time as u32, draw(&mut state, 3) as u32);
            let (line, priority) = (queue.line(TenantId(tenant)), draw(&mut state, 3) as i32);
            if draw(&mut state, 100) < 55 {
                let rank = (queue.rank(time, priority), time);
                let (line, waiter) = match left.pop().filter(|_| draw(&mut state, 4) == 0) {
                    Some((line, waiter)) => (line, waiter), // Comes back at its old rank.
                    None => (line, Waiter { rank, choice: 0, slot }),
                };
                let known = found(waiter.slot, time).known;
                queue.insert(TenantId(line), waiter, known);
                naive.insert(line, waiter, queue.policy.cost(&Waiting { known, ..Waiting::default() }));
            }
            if draw(&mut state, 100) < 5 && !naive.waiting.is_empty() {
                let (line, waiter, ..) = naive.waiting[draw(&mut state, naive.waiting.len() as u64) as usize];
                assert!(queue.remove(TenantId(line), waiter) && !queue.remove(TenantId(line), waiter));
                naive.leave(line, waiter, waiter.rank);
            }
            queue.begin_step();
            naive.looks_left = LOOKS_PER_STEP;
            for _ in 0..draw(&mut state, 3) {
                let slot = queue.settled().or_else(|| {
                    let mut slots = Vec::new();
                    queue.stalest(&mut slots);
                    for slot in slots {
                        let at = naive.waiting.iter().find(|entry| entry.1.slot == slot).expect("it waits");
                        queue.saw(TenantId(at.0), at.1, &found(slot, time));
                    }
                    queue.best()
                });
                let picked = naive.pick(compares, max_passes, |slot| queue.policy.cost(&found(slot, time)));
                assert_eq!(slot, picked.map(|(_, waiter)| waiter.slot), "{policy:?}, seed {seed}, time {time}");
                let Some((line, waiter)) = picked else { break };
                queue.choose(TenantId(line), waiter);
                if draw(&mut state, 100) < 70 {
                    num_passes += naive.waiting.iter().filter(|entry| entry.0 == line && entry.1 < waiter).count();
                    queue.admit(TenantId(line), waiter);
                    naive.leave(line, waiter, (i64::MIN, 0));
                    left.push((line, waiter));
                }
                queue.audit();
            }
        }
        num_passes
    }

    #[test]
    fn the_queue_chooses_as_a_sorted_list_does() {
        use PolicyKind::{CacheAware, Fcfs, HitRate, Priority};
        for (policy, reorders) in [(Fcfs, false), (Priority, false), (HitRate, true), (CacheAware, true)] {
            let num_passes: usize = (0..60).map(|seed| compare(policy, seed)).sum();
            assert_eq!(num_passes > 100, reorders, "{policy:?}: {num_passes} passes");
        }
    }

    #[test]
    fn a_line_gets_no_turn_by_sending_in_requests_and_withdrawing_them() {
        let mut queue = Queue::new(&config(PolicyKind::CacheAware, 64));
        let waiter = |at: i64| Waiter { rank: (at, at as u64), choice: 0, slot: at as u32 };
        queue.insert(TenantId(0), waiter(0), 50);
        for at in 1..4 {
            queue.insert(TenantId(0), waiter(at), 5);
        }
        queue.insert(TenantId(1), waiter(4), 50);
        queue.insert(TenantId(0), waiter(5), 50);
        queue.admit(TenantId(0), waiter(3)); // By the ticket of the oldest.
        queue.remove(TenantId(0), waiter(0)); // Its own is used up: the next one goes.
        queue.remove(TenantId(0), waiter(1));
        let turns = std::iter::from_fn(|| {
            let slot = queue.best()?;
            let tenant = TenantId(u32::from(slot == 4));
            queue.admit(tenant, waiter(slot.into()));
            queue.audit();
            Some(slot)
        });
        assert_eq!(turns.collect::<Vec<_>>(), [2, 4, 5]);
    }
}
