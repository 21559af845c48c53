//! A core driven by hand, plan by plan: every plan is read into plain vectors and completed with scores that the test gives.

use std::collections::BTreeMap;

use kvlite_core::plan::{Header, PlanView, Region};
use kvlite_core::{BlendRequest, Core, CoreConfig, EvictionKind, PolicyKind, Request, Round, Scope};

pub const BLOCK: u32 = 4;

pub fn config() -> CoreConfig {
    CoreConfig {
        num_blocks: 64,
        block_size: BLOCK,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: 64,
        max_num_waiting: 8,
        vocab_size: 100,
        enable_prefix_caching: true,
        policy: PolicyKind::Fcfs,
        max_passes: 64,
        eviction: EvictionKind::ReuseWeighted,
        attention_cost_tokens: 1 << 20,
        attention_split_tokens: 256,
        group_cost_tokens: 0,
        host_blocks: 0,
        swap_cost_tokens: 0,
        reserve_tokens: 0,
        segment_cache_ratio: 0.5,
        model_digest: 1,
        canonical_prefix: vec![98, 99],
        max_segments: 4,
        watermark_ratio: 1.0,
        hash_seed: 1,
    }
}

/// Scores by the new rows, once.
pub const QUERY: [Round; 1] = [Round { scope: Scope::New, cost: 1.0, ratio: 0.25 }];

/// `len` tokens that no other salt has.
pub fn text(salt: i32, len: usize) -> Vec<i32> {
    (0..len as i32).map(|at| (at * 7 + salt * 31) % 90).collect()
}

pub fn blend<'a>(spans: &'a [(u32, u32)], rounds: &'a [Round], ratio: f64) -> BlendRequest<'a> {
    BlendRequest { spans, method_id: 7, ratio, rounds, scores: None, decode_rows: 0 }
}

pub fn request<'a>(prompt: &'a [i32], blend: Option<BlendRequest<'a>>) -> Request<'a> {
    Request {
        prompt,
        n: 1,
        max_tokens: 2,
        min_tokens: 0,
        stop_token_ids: &[],
        priority: 0,
        deadline_ms: None,
        tenant: 0,
        use_cache: true,
        prompt_logprobs: false,
        blend,
    }
}

/// One plan, read.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Positions per seq_row, in order.
    pub rows: BTreeMap<i32, Vec<i32>>,
    /// Rows that are stored in a segment too.
    pub num_segment_rows: usize,
    /// (seq_row, position, len, offset)
    pub places: Vec<[i32; 4]>,
    /// (scoring rows' positions, key_start, key_end, round)
    pub scores: Vec<(Vec<i32>, i32, i32, i32)>,
    pub samples: usize,
    pub admitted: Vec<[i32; 5]>,
    pub finished: Vec<[i32; 3]>,
    pub num_waiting: i32,
}

pub struct Driver {
    pub core: Core,
    arenas: [Vec<i32>; 2],
    next: usize,
    pub now_ms: i64,
    /// (weight, value) per absolute position.
    pub score: fn(i32) -> (f32, f32),
    /// Everything that ended: (handle, choice, reason).
    pub finished: Vec<[i32; 3]>,
}

impl Driver {
    pub fn new(config: CoreConfig) -> Driver {
        let core = Core::new(config).unwrap();
        let len = core.layout().len();
        let arenas = [vec![0; len], vec![0; len]];
        Driver { core, arenas, next: 0, now_ms: 0, score: |at| (at as f32, 1.0), finished: Vec::new() }
    }

    pub fn add(&mut self, prompt: &[i32], blend: Option<BlendRequest<'_>>) -> i32 {
        self.core.add(&request(prompt, blend), self.now_ms).unwrap()
    }

    /// Writes a plan and leaves it running.
    pub fn step(&mut self) -> Plan {
        let idx = self.next;
        let [first, second] = &mut self.arenas;
        self.core.step([first, second], idx, self.now_ms).unwrap();
        self.core.audit();
        self.next = 1 - idx;
        let plan = self.read(idx);
        self.finished.extend(&plan.finished);
        plan
    }

