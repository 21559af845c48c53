//! `CoreConfig`: every limit of the core, with its unit, validated once.
//!
//! Owns the numbers that size arenas, tables and queues; after `validate` every other module trusts them.
//! Knows neither models nor bytes: Python turns a memory budget into `num_blocks`.

use crate::error::CoreError;
use crate::ids::Token;

/// Order in which waiting requests are admitted; see `sched::policy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// Arrival order.
    Fcfs,
    /// Levels of priority, aged.
    Priority,
    /// Largest reused share of the prompt first, within a tenant.
    HitRate,
    /// Least work first, within a tenant.
    CacheAware,
    /// Least served tenant first.
    Fair,
    /// Who begins alike together, much output for little prompt first.
    PrefixGrouped,
}

/// Order in which cached blocks are evicted that no waiting request wants; see `cache::evict`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvictionKind {
    /// Least recently released first.
    Lru,
    /// Recency, deeper blocks sooner.
    DepthDiscounted,
    /// Recency, blocks that cost more to compute again later.
    CostAware,
    /// Recency, blocks that were used more often later; uses outlive eviction.
    ReuseWeighted,
}

impl EvictionKind {
    /// Every order and its name.
    pub const ALL: [(&str, EvictionKind); 4] = [
        ("reuse-weighted", EvictionKind::ReuseWeighted),
        ("lru", EvictionKind::Lru),
        ("depth-discounted", EvictionKind::DepthDiscounted),
        ("cost-aware", EvictionKind::CostAware),
    ];
}

/// Limits of one core. Public limits keep the spelling that vLLM's users know.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Blocks in the pool.
    pub num_blocks: u32,
    /// Blocks in the host tier, where cached blocks go that the pool has no room for; 0: there is none.
    pub host_blocks: u32,
    /// Tokens whose prefill takes as long as copying a block to the host tier and back; what costs less to compute again is
    /// dropped.
    pub swap_cost_tokens: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// Sequences that run at once; also the number of rows in the device tables (one more is reserved for padding).
    pub max_num_seqs: u32,
    /// Tokens per plan.
    pub max_num_batched_tokens: u32,
    /// Longest prompt plus output of one sequence, tokens.
    pub max_model_len: u32,
    /// Requests that wait at once; one more is refused.
    pub max_num_waiting: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Whether completed blocks stay in the tree for later requests.
    pub enable_prefix_caching: bool,
    /// Admission order.
    pub policy: PolicyKind,
    /// Later requests of a tenant that may be admitted before one that waits, where the policy compares requests.
    pub max_passes: u32,
    /// Order of eviction.
    pub eviction: EvictionKind,
    /// Context length at which attention costs a token as much as the linear layers do; prices prefill chunks.
    pub attention_cost_tokens: u32,
    /// Tokens of one split of attention: a group shares whole splits, so a row's partial results are those it has alone.
    pub attention_split_tokens: u32,
    /// Tokens whose KV a group of sequences must save reading to pay for itself; `i32::MAX`: no groups.
    pub group_cost_tokens: u32,
    /// Output tokens for which admission sets room aside per running sequence.
    pub reserve_tokens: u32,
    /// Share of the pool that segments may fill, 0 to 1; 0 keeps none.
    pub segment_cache_ratio: f64,
    /// Keys the digest of segments: model, dtype and RoPE in one number.
    pub model_digest: u64,
    /// Tokens behind which each segment is computed; not part of it.
    pub canonical_prefix: Vec<Token>,
    /// Spans of one request.
    pub max_segments: u32,
    /// Share of the pool that admission may promise (theta), 0 < ratio <= 1.
    pub watermark_ratio: f64,
    /// Seed of the tree's hash table. No decision depends on it; it only makes chosen collisions hard.
    pub hash_seed: u64,
}

impl CoreConfig {
    /// Blocks that one sequence of `max_model_len` tokens needs.
    pub fn max_blocks_per_seq(&self) -> u32 {
        self.max_model_len.div_ceil(self.block_size)
    }

