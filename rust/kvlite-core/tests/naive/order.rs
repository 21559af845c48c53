//! The obvious order of eviction, and the obvious queue. Part of the oracle of `tests/model.rs`.

use super::segments::ATTENTION_COST_TOKENS;
use super::{Entry, Naive, Path};
use kvlite_core::{EvictionKind, Label, Lookup, Token, Waiter};

/// A waiting request that is watched.
pub struct Watched {
    pub waiter: Waiter,
    pub lookup: Lookup,
    pub tokens: Vec<Token>,
    /// The stored path that it was followed to.
    pub path: Path,
}

impl Watched {
    pub fn may_read(&self, label: Label, block: usize) -> bool {
        match self.lookup.recipe {
            Some((recipe, from_block)) if block >= from_block => label == recipe,
            _ => [self.lookup.own, Label::PUBLIC].contains(&label),
        }
    }
}

/// How often `number` can be halved before it is 1.
fn doublings(number: u64) -> u64 {
    if number < 2 { 0 } else { 1 + doublings(number / 2) }
}

impl Naive {
    pub fn is_wanted(&self, path: &[(Label, Token)]) -> bool {
        self.watched.iter().any(|watched| watched.path.starts_with(path))
    }

    /// Counts a release; wanted blocks get no place in the order.
    pub fn rest(&mut self, at: usize) {
        self.entries[at].stamp = self.num_releases;
        self.entries[at].released = Some(self.num_releases);
        self.num_releases += 1;
        let entry = &self.entries[at];
        if self.is_wanted(&entry.path) {
            return;
        }
        let depth = (entry.path.len() / self.regime.block_size - 1) as u64;
        let cost = 1 + depth * self.regime.block_size as u64 / u64::from(ATTENTION_COST_TOKENS);
        let class = match self.eviction {
            EvictionKind::Lru => 0,
            EvictionKind::DepthDiscounted => 7 - doublings(1 + depth).min(7),
            EvictionKind::CostAware => doublings(cost).min(7),
            EvictionKind::ReuseWeighted => doublings(entry.uses),
        };
        let class = class.max(entry.floor);
        let parent = &entry.path[..entry.path.len() - self.regime.block_size];
        if let Some(parent) = self.position(parent) {
            self.entries[parent].floor = self.entries[parent].floor.max(class);
        }
        self.entries[at].class = class;
    }

    /// A use of what was cached, and one way or another of what was evicted and is back.
    pub fn came_back(&mut self, stamp: u64) {
        let interval = self.num_releases - stamp;
        self.interval = self.interval - self.interval / 1024 + interval;
    }

    /// The block that eviction takes next: of those nobody wants, the first in the order; else the one that is needed last.
    pub fn victim(&self) -> Option<usize> {
        let cached = (0..self.entries.len()).filter(|&at| self.entries[at].released.is_some());
        let (wanted, unwanted): (Vec<usize>, Vec<usize>) =
            cached.partition(|&at| self.is_wanted(&self.entries[at].path));
        let worth = 2 * self.interval / 1024;
        let due = |entry: &Entry| (entry.stamp + entry.class * worth, entry.class);
        let first = unwanted.into_iter().min_by_key(|&at| due(&self.entries[at]));
        let is_end = |&at: &usize| self.children(&self.entries[at].path).iter().all(|child| child.on_host);
        let first_waiter = |&at: &usize| {
            let here = self.watched.iter().filter(|watched| watched.path == self.entries[at].path);
            here.map(|watched| watched.waiter).min()
        };
        first.or_else(|| wanted.into_iter().filter(is_end).max_by_key(first_waiter))
    }

    /// A block is on the device no more; what is known of it is remembered.
    pub fn leave_device(&mut self, at: usize) {
        let Entry { path, uses, stamp, .. } = &self.entries[at];
        let (path, uses, stamp) = (path.clone(), *uses, *stamp);
        self.past.retain(|(other, ..)| *other != path);
        for watched in self.watched.iter_mut().filter(|watched| watched.path == path) {
            watched.path.truncate(path.len() - self.regime.block_size);
        }
        let is_tail = |entry: &Entry| !entry.on_host && entry.path != path && entry.path.starts_with(&path);
        assert!(!self.entries.iter().any(is_tail), "the model evicts {path:?} from the middle of a path");
        self.past.push((path, uses, stamp));
    }

    pub fn unwatch(&mut self, at: usize) {
        let gone = self.watched.swap_remove(at);
        for len in (1..=gone.path.len() / self.regime.block_size).rev() {
            let path = &gone.path[..len * self.regime.block_size];
            let at = self.position(path).expect("whoever is watched is parked in the tree");
            if !self.is_wanted(path) && self.entries[at].released.is_some() {
                self.rest(at);
            }
        }
    }

    /// A block has come: whoever goes on with it is parked there.
    pub fn follow(&mut self, path: &Path) {
        let above = path.len() - self.regime.block_size;
        for watched in &mut self.watched {
            let goes_on = watched.tokens.len() >= path.len()
                && path[..above] == watched.path
                && path[above..].iter().zip(&watched.tokens[above..]).all(|(have, want)| have.1 == *want)
                && watched.may_read(path[above].0, above / self.regime.block_size);
            if goes_on {
                watched.path = path.clone();
            }
        }
    }
}