    /// Completes the plan written last.
    pub fn complete(&mut self, status: i32) {
        self.complete_arena(1 - self.next, status);
    }

    /// Completes both plans in flight, the older one first.
    pub fn complete_both(&mut self) {
        self.complete_arena(self.next, 0);
        self.complete_arena(1 - self.next, 0);
    }

    fn complete_arena(&mut self, idx: usize, status: i32) {
        let layout = self.core.layout().clone();
        let view = PlanView::new(&layout, &self.arenas[idx]);
        let num_samples = view.header(Header::NumSamples) as usize;
        let mut scored = Vec::new();
        for [_, _, _, start, end, _, _] in view.rows::<7>(Region::Score) {
            for at in start..end {
                let (weight, value) = (self.score)(at);
                scored.extend([weight.to_bits() as i32, value.to_bits() as i32]);
            }
        }
        let arena = &mut self.arenas[idx];
        arena[layout.region(Region::Sampled).offset..][..num_samples].fill(90);
        arena[layout.region(Region::Scored).offset..][..scored.len()].copy_from_slice(&scored);
        arena[layout.region(Region::Status).offset] = status;
        arena[layout.region(Region::DonePlanId).offset] = arena[Header::PlanId as usize];
    }

    pub fn turn(&mut self) -> Plan {
        let plan = self.step();
        self.complete(0);
        plan
    }

    /// Turns until nothing is left; returns every plan that had rows.
    pub fn drain(&mut self) -> Vec<Plan> {
        let mut plans = Vec::new();
        for _ in 0..1000 {
            plans.push(self.turn());
            let stats = self.core.stats();
            if stats.num_requests == 0 && stats.num_waiting + stats.num_running == 0 {
                self.turn();
                plans.retain(|plan: &Plan| !plan.rows.is_empty());
                return plans;
            }
        }
        panic!("something hangs: {:?} {:?}", self.core.stats(), &plans[plans.len() - 3..]);
    }

    /// Makes a segment and lets it end.
    pub fn precompute(&mut self, ids: &[i32], pinned: bool) {
        let handle = self.core.add_segment(ids, 0, pinned, None, self.now_ms).unwrap();
        self.drain();
        assert!(self.finished.contains(&[handle, -1, 0]), "{:?}", self.finished);
    }

    fn read(&self, idx: usize) -> Plan {
        let view = PlanView::new(self.core.layout(), &self.arenas[idx]);
        let num_tokens = view.header(Header::NumTokens) as usize;
        let num_seqs = view.header(Header::NumSeqs) as usize;
        let positions = view.flat(Region::Positions, num_tokens);
        let starts = view.flat(Region::QueryStart, num_seqs + 1);
        let seq_rows = view.flat(Region::SeqRow, num_seqs);
        let of = |seq: usize| positions[starts[seq] as usize..starts[seq + 1] as usize].to_vec();
        let rows: BTreeMap<_, _> = (0..num_seqs).map(|seq| (seq_rows[seq], of(seq))).collect();
        assert_eq!(rows.len(), num_seqs, "a sequence is named once per plan");
        for seq in 0..num_seqs {
            assert!(of(seq).is_sorted_by(|a, b| a < b), "rows ascend");
        }
        Plan {
            rows,
            num_segment_rows: view.flat(Region::SegmentSlot, num_tokens).iter().filter(|&&slot| slot >= 0).count(),
            places: view.rows::<6>(Region::Place).map(|row| [row[0], row[1], row[2], row[3]]).collect(),
            scores: view
                .rows::<7>(Region::Score)
                .map(|[_, first, count, start, end, method, round]| {
                    assert_eq!(method, 7);
                    (positions[first as usize..(first + count) as usize].to_vec(), start, end, round)
                })
                .collect(),
            samples: view.header(Header::NumSamples) as usize,
            admitted: view.rows::<5>(Region::Admitted).collect(),
            finished: view.rows::<3>(Region::Finished).collect(),
            num_waiting: view.header(Header::NumWaiting),
        }
    }
}
