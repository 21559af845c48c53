//! `Core`: the one door. Owns requests, sequences, queues, rows, blocks and the plans in flight.
//!
//! Must not know text, tensors, devices or clocks: `now_ms` is an argument. A step commits completed plans
//! (`commit.rs`), gives back what ended (`end.rs`), then plans running sequences (`schedule.rs`) and admissions
//! (`admit.rs`). Invariants: those of `audit.rs`, after every call. Called by `kvlite-py` and by tests.

mod add;
mod admit;
mod arrange;
mod audit;
mod blending;
mod commit;
mod end;
mod export;
mod freeze;
mod grouping;
mod import;
mod land;
mod makers;
mod manifest;
mod outputs;
mod queue;
mod recipes;
mod records;
mod repairs;
mod reuse;
mod schedule;
mod service;
mod stats;
mod tiering;
mod turns;
mod waiting;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::cache::{Cache, SegmentId};
use crate::config::CoreConfig;
use crate::error::CoreError;
use crate::ids::{BlockId, Waiter};
use crate::plan::{Header, Layout, PlanWriter, Region};
use crate::sched::Demand;
use crate::sequence::Sequence;
use arrange::Arranged;
use grouping::Grouping;
use import::Arrival;
use makers::Maker;
use queue::Queue;
use recipes::Recipes;
use records::{Hold, NO_HANDLE, NO_SLOT, PlanEntry, PlanRecord, RequestState};

pub use add::{MAX_STOP_TOKEN_IDS, Request};
pub use export::{ExportRow, MAX_HOLDS};
pub use reuse::{BlendRequest, MAX_DECODE_ROWS, MAX_ROUNDS, ReuseReport, SegmentInfo, SpanOutcome};
pub use stats::CoreStats;

/// The scheduler and the cache of one engine. See the module's header.
pub struct Core {
    config: CoreConfig,
    layout: Arc<Layout>,
    cache: Cache,
    requests: Vec<Option<RequestState>>,
    free_requests: Vec<u32>,
    by_handle: FxHashMap<i32, u32>,
    next_handle: i32,
    next_arrival: u64,
    /// Tells sequences of one rank apart.
    next_serial: u64,
    seqs: Vec<Sequence>,
    free_slots: Vec<u32>,
    queue: Queue,
    arranged: Arranged,
    /// Turns beyond those that the cache watches; see `watch.rs`.
    beyond: BTreeSet<Waiter>,
    /// Sequences that wait for segments, outside the queue.
    num_outside: usize,
    /// Sequences that waited when they were frozen.
    num_shelved: usize,
    /// Whoever computes a segment that is not ready. Never iterated where order matters.
    makers: FxHashMap<SegmentId, Maker>,
    recipes: Recipes,
    /// Slots that hold a row, oldest (rank, choice) first.
    running: Vec<u32>,
    free_rows: Vec<u32>,
    /// (deadline, request) of every request that has one.
    deadlines: BTreeSet<(i64, u32)>,
    /// Owners beyond the first of a private block: forks that share prompt blocks or wait to copy a tail.
    extra_owners: Vec<u32>,
    records: [PlanRecord; 2],
    next_number: u64,
    /// Blocks that are being sent to other engines, by the number that `export_stage` gave out.
    exports: BTreeMap<u32, Vec<Hold>>,
    next_hold: u32,
    /// Requests that arrive from other engines, by ticket.
    arrivals: BTreeMap<u32, Arrival>,
    next_ticket: u32,
    /// Running sequences whose rows no plan has announced yet.
    num_arrived: usize,
    /// The time of the last step.
    now_ms: i64,
    /// Sequences in Ending or Preempting: their blocks come back without further preemption.
    num_leaving: usize,
    /// Grows when room may have appeared; a candidate that did not fit is not tried again before.
    room_epoch: u64,
    /// The candidate that did not fit, and when.
    refused: Option<(u32, u64)>,
    out_committed: Vec<[i32; 3]>,
    out_finished: Vec<[i32; 3]>,
    /// What the last look-up found on the device, behind that on the host, and whether more arrives there.
    scratch_hits: Vec<BlockId>,
    scratch_host: Vec<BlockId>,
    hits_arrive: bool,
    scratch_blocks: Vec<BlockId>,
    /// Spans whose segments a survey did not find.
    scratch_spans: Vec<usize>,
    scratch_demands: Vec<Demand>,
    scratch_prefill: Vec<u32>,
    scratch_looks: Vec<u32>,
    grouping: Grouping,
    stats: CoreStats,
}

