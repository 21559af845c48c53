//! `BatchPlan`: the int32 layout of one step, region by region: the contract with Python (`runner/plan.py` mirrors it).
//!
//! Owns offsets (`Layout`), the writer that fills a caller-owned arena in place and the reader that tests and the
//! binding use. Knows neither sequences nor blocks: callers hand over plain numbers. Invariants: regions keep one order
//! and fixed offsets for the life of a core; a write past a region's capacity is our own fault and panics.
//! Written by `core::schedule` once per step; golden-tested in `tests/plan_golden.rs`.

mod codes;
mod view;

use std::ops::Range;

use crate::config::CoreConfig;

pub use codes::{Cause, CopyDirection, PROMPT_LOGPROB, SAMPLE};
pub use view::PlanView;

/// Regions of a plan, in arena order. `DonePlanId` and what follows it are inputs, written by the runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Region {
    /// `[32]`: plan id, counts and hints; see `Header`.
    Header,
    /// `[T]`: ids; -1 means the device's own last token of that row.
    TokenIds,
    /// `[T]`: RoPE positions.
    Positions,
    /// `[T]`: largest key index that the row may see.
    LastKey,
    /// `[T]`: slot that receives the row's K and V.
    SlotMapping,
    /// `[T]`: slot that receives K before RoPE, and V (rows of a segment being made); -1 for none.
    SegmentSlot,
    /// `[S + 1]`: first row of each sequence, cumulative.
    QueryStart,
    /// `[S]`: keys that exist once this plan has run.
    ContextLen,
    /// `[S]`: row of the device tables.
    SeqRow,
    /// `[N, 3]`: row, seq_row, kind (`SAMPLE` or `PROMPT_LOGPROB`).
    Sample,
    /// `[U, 3]`: seq_row, index, block; applied to the device's block table before the forward pass.
    BlockUpdate,
    /// `[S, 3]`: first entry of `GroupSeqs`, sequences, keys that they share: whole splits of attention.
    PrefixGroup,
    /// `[S]`: sequences of this plan, group by group; each is in one at most.
    GroupSeqs,
    /// `[P, 6]`: seq_row, first target position, rows, offset in the segment, first entry of `SourceBlocks`, entries;
    /// done after copies and table updates, before the forward pass.
    Place,
    /// `[B]`: blocks that `Place` reads: a segment's, from its first one on.
    SourceBlocks,
    /// `[S, 7]`: index of the sequence in this plan, first scoring row, scoring rows, key_start, key_end, method_id,
    /// round; at most one per sequence.
    Score,
    /// `[C, 3]`: direction (`CopyDirection`), source block, target block; all before any store of this plan, those to the
    /// host before the others.
    BlockCopy,
    /// `[S, 5]`: handle, choice, seq_row, cause (`Cause`), cached_len.
    Admitted,
    /// `[2 * S, 3]`: seq_row, output position, token.
    Committed,
    /// `[F, 3]`: handle, choice (-1 for every choice left), reason (`FinishReason`).
    Finished,
    /// `[1]`, input: the plan id, written last, when the plan is complete.
    DonePlanId,
    /// `[1]`, input: 0 ok, 1 failed.
    Status,
    /// `[N]`, input: sampled ids; below 0 is a fault of that row.
    Sampled,
    /// `[SC, 2]`, input: weight and value (float32 bits) of each key of each score entry, one entry after the other.
    Scored,
}

const NUM_REGIONS: usize = Region::Scored as usize + 1;
const HEADER_LEN: usize = 32;

