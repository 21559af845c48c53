//! The obvious cache: a list of stored paths, searched from end to end for every question.
//!
//! The oracle of `tests/model.rs`. Owns no blocks: it is told which names the cache gave away. Nothing here is clever.

pub mod order;
pub mod segments;
pub mod tiers;

use kvlite_core::cache::{BlockCounts, MAX_PARTIAL_CANDIDATES, PartialHit, SegmentState};
use kvlite_core::{BlockId, EvictionKind, Label, Lookup, Token};
use order::Watched;
use segments::Segment;
use tiers::HostBlock;

/// Tokens from the root on, each with the label of its block.
pub type Path = Vec<(Label, Token)>;

/// One stored block: its whole path and what is known about its end.
pub struct Entry {
    pub path: Path,
    pub block: BlockId,
    pub users: u32,
    /// When the entry lost its last protection; none while it is protected.
    pub released: Option<u64>,
    pub born: u64,
    /// Number of its last release; 0: none yet.
    pub stamp: u64,
    /// As the order of eviction counts them.
    pub uses: u64,
    pub class: u64,
    /// The highest class of a child that was released below it.
    pub floor: u64,
    /// Whether it lies on the host; then `block` is that one.
    pub on_host: bool,
    /// Its block there, or its twin.
    pub host: Option<HostBlock>,
}

impl Entry {
    pub fn has_host(&self, id: u64) -> bool {
        self.host.as_ref().is_some_and(|host| host.id == id)
    }
}

/// The obvious cache: a list, searched from end to end for every question.
pub struct Naive {
    pub regime: Regime,
    pub entries: Vec<Entry>,
    pub private: Vec<BlockId>,
    pub in_transfer: Vec<BlockId>,
    pub segments: Vec<Segment>,
    /// Blocks of the host that are in use and nothing else.
    pub orphans: Vec<HostBlock>,
    /// Copies to the host that the next allocation may owe, and those that it owes.
    pub room: usize,
    pub owed: Vec<u64>,
    /// Priority of the last segment evicted.
    pub segment_clock: u128,
    /// Every name the cache has given away so far.
    pub named: Vec<BlockId>,
    pub clock: u64,
    pub eviction: EvictionKind,
    pub num_releases: u64,
    /// Mean releases between uses, times 1,024.
    pub interval: u64,
    /// Path, uses and last release of what is gone.
    pub past: Vec<(Path, u64, u64)>,
    pub watched: Vec<Watched>,
}

impl Naive {
    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub fn position(&self, path: &[(Label, Token)]) -> Option<usize> {
        self.entries.iter().position(|entry| entry.path == path)
    }

    fn is_protected(&self, path: &[(Label, Token)]) -> bool {
        self.entries.iter().any(|entry| entry.users > 0 && entry.path.starts_with(path))
    }

    pub fn counts(&self) -> BlockCounts {
        let in_tree = self.entries.iter().filter(|entry| entry.released.is_some()).count();
        let idle: usize = self.segments.iter().filter(|segment| segment.is_cached()).map(Segment::num_held).sum();
        let cached = in_tree + idle;
        let on_device = self.entries.iter().filter(|entry| !entry.on_host).count();
        let owned = on_device + self.segment_blocks() - cached + self.private.len();
        let in_transfer = self.in_transfer.len();
        BlockCounts { free: self.regime.num_blocks - cached - owned - in_transfer, cached, owned, in_transfer }
    }

    /// Evicts until `count` blocks are free: from the tree, then whole segments; says how many of each.
    pub fn evict_for(&mut self, count: usize) -> (usize, usize) {
        let (mut num_blocks, mut num_segments) = (0, 0);
        while self.counts().free < count {
            let Some(at) = self.victim() else {
                self.evict_segment();
                num_segments += 1;
                continue;
            };
            self.evict_entry(at);
            num_blocks += 1;
        }
        (num_blocks, num_segments)
    }

    pub fn pin(&mut self, path: &[(Label, Token)]) {
        let at = self.position(path).expect("only stored paths are pinned");
        self.entries[at].users += 1;
        for len in (1..=path.len() / self.regime.block_size).rev() {
            let at = self.position(&path[..len * self.regime.block_size]).expect("a stored path is stored whole");
            if self.entries[at].released.take().is_some() {
                self.entries[at].uses = (self.entries[at].uses + 1).min(255);
                self.came_back(self.entries[at].stamp);
            }
        }
    }

    pub fn unpin(&mut self, path: &[(Label, Token)]) {
        let at = self.position(path).expect("only stored paths are pinned");
        self.entries[at].users -= 1;
        for len in (1..=path.len() / self.regime.block_size).rev() {
            let prefix = &path[..len * self.regime.block_size];
            let at = self.position(prefix).expect("a stored path is stored from its beginning");
            if !self.is_protected(prefix) && self.entries[at].released.is_none() {
                if self.regime.keeps_released {
                    self.rest(at);
                } else {
                    self.leave_device(at);
                    self.entries.swap_remove(at);
                }
            }
        }
    }

    pub fn children(&self, path: &[(Label, Token)]) -> Vec<&Entry> {
        let len = path.len() + self.regime.block_size;
        self.entries.iter().filter(|entry| entry.path.len() == len && entry.path.starts_with(path)).collect()
    }

    /// The path of the full hits, their blocks, and the partial hit.
    pub fn longest_match(
        &self,
        lookup: Lookup,
        tokens: &[Token],
        max_blocks: usize,
    ) -> (Path, Vec<BlockId>, Option<PartialHit>) {
        let block_size = self.regime.block_size;
        let (mut path, mut hits) = (Path::new(), Vec::new());
        if !self.regime.keeps_released {
            return (path, hits, None);
        }
        let readable = |block: usize| match lookup.recipe {
            Some((label, from_block)) if block >= from_block => vec![label],
            _ => vec![lookup.own, Label::PUBLIC],
        };
        while hits.len() < max_blocks && tokens.len() >= path.len() + block_size {
            let block = &tokens[path.len()..][..block_size];
            let longer =
                |label| path.iter().copied().chain(block.iter().map(|&token| (label, token))).collect::<Path>();
            let mut candidates = readable(hits.len()).into_iter().map(longer);
            let Some(next) = candidates.find(|path| self.position(path).is_some()) else { break };
            path = next;
            hits.push(self.entries[self.position(&path).expect("just found")].block);
        }
        let rest = &tokens[path.len()..];
        let mut children = self.children(&path);
        children.sort_by_key(|entry| std::cmp::Reverse(entry.born));
        children.truncate(if hits.is_empty() { 0 } else { MAX_PARTIAL_CANDIDATES });
        children.retain(|entry| readable(hits.len()).contains(&entry.path[path.len()].0));
        let shared = |entry: &Entry| {
            let same = entry.path[path.len()..].iter().zip(rest).take_while(|(have, want)| have.1 == **want).count();
            same.min(block_size - 1)
        };
        let longest = children.iter().map(|entry| shared(entry)).max().unwrap_or(0);
        let best = children.iter().find(|entry| longest > 0 && shared(entry) == longest);
        let partial = best.map(|entry| PartialHit { block: entry.block, len: longest as u32 });
        (path, hits, partial)
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
    /// Blocks that segments may hold; 0: there are none.
    pub segment_quota: usize,
    pub host_blocks: usize,
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
