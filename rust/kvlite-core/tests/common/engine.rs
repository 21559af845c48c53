//! A core, a device and a reader of plans: the smallest engine, with every promise to the reader checked as it reads.

use std::collections::BTreeMap;

use kvlite_core::plan::{Cause, Header, PROMPT_LOGPROB, PlanView, Region, SAMPLE};
use kvlite_core::sched::policy::{Fcfs, Policy};
use kvlite_core::{Core, CoreConfig, CoreError, FinishReason, PolicyKind};

use super::device::{Device, Drawn};
use super::hashes::Naive;
use super::overlap::Overlap;
use super::{Asked, mix};

/// What has become of one request.
pub struct Told {
    pub arrival: u64,
    pub admitted: bool,
    /// Output per choice.
    pub outputs: Vec<Vec<i32>>,
    /// Prompt and every token drawn so far, per choice, and the KV that they must have.
    texts: Vec<Naive>,
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
    /// Later arrivals admitted before this one, by priority.
    pub passed_by: BTreeMap<i32, u64>,
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
    arenas: [Vec<i32>; 2],
    /// Arenas whose plan has not run, oldest first.
    in_flight: Vec<usize>,
    next: usize,
    rows: Vec<Option<(i32, u32)>>,
    overlap: Overlap,
    pub asked: BTreeMap<i32, Asked>,
    pub told: BTreeMap<i32, Told>,
    pub now_ms: i64,
    arrivals: u64,
    pub digest: u64,
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
        attention_cost_tokens: 4096,
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
        }
    }

    pub fn add(&mut self, asked: Asked) -> Result<i32, CoreError> {
        let handle = self.core.add(&asked.request(), self.now_ms)?;
        let n = asked.n as usize;
        let told = Told {
            arrival: self.arrivals,
            admitted: false,
            outputs: vec![Vec::new(); n],
            texts: vec![Naive::default(); n],
            finished: vec![None; n],
            cached_len: vec![0; n],
            resumed: 0,
            aborted: false,
            faulted: false,
            asked_to_finish: vec![None; n],
            logprobs: vec![0; asked.prompt.len()],
            passed_by: BTreeMap::new(),
        };
        self.arrivals += 1;
        self.asked.insert(handle, asked);
        assert!(self.told.insert(handle, told).is_none(), "handles are not reused soon");
        Ok(handle)
    }

    pub fn abort(&mut self, handle: i32) -> bool {
        if let Some(told) = self.told.get_mut(&handle) {
            told.aborted = true;
        }
        self.core.abort(handle)
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
            for (handle, _) in self.device.named(&plan) {
                self.told.get_mut(&handle).expect("rows belong to requests").faulted = true;
            }
            self.arenas[idx][layout.region(Region::Status).offset] = 1;
        } else {
            let mut drawn = self.device.run(&plan, &self.asked).drawn;
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

    fn read(&mut self, idx: usize) {
        let layout = self.core.layout().clone();
        let arena = self.arenas[idx].clone();
        let plan = PlanView::new(&layout, &arena);
        for &value in &arena[..layout.region(Region::DonePlanId).offset] {
            self.digest = mix(self.digest ^ u64::from(value as u32));
        }
        for [row, position, token] in plan.rows::<3>(Region::Committed) {
            let (handle, choice) = self.rows[row as usize].expect("tokens come from rows that somebody holds");
            let told = self.told.get_mut(&handle).expect("rows belong to requests");
            assert_eq!(told.finished[choice as usize], None, "nothing follows the end of {handle}/{choice}");
            let output = &mut told.outputs[choice as usize];
            assert_eq!(output.len(), position as usize, "positions of {handle}/{choice} come one by one");
            output.push(token);
            let drawn = told.texts[choice as usize].tokens.get(self.asked[&handle].prompt.len() + position as usize);
            assert!(told.faulted || drawn == Some(&token), "{handle}/{choice} commits {token}, {drawn:?} was drawn");
        }
        for [handle, choice, reason] in plan.rows::<3>(Region::Finished) {
            let reason = FinishReason::from_code(reason).expect("a known reason");
            let choices =
                if choice < 0 { 0..self.asked[&handle].n as usize } else { choice as usize..choice as usize + 1 };
            assert!(choice >= 0 || !self.told[&handle].admitted, "-1 is for requests that never ran");
            for choice in choices {
                self.end(handle, choice, reason);
            }
        }
        for [handle, choice, row, cause, cached_len] in plan.rows::<5>(Region::Admitted) {
            self.admit(handle, choice as usize, row as usize, cause, cached_len);
        }
        self.device.meet(&plan);
        self.overlap.plan(&plan);
    }

    /// A sample must come from exactly the KV that its text has, whoever computed it.
    fn check_draw(&mut self, sample: &Drawn) {
        let Drawn { handle, choice, kind, position, token, hidden } = *sample;
        let (asked, position) = (&self.asked[&handle], position as usize);
        let told = self.told.get_mut(&handle).expect("rows belong to requests");
        if told.faulted {
            return;
        }
        let text = &mut told.texts[choice as usize];
        if text.tokens.is_empty() {
            text.tokens = asked.prompt.clone();
        }
        text.settle(position + 1);
        assert_eq!(hidden, text.hidden[position], "{handle}/{choice} reads wrong KV at position {position}");
        if kind == SAMPLE {
            assert_eq!(position + 1, text.tokens.len(), "{handle}/{choice} draws its next token");
            text.tokens.push(token);
        }
    }

    fn end(&mut self, handle: i32, choice: usize, reason: FinishReason) {
        let asked = &self.asked[&handle];
        let told = self.told.get_mut(&handle).expect("ends belong to requests");
        assert_eq!(told.finished[choice], None, "{handle}/{choice} ends once");
        told.finished[choice] = Some(reason);
        let output = &told.outputs[choice];
        let too_late = (1..output.len()).find(|&len| asked.natural_end(&output[..len]).is_some());
        assert!(too_late.is_none(), "{handle}/{choice} went on after its end: {output:?}");
        for holder in &mut self.rows {
            if *holder == Some((handle, choice as u32)) {
                *holder = None;
            }
        }
        let is_natural = asked.natural_end(output) == Some(reason);
        let why = match reason {
            _ if told.asked_to_finish[choice] == Some(reason) => true,
            FinishReason::Cancelled => told.aborted,
            FinishReason::Error => told.faulted,
            FinishReason::Timeout => asked.deadline_ms.is_some_and(|deadline| deadline <= self.now_ms),
            FinishReason::Stop | FinishReason::Length => is_natural,
        };
        assert!(why, "{handle}/{choice} ended with {reason:?} after {output:?}; nobody asked");
        let wants_logprobs = asked.prompt_logprobs && choice == 0 && is_natural;
        if wants_logprobs && !told.faulted {
            let rows = &told.logprobs[..asked.prompt.len() - 1];
            assert!(rows.iter().all(|&count| count == 1), "{handle}: each prompt position is asked for once: {rows:?}");
        }
    }

    fn admit(&mut self, handle: i32, choice: usize, row: usize, cause: i32, cached_len: i32) {
        // Whoever held the row without having finished was preempted; whoever resumes leaves a former row behind.
        let resumes = cause == Cause::Resumed as i32;
        for holder in self.rows.iter_mut().filter(|holder| **holder == Some((handle, choice as u32))) {
            assert!(resumes, "{handle}/{choice} already has a row");
            *holder = None;
        }
        self.rows[row] = Some((handle, choice as u32));
        let asked = &self.asked[&handle];
        assert!((cached_len as usize) <= asked.prompt.len());
        assert!((asked.use_cache && !asked.prompt_logprobs) || cached_len == 0, "{handle} wants no hit");
        if cause != Cause::New as i32 {
            self.told.get_mut(&handle).expect("admissions belong to requests").resumed += u32::from(resumes);
            return;
        }
        assert!((cached_len as usize) < asked.prompt.len(), "at least one prompt token is computed");
        let told = self.told.get_mut(&handle).expect("admissions belong to requests");
        told.admitted = true;
        told.cached_len[choice] = cached_len;
        let (arrival, priority) = (told.arrival, asked.priority);
        let rank = Fcfs.rank(arrival, priority);
        for (other, told) in &mut self.told {
            if told.admitted || told.finished[0].is_some() {
                continue;
            }
            let other = &self.asked[other];
            assert!(Fcfs.rank(told.arrival, other.priority) >= rank, "{handle} overtook the head of the queue");
            if told.arrival < arrival {
                let passed_by = told.passed_by.entry(priority).or_default();
                *passed_by += 1;
                assert!(*passed_by <= Fcfs.may_be_passed_by(other.priority, priority), "the waiting bound holds");
            }
        }
    }
}