/// Fields of the header by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Header {
    /// 1.., positive.
    PlanId,
    /// Rows of this plan.
    NumTokens,
    /// Sequences of this plan.
    NumSeqs,
    /// Rows of `Sample`.
    NumSamples,
    /// Rows of `BlockUpdate`.
    NumBlockUpdates,
    /// Rows of `PrefixGroup`.
    NumPrefixGroups,
    /// Rows of `Place`.
    NumPlaces,
    /// Entries of `SourceBlocks`.
    NumSourceBlocks,
    /// Rows of `Score`.
    NumScores,
    /// Rows of `BlockCopy`.
    NumBlockCopies,
    /// Rows of `Admitted`.
    NumAdmitted,
    /// Rows of `Committed`.
    NumCommitted,
    /// Rows of `Finished`.
    NumFinished,
    /// Milliseconds from now to the next deadline; -1 for none.
    NextWakeMs,
    /// Sequences that hold a row after this step.
    NumRunning,
    /// Requests (or preempted choices) that wait after this step.
    NumWaiting,
}

/// Where one region lies in the arena. A vector has one column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Snake-case name, as in architecture.md section 3.
    pub name: &'static str,
    /// First integer of the region.
    pub offset: usize,
    /// Rows (capacity).
    pub rows: usize,
    /// Columns; 1 for vectors.
    pub cols: usize,
}

/// Offsets and shapes of all regions, fixed by the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    regions: [RegionSpec; NUM_REGIONS],
    len: usize,
}

impl Layout {
    /// Computes the layout of a validated configuration.
    pub fn new(config: &CoreConfig) -> Layout {
        let tokens = config.max_num_batched_tokens as usize;
        let seqs = config.max_num_seqs as usize;
        let blocks = config.max_blocks_per_seq() as usize;
        let samples = tokens + seqs;
        let updates = 2 * blocks + 4 * seqs + tokens.div_ceil(config.block_size as usize);
        let finished = seqs + config.max_num_waiting as usize;
        let places = seqs + config.max_segments as usize;
        let copies = 2 * seqs + if config.host_blocks > 0 { 2 * blocks } else { 0 };
        let shapes = [
            ("header", HEADER_LEN, 1),
            ("token_ids", tokens, 1),
            ("positions", tokens, 1),
            ("last_key", tokens, 1),
            ("slot_mapping", tokens, 1),
            ("segment_slot", tokens, 1),
            ("query_start", seqs + 1, 1),
            ("context_len", seqs, 1),
            ("seq_row", seqs, 1),
            ("sample", samples, 3),
            ("block_update", updates, 3),
            ("prefix_group", seqs, 3),
            ("group_seqs", seqs, 1),
            ("place", places, 6),
            ("source_blocks", 2 * blocks + places, 1),
            ("score", seqs, 7),
            ("block_copy", copies, 3),
            ("admitted", seqs, 5),
            ("committed", 2 * seqs, 3),
            ("finished", finished, 3),
            ("done_plan_id", 1, 1),
            ("status", 1, 1),
            ("sampled", samples, 1),
            ("scored", config.max_model_len as usize, 2),
        ];
        let mut len = 0;
        let regions = shapes.map(|(name, rows, cols)| {
            let spec = RegionSpec { name, offset: len, rows, cols };
            len += rows * cols;
            spec
        });
        Layout { regions, len }
    }

    /// All regions in arena order.
    pub fn regions(&self) -> &[RegionSpec] {
        &self.regions
    }

    /// One region.
    pub fn region(&self, region: Region) -> &RegionSpec {
        &self.regions[region as usize]
    }

    /// Integers in one arena.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true; a layout has a header at least.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn offset(&self, region: Region) -> usize {
        self.regions[region as usize].offset
    }

    fn rows(&self, region: Region) -> usize {
        self.regions[region as usize].rows
    }
}

/// Fills one arena in place. Counts live here and go to the header in `seal`.
pub struct PlanWriter<'a> {
    layout: &'a Layout,
    /// The arena, cut into its regions once: a write then needs no offset and one check.
    regions: [&'a mut [i32]; NUM_REGIONS],
    counts: [usize; NUM_REGIONS],
    num_tokens: usize,
    num_seqs: usize,
}

