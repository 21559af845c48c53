//! The obvious cache: a list of stored paths, searched from end to end for every question.
//!
//! The oracle of `tests/model.rs`. Owns no blocks: it is told which names the cache gave away. Nothing here is clever.

use kvlite_core::cache::{BlockCounts, MAX_PARTIAL_CANDIDATES, PartialHit};
use kvlite_core::{BlockId, Token};

/// One stored block: a whole path of tokens and what is known about its end.
pub struct Entry {
    pub tenant: u32,
    pub path: Vec<Token>,
    pub block: BlockId,
    pub users: u32,
    /// When the entry lost its last protection; none while it is protected.
    pub released: Option<u64>,
    pub born: u64,
}

/// The obvious cache: a list, searched from end to end for every question.
pub struct Naive {
    pub regime: Regime,
    pub entries: Vec<Entry>,
    pub private: Vec<BlockId>,
    pub in_transfer: Vec<BlockId>,
    /// Every name the cache has given away so far.
    pub named: Vec<BlockId>,
    pub clock: u64,
}

impl Naive {
    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub fn position(&self, tenant: u32, path: &[Token]) -> Option<usize> {
        self.entries.iter().position(|entry| entry.tenant == tenant && entry.path == path)
    }

    pub fn is_protected(&self, tenant: u32, path: &[Token]) -> bool {
        self.entries.iter().any(|entry| entry.tenant == tenant && entry.users > 0 && entry.path.starts_with(path))
    }

    pub fn counts(&self) -> BlockCounts {
        let cached = self.entries.iter().filter(|entry| entry.released.is_some()).count();
        let owned = self.entries.len() - cached + self.private.len();
        let in_transfer = self.in_transfer.len();
        BlockCounts { free: self.regime.num_blocks - cached - owned - in_transfer, cached, owned, in_transfer }
    }

    pub fn oldest(&self) -> Option<usize> {
        let released = (0..self.entries.len()).filter(|&at| self.entries[at].released.is_some());
        released.min_by_key(|&at| self.entries[at].released)
    }

    pub fn evict(&mut self) {
        let at = self.oldest().expect("something is cached");
        let gone = self.entries.swap_remove(at);
        let has_tail =
            self.entries.iter().any(|entry| entry.tenant == gone.tenant && entry.path.starts_with(&gone.path));
        assert!(!has_tail, "the model evicts {:?} from the middle of a path", gone.path);
    }

    pub fn pin(&mut self, tenant: u32, path: &[Token]) {
        let at = self.position(tenant, path).expect("only stored paths are pinned");
        self.entries[at].users += 1;
        for entry in self.entries.iter_mut().filter(|entry| entry.tenant == tenant && path.starts_with(&entry.path)) {
            entry.released = None;
        }
    }

    pub fn unpin(&mut self, tenant: u32, path: &[Token]) {
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

    pub fn children(&self, tenant: u32, path: &[Token]) -> Vec<&Entry> {
        let len = path.len() + self.regime.block_size;
        let is_child =
            |entry: &&Entry| entry.tenant == tenant && entry.path.len() == len && entry.path.starts_with(path);
        self.entries.iter().filter(is_child).collect()
    }

    pub fn longest_match(
        &self,
        tenant: u32,
        tokens: &[Token],
        max_blocks: usize,
    ) -> (Vec<BlockId>, Option<PartialHit>) {
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
        let mut children = self.children(tenant, known);
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
#[derive(Clone, Copy, Debug)]
pub struct Regime {
    pub name: u64,
    pub num_blocks: usize,
    pub block_size: usize,
    pub vocab: u64,
    pub tenants: u64,
    /// Whether some block is to get more children than a match looks at.
    pub must_crowd: bool,
    pub keeps_released: bool,
}

/// SplitMix64: random enough, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
}
