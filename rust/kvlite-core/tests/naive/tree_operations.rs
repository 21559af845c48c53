//! Random operations on blocks and paths, applied to the cache and to the list; part of `tests/model.rs`.

use super::naive::order::Watched;
use super::naive::tiers::HostBlock;
use super::naive::{Entry, Naive, Path};
use super::segment_operations::EVICTED_FOR_BLOCKS;
use super::{BlockId, BlockState, Label, Lookup, MAX_PARTIAL_CANDIDATES, Pair, TenantId, Token};
use kvlite_core::Waiter;
use kvlite_core::cache::Inserted;

impl Pair {
    pub fn tokens(&mut self, len: usize, vocab: u64) -> Vec<Token> {
        // Long blocks differ in about one token, or no two would ever be alike.
        let sparse = if self.naive.regime.block_size > 3 { self.naive.regime.block_size as u64 } else { 1 };
        let random = &mut self.random;
        (0..len).map(|_| if random.below(sparse) == 0 { random.below(vocab) as Token } else { 0 }).collect()
    }

    /// A tenant, the public one now and then.
    pub fn tenant(&mut self) -> TenantId {
        let tenants = self.naive.regime.tenants;
        let tenant = self.random.below(tenants + 1) as u32;
        if u64::from(tenant) == tenants { TenantId::PUBLIC } else { TenantId(tenant) }
    }

    /// A label that may follow `above`; where parents are to be crowded, all paths begin alike.
    pub fn label(&mut self, above: Option<Label>) -> Label {
        if above.is_none() && self.naive.regime.must_crowd {
            return Label::PUBLIC;
        }
        if above.is_some_and(|label| label != Label::PUBLIC && (!label.is_exact() || self.random.below(3) > 0)) {
            return above.expect("just looked");
        }
        let may_be_exact = above.is_none_or(|label| label == Label::PUBLIC);
        let label = Label::exact(self.tenant());
        if may_be_exact && self.random.below(4) > 0 { label } else { Label::recipe(self.random.below(2) as u32) }
    }

    /// A prompt and who asks: random, or a stored path with a random tail, cut anywhere, asked for by whom it is for or not.
    pub fn prompt(&mut self) -> (Lookup, Vec<Token>) {
        let (mut lookup, mut tokens) = (Lookup::exact(Label::exact(self.tenant())), Vec::new());
        if !self.naive.entries.is_empty() && self.random.below(4) > 0 {
            let path = self.naive.entries[self.random.index(self.naive.entries.len())].path.clone();
            let cut = self.random.index(path.len() + 1);
            tokens.extend(path[..cut].iter().map(|&(_, token)| token));
            let mut own =
                path.iter().map(|&(label, _)| label).filter(|&label| label.is_exact() && label != Label::PUBLIC);
            lookup.own = own.next_back().filter(|_| self.random.below(8) > 0).unwrap_or(lookup.own);
            let from = path.iter().position(|(label, _)| !label.is_exact());
            lookup.recipe = from.map(|at| (path[at].0, at / self.naive.regime.block_size));
            if self.random.below(8) == 0 {
                let any = (Label::recipe(self.random.below(2) as u32), self.random.index(3));
                lookup.recipe = Some(any).filter(|_| self.random.below(2) == 0);
            }
        }
        let len = self.random.index(3 * self.naive.regime.block_size + 1);
        tokens.extend(self.tokens(len, self.naive.regime.vocab));
        (lookup, tokens)
    }

    /// Matches in both; returns the path of the last hit.
    pub fn match_both(&mut self) -> Option<(Path, BlockId)> {
        let (lookup, tokens) = self.prompt();
        let max_blocks = if self.random.below(4) == 0 { self.random.index(4) } else { usize::MAX };
        self.out.clear();
        let partial = self.cache.match_prefix(lookup, &tokens, max_blocks, &mut self.out);
        let (path, hits, naive_partial) = self.naive.longest_match(lookup, &tokens, max_blocks);
        assert_eq!(self.out, hits, "hits of {tokens:?}, at most {max_blocks}, {lookup:?}");
        assert_eq!(partial, naive_partial, "partial hit of {tokens:?}, at most {max_blocks}, {lookup:?}");
        self.seen.full_hits += hits.len();
        self.seen.public_hits +=
            usize::from(path.last().is_some_and(|last| last.0 == Label::PUBLIC && last.0 != lookup.own));
        self.seen.recipe_hits += usize::from(path.last().is_some_and(|last| !last.0.is_exact()));
        let children = self.naive.children(&path);
        let next = tokens[path.len()..].get(..self.naive.regime.block_size).filter(|_| hits.len() < max_blocks);
        let is_next = |entry: &Entry| next.is_some_and(|next| entry.path[path.len()..].iter().map(|at| &at.1).eq(next));
        self.seen.unreadable += usize::from(children.iter().any(|&entry| is_next(entry)));
        self.seen.crowded_matches += usize::from(!hits.is_empty() && children.len() > MAX_PARTIAL_CANDIDATES);
        self.seen.partial_hits += usize::from(partial.is_some());
        self.split_both(&hits);
        let last = hits.iter().rposition(|&block| !self.cache.is_on_host(block))?;
        Some((path[..(last + 1) * self.naive.regime.block_size].to_vec(), hits[last]))
    }