impl<'a> PlanWriter<'a> {
    /// Starts a plan over `arena` (`layout.len()` integers). The inputs of the plan that was there are cleared.
    pub fn new(layout: &'a Layout, arena: &'a mut [i32]) -> PlanWriter<'a> {
        assert_eq!(arena.len(), layout.len(), "step checks the arena's length");
        let mut rest = arena;
        let regions = layout.regions.each_ref().map(|spec| {
            let (region, behind) = std::mem::take(&mut rest).split_at_mut(spec.rows * spec.cols);
            rest = behind;
            region
        });
        for region in [Region::DonePlanId, Region::Status, Region::QueryStart] {
            regions[region as usize][0] = 0;
        }
        PlanWriter { layout, regions, counts: [0; NUM_REGIONS], num_tokens: 0, num_seqs: 0 }
    }

    /// Rows written so far.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Rows of `region` that are still empty.
    pub fn room(&self, region: Region) -> usize {
        self.layout.rows(region) - self.counts[region as usize]
    }

    /// Index that the next sample gets.
    pub fn next_sample(&self) -> u32 {
        self.counts[Region::Sample as usize] as u32
    }

    /// Appends one row: token `id` (-1: the device's own) at `position`, stored at `slot` and, before RoPE, at
    /// `segment_slot` (-1: nowhere); sees keys up to `position`.
    #[inline]
    pub fn token(&mut self, id: i32, position: u32, slot: u32, segment_slot: i32) {
        let at = self.num_tokens;
        self.set(Region::TokenIds, at, id);
        self.set(Region::Positions, at, position as i32);
        self.set(Region::LastKey, at, position as i32);
        self.set(Region::SlotMapping, at, slot as i32);
        self.set(Region::SegmentSlot, at, segment_slot);
        self.num_tokens = at + 1;
    }

    /// Closes a sequence: all rows since the last call are its rows. Returns its index.
    #[inline]
    pub fn sequence(&mut self, seq_row: u32, context_len: u32) -> u32 {
        let at = self.num_seqs;
        self.set(Region::SeqRow, at, seq_row as i32);
        self.set(Region::ContextLen, at, context_len as i32);
        self.set(Region::QueryStart, at + 1, self.num_tokens as i32);
        self.num_seqs = at + 1;
        at as u32
    }

    /// Names sequences whose first `keys` keys are the same ones.
    pub fn prefix_group(&mut self, keys: u32, seqs: impl Iterator<Item = u32>) {
        let first = self.counts[Region::GroupSeqs as usize];
        let mut count = 0;
        for seq in seqs {
            self.set(Region::GroupSeqs, first + count, seq as i32);
            count += 1;
        }
        self.counts[Region::GroupSeqs as usize] = first + count;
        self.push(Region::PrefixGroup, [first as i32, count as i32, keys as i32]);
    }

    /// Asks for a sample of `row`; returns its index. Until the runner writes it, a draw counts as a fault.
    #[inline]
    pub fn sample(&mut self, row: usize, seq_row: u32, kind: i32) -> u32 {
        let index = self.counts[Region::Sample as usize];
        self.push(Region::Sample, [row as i32, seq_row as i32, kind]);
        self.regions[Region::Sampled as usize][index] = if kind == SAMPLE { -1 } else { 0 };
        index as u32
    }

    /// Sets entry `index` of the device's block table of `seq_row`.
    #[inline]
    pub fn block_update(&mut self, seq_row: u32, index: u32, block: u32) {
        self.push(Region::BlockUpdate, [seq_row as i32, index as i32, block as i32]);
    }

    /// Copies a block before the forward pass; blocks of the host are counted from 0.
    pub fn block_copy(&mut self, direction: CopyDirection, source: u32, target: u32) {
        self.push(Region::BlockCopy, [direction as i32, source as i32, target as i32]);
    }

    /// Places `len` rows of a segment, from its row `offset` on, at `position` of `seq_row`; `sources` are the segment's
    /// blocks, beginning with its first.
    pub fn place(&mut self, seq_row: u32, position: u32, len: u32, offset: u32, sources: impl Iterator<Item = u32>) {
        let first = self.counts[Region::SourceBlocks as usize];
        sources.for_each(|block| self.push(Region::SourceBlocks, [block as i32]));
        let count = self.counts[Region::SourceBlocks as usize] - first;
        let row = [seq_row, position, len, offset, first as u32, count as u32];
        self.push(Region::Place, row.map(|value| value as i32));
    }

    /// Asks what `rows` (of the sequence that `sequence` closes next) say about the keys of `hull`; returns the first of
    /// their rows in `Scored`. Until the runner writes those, they weigh nothing.
    pub fn score(&mut self, rows: Range<usize>, hull: Range<u32>, method_id: u32, round: u32) -> u32 {
        let (first, len) = (self.counts[Region::Scored as usize], hull.len());
        assert!(len <= self.room(Region::Scored), "region scored is full: room() is asked first");
        self.counts[Region::Scored as usize] = first + len;
        self.regions[Region::Scored as usize][2 * first..][..2 * len].fill(0);
        let row = [self.num_seqs, rows.start, rows.len(), hull.start as usize, hull.end as usize];
        let [seq, start, count, key_start, key_end] = row.map(|value| value as i32);
        self.push(Region::Score, [seq, start, count, key_start, key_end, method_id as i32, round as i32]);
        first as u32
    }

    /// Announces that a sequence holds `seq_row` from now on.
    pub fn admitted(&mut self, handle: i32, choice: u32, seq_row: u32, cause: Cause, cached_len: u32) {
        self.push(Region::Admitted, [handle, choice as i32, seq_row as i32, cause as i32, cached_len as i32]);
    }

    /// Reports committed tokens.
    pub fn committed(&mut self, rows: &[[i32; 3]]) {
        let (at, flat) = (self.counts[Region::Committed as usize], rows.as_flattened());
        self.regions[Region::Committed as usize][3 * at..][..flat.len()].copy_from_slice(flat);
        self.counts[Region::Committed as usize] = at + rows.len();
    }

    /// Reports an end.
    pub fn finished(&mut self, row: [i32; 3]) {
        self.push(Region::Finished, row);
    }

    /// Writes the header; nothing may be added afterwards.
    pub fn seal(self, plan_id: i32, next_wake_ms: i32, num_running: usize, num_waiting: usize) {
        let count = |region: Region| self.counts[region as usize] as i32;
        let mut header = [0; HEADER_LEN];
        header[Header::PlanId as usize] = plan_id;
        header[Header::NumTokens as usize] = self.num_tokens as i32;
        header[Header::NumSeqs as usize] = self.num_seqs as i32;
        header[Header::NumSamples as usize] = count(Region::Sample);
        header[Header::NumBlockUpdates as usize] = count(Region::BlockUpdate);
        header[Header::NumPrefixGroups as usize] = count(Region::PrefixGroup);
        header[Header::NumPlaces as usize] = count(Region::Place);
        header[Header::NumSourceBlocks as usize] = count(Region::SourceBlocks);
        header[Header::NumScores as usize] = count(Region::Score);
        header[Header::NumBlockCopies as usize] = count(Region::BlockCopy);
        header[Header::NumAdmitted as usize] = count(Region::Admitted);
        header[Header::NumCommitted as usize] = count(Region::Committed);
        header[Header::NumFinished as usize] = count(Region::Finished);
        header[Header::NextWakeMs as usize] = next_wake_ms;
        header[Header::NumRunning as usize] = num_running as i32;
        header[Header::NumWaiting as usize] = num_waiting as i32;
        self.regions[Region::Header as usize].copy_from_slice(&header);
    }

    /// Panics past the region's end: callers check the budget of tokens first, and schedule a row once.
    #[inline]
    fn set(&mut self, region: Region, at: usize, value: i32) {
        self.regions[region as usize][at] = value;
    }

    #[inline]
    fn push<const COLS: usize>(&mut self, region: Region, row: [i32; COLS]) {
        debug_assert_eq!(COLS, self.layout.region(region).cols, "columns of {region:?}");
        let at = self.counts[region as usize];
        let cells = self.regions[region as usize].as_chunks_mut().0.get_mut(at);
        *cells.expect("the region is full: room() is asked first") = row;
        self.counts[region as usize] = at + 1;
    }
}
