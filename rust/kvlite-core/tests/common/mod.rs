//! A device that cannot be fooled, and what every engine test shares.
//!
//! `hashes` is a transformer in hashes, `device` runs plans with it literally, `blending` says naively what a blended request
//! must read, `engine` drives a core and checks every promise. What a request samples is a hash of all KV that it reads.
#![allow(dead_code)] // Each test binary uses its own part.

pub mod blending;
pub mod device;
pub mod engine;
pub mod hashes;
mod overlap;

use kvlite_core::FinishReason;

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
    pub blend: Option<Blend>,
}

/// Tenant that every other may read from.
pub const PUBLIC: u32 = (1 << 31) - 1;

/// Rows that a scoring round runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    New,
    All,
}

#[derive(Clone, Copy, Debug)]
pub struct Round {
    pub scope: Scope,
    pub ratio: f64,
}

/// What a request asks of its spans.
#[derive(Clone, Debug)]
pub struct Blend {
    /// (start, len)
    pub spans: Vec<(u32, u32)>,
    pub method_id: u32,
    pub ratio: f64,
    pub rounds: Vec<Round>,
    pub scores: Option<Vec<f32>>,
    pub decode_rows: u32,
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
            blend: None,
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

    pub fn draw(&self, read: u64, choice: u32, vocab_size: u32) -> i32 {
        (mix(read ^ mix(self.seed ^ (u64::from(choice) << 40))) % u64::from(vocab_size)) as i32
    }

    /// Why a choice ends by itself with this output, if it does.
    pub fn natural_end(&self, output: &[i32]) -> Option<FinishReason> {
        let last = output.last()?;
        if output.len() as u32 >= self.min_tokens && self.stop_token_ids.contains(last) {
            return Some(FinishReason::Stop);
        }
        (output.len() as u32 == self.max_tokens).then_some(FinishReason::Length)
    }
}
