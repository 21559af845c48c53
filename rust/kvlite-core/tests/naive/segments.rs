//! The obvious store of segments: a list. Part of the oracle of `tests/model.rs`.

use super::{Naive, SegmentState};
use kvlite_core::cache::SegmentId;
use kvlite_core::{BlockId, TenantId, Token};

/// Context length at which attention costs as much as everything else; small, so that length matters here.
pub const ATTENTION_COST_TOKENS: u32 = 3;

/// One segment.
pub struct Segment {
    pub id: SegmentId,
    pub tenant: TenantId,
    pub ids: Vec<Token>,
    /// What it was given when it was filled.
    pub blocks: Vec<BlockId>,
    pub state: SegmentState,
    pub users: u32,
    pub pinned: bool,
    pub dropped: bool,
    pub hits: u32,
    /// Priority and time of its last release; meaningful while cached.
    pub released: (u128, u64),
}

impl Segment {
    pub fn is_cached(&self) -> bool {
        self.state == SegmentState::Ready && self.users == 0 && !self.pinned
    }

    pub fn num_held(&self) -> usize {
        self.blocks.len()
    }
}

impl Naive {
    pub fn blocks_of(&self, ids: &[Token]) -> usize {
        ids.len().div_ceil(self.regime.block_size)
    }

    pub fn segment_blocks(&self) -> usize {
        self.segments.iter().map(Segment::num_held).sum()
    }

    /// The segment of exactly this tenant.
    pub fn segment_of(&self, tenant: TenantId, ids: &[Token]) -> Option<usize> {
        self.segments.iter().position(|segment| segment.tenant == tenant && segment.ids == ids && !segment.dropped)
    }

    pub fn find_segment(&self, tenant: TenantId, ids: &[Token]) -> Option<usize> {
        self.segment_of(tenant, ids).or_else(|| self.segment_of(TenantId::PUBLIC, ids))
    }

    pub fn segment_victim(&self) -> Option<usize> {
        let cached = (0..self.segments.len()).filter(|&at| self.segments[at].is_cached());
        cached.min_by_key(|&at| self.segments[at].released)
    }

    pub fn evict_segment(&mut self) {
        let gone = self.segments.swap_remove(self.segment_victim().expect("a segment is cached"));
        self.segment_clock = gone.released.0;
    }

    pub fn can_fill(&self, at: usize) -> bool {
        let count = self.blocks_of(&self.segments[at].ids);
        let kept: usize = self.segments.iter().filter(|segment| !segment.is_cached()).map(Segment::num_held).sum();
        let counts = self.counts();
        kept + count <= self.regime.segment_quota && count <= counts.free + counts.cached
    }

    /// Applies a change, then what follows from it: nobody keeps a dropped segment, and one that becomes cached gets its place.
    pub fn change_segment(&mut self, at: usize, change: impl FnOnce(&mut Segment)) {
        let segment = &mut self.segments[at];
        let was_cached = segment.is_cached();
        change(segment);
        let (is_cached, dropped) = (segment.is_cached(), segment.dropped);
        if is_cached && dropped {
            self.segments.swap_remove(at);
        } else if is_cached && !was_cached {
            let tick = self.tick();
            let segment = &self.segments[at];
            let (len, limit) = (segment.ids.len() as u128, 2 * u128::from(ATTENTION_COST_TOKENS));
            let cost = len * limit + len * len;
            let bytes = limit * (segment.num_held() * self.regime.block_size) as u128;
            let priority = self.segment_clock + u128::from(1 + segment.hits.min(15)) * (cost * 65_536 / bytes);
            self.segments[at].released = (priority, tick);
        }
    }
}