    pub fn alloc(&mut self) {
        let limit = if self.random.below(8) == 0 { self.naive.regime.num_blocks + 2 } else { 4 };
        let count = self.random.index(limit);
        let after = match self.random.below(3) {
            0 => self.naive.private.last().copied(),
            1 => self.pins.last().map(|pin| pin.1),
            _ => None,
        };
        let counts = self.naive.counts();
        self.out.clear();
        let has_host = self.naive.regime.host_blocks > 0;
        let room = if has_host { self.random.index(5) } else { 0 };
        self.cache.open_demotions(room);
        self.naive.room = room;
        let done = self.cache.alloc(count, after, &mut self.out);
        assert_eq!(done, count <= counts.free + counts.cached, "alloc of {count} with {counts:?}");
        assert_eq!(self.out.len(), if done { count } else { 0 }, "alloc is all or nothing");
        if !done {
            self.seen.refused += 1;
            self.name_demotions();
            self.naive.room = 0;
            return;
        }
        let wanted = |naive: &Naive| naive.entries.iter().filter(|entry| naive.is_wanted(&entry.path)).count();
        let before = wanted(&self.naive);
        let (num_blocks, num_segments) = self.naive.evict_for(count);
        self.seen.wanted_evicted += before - wanted(&self.naive);
        self.name_demotions();
        self.naive.room = 0;
        self.seen.evicted += num_blocks;
        self.seen.segments[EVICTED_FOR_BLOCKS] += num_segments;
        for block in std::mem::take(&mut self.out) {
            self.name_block(block);
            self.naive.private.push(block);
        }
    }

    /// Checks that a block given away is nobody's and has a name of its own.
    pub fn name_block(&mut self, block: BlockId) {
        assert!((block.index as usize) < self.naive.regime.num_blocks, "{block:?} is not in the pool");
        assert!(!self.naive.named.contains(&block), "{block:?} was given away before");
        let taken = self.naive.entries.iter().map(|entry| &entry.block).chain(&self.naive.private);
        let mut taken =
            taken.chain(&self.naive.in_transfer).chain(self.naive.segments.iter().flat_map(|one| &one.blocks));
        assert!(!taken.any(|other| other.index == block.index), "{block:?} is given away while in use");
        self.naive.named.retain(|old| old.index != block.index);
        self.naive.named.push(block);
    }

    /// The pin below which the next block goes; none for a new first block.
    pub fn parent(&mut self) -> Option<usize> {
        if self.pins.is_empty() || self.random.below(6) == 0 {
            return None;
        }
        // Half of the time a shortest path, so that some block gets more children than a match looks at.
        let shortest = (0..self.pins.len()).min_by_key(|&pin| self.pins[pin].0.len());
        if self.random.below(2) == 0 { shortest } else { Some(self.random.index(self.pins.len())) }
    }

