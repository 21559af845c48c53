//! A core, a device and a reader of plans (`reader`): the smallest engine.

use std::collections::BTreeMap;

use kvlite_core::plan::{Header, PROMPT_LOGPROB, PlanView, Region};
use kvlite_core::{Core, CoreConfig, CoreError, EvictionKind, FinishReason, PolicyKind};

use super::Asked;
use super::device::Device;
use super::hashes::Naive;
use super::overlap::Overlap;
use super::reuse::{BlendTold, Reuse};

/// What has become of one request.
pub struct Told {
    pub arrival: u64,
    pub admitted: bool,
    /// Output per choice.
    pub outputs: Vec<Vec<i32>>,
    /// Prompt and every token drawn so far, per choice, and the KV that they must have.
    pub(super) texts: Vec<Naive>,
    pub(super) blends: Vec<BlendTold>,
    pub finished: Vec<Option<FinishReason>>,
    pub cached_len: Vec<i32>,
    /// Admissions after a preemption, all choices together.
    pub resumed: u32,
    /// Calls and faults that allow an end which the oracle does not know.
    pub aborted: bool,
    pub faulted: bool,
    pub asked_to_finish: Vec<Option<FinishReason>>,
    /// Times that each prompt position's log-probability arrived.
    pub logprobs: Vec<u32>,
    /// It was out of the queue, about to move; or it came from elsewhere.
    pub moved: bool,
    /// Later arrivals admitted before this one, by priority.
    pub passed_by: BTreeMap<i32, u64>,
    /// Requests of its tenant admitted before this one though they come after it in order of rank.
    pub passes: u64,
}

impl Told {
    /// Of a request that nothing has been heard of.
    pub(super) fn new(arrival: u64, asked: &Asked) -> Told {
        let n = asked.n as usize;
        Told {
            arrival,
            admitted: false,
            outputs: vec![Vec::new(); n],
            texts: vec![Naive::default(); n],
            blends: vec![BlendTold::default(); n],
            finished: vec![None; n],
            cached_len: vec![0; n],
            resumed: 0,
            aborted: false,
            faulted: false,
            asked_to_finish: vec![None; n],
            logprobs: vec![0; asked.prompt.len()],
            moved: false,
            passed_by: BTreeMap::new(),
            passes: 0,
        }
    }

    /// Prompt and what was drawn of a choice.
    fn text<'a>(&'a self, asked: &'a Asked, choice: usize) -> &'a [i32] {
        let tokens = &self.texts[choice].tokens;
        if tokens.is_empty() { &asked.prompt } else { tokens }
    }
}

/// How one plan ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    /// Failed, with nothing or with rubbish written.
    Failed {
        garbage: bool,
    },
    /// One sampled row holds this id instead.
    FaultyRow {
        index: usize,
        id: i32,
    },
}

pub struct Engine {
    pub core: Core,
    pub device: Device,
    pub(super) arenas: [Vec<i32>; 2],
    /// Arenas whose plan has not run, oldest first.
    in_flight: Vec<usize>,
    next: usize,
    pub(super) rows: Vec<Option<(i32, u32)>>,
    pub(super) overlap: Overlap,
    pub asked: BTreeMap<i32, Asked>,
    pub told: BTreeMap<i32, Told>,
    pub now_ms: i64,
    pub(super) arrivals: u64,
    pub digest: u64,
    pub reuse: Reuse,
    /// All that waits is one workload.
    pub(super) is_workload: bool,
}

/// A small configuration to start from.
pub fn small_config() -> CoreConfig {
    CoreConfig {
        num_blocks: 32,
        block_size: 4,
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 64,
        max_num_waiting: 16,
        vocab_size: 100,
        enable_prefix_caching: true,
        policy: PolicyKind::Fcfs,
        max_passes: 64,
        eviction: EvictionKind::ReuseWeighted,
        attention_cost_tokens: 4096,
        attention_split_tokens: 256,
        group_cost_tokens: 0,
        host_blocks: 0,
        swap_cost_tokens: 0,
        reserve_tokens: 4,
        watermark_ratio: 1.0,
        segment_cache_ratio: 0.5,
        model_digest: 0,
        canonical_prefix: vec![],
        max_segments: 4,
        hash_seed: 7,
    }
}

impl Engine {
    pub fn new(config: CoreConfig) -> Engine {
        let device = Device::new(&config);
        let rows = vec![None; config.max_num_seqs as usize];
        let overlap = Overlap::new(rows.len(), config.block_size);
        let reuse = Reuse::new(&config);
        let core = Core::new(config).expect("test configurations are valid");
        let len = core.layout().len();
        Engine {
            core,
            device,
            arenas: [vec![-9; len], vec![-9; len]],
            in_flight: Vec::new(),
            next: 0,
            rows,
            overlap,
            asked: BTreeMap::new(),
            told: BTreeMap::new(),
            now_ms: 0,
            arrivals: 0,
            digest: 0,
            reuse,
            is_workload: false,
        }
    }

    pub fn add(&mut self, asked: Asked) -> Result<i32, CoreError> {
        let handle = match asked.precompute {
            None => self.core.add(&asked.request(), self.now_ms)?,
            Some(pinned) => {
                self.core.add_segment(&asked.prompt, asked.tenant, pinned, asked.deadline_ms, self.now_ms)?
            }
        };
        self.reuse.ask(handle, &asked);
        let told = Told::new(self.arrivals, &asked);
        self.arrivals += 1;
        self.asked.insert(handle, asked);
        assert!(self.told.insert(handle, told).is_none(), "handles are not reused soon");
        Ok(handle)
    }

