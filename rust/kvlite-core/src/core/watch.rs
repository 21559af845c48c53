//! Who of those that wait is watched by the cache: the first `MAX_WATCHED` to be served, so that eviction knows what
//! they will hit, and in which order.
//!
//! The order is that of `Sequence::turn`: of ranks (arrival, for `priority` the aged levels), or the arranged one. Where
//! a choice is made anew at every pass (`hit-rate`, `cache-aware`, `fair`) it is that of arrival: the next choice is
//! known when it is made, and to ask the cache for the whole queue at each pass would cost O(waiting * hits). Nor does
//! it tell who is overdue under `prefix-grouped`.
//! Owns the waiters beyond the watched. Must not know blocks: the cache parks and follows. Invariant: whoever waits and
//! may hit is watched or beyond, and nobody beyond comes before one that is watched. Called by `waiting.rs`,
//! `arrange.rs` and `admit.rs`, and by who publishes blocks.

use std::collections::BTreeSet;

use super::Core;
use super::recipes::Recipes;
use crate::cache::MAX_WATCHED;
use crate::ids::{BlockId, Label, Lookup, Token, Waiter};
use crate::sequence::Sequence;

impl Core {
    fn is_watchable(&self, slot: u32) -> bool {
        self.config.enable_prefix_caching && self.request(self.seq(slot).request).use_cache
    }

    /// A sequence comes to the queue.
    pub(super) fn watch(&mut self, slot: u32) {
        if !self.is_watchable(slot) {
            return;
        }
        let waiter = self.seq(slot).watcher(slot);
        if self.cache.num_watched() == MAX_WATCHED {
            let last = self.cache.last_watched().expect("somebody is watched");
            self.beyond.insert(last.max(waiter));
            if last < waiter {
                return;
            }
            self.cache.unwatch(last);
        }
        self.start_watching(waiter);
    }

    /// It leaves, to run or for another reason; without effect when it was not in the queue.
    pub(super) fn unwatch(&mut self, slot: u32) {
        let waiter = self.seq(slot).watcher(slot);
        if self.cache.unwatch(waiter) {
            if let Some(next) = self.beyond.pop_first() {
                self.start_watching(next);
            }
        } else {
            self.beyond.remove(&waiter);
        }
    }

    /// Turns of some who wait have changed. O(waiting), and a path for each who is watched now and was not, or was.
    pub(super) fn reorder_watched(&mut self) {
        let seqs = &self.seqs;
        let now = |waiter: Waiter| seqs[waiter.slot as usize].watcher(waiter.slot);
        self.cache.reorder(now);
        self.beyond = std::mem::take(&mut self.beyond).into_iter().map(now).collect();
        while let (Some(last), Some(&first)) = (self.cache.last_watched(), self.beyond.first())
            && first < last
        {
            self.beyond.pop_first();
            self.cache.unwatch(last);
            self.beyond.insert(last);
            self.start_watching(first);
        }
    }

    fn start_watching(&mut self, waiter: Waiter) {
        let (lookup, tokens) = may_hit(&self.seqs, &self.recipes, self.config.block_size, waiter);
        self.cache.watch(waiter, lookup, tokens);
    }

    /// After a block came into the tree: whoever waits for it, wants it.
    pub(super) fn follow(&mut self, block: BlockId) {
        let (seqs, recipes, block_size) = (&self.seqs, &self.recipes, self.config.block_size);
        self.cache.follow(block, |waiter| may_hit(seqs, recipes, block_size, waiter));
    }

    /// Checks the header's invariant.
    pub(super) fn audit_watched(&self) {
        let watched: BTreeSet<Waiter> = self.cache.watched().map(|(waiter, _)| waiter).collect();
        let (last, first_beyond) = (watched.last(), self.beyond.first());
        assert!(first_beyond.is_none_or(|first| last < Some(first)), "{first_beyond:?} is not watched, {last:?} is");
        assert!(self.beyond.is_empty() || watched.len() == MAX_WATCHED, "some could be watched and are not");
        let expected = self.service_order().into_iter().filter(|&slot| self.is_watchable(slot));
        let known = watched.iter().chain(&self.beyond).map(|waiter| waiter.slot);
        assert!(known.eq(expected), "whoever waits and may hit is watched or beyond, in the order of service");
    }
}

/// What a waiting sequence may hit: one token at least is left to compute. A blend is sure of exact blocks alone until it has
/// its recipe.
fn may_hit<'a>(seqs: &'a [Sequence], recipes: &Recipes, block_size: u32, waiter: Waiter) -> (Lookup, &'a [Token]) {
    let seq = &seqs[waiter.slot as usize];
    let recipe = seq.blend.as_ref().and_then(|blend| blend.recipe);
    let recipe = recipe.map(|number| (Label::recipe(number), recipes.get(number).first_block(block_size)));
    (Lookup { own: seq.label, recipe }, &seq.tokens[..seq.tokens.len() - 1])
}
