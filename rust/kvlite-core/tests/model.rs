//! The cache against a naive model: more than 10^6 random operations, each also applied to a plain list of paths, and a full
//! audit after each. Vocabulary, blocks and pool are tiny, so that everything collides.
//!
//! A failing seed is printed; `KVLITE_MODEL_SEED=<seed>` replays it alone, `KVLITE_MODEL_SEEDS=<n>` runs n seeds per regime.

mod naive;

use kvlite_core::cache::{BlockState, Cache, Inserted, MAX_PARTIAL_CANDIDATES};
use kvlite_core::{BlockId, CoreConfig, Label, Lookup, PolicyKind, TenantId, Token};
use naive::{Entry, Naive, Random, Regime};

const OPERATIONS_PER_SEED: usize = 5_000;

/// How often the interesting things happened; a regime in which one of them is rare tests little.
#[derive(Debug, Default)]
struct Seen {
    evicted: usize,
    refused: usize,
    duplicates: usize,
    revived: usize,
    full_hits: usize,
    partial_hits: usize,
    crowded_matches: usize,
}

impl Seen {
    /// One seed is long enough for each of them.
    fn check(&self, regime: Regime) {
        assert!(self.refused > 0 && self.duplicates > 0, "too little happened: {self:?}");
        if regime.keeps_released {
            assert!(self.evicted > 100 && self.revived > 50 && self.full_hits > 1000, "too little happened: {self:?}");
            let has_parts = regime.block_size > 1;
            assert!((self.partial_hits > 100) == has_parts, "partial hits of {regime:?}: {self:?}");
            assert!(self.crowded_matches > 0 || !regime.must_crowd, "crowded parents of {regime:?}: {self:?}");
        }
    }
}

/// Cache and model side by side, with the pins that somebody holds.
struct Pair {
    cache: Cache,
    naive: Naive,
    random: Random,
    pins: Vec<(u32, Vec<Token>, BlockId)>,
    out: Vec<BlockId>,
    seen: Seen,
}

impl Pair {
    fn new(regime: Regime, seed: u64) -> Pair {
        let config = CoreConfig {
            num_blocks: regime.num_blocks as u32,
            block_size: regime.block_size as u32,
            max_num_seqs: 1,
            max_num_batched_tokens: 64,
            max_model_len: 64,
            max_num_waiting: 1,
            vocab_size: 8,
            enable_prefix_caching: regime.keeps_released,
            policy: PolicyKind::Fcfs,
            attention_cost_tokens: 1,
            reserve_tokens: 0,
            watermark_ratio: 1.0,
            segment_cache_ratio: 0.5,
            model_digest: 0,
            canonical_prefix: vec![],
            max_segments: 4,
            hash_seed: seed,
        };
        let naive = Naive { regime, entries: vec![], private: vec![], in_transfer: vec![], named: vec![], clock: 0 };
        let random = Random(seed ^ regime.name << 32);
        Pair { cache: Cache::new(&config), naive, random, pins: vec![], out: vec![], seen: Seen::default() }
    }

    fn tokens(&mut self, len: usize, vocab: u64) -> Vec<Token> {
        // Long blocks differ in about one token, or no two would ever be alike.
        let sparse = if self.naive.regime.block_size > 3 { self.naive.regime.block_size as u64 } else { 1 };
        let random = &mut self.random;
        (0..len).map(|_| if random.below(sparse) == 0 { random.below(vocab) as Token } else { 0 }).collect()
    }

    fn tenant(&mut self) -> u32 {
        self.random.below(self.naive.regime.tenants) as u32
    }

    /// A prompt: random, or a stored path with a random tail, cut anywhere.
    fn prompt(&mut self) -> (u32, Vec<Token>) {
        let (mut tenant, mut tokens) = (self.tenant(), Vec::new());
        if !self.naive.entries.is_empty() && self.random.below(4) > 0 {
            let entry = &self.naive.entries[self.random.index(self.naive.entries.len())];
            (tenant, tokens) = (entry.tenant, entry.path.clone());
            let cut = self.random.index(tokens.len() + 1);
            tokens.truncate(cut);
        }
        let len = self.random.index(3 * self.naive.regime.block_size + 1);
        tokens.extend(self.tokens(len, self.naive.regime.vocab));
        (tenant, tokens)
    }

