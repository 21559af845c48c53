//! The cache against a naive model: more than 10^6 random operations, each also applied to a plain list of paths, and a full
//! audit after each. Vocabulary, blocks and pool are tiny, so that everything collides.
//!
//! A failing seed is printed; `KVLITE_MODEL_SEED=<seed>` replays it alone, `KVLITE_MODEL_SEEDS=<n>` runs n seeds per regime.

use kvlite_core::cache::{BlockCounts, BlockState, Cache, Inserted, MAX_PARTIAL_CANDIDATES, PartialHit, Provenance};
use kvlite_core::{BlockId, CoreConfig, Namespace, PolicyKind, TenantId, Token};

const OPERATIONS_PER_SEED: usize = 5_000;

/// One stored block: a whole path of tokens and what is known about its end.
struct Entry {
    tenant: u32,
    path: Vec<Token>,
    block: BlockId,
    users: u32,
    /// When the entry lost its last protection; none while it is protected.
    released: Option<u64>,
    born: u64,
}

/// The obvious cache: a list, searched from end to end for every question.
struct Naive {
    regime: Regime,
    entries: Vec<Entry>,
    private: Vec<BlockId>,
    in_transfer: Vec<BlockId>,
    /// Every name the cache has given away so far.
    named: Vec<BlockId>,
    clock: u64,
}

impl Naive {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn position(&self, tenant: u32, path: &[Token]) -> Option<usize> {
        self.entries.iter().position(|entry| entry.tenant == tenant && entry.path == path)
    }

    fn is_protected(&self, tenant: u32, path: &[Token]) -> bool {
        self.entries.iter().any(|entry| entry.tenant == tenant && entry.users > 0 && entry.path.starts_with(path))
    }

    fn counts(&self) -> BlockCounts {
        let cached = self.entries.iter().filter(|entry| entry.released.is_some()).count();
        let owned = self.entries.len() - cached + self.private.len();
        let in_transfer = self.in_transfer.len();
        BlockCounts { free: self.regime.num_blocks - cached - owned - in_transfer, cached, owned, in_transfer }
    }

    fn oldest(&self) -> Option<usize> {
        let released = (0..self.entries.len()).filter(|&at| self.entries[at].released.is_some());
        released.min_by_key(|&at| self.entries[at].released)
    }

    fn evict(&mut self) {
        let at = self.oldest().expect("something is cached");
        let gone = self.entries.swap_remove(at);
        let has_tail =
            self.entries.iter().any(|entry| entry.tenant == gone.tenant && entry.path.starts_with(&gone.path));
        assert!(!has_tail, "the model evicts {:?} from the middle of a path", gone.path);
    }

    fn pin(&mut self, tenant: u32, path: &[Token]) {
        let at = self.position(tenant, path).expect("only stored paths are pinned");
        self.entries[at].users += 1;
        for entry in self.entries.iter_mut().filter(|entry| entry.tenant == tenant && path.starts_with(&entry.path)) {
            entry.released = None;
        }
    }

    fn unpin(&mut self, tenant: u32, path: &[Token]) {
        let at = self.position(tenant, path).expect("only stored paths are pinned");
        self.entries[at].users -= 1;
        for len in (1..=path.len() / self.regime.block_size).rev() {
            let prefix = &path[..len * self.regime.block_size];
            let at = self.position(tenant, prefix).expect("a stored path is stored from its beginning");
            if !self.is_protected(tenant, prefix) && self.entries[at].released.is_none() {
                self.entries[at].released = Some(self.tick());
                if !self.regime.keeps_released {
                    self.entries.swap_remove(at);
                }
            }
        }
    }

    fn longest_match(&self, tenant: u32, tokens: &[Token], max_blocks: usize) -> (Vec<BlockId>, Option<PartialHit>) {
        let block_size = self.regime.block_size;
        let mut hits = Vec::new();
        if !self.regime.keeps_released {
            return (hits, None);
        }
        while hits.len() < max_blocks && tokens.len() >= (hits.len() + 1) * block_size {
            match self.position(tenant, &tokens[..(hits.len() + 1) * block_size]) {
                Some(at) => hits.push(self.entries[at].block),
                None => break,
            }
        }
        let (known, rest) = tokens.split_at(hits.len() * block_size);
        let is_child = |entry: &&Entry| {
            entry.tenant == tenant && entry.path.len() == known.len() + block_size && entry.path.starts_with(known)
        };
        let mut children: Vec<&Entry> = self.entries.iter().filter(is_child).collect();
        children.sort_by_key(|entry| std::cmp::Reverse(entry.born));
        children.truncate(if hits.is_empty() { 0 } else { MAX_PARTIAL_CANDIDATES });
        let shared = |entry: &Entry| {
            let same = entry.path[known.len()..].iter().zip(rest).take_while(|(have, want)| have == want).count();
            same.min(block_size - 1)
        };
        let longest = children.iter().map(|entry| shared(entry)).max().unwrap_or(0);
        let best = children.iter().find(|entry| longest > 0 && shared(entry) == longest);
        (hits, best.map(|entry| PartialHit { block: entry.block, len: longest as u32 }))
    }
}

