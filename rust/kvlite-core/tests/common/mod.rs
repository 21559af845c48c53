//! A device that cannot be fooled, and what every engine test shares.
//!
//! The "KV" of a slot is a hash of (tenant, token, previous KV, position); the next token is a hash of all KV read
//! through the device's own block table. A lost, stale, foreign or badly shared block therefore changes tokens, and
//! `Oracle` says which tokens are right without any engine.
#![allow(dead_code)] // Each test binary uses its own part.

pub mod engine;
mod overlap;

use std::collections::{BTreeMap, BTreeSet};

use kvlite_core::plan::{Header, PROMPT_LOGPROB, PlanView, Region, SAMPLE};
use kvlite_core::{CoreConfig, FinishReason};

/// splitmix64: one u64 of state, good enough to pick test cases.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Uniform in `low..=high`.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True with `percent` / 100.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn kv_of(tenant: u32, token: i32, previous: u64, position: u32) -> u64 {
    mix(previous ^ mix(u64::from(token as u32) << 32 | u64::from(position)) ^ mix(u64::from(tenant) + 77))
}

/// What the fake sampler needs to know about a request.
#[derive(Clone, Debug)]
pub struct Asked {
    pub prompt: Vec<i32>,
    pub n: u32,
    pub max_tokens: u32,
    pub min_tokens: u32,
    pub stop_token_ids: Vec<i32>,
    pub tenant: u32,
    pub priority: i32,
    pub deadline_ms: Option<i64>,
    pub use_cache: bool,
    pub prompt_logprobs: bool,
    /// Makes two requests with one prompt go different ways.
    pub seed: u64,
}

impl Asked {
    pub fn new(prompt: &[i32], max_tokens: u32) -> Asked {
        Asked {
            prompt: prompt.to_vec(),
            n: 1,
            max_tokens,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            tenant: 0,
            priority: 0,
            deadline_ms: None,
            use_cache: true,
            prompt_logprobs: false,
            seed: 0,
        }
    }

    pub fn request(&self) -> kvlite_core::Request<'_> {
        kvlite_core::Request {
            prompt: &self.prompt,
            n: self.n,
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            stop_token_ids: &self.stop_token_ids,
            priority: self.priority,
            deadline_ms: self.deadline_ms,
            tenant: self.tenant,
            use_cache: self.use_cache,
            prompt_logprobs: self.prompt_logprobs,
        }
    }

    fn draw(&self, read: u64, choice: u32, vocab_size: u32) -> i32 {
        (mix(read ^ mix(self.seed ^ (u64::from(choice) << 40))) % u64::from(vocab_size)) as i32
    }

    /// The oracle: the complete output of one choice and why it ends, computed token by token without any engine.
    pub fn answer(&self, choice: u32, vocab_size: u32) -> (Vec<i32>, FinishReason) {
        let (mut kv, mut read) = (0, 0);
        let mut see = |token: i32, position: usize| {
            kv = kv_of(self.tenant, token, kv, position as u32);
            read = mix(read ^ kv);
            read
        };
        let mut seen = 0;
        for (position, &token) in self.prompt.iter().enumerate() {
            seen = see(token, position);
        }
        let mut output = Vec::new();
        loop {
            let token = self.draw(seen, choice, vocab_size);
            output.push(token);
            if output.len() as u32 >= self.min_tokens && self.stop_token_ids.contains(&token) {
                return (output, FinishReason::Stop);
            }
            if output.len() as u32 == self.max_tokens {
                return (output, FinishReason::Length);
            }
            seen = see(token, self.prompt.len() + output.len() - 1);
        }
    }
}

/// One sampled row, as the device saw it.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    pub handle: i32,
    pub choice: u32,
    pub kind: i32,
    pub position: i32,
    pub token: i32,
}

/// Slots, block tables and last tokens, all changed by plans alone.
pub struct Device {
    block_size: usize,
    vocab_size: u32,
    kv: Vec<u64>,
    tables: Vec<Vec<u32>>,
    last_token: Vec<i32>,
    rows: Vec<(i32, u32)>,
    /// Requests of failed plans: a plan made before that was known still names them, over tables that were never set.
    doomed: BTreeSet<i32>,
}

impl Device {
    pub fn new(config: &CoreConfig) -> Device {
        let num_rows = config.max_num_seqs as usize;
        Device {
            block_size: config.block_size as usize,
            vocab_size: config.vocab_size,
            kv: vec![u64::MAX; (config.num_blocks * config.block_size) as usize],
            tables: vec![Vec::new(); num_rows],
            last_token: vec![-1; num_rows],
            rows: vec![(-1, 0); num_rows],
            doomed: BTreeSet::new(),
        }
    }

    /// Learns who sits in which row; done when the plan is read, which is before it runs.
    pub fn meet(&mut self, plan: &PlanView<'_>) {
        for [handle, choice, row, _, _] in plan.rows::<5>(Region::Admitted) {
            self.rows[row as usize] = (handle, choice as u32);
        }
    }

