//! What waiting requests will hit: each one that is watched is *parked* at the last block of the tree that its prompt begins with.
//!
//! Owns who is parked where, and which cached ends of wanted paths would go first. Must not know prompts: `Cache` finds the
//! block, and asks again when a child comes to it. Invariants: a block is wanted while somebody is parked at it or below it; a
//! wanted block is in no other order of eviction; at most `MAX_WATCHED` are watched, so nothing here is long. Called by `watch.rs`.
//!
//! ```text
//!   root - [a] - [b] - [c] <- waiter 2      wanted: a, b, c, d; listed, as they are cached and have no child: c, d
//!            \                              d goes first (7 is served after 2); then 7 and 9 are parked at a
//!             `- [d] <- waiters 7, 9        a new block below d may continue 9: then it is parked there
//! ```

use super::NONE;
use crate::ids::Waiter;

/// Waiting requests whose hits are kept, those to be served first. Bounds the cost of a block that many of them begin with.
pub const MAX_WATCHED: usize = 256;

/// Where a watched request is parked.
#[derive(Clone, Copy)]
struct Watcher {
    waiter: Waiter,
    /// `NONE`: at the root.
    block: u32,
    /// Blocks of its prompt from the root to there.
    len: u32,
    /// Next in the list of its block.
    next: u32,
}

#[derive(Clone, Copy)]
struct Spot {
    /// First of the watchers parked here.
    first: u32,
    /// Watchers here and children that are wanted.
    wants: u32,
}

/// See the module's header. Never allocates after `new`.
pub(super) struct Wants {
    watchers: Vec<Watcher>,
    free: Vec<u32>,
    /// Watchers by waiter.
    by_waiter: Vec<(Waiter, u32)>,
    /// Per block; the last one is the root's.
    spots: Vec<Spot>,
    /// Cached ends of wanted paths by the waiter that needs them first; the last goes first.
    ends: Vec<(Waiter, u32)>,
}

/// A watcher that left its block: who, and how far its prompt is matched there.
pub(super) struct Parked {
    pub watcher: u32,
    pub waiter: Waiter,
    pub len: u32,
}

impl Wants {
    pub(super) fn new(num_blocks: usize) -> Wants {
        let nowhere = Watcher { waiter: Waiter { rank: (0, 0), choice: 0, slot: 0 }, block: NONE, len: 0, next: NONE };
        Wants {
            watchers: vec![nowhere; MAX_WATCHED],
            free: (0..MAX_WATCHED as u32).rev().collect(),
            by_waiter: Vec::with_capacity(MAX_WATCHED),
            spots: vec![Spot { first: NONE, wants: 0 }; num_blocks + 1],
            ends: Vec::with_capacity(MAX_WATCHED),
        }
    }

    fn spot(&self, block: u32) -> usize {
        (block as usize).min(self.spots.len() - 1)
    }

    pub(super) fn is_wanted(&self, block: u32) -> bool {
        self.spots[block as usize].wants > 0
    }

    /// Watchers by waiter.
    pub(super) fn by_waiter(&self) -> impl Iterator<Item = (Waiter, u32)> {
        self.by_waiter.iter().copied()
    }

    /// Watched requests.
    pub(super) fn num_watched(&self) -> usize {
        self.by_waiter.len()
    }

    /// The last waiter that is watched.
    pub(super) fn last(&self) -> Option<Waiter> {
        self.by_waiter.last().map(|&(waiter, _)| waiter)
    }

    /// A new watcher, not parked yet. There is room for it.
    pub(super) fn enter(&mut self, waiter: Waiter) -> u32 {
        let watcher = self.free.pop().expect("the caller has counted those who are watched");
        self.watchers[watcher as usize].waiter = waiter;
        let at = self.by_waiter.partition_point(|&(other, _)| other < waiter);
        self.by_waiter.insert(at, (waiter, watcher));
        watcher
    }

    /// Forgets a waiter, which its caller then takes from its block; none: it is not watched.
    pub(super) fn leave(&mut self, waiter: Waiter) -> Option<u32> {
        let at = self.by_waiter.binary_search_by_key(&waiter, |&(waiter, _)| waiter).ok()?;
        let (_, watcher) = self.by_waiter.remove(at);
        self.free.push(watcher);
        Some(watcher)
    }

    /// Each waiter becomes another one and stays where it is parked. O(`MAX_WATCHED` * log).
    pub(super) fn reorder(&mut self, now: impl Fn(Waiter) -> Waiter) {
        for (waiter, watcher) in &mut self.by_waiter {
            *waiter = now(*waiter);
            self.watchers[*watcher as usize].waiter = *waiter;
        }
        self.by_waiter.sort_unstable();
        let mut ends = std::mem::take(&mut self.ends);
        for (first, block) in &mut ends {
            *first = self.first_waiter(*block).expect("somebody is parked at the end of a wanted path");
        }
        ends.sort_unstable();
        self.ends = ends;
    }

    /// The block at which a watcher is parked; none: the root.
    pub(super) fn block_of(&self, watcher: u32) -> Option<u32> {
        Some(self.watchers[watcher as usize].block).filter(|&block| block != NONE)
    }