impl Core {
    /// A core with an empty cache. Errors: a limit out of range.
    pub fn new(config: CoreConfig) -> Result<Core, CoreError> {
        config.validate()?;
        let layout = Layout::new(&config);
        let num_seqs = config.max_num_seqs as usize;
        let record = || PlanRecord {
            entries: Vec::with_capacity(num_seqs),
            holds: Vec::with_capacity(
                [Region::BlockUpdate, Region::BlockCopy].map(|it| layout.region(it).rows).iter().sum(),
            ),
            ..PlanRecord::default()
        };
        let max_blocks = config.max_blocks_per_seq() as usize;
        let max_finished = layout.region(Region::Finished).rows;
        Ok(Core {
            records: [record(), record()],
            cache: Cache::new(&config),
            requests: Vec::new(),
            free_requests: Vec::new(),
            by_handle: FxHashMap::with_capacity_and_hasher(max_finished, Default::default()),
            next_handle: 0,
            next_arrival: 0,
            next_serial: 0,
            seqs: Vec::new(),
            free_slots: Vec::new(),
            queue: Queue::new(&config),
            arranged: Arranged::new(&config),
            beyond: BTreeSet::new(),
            num_outside: 0,
            num_shelved: 0,
            makers: FxHashMap::default(),
            recipes: Recipes::default(),
            running: Vec::with_capacity(num_seqs),
            free_rows: (0..config.max_num_seqs).rev().collect(),
            deadlines: BTreeSet::new(),
            extra_owners: vec![0; config.num_blocks as usize],
            next_number: 1,
            exports: BTreeMap::new(),
            next_hold: 0,
            arrivals: BTreeMap::new(),
            next_ticket: 0,
            num_arrived: 0,
            now_ms: 0,
            num_leaving: 0,
            room_epoch: 0,
            refused: None,
            out_committed: Vec::with_capacity(2 * num_seqs),
            out_finished: Vec::with_capacity(max_finished),
            scratch_hits: Vec::with_capacity(max_blocks),
            scratch_host: Vec::with_capacity(max_blocks),
            hits_arrive: false,
            scratch_blocks: Vec::with_capacity(max_blocks),
            scratch_spans: Vec::with_capacity(config.max_segments as usize),
            scratch_demands: Vec::with_capacity(num_seqs + 1),
            scratch_prefill: Vec::with_capacity(num_seqs),
            scratch_looks: Vec::with_capacity(queue::WINDOW),
            grouping: Grouping::new(&config),
            stats: CoreStats::default(),
            layout: Arc::new(layout),
            config,
        })
    }

    /// The arena layout of this core.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The limits of this core.
    pub fn config(&self) -> &CoreConfig {
        &self.config
    }

    /// Drops every cached block; running sequences keep theirs.
    pub fn clear_cache(&mut self) {
        self.cache.clear();
    }

    /// The one call per step: commits every completed plan of `arenas`, in plan order, then writes the next plan into
    /// `arenas[arena_idx]`.
    ///
    /// `now_ms` is the caller's clock, the one that deadlines are measured by. Errors (nothing has changed then): an arena
    /// of the wrong size, an arena index other than 0 and 1, or the plan in `arena_idx` is still incomplete. O(running)
    /// without admissions; allocates nothing in steady state.
    pub fn step(&mut self, arenas: [&mut [i32]; 2], arena_idx: usize, now_ms: i64) -> Result<(), CoreError> {
        self.check_arenas(&arenas, arena_idx)?;
        let older = usize::from(self.records[1].number < self.records[0].number);
        for idx in [older, 1 - older] {
            if self.records[idx].number != 0 {
                if !self.is_complete(idx, arenas[idx]) {
                    break;
                }
                self.commit_plan(idx, arenas[idx]);
            }
        }
        self.now_ms = now_ms;
        self.expire(now_ms);
        self.expire_arrivals(now_ms);
        self.sweep();

        let [first, second] = arenas;
        let layout = Arc::clone(&self.layout);
        let mut plan = PlanWriter::new(&layout, if arena_idx == 0 { first } else { second });
        let mut record = std::mem::take(&mut self.records[arena_idx]);
        record.number = self.next_number;
        self.next_number += 1;
        self.announce(&mut plan);
        self.cache.open_demotions(self.max_demotions());
        self.schedule(&mut plan, &mut record);
        self.write_demotions(&mut plan, &mut record);
        self.write_groups(&mut plan);
        self.report(&mut plan);
        record.num_tokens = plan.num_tokens() as u32;
        let arrivals = self.arrivals.values().filter_map(|arrival| arrival.deadline_ms);
        let next = self.deadlines.first().map(|&(deadline, _)| deadline).into_iter().chain(arrivals).min();
        let wake = next.map_or(-1, |deadline| deadline.saturating_sub(now_ms).clamp(0, i64::from(i32::MAX)));
        plan.seal(plan_id(record.number), wake as i32, self.running.len(), self.queue.len() + self.num_outside);
        self.records[arena_idx] = record;
        self.stats.steps_total += 1;
        Ok(())
    }

