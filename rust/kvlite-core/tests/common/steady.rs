//! Decode in steady state: a core whose sequences all decode, with a device that answers at once.
#![allow(dead_code)] // The test and the bench each use their own part.

use kvlite_core::plan::{Header, PlanView, Region};
use kvlite_core::{Core, CoreConfig, EvictionKind, PolicyKind, Request};

const BLOCK_SIZE: u32 = 16;
const VOCAB_SIZE: u32 = 150_000;

/// `num_running` different sequences, their block boundaries spread evenly over the steps.
pub struct Steady {
    core: Core,
    arenas: [Vec<i32>; 2],
    next: usize,
    num_running: usize,
    steps_left: u32,
    sampled: Vec<i32>,
}

impl Steady {
    pub fn new(num_running: u32, num_steps: u32) -> Steady {
        Steady::queued(num_running, num_steps, PolicyKind::Fcfs, 0)
    }

    /// The same, with `num_waiting` requests that no row is free for.
    pub fn queued(num_running: u32, num_steps: u32, policy: PolicyKind, num_waiting: u32) -> Steady {
        let max_model_len = 96 + num_steps;
        let config = CoreConfig {
            num_blocks: num_running * max_model_len.div_ceil(BLOCK_SIZE),
            block_size: BLOCK_SIZE,
            max_num_seqs: num_running,
            max_num_batched_tokens: num_running.max(4096),
            max_model_len,
            max_num_waiting: num_running + num_waiting,
            vocab_size: VOCAB_SIZE,
            enable_prefix_caching: true,
            policy,
            max_passes: 64,
            eviction: EvictionKind::ReuseWeighted,
            attention_cost_tokens: 4096,
            attention_split_tokens: 256,
            group_cost_tokens: 0,
            host_blocks: 0,
            swap_cost_tokens: 0,
            reserve_tokens: 64,
            watermark_ratio: 1.0,
            segment_cache_ratio: 0.5,
            model_digest: 0,
            canonical_prefix: vec![],
            max_segments: 4,
            hash_seed: 1,
        };
        let core = Core::new(config).expect("a valid configuration");
        let len = core.layout().len();
        let num_running = num_running as usize;
        let sampled = vec![0; num_running];
        let mut steady =
            Steady { core, arenas: [vec![0; len], vec![0; len]], next: 0, num_running, steps_left: 0, sampled };
        for seq in 0..num_running {
            let prompt: Vec<i32> = (0..64 + seq % 16).map(|at| ((seq * 7919 + at * 31) % 149_999) as i32).collect();
            steady.add(&prompt, max_model_len);
        }
        while steady.num_decoding() < num_running {
            steady.step();
        }
        for seq in 0..num_waiting as usize {
            let prompt: Vec<i32> = (0..64 + seq % 16).map(|at| ((seq * 31 + at * 17) % 149_999) as i32).collect();
            steady.add(&prompt, max_model_len);
        }
        // What is left of the first blocks, and every arena and table touched once.
        for _ in 0..16 {
            steady.step();
        }
        steady.steps_left = num_steps - 32;
        steady
    }

    fn add(&mut self, prompt: &[i32], max_model_len: u32) {
        let request = Request {
            prompt,
            n: 1,
            max_tokens: max_model_len - prompt.len() as u32,
            min_tokens: 0,
            stop_token_ids: &[VOCAB_SIZE as i32],
            priority: 0,
            deadline_ms: Some(i64::MAX),
            tenant: 0,
            use_cache: true,
            prompt_logprobs: false,
            blend: None,
        };
        self.core.add(&request, 0).expect("the pool is large enough");
    }

    /// Sequences that the newest plan decodes; fewer while some are in prefill.
    pub fn num_decoding(&self) -> usize {
        let view = PlanView::new(self.core.layout(), &self.arenas[1 - self.next]);
        let counts = [view.header(Header::NumSeqs), view.header(Header::NumTokens)];
        if counts[0] == counts[1] { counts[0] as usize } else { 0 }
    }

    /// Steps that this fixture still has before sequences reach their ends.
    pub fn steps_left(&self) -> u32 {
        self.steps_left
    }

    /// One step, answered at once: every sequence samples an id that depends on its row and the step.
    pub fn step(&mut self) {
        let idx = self.next;
        let [first, second] = &mut self.arenas;
        self.core.step([first, second], idx, 0).expect("the arena is free");
        self.next = 1 - idx;
        self.steps_left = self.steps_left.saturating_sub(1);
        let layout = self.core.layout();
        let arena = &mut self.arenas[idx];
        let plan_id = arena[Header::PlanId as usize];
        let num_samples = arena[Header::NumSamples as usize] as usize;
        for (row, id) in self.sampled.iter_mut().enumerate() {
            *id = (row as i32 * 131 + plan_id) % 149_999;
        }
        arena[layout.region(Region::Sampled).offset..][..num_samples].copy_from_slice(&self.sampled[..num_samples]);
        arena[layout.region(Region::DonePlanId).offset] = plan_id;
    }

    /// Panics unless every sequence still decodes in every step.
    pub fn check(&self) {
        assert_eq!(self.num_decoding(), self.num_running, "every sequence decodes in every step");
        self.core.audit();
    }
}
