//! What the cache promises, one sentence per test. Random operations are in `model.rs`.

mod eviction;
mod labels;
mod matching;
mod misuse;
mod pool;
mod segments;

use kvlite_core::cache::{BlockCounts, BlockState, Cache, Inserted, MAX_PARTIAL_CANDIDATES, PartialHit};
use kvlite_core::{BlockId, CoreConfig, EvictionKind, Label, Lookup, PolicyKind, TenantId, Token};

const BLOCK_SIZE: usize = 4;

fn config(num_blocks: u32) -> CoreConfig {
    CoreConfig {
        num_blocks,
        block_size: BLOCK_SIZE as u32,
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_model_len: 64,
        max_num_waiting: 8,
        vocab_size: 1000,
        enable_prefix_caching: true,
        policy: PolicyKind::Fcfs,
        max_passes: 64,
        eviction: EvictionKind::ReuseWeighted,
        attention_cost_tokens: 1,
        attention_split_tokens: 256,
        group_cost_tokens: 0,
        host_blocks: 0,
        swap_cost_tokens: 0,
        reserve_tokens: 0,
        watermark_ratio: 1.0,
        segment_cache_ratio: 0.5,
        model_digest: 0,
        canonical_prefix: vec![],
        max_segments: 4,
        hash_seed: 1,
    }
}

fn tenant(tenant: u32) -> Label {
    Label::exact(TenantId(tenant))
}

fn alloc(cache: &mut Cache, count: usize, after: Option<BlockId>) -> Vec<BlockId> {
    let mut out = Vec::new();
    assert!(cache.alloc(count, after, &mut out), "the pool has {count} blocks to give");
    out
}

/// Computes `tokens` from nothing and publishes its full blocks; the last of the blocks returned is pinned.
fn publish(cache: &mut Cache, label: Label, tokens: &[Token]) -> Vec<BlockId> {
    let blocks = alloc(cache, tokens.len() / BLOCK_SIZE, None);
    let mut parent = None;
    for (tokens, &block) in tokens.chunks_exact(BLOCK_SIZE).zip(&blocks) {
        assert_eq!(cache.insert(label, parent, tokens, block), Inserted::New);
        if let Some(parent) = parent.replace(block) {
            cache.unpin(parent);
        }
    }
    cache.audit();
    blocks
}

/// Publishes and lets go.
fn remember(cache: &mut Cache, label: Label, tokens: &[Token]) -> Vec<BlockId> {
    let blocks = publish(cache, label, tokens);
    cache.unpin(*blocks.last().expect("at least one block"));
    cache.audit();
    blocks
}

fn lookup(cache: &Cache, label: Label, tokens: &[Token]) -> (Vec<BlockId>, Option<PartialHit>) {
    let mut hits = Vec::new();
    let partial = cache.match_prefix(Lookup::exact(label), tokens, usize::MAX, &mut hits);
    (hits, partial)
}

fn indices(blocks: &[BlockId]) -> Vec<u32> {
    blocks.iter().map(|block| block.index).collect()
}

/// `num_blocks` blocks that begin with `first` and are found under no other `first`.
fn text(first: Token, num_blocks: usize) -> Vec<Token> {
    (0..num_blocks * BLOCK_SIZE).map(|at| first * 100 + at as Token).collect()
}
