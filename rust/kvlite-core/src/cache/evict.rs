//! Which cached block goes first when free ones run out and no waiting request wants it (for those see `wants.rs`).
//!
//! Owns the order of unwanted cached blocks and what is known of each block's past; a policy weighs, `Cache` evicts. Must not
//! know tokens, users or time: it counts releases. Invariant: a block comes in no class below that of a child which was released before it,
//! so no block goes before its cached child, whatever the policy says. Called by `Cache`.
//!
//! ```text
//!   class 0   oldest [c2] [c1] [d5] [d4] newest        a block goes when it is the oldest of its class and
//!   class 1   oldest [a3] [a2] newest                  released + class * CLASS_INTERVALS * interval is least of all
//! ```

use super::NONE;
use super::hash::BlockHash;
use super::past::Past;
use crate::config::{CoreConfig, EvictionKind};
use crate::ids::{Label, Token};

/// Classes of blocks; a policy names one below this.
pub const NUM_CLASSES: usize = 8;

/// What a class is worth, in intervals: releases from one use of a block to the next, in the mean of those that come back.
/// So a class protects for as long as a return usually takes, whatever the pool's size. Measured: `python -m bench hitrate`.
pub const CLASS_INTERVALS: u64 = 2;

/// The mean forgets with 1/2^this per return.
const MEAN_SHIFT: u32 = 10;

/// The mean is kept in 1/2^this of a release.
const FRACTION_BITS: u32 = 10;

/// Blocks that may be gone before their pasts are written.
const GONE_AT_ONCE: usize = 32;

/// Fixed: what is remembered depends on nobody's secret, so the order is the same in every process.
const FINGERPRINT_SEED: u64 = 0x2545_f491_4f6c_dd1d;

/// What an order may go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Times that the block was put to use, evictions in between not counted against it; 1: never used again.
    pub uses: u8,
    /// Tokens of the path above it, in units of `attention_cost_tokens`.
    pub relative_depth: u32,
    /// Blocks above it.
    pub depth: u32,
}

/// An order of eviction: recency, but a class more is worth `CLASS_INTERVALS` usual intervals of it.
pub trait EvictionPolicy: Send + Sync {
    /// The class of a block that is cached from now on, below `NUM_CLASSES`; the lowest goes first.
    fn class(&self, standing: Standing) -> usize;
}

/// Least recently released first. What every other order is measured against.
pub struct Lru;

impl EvictionPolicy for Lru {
    fn class(&self, _: Standing) -> usize {
        0
    }
}

/// Recency, a class lower with every doubling of the depth: what many prompts may begin with stays longest.
pub struct DepthDiscounted;

impl EvictionPolicy for DepthDiscounted {
    fn class(&self, standing: Standing) -> usize {
        (NUM_CLASSES - 1).saturating_sub(log2(standing.depth + 1))
    }
}

/// Recency, a class higher with every doubling of what a token costs to compute again, (1 + depth / `attention_cost_tokens`).
pub struct CostAware;

impl EvictionPolicy for CostAware {
    fn class(&self, standing: Standing) -> usize {
        log2(standing.relative_depth.saturating_add(1)).min(NUM_CLASSES - 1)
    }
}

/// Recency, a class higher with every doubling of the number of uses, which outlive eviction (`past.rs`).
///
/// A conversation that has come back once comes back again with twice the likelihood of a new one, and usually later than a
/// full pool keeps anything; so what a block's KV was worth before it was evicted says most about what it will be.
pub struct ReuseWeighted;

impl EvictionPolicy for ReuseWeighted {
    fn class(&self, standing: Standing) -> usize {
        log2(standing.uses.into())
    }
}

fn log2(value: u32) -> usize {
    value.max(1).ilog2() as usize
}

fn policy(kind: EvictionKind) -> Box<dyn EvictionPolicy> {
    match kind {
        EvictionKind::Lru => Box::new(Lru),
        EvictionKind::DepthDiscounted => Box::new(DepthDiscounted),
        EvictionKind::CostAware => Box::new(CostAware),
        EvictionKind::ReuseWeighted => Box::new(ReuseWeighted),
    }
}

