//! A device that cannot be fooled, and what every engine test shares.
//!
//! `hashes` is a transformer in hashes, `device` runs plans with it literally, `blending` says naively what a blended request
//! must read, `engine` drives a core, `reader` checks every promise. What a request samples is a hash of all KV that it reads.
#![allow(dead_code)] // Each test binary uses its own part.

pub mod blending;
pub mod device;
pub mod engine;
pub mod hashes;
pub mod moving;
mod overlap;
mod reader;
pub mod reuse;
pub mod seeds;
pub mod workload;

use kvlite_core::{BlendRequest, FinishReason, Round};

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
    /// The prompt is a segment to be made ahead of its use; true: pinned.
    pub precompute: Option<bool>,
}

/// Tenant that every other may read from.
pub const PUBLIC: u32 = (1 << 31) - 1;

/// What a request asks of its spans.
#[derive(Clone, Debug, PartialEq)]
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
            precompute: None,
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
            blend: self.blend.as_ref().map(|blend| BlendRequest {
                spans: &blend.spans,
                method_id: blend.method_id,
                ratio: blend.ratio,
                rounds: &blend.rounds,
                scores: blend.scores.as_deref(),
                decode_rows: blend.decode_rows,
            }),
        }
    }

    pub fn draw(&self, read: u64, choice: u32, vocab_size: u32) -> i32 {
        (mix(read ^ mix(self.seed ^ (u64::from(choice) << 40))) % u64::from(vocab_size)) as i32
    }

    /// Rows that may have to be computed for it, roughly.
    pub fn work(&self) -> u32 {
        let (passes, made) = self
            .blend
            .as_ref()
            .map_or((1, 0), |blend| (2 + blend.rounds.len() as u32, blend.spans.iter().map(|&(_, len)| 4 + len).sum()));
        self.n * (passes * self.prompt.len() as u32 + self.max_tokens) + 3 * made
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