    /// Matches in both; returns the path of the last hit.
    fn match_both(&mut self) -> Option<(u32, Vec<Token>, BlockId)> {
        let (tenant, tokens) = self.prompt();
        let max_blocks = if self.random.below(4) == 0 { self.random.index(4) } else { usize::MAX };
        self.out.clear();
        let lookup = Lookup::exact(Label::exact(TenantId(tenant)));
        let partial = self.cache.match_prefix(lookup, &tokens, max_blocks, &mut self.out);
        let (hits, naive_partial) = self.naive.longest_match(tenant, &tokens, max_blocks);
        assert_eq!(self.out, hits, "hits of {tokens:?}, at most {max_blocks}, tenant {tenant}");
        assert_eq!(partial, naive_partial, "partial hit of {tokens:?}, at most {max_blocks}, tenant {tenant}");
        self.seen.full_hits += hits.len();
        let path = &tokens[..hits.len() * self.naive.regime.block_size];
        let num_children = self.naive.children(tenant, path).len();
        self.seen.crowded_matches += usize::from(!hits.is_empty() && num_children > MAX_PARTIAL_CANDIDATES);
        self.seen.partial_hits += usize::from(partial.is_some());
        let last = *hits.last()?;
        Some((tenant, path.to_vec(), last))
    }

    fn alloc(&mut self) {
        let limit = if self.random.below(8) == 0 { self.naive.regime.num_blocks + 2 } else { 4 };
        let count = self.random.index(limit);
        let after = match self.random.below(3) {
            0 => self.naive.private.last().copied(),
            1 => self.pins.last().map(|pin| pin.2),
            _ => None,
        };
        let counts = self.naive.counts();
        self.out.clear();
        let done = self.cache.alloc(count, after, &mut self.out);
        assert_eq!(done, count <= counts.free + counts.cached, "alloc of {count} with {counts:?}");
        assert_eq!(self.out.len(), if done { count } else { 0 }, "alloc is all or nothing");
        if !done {
            self.seen.refused += 1;
            return;
        }
        for _ in counts.free..count {
            self.naive.evict();
            self.seen.evicted += 1;
        }
        for &block in &self.out {
            assert!((block.index as usize) < self.naive.regime.num_blocks, "{block:?} is not in the pool");
            assert!(!self.naive.named.contains(&block), "{block:?} was given away before");
            let taken = self.naive.entries.iter().map(|entry| &entry.block).chain(&self.naive.private);
            let is_taken = taken.chain(&self.naive.in_transfer).any(|other| other.index == block.index);
            assert!(!is_taken, "{block:?} is given away while in use");
            self.naive.private.push(block);
            self.naive.named.retain(|old| old.index != block.index);
            self.naive.named.push(block);
        }
    }

    /// The pin below which the next block goes; none for a new first block.
    fn parent(&mut self) -> Option<usize> {
        if self.pins.is_empty() || self.random.below(6) == 0 {
            return None;
        }
        // Half of the time a shortest path, so that some block gets more children than a match looks at.
        let shortest = (0..self.pins.len()).min_by_key(|&pin| self.pins[pin].1.len());
        if self.random.below(2) == 0 { shortest } else { Some(self.random.index(self.pins.len())) }
    }

    fn insert(&mut self) {
        if self.naive.private.is_empty() {
            return;
        }
        let at = self.random.index(self.naive.private.len());
        let block = self.naive.private[at];
        let parent = self.parent();
        let tenant = self.tenant();
        let (tenant, mut path, above) = parent
            .map_or((tenant, vec![], None), |pin| (self.pins[pin].0, self.pins[pin].1.clone(), Some(self.pins[pin].2)));
        // Few first blocks, so that paths share them.
        let vocab = if parent.is_none() && self.random.below(4) > 0 { 1 } else { self.naive.regime.vocab };
        let tokens = self.tokens(self.naive.regime.block_size, vocab);
        path.extend(&tokens);
        let done = self.cache.insert(Label::exact(TenantId(tenant)), above, &tokens, block);
        match self.naive.position(tenant, &path) {
            Some(existing) => {
                let existing = self.naive.entries[existing].block;
                assert_eq!(done, Inserted::Duplicate(existing), "{path:?} is stored already");
                self.seen.duplicates += 1;
                self.naive.pin(tenant, &path);
                self.pins.push((tenant, path, existing));
            }
            None => {
                assert_eq!(done, Inserted::New, "{path:?} is not stored");
                let born = self.naive.tick();
                self.naive.private.swap_remove(at);
                self.naive.entries.push(Entry { tenant, path: path.clone(), block, users: 1, released: None, born });
                self.pins.push((tenant, path, block));
            }
        }
        // A sequence moves its pin to the end of its path; a fork leaves one behind.
        if let Some(pin) = parent
            && self.random.below(2) == 0
        {
            self.unpin(pin);
        }
    }

