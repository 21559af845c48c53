//! Random operations on segments, applied to the cache and to the list; part of `tests/model.rs`.

use super::naive::segments::Segment;
use super::{BlockState, Pair, TenantId, Token};
use kvlite_core::cache::SegmentState;

/// Events that a regime with segments must have seen.
pub const NUM_SEGMENT_EVENTS: usize = 8;
pub const EVICTED_FOR_BLOCKS: usize = 0;
const EVICTED_FOR_SEGMENTS: usize = 1;
const FOUND_OWN: usize = 2;
const FOUND_PUBLIC: usize = 3;
const FOREIGN: usize = 4;
const NOT_NOW: usize = 5;
const DROPPED_IN_USE: usize = 6;
const DROPPED_WHILE_MADE: usize = 7;

impl Pair {
    /// A short text of few tokens, or one that somebody stores.
    fn segment_text(&mut self) -> Vec<Token> {
        if let Some(at) = self.some_segment(|_| true).filter(|_| self.random.below(3) == 0) {
            return self.naive.segments[at].ids.clone();
        }
        let len = 1 + self.random.index(3 * self.naive.regime.block_size);
        self.tokens(len, self.naive.regime.vocab)
    }

    /// A segment that satisfies `is_fit`.
    fn some_segment(&mut self, is_fit: impl Fn(&Segment) -> bool) -> Option<usize> {
        let fit: Vec<usize> = (0..self.naive.segments.len()).filter(|&at| is_fit(&self.naive.segments[at])).collect();
        if fit.is_empty() { None } else { Some(fit[self.random.index(fit.len())]) }
    }

    fn find(&mut self, tenant: TenantId, ids: &[Token]) -> Option<usize> {
        let found = self.naive.find_segment(tenant, ids);
        let expected = found.map(|at| self.naive.segments[at].id);
        assert_eq!(self.cache.find_segment(tenant, ids), expected, "the segment of {ids:?} for {tenant:?}");
        match found {
            Some(at) if self.naive.segments[at].tenant == tenant => self.seen.segments[FOUND_OWN] += 1,
            Some(_) => self.seen.segments[FOUND_PUBLIC] += 1,
            None => {
                let is_foreign = self.naive.segments.iter().any(|segment| segment.ids == ids && !segment.dropped);
                self.seen.segments[FOREIGN] += usize::from(is_foreign);
            }
        }
        found
    }

    fn open_segment(&mut self) {
        let (tenant, ids) = (self.tenant(), self.segment_text());
        self.find(tenant, &ids);
        let fits = self.naive.blocks_of(&ids) <= self.naive.regime.segment_quota;
        assert_eq!(self.cache.fits_segment(ids.len() as u32), fits, "{} tokens", ids.len());
        let num_wanted = self.naive.segments.iter().filter(|segment| segment.state == SegmentState::Wanted).count();
        if !fits || num_wanted > 3 || self.naive.segment_of(tenant, &ids).is_some() {
            return;
        }
        let id = self.cache.open_segment(tenant, &ids);
        assert!(!self.named_segments.contains(&id), "{id:?} was given away before");
        self.named_segments.push(id);
        self.naive.segments.push(Segment {
            id,
            tenant,
            ids,
            blocks: vec![],
            state: SegmentState::Wanted,
            users: 0,
            pinned: false,
            dropped: false,
            hits: 0,
            released: (0, 0),
        });
    }

    fn fill_segment(&mut self, at: usize) {
        let segment = &self.naive.segments[at];
        let (id, count) = (segment.id, self.naive.blocks_of(&segment.ids));
        let can_fill = self.naive.can_fill(at);
        assert_eq!(self.cache.fill_segment(id), can_fill, "{id:?} needs {count} blocks");
        if !can_fill {
            self.seen.segments[NOT_NOW] += 1;
            return;
        }
        while self.naive.segment_blocks() + count > self.naive.regime.segment_quota {
            self.naive.evict_segment();
            self.seen.segments[EVICTED_FOR_SEGMENTS] += 1;
        }
        self.naive.evict_for(count);
        let blocks = self.cache.segment(id).blocks.to_vec();
        assert_eq!(blocks.len(), count, "a segment is filled whole");
        blocks.iter().for_each(|&block| self.name_block(block));
        let at = self.naive.segments.iter().position(|segment| segment.id == id).expect("nobody evicts what is wanted");
        self.naive.change_segment(at, |segment| (segment.blocks, segment.state) = (blocks, SegmentState::Making));
    }