    /// Parks a watcher at `block` (none: the root), `len` blocks into its prompt. The caller counts the want and relists.
    pub(super) fn park(&mut self, watcher: u32, block: Option<u32>, len: u32) {
        let block = block.unwrap_or(NONE);
        let spot = self.spot(block);
        let next = std::mem::replace(&mut self.spots[spot].first, watcher);
        let parked = &mut self.watchers[watcher as usize];
        (parked.block, parked.len, parked.next) = (block, len, next);
    }

    /// Takes a watcher from the list of its block. The caller counts the want and relists.
    pub(super) fn unpark(&mut self, watcher: u32) {
        let Watcher { block, next, .. } = self.watchers[watcher as usize];
        let spot = self.spot(block);
        if self.spots[spot].first == watcher {
            self.spots[spot].first = next;
            return;
        }
        let mut at = self.spots[spot].first;
        while self.watchers[at as usize].next != watcher {
            at = self.watchers[at as usize].next;
        }
        self.watchers[at as usize].next = next;
    }

    /// Watchers parked at `block` (none: the root), the last that came first.
    pub(super) fn parked(&self, block: Option<u32>) -> impl Iterator<Item = Parked> {
        let first = self.spots[self.spot(block.unwrap_or(NONE))].first;
        std::iter::successors(self.at(first), |parked| self.after(parked.watcher))
    }

    /// Who comes behind a watcher in the list of its block.
    pub(super) fn after(&self, watcher: u32) -> Option<Parked> {
        self.at(self.watchers[watcher as usize].next)
    }

    fn at(&self, watcher: u32) -> Option<Parked> {
        let Watcher { waiter, len, .. } = *self.watchers.get(watcher as usize)?;
        Some(Parked { watcher, waiter, len })
    }

    /// One more want of a block; true when it is the first.
    pub(super) fn add(&mut self, block: u32) -> bool {
        let wants = &mut self.spots[block as usize].wants;
        *wants += 1;
        *wants == 1
    }

    /// One want of a block less; true when it was the last.
    pub(super) fn drop(&mut self, block: u32) -> bool {
        let wants = &mut self.spots[block as usize].wants;
        *wants -= 1;
        *wants == 0
    }

    /// The first waiter that needs a block at which somebody is parked.
    fn first_waiter(&self, block: u32) -> Option<Waiter> {
        self.parked(Some(block)).map(|parked| parked.waiter).min()
    }

    /// A wanted block is cached and has no child: it may be taken. O(`MAX_WATCHED`), usually a few.
    pub(super) fn list(&mut self, block: u32) {
        let waiter = self.first_waiter(block).expect("somebody is parked at the end of a wanted path");
        let end = (waiter, block);
        // Mostly the parent of the last one, which was just taken.
        let is_last = self.ends.last().is_none_or(|&last| last < end);
        let at = if is_last { self.ends.len() } else { self.ends.partition_point(|&other| other < end) };
        self.ends.insert(at, end);
    }

    /// A block may be taken no more, or the first waiter that needs it is about to change; false: it was not listed.
    pub(super) fn unlist(&mut self, block: u32) -> bool {
        if self.victim() == Some(block) {
            return self.ends.pop().is_some();
        }
        let Some(waiter) = self.first_waiter(block) else { return false };
        let found = self.ends.binary_search(&(waiter, block));
        found.map(|at| self.ends.remove(at)).is_ok()
    }

    /// The end of a wanted path that is needed last; none when nothing wanted may be taken.
    pub(super) fn victim(&self) -> Option<u32> {
        self.ends.last().map(|&(_, block)| block)
    }

    /// Checks lists and counts against each other. `parent` and `is_end` (cached, without a child) are the tree's.
    pub(super) fn audit(&self, parent: impl Fn(u32) -> Option<u32>, is_end: impl Fn(u32) -> bool) {
        assert!(
            self.by_waiter.is_sorted() && self.by_waiter.len() + self.free.len() == MAX_WATCHED,
            "watchers by waiter"
        );
        let mut wants = vec![0; self.spots.len() - 1];
        let mut num_parked = self.parked(None).count();
        for block in 0..wants.len() as u32 {
            let mut at = Some(block);
            let here = self.parked(at).count();
            num_parked += here;
            let is_sound = self.parked(at).all(|parked| self.watchers[parked.watcher as usize].block == block);
            assert!(is_sound, "block {block}: whoever is parked here knows it");
            wants[block as usize] += here as u32;
            let mut is_first = here > 0 && wants[block as usize] == here as u32;
            while let Some(above) = at.filter(|_| is_first).and_then(&parent) {
                wants[above as usize] += 1;
                is_first = wants[above as usize] == 1;
                at = Some(above);
            }
        }
        assert!(num_parked == self.by_waiter.len(), "{num_parked} are parked, {} are watched", self.by_waiter.len());
        let mut num_ends = 0;
        for (block, &count) in wants.iter().enumerate() {
            let (block, counted) = (block as u32, self.spots[block].wants);
            assert!(counted == count, "block {block} is wanted {count} times, counted {counted} times");
            if count > 0 && is_end(block) {
                num_ends += 1;
                let waiter = self.first_waiter(block).expect("somebody is parked at the end of a wanted path");
                assert!(
                    self.ends.binary_search(&(waiter, block)).is_ok(),
                    "block {block} is wanted, cached and not listed"
                );
            }
        }
        assert!(num_ends == self.ends.len(), "{} ends are listed, {num_ends} are there", self.ends.len());
    }
}