    pub fn set_workload(&mut self, is_workload: bool) {
        self.is_workload = is_workload;
        self.core.set_workload(is_workload);
    }

    pub fn abort(&mut self, handle: i32) -> bool {
        if let Some(told) = self.told.get_mut(&handle) {
            told.aborted = true;
        }
        self.core.abort(handle)
    }

    pub fn pin_segment(&mut self, tenant: u32, ids: &[i32], pinned: bool) -> Result<bool, CoreError> {
        let is_done = self.core.pin_segment(tenant, ids, pinned)?;
        if pinned {
            self.reuse.makers_may_fail = true;
        } else {
            self.reuse.let_go(tenant, ids);
        }
        Ok(is_done)
    }

    pub fn drop_segment(&mut self, tenant: u32, ids: &[i32]) -> bool {
        let is_dropped = self.core.drop_segment(tenant, ids);
        if is_dropped {
            self.reuse.let_go(tenant, ids);
        }
        is_dropped
    }

    pub fn finish(&mut self, handle: i32, choice: u32, kept_len: u32, reason: FinishReason) -> bool {
        let ended = self.core.finish(handle, choice, kept_len, reason);
        if ended {
            self.told.get_mut(&handle).expect("finished handles were added").asked_to_finish[choice as usize] =
                Some(reason);
        }
        ended
    }

    /// One step: plans, then reads. The plan stays in flight until `complete`.
    pub fn step(&mut self) -> usize {
        let idx = self.next;
        let [first, second] = &mut self.arenas;
        self.core.step([first, second], idx, self.now_ms).expect("the arena is free");
        self.core.audit();
        self.next = 1 - idx;
        self.in_flight.push(idx);
        self.read(idx);
        idx
    }

    /// Runs the oldest plan in flight.
    pub fn complete(&mut self, outcome: Outcome) {
        let idx = self.in_flight.remove(0);
        self.overlap.complete();
        let layout = self.core.layout().clone();
        let plan = PlanView::new(&layout, &self.arenas[idx]);
        let id = plan.header(Header::PlanId);
        if let Outcome::Failed { garbage } = outcome {
            self.device.fail(&plan, garbage);
            self.reuse.makers_may_fail = true;
            for (handle, _) in self.device.named(&plan) {
                if let Some(told) = self.told.get_mut(&handle) {
                    told.faulted = true; // Or a maker's: it has no name.
                }
            }
            self.arenas[idx][layout.region(Region::Status).offset] = 1;
        } else {
            let results = self.device.run(&plan, &self.asked);
            for (handle, choice, start, end) in &results.placed {
                let told = self.told.get_mut(handle).expect("rows belong to requests");
                told.blends[*choice as usize].stay.placed.push((*start, *end));
            }
            let mut placed: Vec<_> = results.placed.iter().map(|&(handle, choice, ..)| (handle, choice)).collect();
            placed.dedup();
            for (handle, choice) in placed {
                let (asked, told) = (&self.asked[&handle], &self.told[&handle]);
                self.reuse.oracle.begin(asked, &told.blends[choice as usize].stay);
            }
            for (handle, choice, rows) in &results.repaired {
                self.check_repair(*handle, *choice as usize, rows);
            }
            let scored = results.scored.as_flattened().iter().map(|number| number.to_bits() as i32);
            let region = layout.region(Region::Scored).offset;
            self.arenas[idx][region..].iter_mut().zip(scored).for_each(|(to, bits)| *to = bits);
            let mut drawn = results.drawn;
            drawn.iter().for_each(|sample| self.check_draw(sample));
            if let Outcome::FaultyRow { index, id } = outcome
                && !drawn.is_empty()
            {
                let at = index % drawn.len();
                drawn[at].token = id;
                self.told.get_mut(&drawn[at].handle).expect("rows belong to requests").faulted = true;
            }
            for (at, sample) in drawn.iter().enumerate() {
                self.arenas[idx][layout.region(Region::Sampled).offset + at] = sample.token;
                if sample.kind == PROMPT_LOGPROB {
                    let told = self.told.get_mut(&sample.handle).expect("rows belong to requests");
                    told.logprobs[sample.position as usize] += 1;
                }
            }
        }
        self.arenas[idx][layout.region(Region::DonePlanId).offset] = id;
    }

    pub fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Synchronous: plan, run, and return the plan as read.
    pub fn turn(&mut self) -> PlanView<'_> {
        let idx = self.step();
        while !self.in_flight.is_empty() {
            self.complete(Outcome::Ok);
        }
        self.now_ms += 1;
        PlanView::new(self.core.layout(), &self.arenas[idx])
    }

    pub fn view(&self, idx: usize) -> PlanView<'_> {
        PlanView::new(self.core.layout(), &self.arenas[idx])
    }

    /// Turns until nothing lives; panics after `bound` turns.
    pub fn drain(&mut self, bound: usize) {
        for _ in 0..bound {
            if self.num_live() == 0 && self.core.stats().num_requests == 0 {
                self.assert_empty();
                return;
            }
            self.turn();
        }
        panic!("{} requests still live after {bound} steps: {:?}", self.num_live(), self.core.stats());
    }

    pub fn assert_empty(&self) {
        let stats = self.core.stats();
        assert_eq!([stats.num_running, stats.num_waiting, stats.num_requests], [0; 3], "nothing lives");
        assert_eq!([stats.owned_blocks, stats.in_transfer_blocks], [0; 2], "every block is free or cached");
    }

    pub fn num_live(&self) -> usize {
        self.told.values().filter(|told| told.finished.contains(&None)).count()
    }

    pub fn output(&self, handle: i32) -> &[i32] {
        &self.told[&handle].outputs[0]
    }
}