    pub fn step_segments(&mut self) {
        let is = |state| move |segment: &Segment| segment.state == state;
        match self.random.below(100) {
            0..25 => self.open_segment(),
            25..45 => {
                if let Some(at) = self.some_segment(is(SegmentState::Wanted)) {
                    self.fill_segment(at);
                }
            }
            45..60 => {
                if let Some(at) = self.some_segment(is(SegmentState::Making)) {
                    let segment = &self.naive.segments[at];
                    assert_eq!(self.cache.complete_segment(segment.id), !segment.dropped, "{:?}", segment.ids);
                    self.naive.change_segment(at, |segment| segment.state = SegmentState::Ready);
                }
            }
            60..63 => {
                if let Some(at) = self.some_segment(|segment| segment.state != SegmentState::Ready) {
                    self.cache.abandon_segment(self.naive.segments.swap_remove(at).id);
                }
            }
            63..66 => {
                if let Some(at) = self.some_segment(is(SegmentState::Making)) {
                    self.cache.empty_segment(self.naive.segments[at].id);
                    let empty =
                        |segment: &mut Segment| (segment.blocks, segment.state) = (vec![], SegmentState::Wanted);
                    self.naive.change_segment(at, empty);
                }
            }
            66..78 => {
                if let Some(at) = self.some_segment(is(SegmentState::Ready)) {
                    self.cache.use_segment(self.naive.segments[at].id);
                    self.naive.change_segment(at, |segment| {
                        segment.users += 1;
                        segment.hits += 1;
                    });
                }
            }
            78..91 => {
                if let Some(at) = self.some_segment(|segment| segment.users > 0) {
                    self.cache.release_segment(self.naive.segments[at].id);
                    self.naive.change_segment(at, |segment| segment.users -= 1);
                }
            }
            91..96 => {
                if let Some(at) = self.some_segment(|segment| !segment.dropped) {
                    let pinned = self.random.below(3) == 0;
                    self.cache.pin_segment(self.naive.segments[at].id, pinned);
                    self.naive.change_segment(at, |segment| segment.pinned = pinned);
                }
            }
            _ => {
                if let Some(at) = self.some_segment(|segment| !segment.dropped) {
                    let segment = &self.naive.segments[at];
                    self.seen.segments[DROPPED_IN_USE] += usize::from(segment.users > 0);
                    self.seen.segments[DROPPED_WHILE_MADE] += usize::from(segment.state == SegmentState::Making);
                    self.cache.drop_segment(segment.id);
                    self.naive.change_segment(at, |segment| (segment.pinned, segment.dropped) = (false, true));
                }
            }
        }
    }

    pub fn compare_segments(&mut self) {
        let (cache, naive) = (&self.cache, &self.naive);
        for segment in &naive.segments {
            let view = cache.segment(segment.id);
            assert_eq!(
                (view.tenant, view.ids, view.len as usize),
                (segment.tenant, &segment.ids[..], segment.ids.len())
            );
            assert_eq!((view.blocks, view.state), (&segment.blocks[..], segment.state), "{:?}", segment.ids);
            assert_eq!((view.users, view.hits), (segment.users, segment.hits), "{:?}", segment.ids);
            assert_eq!((view.pinned, view.dropped), (segment.pinned, segment.dropped), "{:?}", segment.ids);
            let expected = if segment.is_cached() { BlockState::Cached } else { BlockState::Owned };
            assert!(segment.blocks.iter().all(|&block| cache.state(block) == expected && cache.label(block).is_none()));
        }
        let living = self.named_segments.iter().filter(|&&id| cache.has_segment(id)).count();
        assert_eq!(
            (living, cache.num_segments()),
            (naive.segments.len(), naive.segments.len()),
            "names that still hold"
        );
        assert_eq!(cache.segment_blocks(), naive.segment_blocks());
        let pinned = naive.segments.iter().filter(|segment| segment.pinned);
        assert_eq!(cache.pinned_blocks(), pinned.map(|segment| naive.blocks_of(&segment.ids)).sum::<usize>());
        let victim = naive.segment_victim().map(|at| naive.segments[at].id);
        assert_eq!(cache.segment_victim(), victim, "the segment to evict next");
    }
}