    /// Checks every limit; the error names the field, its value and the allowed range.
    pub fn validate(&self) -> Result<(), CoreError> {
        let range = |field: &'static str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) { Ok(()) } else { Err(CoreError::Config { field, value, low, high }) }
        };
        range("block_size", self.block_size.into(), 1, 1024)?;
        range("num_blocks", self.num_blocks.into(), 1, (i32::MAX as u64) / u64::from(self.block_size))?;
        range("host_blocks", self.host_blocks.into(), 0, (i32::MAX as u64) / u64::from(self.block_size))?;
        range("swap_cost_tokens", self.swap_cost_tokens.into(), 0, i32::MAX as u64)?;
        range("max_num_seqs", self.max_num_seqs.into(), 1, 1 << 16)?;
        range("max_num_batched_tokens", self.max_num_batched_tokens.into(), self.max_num_seqs.into(), 1 << 20)?;
        range("max_model_len", self.max_model_len.into(), 2, 1 << 24)?;
        range("max_num_waiting", self.max_num_waiting.into(), 1, 1 << 20)?;
        range("vocab_size", self.vocab_size.into(), 1, i32::MAX as u64)?;
        range("max_passes", self.max_passes.into(), 0, 1 << 20)?;
        range("attention_cost_tokens", self.attention_cost_tokens.into(), 1, i32::MAX as u64)?;
        range("attention_split_tokens", self.attention_split_tokens.into(), 1, 1 << 16)?;
        range("group_cost_tokens", self.group_cost_tokens.into(), 0, i32::MAX as u64)?;
        range("reserve_tokens", self.reserve_tokens.into(), 0, i32::MAX as u64)?;
        if !(self.watermark_ratio > 0.0 && self.watermark_ratio <= 1.0) {
            return Err(CoreError::Watermark { value: self.watermark_ratio });
        }
        if !(0.0..=1.0).contains(&self.segment_cache_ratio) {
            return Err(CoreError::SegmentCache { value: self.segment_cache_ratio });
        }
        range("max_segments", self.max_segments.into(), 1, 1 << 12)?;
        let prefix_len = self.canonical_prefix.len() as u64;
        range("canonical_prefix_len", prefix_len, 0, u64::from(self.max_model_len) - 2)?;
        for (index, &token) in self.canonical_prefix.iter().enumerate() {
            if u32::try_from(token).map_or(true, |id| id >= self.vocab_size) {
                return Err(CoreError::CanonicalPrefix { index, token, vocab_size: self.vocab_size });
            }
        }
        Ok(())
    }
}

/// The smallest core, for tests to start from.
#[cfg(test)]
pub(crate) fn small() -> CoreConfig {
    CoreConfig {
        num_blocks: 4,
        host_blocks: 0,
        swap_cost_tokens: 0,
        block_size: 4,
        max_num_seqs: 1,
        max_num_batched_tokens: 4,
        max_model_len: 8,
        max_num_waiting: 8,
        vocab_size: 9,
        enable_prefix_caching: true,
        policy: PolicyKind::Fcfs,
        eviction: EvictionKind::ReuseWeighted,
        max_passes: 64,
        attention_cost_tokens: 1,
        attention_split_tokens: 4,
        group_cost_tokens: 0,
        reserve_tokens: 0,
        segment_cache_ratio: 0.5,
        model_digest: 0,
        canonical_prefix: vec![],
        max_segments: 1,
        watermark_ratio: 1.0,
        hash_seed: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_segments_out_of_range_are_named_with_their_value_and_range() {
        let refused = |config: CoreConfig| config.validate().expect_err("out of range").to_string();
        for value in [-0.1, 1.1, f64::NAN] {
            let text = refused(CoreConfig { segment_cache_ratio: value, ..small() });
            assert_eq!(text, format!("segment_cache_ratio is {value}, allowed is a share from 0 to 1"));
        }
        assert_eq!(refused(CoreConfig { max_segments: 0, ..small() }), "max_segments is 0, allowed are 1 to 4096");
        let text = refused(CoreConfig { canonical_prefix: vec![1, 9], ..small() });
        assert_eq!(text, "canonical_prefix token 1 is 9, allowed are 0 to 9 (exclusive)");
        let text = refused(CoreConfig { canonical_prefix: vec![1; 7], ..small() });
        assert_eq!(text, "canonical_prefix_len is 7, allowed are 0 to 6");
        small().validate().expect("all in range");
    }
}