#[derive(Clone, Copy)]
struct Neighbours {
    older: u32,
    newer: u32,
}

/// Lists of blocks, oldest first; a block is in one at most. Each operation is O(1).
pub(super) struct Lists {
    /// An intrusive ring per list; the entries after the last block close them (their `newer` is the oldest block).
    ring: Vec<Neighbours>,
    num_blocks: usize,
}

impl Lists {
    /// Empty lists over `num_blocks` blocks; never allocates afterwards.
    pub(super) fn new(num_blocks: usize, num_lists: usize) -> Lists {
        let mut ring = vec![Neighbours { older: NONE, newer: NONE }; num_blocks];
        ring.extend(
            (num_blocks..num_blocks + num_lists).map(|end| Neighbours { older: end as u32, newer: end as u32 }),
        );
        Lists { ring, num_blocks }
    }

    /// `block`, which is in no list, becomes the newest of one.
    pub(super) fn push(&mut self, list: usize, block: u32) {
        let end = self.num_blocks + list;
        let newest = self.ring[end].older;
        self.ring[block as usize] = Neighbours { older: newest, newer: end as u32 };
        self.ring[newest as usize].newer = block;
        self.ring[end].older = block;
    }

    /// Takes `block` out of its list.
    pub(super) fn remove(&mut self, block: u32) {
        let Neighbours { older, newer } = self.ring[block as usize];
        self.ring[older as usize].newer = newer;
        self.ring[newer as usize].older = older;
        self.ring[block as usize] = Neighbours { older: NONE, newer: NONE };
    }

    /// The blocks of a list, oldest first.
    pub(super) fn iter(&self, list: usize) -> impl Iterator<Item = u32> {
        let end = (self.num_blocks + list) as u32;
        let mut at = end;
        std::iter::from_fn(move || {
            at = self.ring[at as usize].newer;
            (at != end).then_some(at)
        })
    }
}

/// What is kept of a block while it is in the tree.
#[derive(Clone, Copy, Default)]
struct Known {
    /// When it was released last, in releases of any block.
    released: u64,
    /// Of labels and tokens of the whole path.
    fingerprint: u32,
    /// See [`Standing::uses`].
    uses: u8,
    /// Its class is at least this, for the sake of children that were released before it.
    floor: u8,
    /// As of its last release.
    class: u8,
}

impl Known {
    /// When it is evicted, on the clock of releases, where a class is worth so many.
    fn due(&self, worth: u64) -> u64 {
        self.released + u64::from(self.class) * worth
    }
}

/// The unwanted cached blocks in the order of a policy. Each operation is O(1), or O(`NUM_CLASSES`).
pub(super) struct Evictor {
    policy: Box<dyn EvictionPolicy>,
    lists: Lists,
    known: Vec<Known>,
    past: Past,
    /// Of blocks that are gone, in order, to be remembered before the past is asked: each is a cache miss, and in a row
    /// they are under way at once instead of holding up one eviction each.
    gone: Vec<Known>,
    hash: BlockHash,
    num_releases: u64,
    /// Mean releases between a block's release and its next use, counted in blocks that came back; at first the pool's size.
    interval: u64,
    block_size: u32,
    attention_cost_tokens: u32,
}

impl Evictor {
    pub(super) fn new(config: &CoreConfig) -> Evictor {
        let num_blocks = config.num_blocks as usize;
        Evictor {
            policy: policy(config.eviction),
            lists: Lists::new(num_blocks, NUM_CLASSES),
            known: vec![Known::default(); num_blocks],
            past: Past::new(num_blocks),
            gone: Vec::with_capacity(GONE_AT_ONCE),
            hash: BlockHash::new(FINGERPRINT_SEED),
            num_releases: 0,
            interval: u64::from(config.num_blocks) << FRACTION_BITS,
            block_size: config.block_size,
            attention_cost_tokens: config.attention_cost_tokens,
        }
    }