    /// Moves what has been committed and finished into the plan; ends beyond the region's capacity wait for the next.
    fn report(&mut self, plan: &mut PlanWriter<'_>) {
        plan.committed(&self.out_committed);
        self.out_committed.clear();
        let room = self.out_finished.len().min(plan.room(Region::Finished));
        for row in self.out_finished.drain(..room) {
            plan.finished(row);
        }
    }

    fn check_arenas(&self, arenas: &[&mut [i32]; 2], arena_idx: usize) -> Result<(), CoreError> {
        if arena_idx > 1 {
            return Err(CoreError::ArenaIndex { arena_idx });
        }
        for (idx, arena) in arenas.iter().enumerate() {
            if arena.len() != self.layout.len() {
                let expected = self.layout.len();
                return Err(CoreError::ArenaLength { arena_idx: idx, len: arena.len(), expected });
            }
        }
        let number = self.records[arena_idx].number;
        let blocked = |idx: usize| self.records[idx].number != 0 && !self.is_complete(idx, arenas[idx]);
        let older_blocks = self.records[1 - arena_idx].number < number && blocked(1 - arena_idx);
        if number != 0 && (blocked(arena_idx) || older_blocks) {
            return Err(CoreError::PlanOutstanding { plan_id: plan_id(number), arena_idx });
        }
        Ok(())
    }

    fn is_complete(&self, idx: usize, arena: &[i32]) -> bool {
        let record = &self.records[idx];
        debug_assert_eq!(arena[Header::PlanId as usize], plan_id(record.number), "arenas keep their index");
        record.num_tokens == 0 || arena[self.layout.offset(Region::DonePlanId)] == plan_id(record.number)
    }

    fn request(&self, request: u32) -> &RequestState {
        self.requests[request as usize].as_ref().expect("sequences outlive neither their request nor its slot")
    }

    fn request_mut(&mut self, request: u32) -> &mut RequestState {
        self.requests[request as usize].as_mut().expect("sequences outlive neither their request nor its slot")
    }

    /// The sequence of a choice, while it exists.
    fn slot_of(&self, request: u32, choice: usize) -> Option<u32> {
        self.request(request).choices.get(choice).copied().filter(|&slot| slot != NO_SLOT)
    }

    fn seq(&self, slot: u32) -> &Sequence {
        &self.seqs[slot as usize]
    }

    fn seq_mut(&mut self, slot: u32) -> &mut Sequence {
        &mut self.seqs[slot as usize]
    }

    /// The other plan in flight, if any: what must complete before a block that it reads may be reused.
    fn newest_in_flight(&mut self) -> Option<&mut PlanRecord> {
        self.records.iter_mut().filter(|record| record.number != 0).max_by_key(|record| record.number)
    }

    /// Gives back one owner's share of a private block.
    fn free_private(&mut self, block: BlockId) {
        let extra = &mut self.extra_owners[block.index as usize];
        if *extra > 0 {
            *extra -= 1;
        } else {
            self.cache.free(block);
        }
    }
}

/// The positive int32 name of a plan.
fn plan_id(number: u64) -> i32 {
    if number == 0 { 0 } else { ((number - 1) % i32::MAX as u64) as i32 + 1 }
}

#[cfg(test)]
mod tests {
    use super::plan_id;

    #[test]
    fn plan_ids_stay_positive_after_the_last() {
        assert_eq!([1, 2, i32::MAX as u64, i32::MAX as u64 + 1].map(plan_id), [1, 2, i32::MAX, 1]);
    }
}