    fn unpin(&mut self, pin: usize) {
        let (tenant, path, block) = self.pins.swap_remove(pin);
        self.cache.unpin(block);
        self.naive.unpin(tenant, &path);
    }

    fn pin(&mut self, pin: (u32, Vec<Token>, BlockId)) {
        self.seen.revived += usize::from(self.cache.state(pin.2) == BlockState::Cached);
        self.cache.pin(pin.2);
        self.naive.pin(pin.0, &pin.1);
        self.pins.push(pin);
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..20 => self.alloc(),
            20..48 => self.insert(),
            48..58 => {
                if let Some(hit) = self.match_both() {
                    self.pin(hit);
                }
            }
            58..62 => {
                if !self.naive.entries.is_empty() {
                    let entry = &self.naive.entries[self.random.index(self.naive.entries.len())];
                    self.pin((entry.tenant, entry.path.clone(), entry.block));
                }
            }
            62..84 => {
                if !self.pins.is_empty() {
                    let pin = self.random.index(self.pins.len());
                    self.unpin(pin);
                }
            }
            84..91 => {
                if !self.naive.private.is_empty() {
                    let at = self.random.index(self.naive.private.len());
                    self.cache.free(self.naive.private.swap_remove(at));
                }
            }
            91..94 => {
                if let Some(block) = self.naive.private.pop() {
                    self.cache.begin_transfer(block);
                    self.naive.in_transfer.push(block);
                }
            }
            94..98 => {
                if let Some(block) = self.naive.in_transfer.pop() {
                    self.cache.end_transfer(block);
                    self.naive.private.push(block);
                }
            }
            98 => {
                while !self.pins.is_empty() {
                    self.unpin(0);
                }
            }
            _ => {
                if self.random.below(8) == 0 {
                    self.cache.clear();
                    self.naive.entries.retain(|entry| entry.released.is_none());
                }
            }
        }
    }

    fn compare(&mut self) {
        self.cache.audit();
        let counts = self.naive.counts();
        assert_eq!(self.cache.counts(), counts);
        assert_eq!(self.cache.available(), counts.free + counts.cached);
        let victim = self.naive.oldest().map(|at| self.naive.entries[at].block);
        assert_eq!(self.cache.victim(), victim, "the block to evict next");
        for entry in &self.naive.entries {
            let expected = if entry.released.is_some() { BlockState::Cached } else { BlockState::Owned };
            assert_eq!(self.cache.state(entry.block), expected, "{:?}", entry.path);
            assert_eq!(self.cache.label(entry.block), Some(Label::exact(TenantId(entry.tenant))));
        }
        self.match_both();
    }
}

/// Prints where a seed failed.
struct Where {
    seed: u64,
    operation: usize,
}

impl Drop for Where {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("operation {} failed: replay with KVLITE_MODEL_SEED={}", self.operation, self.seed);
        }
    }
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a seed and a number of seeds are plain numbers"))
}

fn run(regime: Regime, default_seeds: u64) {
    let seeds = match env("KVLITE_MODEL_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..env("KVLITE_MODEL_SEEDS").unwrap_or(default_seeds),
    };
    for seed in seeds {
        let mut at = Where { seed, operation: 0 };
        let mut pair = Pair::new(regime, seed);
        while at.operation < OPERATIONS_PER_SEED {
            pair.step();
            pair.compare();
            at.operation += 1;
        }
        pair.seen.check(regime);
    }
}

const TINY: Regime =
    Regime { name: 1, num_blocks: 10, block_size: 2, vocab: 2, tenants: 2, must_crowd: false, keeps_released: true };

#[test]
fn random_operations_agree_with_the_naive_cache_where_everything_collides() {
    run(TINY, 240);
}

#[test]
fn random_operations_agree_with_the_naive_cache_where_a_block_has_more_children_than_a_match_looks_at() {
    run(Regime { name: 2, num_blocks: 40, block_size: 3, vocab: 3, tenants: 1, must_crowd: true, ..TINY }, 100);
}

#[test]
fn random_operations_agree_with_the_naive_cache_when_blocks_hold_one_token() {
    run(Regime { name: 3, num_blocks: 7, block_size: 1, vocab: 2, tenants: 2, ..TINY }, 100);
}

#[test]
fn random_operations_agree_with_the_naive_cache_when_nothing_is_kept() {
    run(Regime { name: 4, keeps_released: false, ..TINY }, 40);
}

#[test]
fn random_operations_agree_with_the_naive_cache_at_the_usual_block_size() {
    run(Regime { name: 5, num_blocks: 20, block_size: 16, vocab: 2, tenants: 1, ..TINY }, 40);
}