    /// (handle, choice) of every row that a plan names, sampled rows of forks included.
    pub fn named(&self, plan: &PlanView<'_>) -> Vec<(i32, u32)> {
        let seqs = plan.flat(Region::SeqRow, plan.header(Header::NumSeqs) as usize).iter().copied();
        let samples = plan.rows::<3>(Region::Sample).map(|sample| sample[1]);
        let touched = plan.rows::<3>(Region::BlockUpdate).map(|update| update[0]);
        seqs.chain(samples).chain(touched).map(|row| self.rows[row as usize]).collect()
    }

    /// A plan that broke: nothing of it happened, or (`garbage`) everything it was to write is rubbish.
    pub fn fail(&mut self, plan: &PlanView<'_>, garbage: bool) {
        self.doomed.extend(self.named(plan).into_iter().map(|(handle, _)| handle));
        if garbage {
            for &slot in plan.flat(Region::SlotMapping, plan.header(Header::NumTokens) as usize) {
                self.kv[slot as usize] = 0xdead;
            }
            for [_, _, target] in plan.rows::<3>(Region::BlockCopy) {
                self.kv[target as usize * self.block_size..][..self.block_size].fill(0xdead);
            }
        }
    }

    /// Runs a plan: table changes, copies, rows in order, samples. Returns what each sample entry drew.
    pub fn run(&mut self, plan: &PlanView<'_>, asked: &BTreeMap<i32, Asked>) -> Vec<Drawn> {
        plan.expand(&mut self.tables);
        for [direction, source, target] in plan.rows::<3>(Region::BlockCopy) {
            assert_eq!(direction, 0, "copies stay on the device");
            let source = source as usize * self.block_size;
            self.kv.copy_within(source..source + self.block_size, target as usize * self.block_size);
        }
        let num_tokens = plan.header(Header::NumTokens) as usize;
        let num_seqs = plan.header(Header::NumSeqs) as usize;
        let positions = plan.flat(Region::Positions, num_tokens);
        let starts = plan.flat(Region::QueryStart, num_seqs + 1);
        assert_eq!(starts[num_seqs] as usize, num_tokens, "every row belongs to a sequence");
        assert_eq!(plan.flat(Region::LastKey, num_tokens), positions, "ordinary rows see up to their own position");
        assert!(plan.flat(Region::SegmentSlot, num_tokens).iter().all(|&slot| slot == -1));
        let mut written: Vec<i32> = plan.flat(Region::SlotMapping, num_tokens).to_vec();
        let mut readers = vec![usize::MAX; num_tokens];
        for seq in 0..num_seqs {
            let rows = starts[seq] as usize..starts[seq + 1] as usize;
            assert!(!rows.is_empty(), "a sequence in a plan has rows");
            readers[rows.clone()].fill(seq);
            let seq_row = plan.flat(Region::SeqRow, num_seqs)[seq] as usize;
            assert_eq!(plan.flat(Region::ContextLen, num_seqs)[seq], positions[rows.end - 1] + 1);
            for row in rows {
                self.compute_row(plan, seq_row, row, asked);
            }
        }
        written.sort_unstable();
        assert!(written.windows(2).all(|pair| pair[0] != pair[1]), "a slot has one writer");
        plan.rows::<3>(Region::Sample)
            .map(|[row, seq_row, kind]| {
                let position = positions[row as usize];
                let reader = plan.flat(Region::SeqRow, num_seqs)[readers[row as usize]] as usize;
                let read = (0..=position).fold(0, |read, at| mix(read ^ self.kv[self.slot(reader, at)]));
                let (handle, choice) = self.rows[seq_row as usize];
                let token = asked[&handle].draw(read, choice, self.vocab_size);
                if kind == SAMPLE {
                    self.last_token[seq_row as usize] = token;
                } else {
                    assert_eq!(kind, PROMPT_LOGPROB);
                }
                Drawn { handle, choice, kind, position, token }
            })
            .collect()
    }

    fn compute_row(&mut self, plan: &PlanView<'_>, seq_row: usize, row: usize, asked: &BTreeMap<i32, Asked>) {
        let at = |region: Region| plan.flat(region, row + 1)[row];
        let position = at(Region::Positions);
        let token = match at(Region::TokenIds) {
            -1 => self.last_token[seq_row],
            id => id,
        };
        let previous = if position == 0 { 0 } else { self.kv[self.slot(seq_row, position - 1)] };
        let slot = at(Region::SlotMapping) as usize;
        let is_right = slot == self.slot(seq_row, position) || self.doomed.contains(&self.rows[seq_row].0);
        assert!(is_right, "slot {slot} of row {seq_row} agrees with the device's block table");
        let tenant = asked[&self.rows[seq_row].0].tenant;
        self.kv[slot] = kv_of(tenant, token, previous, position as u32);
    }

    fn slot(&self, seq_row: usize, position: i32) -> usize {
        let position = position as usize;
        let Some(&block) = self.tables[seq_row].get(position / self.block_size).filter(|&&block| block != u32::MAX)
        else {
            assert!(self.doomed.contains(&self.rows[seq_row].0), "row {seq_row} has no block for position {position}");
            return 0;
        };
        block as usize * self.block_size + position % self.block_size
    }
}