    /// `block` is new in the tree, in use. O(block_size).
    pub(super) fn entered(&mut self, block: u32, parent: Option<u32>, label: Label, tokens: &[Token]) {
        let above = parent.map(|parent| self.known[parent as usize]);
        let fingerprint = self.hash.of(above.map_or(NONE, |above| above.fingerprint), label, tokens);
        self.remember_gone();
        let past = self.past.recall(fingerprint);
        if let Some((_, until)) = past {
            self.came_back(u64::from((self.num_releases as u32).wrapping_sub(until)));
        }
        let uses = past.map_or(0, |(uses, _)| uses).saturating_add(1);
        self.known[block as usize] = Known { uses, fingerprint, ..Known::default() };
    }

    /// `block`, which was cached, is in use again.
    pub(super) fn used(&mut self, block: u32) {
        let known = &mut self.known[block as usize];
        known.uses = known.uses.saturating_add(1);
        let interval = self.num_releases - known.released;
        self.came_back(interval);
    }

    fn came_back(&mut self, interval: u64) {
        self.interval -= self.interval >> MEAN_SHIFT;
        self.interval += (interval << FRACTION_BITS) >> MEAN_SHIFT;
    }

    /// `block` leaves the tree; its uses are remembered.
    pub(super) fn left(&mut self, block: u32) {
        self.gone.push(self.known[block as usize]);
        if self.gone.len() == GONE_AT_ONCE {
            self.remember_gone();
        }
    }

    fn remember_gone(&mut self) {
        for known in self.gone.drain(..) {
            self.past.remember(known.fingerprint, known.uses, known.released as u32);
        }
    }

    /// `block` is cached from now on, and wanted.
    pub(super) fn put_by(&mut self, block: u32) {
        self.known[block as usize].released = self.num_releases;
        self.num_releases += 1;
    }

    /// `block`, with `depth` blocks above it, is cached and unwanted from now on. Of its children all that are cached were
    /// released before it.
    pub(super) fn released(&mut self, block: u32, parent: Option<u32>, depth: u32) {
        let known = &mut self.known[block as usize];
        let relative_depth = u64::from(depth) * u64::from(self.block_size) / u64::from(self.attention_cost_tokens);
        let standing = Standing { uses: known.uses, depth, relative_depth: relative_depth as u32 };
        let class = self.policy.class(standing).max(known.floor.into());
        known.class = class as u8;
        self.put_by(block);
        self.lists.push(class, block);
        if let Some(parent) = parent {
            let floor = &mut self.known[parent as usize].floor;
            *floor = (*floor).max(class as u8);
        }
    }

    /// `block` is in use again, wanted, or taken.
    pub(super) fn removed(&mut self, block: u32) {
        self.lists.remove(block);
    }

    /// The block to take next; none when there is no unwanted cached block.
    pub(super) fn victim(&self) -> Option<u32> {
        let worth = self.class_worth();
        let mut first = None;
        for end in &self.lists.ring[self.lists.num_blocks..] {
            if let Some(known) = self.known.get(end.newer as usize) {
                let due = known.due(worth);
                if first.is_none_or(|(least, _)| due < least) {
                    first = Some((due, end.newer));
                }
            }
        }
        first.map(|(_, block)| block)
    }

    /// Blocks in the order of these numbers are in the order of eviction.
    fn due(&self, block: u32) -> u64 {
        self.known[block as usize].due(self.class_worth())
    }

    /// Uses of a block of the tree so far, those before it was last evicted among them as far as they are remembered.
    pub(super) fn uses(&self, block: u32) -> u8 {
        self.known[block as usize].uses
    }

    /// Releases that a class is worth now.
    pub(super) fn class_worth(&self) -> u64 {
        (CLASS_INTERVALS * self.interval) >> FRACTION_BITS
    }

    /// All unwanted cached blocks in the order in which they would be taken, for audits.
    pub(super) fn order(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..NUM_CLASSES).flat_map(|class| self.lists.iter(class)).collect();
        order.sort_by_key(|&block| self.due(block));
        order
    }
}
