//! Eviction that knows the queue: which order a cached block belongs to, as requests come to wait, leave and are followed.
//!
//! Connects `wants.rs` with tree, states and the order of what nobody wants (`evict.rs`). Invariant: a cached block of the tree
//! is in that order exactly while it is not wanted, and listed exactly while it is wanted and has no child. Called by `Cache`,
//! and by `core`.

use super::wants::Parked;
use super::{BlockState, Cache};
use crate::ids::{BlockId, Lookup, Token, Waiter};

impl Cache {
    /// Keeps what a waiting request will hit until it is unwatched: of its path, which is followed as it grows, blocks are taken
    /// after all that nobody watched wants, and after those that earlier waiters do not need. `tokens` are what it may hit.
    ///
    /// There is room for it and its waiter is new. O(path); without prefix caching nothing is watched.
    pub fn watch(&mut self, waiter: Waiter, lookup: Lookup, tokens: &[Token]) {
        if !self.keeps_released {
            return;
        }
        let watcher = self.wants.enter(waiter);
        let (mut end, mut len) = (None, 0);
        self.tree.walk(lookup, tokens, usize::MAX, |block| {
            if !self.pool.is_on_host(block) {
                (end, len) = (Some(block), len + 1);
            }
        });
        let was_listed = end.is_some_and(|end| self.wants.unlist(end));
        self.wants.park(watcher, end, len);
        if let Some(end) = end {
            self.add_want(end);
            if was_listed {
                self.wants.list(end);
            }
        }
    }

    /// A request waits no longer; false: it was not watched. O(path).
    pub fn unwatch(&mut self, waiter: Waiter) -> bool {
        let Some(watcher) = self.wants.leave(waiter) else { return false };
        let end = self.wants.block_of(watcher);
        let was_listed = end.is_some_and(|end| self.wants.unlist(end));
        self.wants.unpark(watcher);
        if let Some(end) = end {
            self.drop_want(end);
            if was_listed && self.wants.is_wanted(end) {
                self.wants.list(end);
            }
        }
        true
    }

    /// Waiters are served in another order: each is from now on whom `now` says, in the same slot. No path is walked.
    pub fn reorder(&mut self, now: impl Fn(Waiter) -> Waiter) {
        self.wants.reorder(now);
    }

    /// After `block` was inserted: watched requests whose prompts go on with it are parked there. `asked` gives what was
    /// passed to `watch`. O(watched requests that are parked at its parent).
    pub fn follow<'a>(&mut self, block: BlockId, asked: impl Fn(Waiter) -> (Lookup, &'a [Token])) {
        let block = self.in_tree(block);
        let (parent, label) = (self.tree.parent(block), self.tree.label(block).expect("it is in the tree"));
        let mut next = self.wants.parked(parent).next();
        while let Some(Parked { watcher, waiter, len }) = next {
            next = self.wants.after(watcher);
            let (lookup, tokens) = asked(waiter);
            let goes_on = tokens.chunks_exact(self.tree.block_size()).nth(len as usize);
            if goes_on != Some(self.tree.tokens(block)) || !lookup.may_read(label, len as usize) {
                continue;
            }
            self.wants.unpark(watcher);
            self.wants.park(watcher, Some(block), len + 1);
            self.add_want(block);
            if let Some(parent) = parent {
                self.drop_want(parent); // It stays wanted: its child is.
            }
        }
    }

    /// Watched requests; O(1).
    pub fn num_watched(&self) -> usize {
        self.wants.num_watched()
    }

    /// The last waiter that is watched.
    pub fn last_watched(&self) -> Option<Waiter> {
        self.wants.last()
    }

    /// Where every watched request is parked, by waiter; none: at the root. For tests.
    pub fn watched(&self) -> impl Iterator<Item = (Waiter, Option<BlockId>)> {
        self.wants
            .by_waiter()
            .map(|(waiter, watcher)| (waiter, self.wants.block_of(watcher).map(|at| self.pool.name(at))))
    }

    /// Wants turn up the path as far as it was not wanted before.
    fn add_want(&mut self, block: u32) {
        let mut at = block;
        while self.wants.add(at) {
            if self.pool.state(at) == BlockState::Cached {
                self.evictor.removed(at);
                if self.is_end(at) {
                    self.wants.list(at);
                }
            }
            let Some(parent) = self.tree.parent(at) else { break };
            at = parent;
        }
    }

    /// Blocks that nobody wants any more are ordered as if they were released now, tail first. They are not listed.
    fn drop_want(&mut self, block: u32) {
        let mut at = block;
        while self.wants.drop(at) {
            let parent = self.tree.parent(at);
            if self.pool.state(at) == BlockState::Cached {
                self.evictor.released(at, parent, self.tree.depth(at));
            }
            let Some(parent) = parent else { break };
            at = parent;
        }
    }

    /// A block of the tree has lost its last use: it comes into the order that it belongs to.
    pub(super) fn rest(&mut self, block: u32) {
        if !self.wants.is_wanted(block) {
            return self.evictor.released(block, self.tree.parent(block), self.tree.depth(block));
        }
        self.evictor.put_by(block);
        if self.is_end(block) {
            self.wants.list(block);
        }
    }

    /// A cached block is in use again.
    pub(super) fn wake(&mut self, block: u32) {
        if self.wants.is_wanted(block) {
            self.wants.unlist(block);
        } else {
            self.evictor.removed(block);
        }
        self.evictor.used(block);
    }

    /// A victim is about to leave the tree: who is parked there goes back to its parent.
    pub(super) fn take_from_order(&mut self, block: u32) {
        if !self.wants.is_wanted(block) {
            return self.evictor.removed(block);
        }
        self.wants.unlist(block);
        let parent = self.tree.parent(block);
        loop {
            let Some(Parked { watcher, len, .. }) = self.wants.parked(Some(block)).next() else { break };
            self.wants.unpark(watcher);
            self.wants.park(watcher, parent, len - 1);
            self.wants.drop(block);
            parent.map(|parent| self.wants.add(parent));
        }
        parent.map(|parent| self.wants.drop(parent));
    }

    /// A child of `block` has left the tree.
    pub(super) fn lost_child(&mut self, block: u32) {
        let is_cached = self.pool.state(block) == BlockState::Cached;
        if is_cached && self.wants.is_wanted(block) && self.is_end(block) {
            self.wants.list(block);
        }
    }

    /// Whether nothing of the device hangs below a block of the tree.
    pub(super) fn is_end(&self, block: u32) -> bool {
        self.tree.children(block).all(|child| self.pool.is_on_host(child))
    }
}
