//! The table of segments: entries by number, by text, and in the order of eviction.
//!
//! Owns names, digests and priorities. Must not know states of blocks: `segments.rs` keeps the pool in step with it.

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

use super::{SegmentId, SegmentState};
use crate::cache::NONE;
use crate::config::CoreConfig;
use crate::ids::{BlockId, TenantId, Token};

type Digest = [u8; 32];

/// Place in the order of eviction, least first: Greedy-Dual-Size-Frequency, then the one that was in use longer ago.
type Rank = (u128, u64, u32);

/// Binary places of a priority.
const PRIORITY_SHIFT: u32 = 16;
/// Hits that count for the order of eviction.
const MAX_COUNTED_HITS: u32 = 15;

/// Tokens that are hashed at once; 4 KiB keep the vector units of BLAKE3 busy.
const HASHED_AT_ONCE: usize = 1024;

/// One segment, or room for one.
#[derive(Default)]
pub(in crate::cache) struct Entry {
    pub generation: u32,
    pub tenant: TenantId,
    pub digest: Digest,
    pub ids: Box<[Token]>,
    pub blocks: Vec<BlockId>,
    /// None: the entry is vacant.
    pub state: Option<SegmentState>,
    pub users: u32,
    pub pinned: bool,
    pub dropped: bool,
    pub hits: u32,
    /// Set exactly while the segment is cached.
    pub rank: Option<Rank>,
}

/// All segments of a cache.
pub(in crate::cache) struct Segments {
    pub entries: Vec<Entry>,
    pub vacant: Vec<u32>,
    pub found: FxHashMap<(TenantId, Digest), u32>,
    /// Cached segments, next to be evicted first.
    pub order: BTreeSet<Rank>,
    /// The segment of each block.
    pub owners: Vec<u32>,
    /// Priority of the last one evicted: what was useful long ago is overtaken by what is useful now.
    pub clock: u128,
    pub num_released: u64,
    /// Of BLAKE3: no two models share a digest.
    key: Digest,
    /// Blocks that segments may hold together.
    pub quota: usize,
    pub num_held: usize,
    pub num_cached: usize,
    pub num_pinned: usize,
    block_size: usize,
    attention_cost_tokens: u128,
}

impl Segments {
    pub(in crate::cache) fn new(config: &CoreConfig) -> Segments {
        let mut key = blake3::Hasher::new_derive_key("kvlite segment, version 1: model digest, canonical prefix");
        key.update(&config.model_digest.to_le_bytes());
        hash_ids(&mut key, &config.canonical_prefix);
        Segments {
            entries: Vec::new(),
            vacant: Vec::new(),
            found: FxHashMap::default(),
            order: BTreeSet::new(),
            owners: vec![NONE; config.num_blocks as usize],
            clock: 0,
            num_released: 0,
            key: *key.finalize().as_bytes(),
            quota: (config.segment_cache_ratio * f64::from(config.num_blocks)) as usize,
            num_held: 0,
            num_cached: 0,
            num_pinned: 0,
            block_size: config.block_size as usize,
            attention_cost_tokens: u128::from(config.attention_cost_tokens),
        }
    }

    /// Whether `block` belongs to a segment.
    pub(in crate::cache) fn holds(&self, block: u32) -> bool {
        self.owners[block as usize] != NONE
    }

    pub(super) fn digest(&self, ids: &[Token]) -> Digest {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hash_ids(&mut hasher, ids);
        *hasher.finalize().as_bytes()
    }

    pub(super) fn find(&self, tenant: TenantId, digest: Digest, ids: &[Token]) -> Option<u32> {
        let index = *self.found.get(&(tenant, digest))?;
        (*self.entries[index as usize].ids == *ids).then_some(index)
    }

    pub(super) fn resolve(&self, id: SegmentId) -> u32 {
        let now = self.entries.get(id.index as usize).map(|entry| entry.generation);
        assert!(now == Some(id.generation), "stale segment id {id:?}: its segment is at generation {now:?} now");
        id.index
    }

    pub(super) fn name(&self, index: u32) -> SegmentId {
        SegmentId { index, generation: self.entries[index as usize].generation }
    }

    /// The entry of `id`, which must be in `state`.
    pub(super) fn in_state(&mut self, id: SegmentId, state: SegmentState) -> &mut Entry {
        let index = self.resolve(id);
        let entry = &mut self.entries[index as usize];
        assert!(entry.state == Some(state), "{id:?} is {:?}, not {state:?}", entry.state);
        entry
    }

    pub(super) fn blocks_of(&self, len: usize) -> usize {
        len.div_ceil(self.block_size)
    }

    /// Clock + uses * recompute cost / bytes, in 2^-16 of a token's cost per token kept: uses count from one, because making it
    /// was one; cost = len * (1 + len / (2 attention_cost_tokens)); bytes are those of whole blocks. Uses beyond `MAX_COUNTED_HITS`
    /// do not count: what was popular once would outlive, for as many evictions, everything that is new.
    pub(super) fn priority(&self, entry: &Entry) -> u128 {
        let (len, linear) = (entry.ids.len() as u128, 2 * self.attention_cost_tokens);
        let kept = (entry.blocks.len() * self.block_size) as u128;
        let value = ((len * (linear + len)) << PRIORITY_SHIFT) / (linear * kept);
        self.clock + (u128::from(entry.hits.min(MAX_COUNTED_HITS)) + 1) * value
    }
}

fn hash_ids(hasher: &mut blake3::Hasher, ids: &[Token]) {
    let mut bytes = [0; 4 * HASHED_AT_ONCE];
    for ids in ids.chunks(HASHED_AT_ONCE) {
        for (to, id) in bytes.chunks_exact_mut(4).zip(ids) {
            to.copy_from_slice(&id.to_le_bytes());
        }
        hasher.update(&bytes[..4 * ids.len()]);
    }
}
