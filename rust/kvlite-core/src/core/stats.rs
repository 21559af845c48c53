//! Counters of a core, for metrics and tests. Plain numbers; read by `Core::stats`, printed by nobody here.

use super::Core;

/// What a core has done and holds. Totals only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CoreStats {
    /// Sequences that hold a row.
    pub num_running: usize,
    /// Requests and preempted choices that wait.
    pub num_waiting: usize,
    /// Requests that live.
    pub num_requests: usize,
    /// Blocks that hold nothing.
    pub free_blocks: usize,
    /// Blocks that hold reusable KV and nobody uses.
    pub cached_blocks: usize,
    /// Blocks in use.
    pub owned_blocks: usize,
    /// Blocks being copied into.
    pub in_transfer_blocks: usize,
    /// Blocks of the host tier that hold KV.
    pub host_blocks: usize,
    /// Segments in every state.
    pub num_segments: usize,
    /// Blocks that segments hold.
    pub segment_blocks: usize,
    /// Blocks that pinned segments hold or will hold.
    pub pinned_blocks: usize,
    /// Recipes of blended KV that may still be found.
    pub num_recipes: usize,
    /// Plans written.
    pub steps_total: u64,
    /// Requests accepted.
    pub requests_total: u64,
    /// Sequences put back into the queue.
    pub preemptions_total: u64,
    /// Prompt tokens of first admissions.
    pub prompt_tokens_total: u64,
    /// Of those, tokens served from the cache.
    pub prefix_hit_tokens_total: u64,
    /// Tokens copied back from the host tier, for prompts and after preemptions.
    pub host_hit_tokens_total: u64,
    /// Blocks copied to the host tier.
    pub demoted_blocks_total: u64,
    /// Full blocks copied back.
    pub promoted_blocks_total: u64,
    /// Of those, tokens placed from segments; kept or computed again.
    pub segment_hit_tokens_total: u64,
    /// Of the placed ones, those that were kept.
    pub blended_tokens_total: u64,
    /// Of the placed ones, those computed again.
    pub recomputed_tokens_total: u64,
    /// Segments computed.
    pub segments_made_total: u64,
    /// Tokens planned in chunks (prompts, and recomputation after preemption).
    pub prefill_tokens_total: u64,
    /// Keys of shared prefixes that plans read for several sequences at once, counted for each but the first.
    pub shared_keys_total: u64,
    /// Output tokens committed.
    pub generated_tokens_total: u64,
    /// Of those, tokens that the stream's owner cut off.
    pub discarded_tokens_total: u64,
    /// Plans that came back as failed.
    pub failed_plans_total: u64,
    /// Requests that left for another engine.
    pub migrations_out_total: u64,
    /// Requests that came from another engine.
    pub migrations_in_total: u64,
    /// Reservations for requests of other engines that were cancelled or expired.
    pub imports_cancelled_total: u64,
    /// Ends of choices by `FinishReason`.
    pub finished_total: [u64; 5],
}

impl Core {
    /// Counters now; O(1).
    pub fn stats(&self) -> CoreStats {
        let (counts, host) = (self.cache.counts(), self.cache.host_counts());
        CoreStats {
            num_running: self.running.len(),
            num_waiting: self.queue.len() + self.num_outside + self.num_shelved,
            num_requests: self.by_handle.len(),
            free_blocks: counts.free,
            cached_blocks: counts.cached,
            owned_blocks: counts.owned,
            in_transfer_blocks: counts.in_transfer,
            host_blocks: host.cached + host.owned + host.in_transfer,
            num_segments: self.cache.num_segments(),
            segment_blocks: self.cache.segment_blocks(),
            pinned_blocks: self.cache.pinned_blocks(),
            num_recipes: self.recipes.len(),
            ..self.stats
        }
    }
}