    pub fn insert(&mut self) {
        if self.naive.private.is_empty() {
            return;
        }
        let at = self.random.index(self.naive.private.len());
        let block = self.naive.private[at];
        let parent = self.parent();
        let (mut path, above) = parent.map_or((vec![], None), |pin| (self.pins[pin].0.clone(), Some(self.pins[pin].1)));
        let label = self.label(path.last().map(|last| last.0));
        // Few first blocks, so that paths share them.
        let vocab = if parent.is_none() && self.random.below(4) > 0 { 1 } else { self.naive.regime.vocab };
        let tokens = self.tokens(self.naive.regime.block_size, vocab);
        let below = |label| path.iter().copied().chain(tokens.iter().map(|&token| (label, token))).collect::<Path>();
        let is_copy = self.naive.regime.host_blocks > 0 && self.random.below(2) == 0;
        let may_share = |at: usize| label == Label::PUBLIC || is_copy || !self.naive.entries[at].on_host;
        let shared = Some(below(Label::PUBLIC))
            .filter(|path| label.is_exact() && self.naive.position(path).is_some_and(may_share));
        path = Some(below(label))
            .filter(|path| shared.is_none() || self.naive.position(path).is_some())
            .or(shared)
            .unwrap();
        let done = match is_copy {
            true => self.cache.restore(label, above, &tokens, block),
            false => self.cache.insert(label, above, &tokens, block),
        };
        match self.naive.position(&path) {
            Some(existing) if self.naive.entries[existing].on_host => {
                assert_eq!(done, Inserted::New, "{path:?} is on the host alone");
                let tick = self.naive.tick();
                self.naive.private.swap_remove(at);
                let mut entry = self.naive.entries.swap_remove(existing);
                entry.host.as_mut().expect("it lay there").idle_since = tick;
                self.enter(path.clone(), block, entry.born, entry.host);
                self.pins.push((path, block));
                self.seen.returned += 1;
            }
            Some(existing) => {
                let existing = self.naive.entries[existing].block;
                assert_eq!(done, Inserted::Duplicate(existing), "{path:?} is stored already");
                self.seen.duplicates += 1;
                self.naive.pin(&path);
                self.pins.push((path, existing));
            }
            None => {
                assert_eq!(done, Inserted::New, "{path:?} is not stored");
                let born = self.naive.tick();
                self.naive.private.swap_remove(at);
                self.enter(path.clone(), block, born, None);
                self.pins.push((path, block));
            }
        }
        // A sequence moves its pin to the end of its path; a fork leaves one behind.
        if let Some(pin) = parent
            && self.random.below(2) == 0
        {
            self.unpin(pin);
        }
    }

    /// A block is new in the tree; of what it was before it was evicted, the cache may have lost all but invented nothing.
    fn enter(&mut self, path: Path, block: BlockId, born: u64, host: Option<HostBlock>) {
        let uses = u64::from(self.cache.uses(block));
        let past = self.naive.past.iter().find(|(gone, ..)| *gone == path).map(|&(_, uses, stamp)| (uses, stamp));
        if uses > 1 {
            let (before, stamp) = past.expect("a block without a past has one use");
            assert_eq!(uses, (before + 1).min(255), "uses of {path:?}");
            self.naive.came_back(stamp);
            self.seen.remembered += 1;
        }
        self.seen.forgotten += usize::from(uses == 1 && past.is_some());
        self.naive.follow(&path);
        let (users, released, on_host, stamp, class, floor) = (1, None, false, 0, 0, 0);
        let entry = Entry { path, block, users, released, born, stamp, uses, class, floor, on_host, host };
        self.naive.entries.push(entry);
        let watched = &self.naive.watched;
        let asked = |waiter| watched.iter().find(|one| one.waiter == waiter).expect("it is watched");
        self.cache.follow(block, |waiter| (asked(waiter).lookup, &asked(waiter).tokens));
    }

    /// A request comes to wait.
    pub fn watch(&mut self) {
        let (lookup, tokens) = self.prompt();
        let rank = (self.random.below(4) as i64, 0);
        self.num_waiters += 1;
        let waiter = Waiter { rank, choice: self.random.below(2) as u32, slot: self.num_waiters };
        self.cache.watch(waiter, lookup, &tokens);
        if self.naive.regime.keeps_released {
            let (mut path, ..) = self.naive.longest_match(lookup, &tokens, usize::MAX);
            let size = self.naive.regime.block_size;
            while self.naive.position(&path).is_some_and(|at| self.naive.entries[at].on_host) {
                path.truncate(path.len() - size);
            }
            self.naive.watched.push(Watched { waiter, lookup, tokens, path });
        }
    }

    /// One of them leaves.
    pub fn unwatch(&mut self) {
        if !self.naive.watched.is_empty() {
            let at = self.random.index(self.naive.watched.len());
            assert!(self.cache.unwatch(self.naive.watched[at].waiter), "it was watched");
            self.naive.unwatch(at);
        }
    }

    /// They are going to be served in another order.
    pub fn reorder(&mut self) {
        for watched in &mut self.naive.watched {
            watched.waiter.rank.0 = self.random.below(4) as i64;
        }
        let watched = &self.naive.watched;
        let now = |old: Waiter| watched.iter().find(|one| one.waiter.slot == old.slot).expect("it is watched").waiter;
        self.cache.reorder(now);
    }

    pub fn unpin(&mut self, pin: usize) {
        let (path, block) = self.pins.swap_remove(pin);
        self.cache.unpin(block);
        self.naive.unpin(&path);
    }

    pub fn pin(&mut self, pin: (Path, BlockId)) {
        self.seen.revived += usize::from(self.cache.state(pin.1) == BlockState::Cached);
        self.cache.pin(pin.1);
        self.naive.pin(&pin.0);
        self.pins.push(pin);
    }
}