/// The size of everything; small numbers collide.
#[derive(Clone, Copy)]
struct Regime {
    name: u64,
    num_blocks: usize,
    block_size: usize,
    vocab: u64,
    tenants: u64,
    keeps_released: bool,
}

/// SplitMix64: random enough, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
}

/// Cache and model side by side, with the pins that somebody holds.
struct Pair {
    cache: Cache,
    naive: Naive,
    random: Random,
    pins: Vec<(u32, Vec<Token>, BlockId)>,
    out: Vec<BlockId>,
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
            hash_seed: seed,
        };
        let naive = Naive { regime, entries: vec![], private: vec![], in_transfer: vec![], named: vec![], clock: 0 };
        let random = Random(seed ^ regime.name << 32);
        Pair { cache: Cache::new(&config), naive, random, pins: vec![], out: vec![] }
    }

    fn tokens(&mut self, len: usize) -> Vec<Token> {
        let vocab = self.naive.regime.vocab;
        (0..len).map(|_| self.random.below(vocab) as Token).collect()
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
        tokens.extend(self.tokens(len));
        (tenant, tokens)
    }

    /// Matches in both; returns the path of the last hit.
    fn match_both(&mut self) -> Option<(u32, Vec<Token>, BlockId)> {
        let (tenant, tokens) = self.prompt();
        let max_blocks = if self.random.below(4) == 0 { self.random.index(4) } else { usize::MAX };
        self.out.clear();
        let namespace = Namespace::exact(TenantId(tenant));
        let partial = self.cache.match_prefix(namespace, &tokens, max_blocks, &mut self.out);
        let (hits, naive_partial) = self.naive.longest_match(tenant, &tokens, max_blocks);
        assert_eq!(self.out, hits, "hits of {tokens:?}, at most {max_blocks}, tenant {tenant}");
        assert_eq!(partial, naive_partial, "partial hit of {tokens:?}, at most {max_blocks}, tenant {tenant}");
        let last = *hits.last()?;
        Some((tenant, tokens[..hits.len() * self.naive.regime.block_size].to_vec(), last))
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
            return;
        }
        for _ in counts.free..count {
            self.naive.evict();
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

    fn insert(&mut self) {
        if self.naive.private.is_empty() {
            return;
        }
        let at = self.random.index(self.naive.private.len());
        let block = self.naive.private[at];
        let parent = if self.pins.is_empty() || self.random.below(4) == 0 {
            None
        } else {
            Some(self.random.index(self.pins.len()))
        };
        let tenant = self.tenant();
        let (tenant, mut path, above) = parent
            .map_or((tenant, vec![], None), |pin| (self.pins[pin].0, self.pins[pin].1.clone(), Some(self.pins[pin].2)));
        let tokens = self.tokens(self.naive.regime.block_size);
        path.extend(&tokens);
        let done = self.cache.insert(Namespace::exact(TenantId(tenant)), above, &tokens, block, Provenance::Exact);
        match self.naive.position(tenant, &path) {
            Some(existing) => {
                let existing = self.naive.entries[existing].block;
                assert_eq!(done, Inserted::Duplicate(existing), "{path:?} is stored already");
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
            && self.random.below(4) > 0
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
            assert_eq!(self.cache.provenance(entry.block), Some(Provenance::Exact));
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
    }
}

const TINY: Regime = Regime { name: 1, num_blocks: 10, block_size: 2, vocab: 2, tenants: 2, keeps_released: true };

#[test]
fn random_operations_agree_with_the_naive_cache_where_everything_collides() {
    run(TINY, 120);
}

#[test]
fn random_operations_agree_with_the_naive_cache_where_a_block_has_more_children_than_a_match_looks_at() {
    run(Regime { name: 2, num_blocks: 24, block_size: 3, vocab: 3, tenants: 1, ..TINY }, 40);
}

#[test]
fn random_operations_agree_with_the_naive_cache_when_blocks_hold_one_token() {
    run(Regime { name: 3, num_blocks: 7, block_size: 1, vocab: 2, tenants: 2, ..TINY }, 40);
}

#[test]
fn random_operations_agree_with_the_naive_cache_when_nothing_is_kept() {
    run(Regime { name: 4, keeps_released: false, ..TINY }, 20);
}
