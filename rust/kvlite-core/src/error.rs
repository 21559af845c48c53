//! `CoreError`: what a caller can cause, one sentence per variant. Faults of our own are asserts, not variants.
//!
//! The binding maps it to Python exceptions in one match (`kvlite-py/src/errors.rs`).

use thiserror::Error;

/// A request or a setting that the core refuses; nothing has changed when one is returned.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum CoreError {
    /// A limit out of range.
    #[error("{field} is {value}, allowed are {low} to {high}")]
    Config {
        /// The setting's name.
        field: &'static str,
        /// What was given.
        value: u64,
        /// Smallest allowed value.
        low: u64,
        /// Largest allowed value.
        high: u64,
    },
    /// The admission watermark is no share.
    #[error("watermark_ratio is {value}, allowed is a share above 0 and at most 1")]
    Watermark {
        /// What was given.
        value: f64,
    },
    /// The segments' part of the pool is no share.
    #[error("segment_cache_ratio is {value}, allowed is a share from 0 to 1")]
    SegmentCache {
        /// What was given.
        value: f64,
    },
    /// The canonical prefix names a token that the model does not have.
    #[error("canonical_prefix token {index} is {token}, allowed are 0 to {vocab_size} (exclusive)")]
    CanonicalPrefix {
        /// Position in the prefix.
        index: usize,
        /// What was given.
        token: i32,
        /// Ids are below this.
        vocab_size: u32,
    },
    /// Nothing to compute.
    #[error("the prompt is empty, at least one token is needed")]
    EmptyPrompt,
    /// A token id that the model does not have.
    #[error("prompt token {index} is {token}, allowed are 0 to {vocab_size} (exclusive)")]
    OutsideVocabulary {
        /// Position in the prompt.
        index: usize,
        /// What was given.
        token: i32,
        /// Ids are below this.
        vocab_size: u32,
    },
    /// No room for even one output token.
    #[error("the prompt has {prompt_len} tokens, at most {} fit below max_model_len {max_model_len}", max_model_len - 1)]
    PromptTooLong {
        /// Prompt tokens.
        prompt_len: usize,
        /// The limit of prompt plus output.
        max_model_len: u32,
    },
    /// Prompt plus output passes the model's length.
    #[error("prompt ({prompt_len}) plus max_tokens ({max_tokens}) passes max_model_len {max_model_len}")]
    TooLong {
        /// Prompt tokens.
        prompt_len: usize,
        /// Output tokens asked for.
        max_tokens: u32,
        /// The limit of their sum.
        max_model_len: u32,
    },
    /// The request could not run even alone.
    #[error("request needs {needed} blocks, the pool has {total}: raise kv_cache_bytes or lower max_tokens")]
    NeverFits {
        /// Blocks of one choice at its declared end.
        needed: u32,
        /// Blocks of the pool.
        total: u32,
    },
    /// A number of choices that cannot run.
    #[error("n is {n}, allowed are 1 to {max} (max_num_seqs)")]
    Choices {
        /// What was given.
        n: u32,
        /// Sequences that run at once.
        max: u32,
    },
    /// No output wanted.
    #[error("max_tokens is 0, at least 1 is needed")]
    NoOutput,
    /// More output demanded than allowed.
    #[error("min_tokens is {min_tokens}, at most max_tokens ({max_tokens}) is allowed")]
    MinTokens {
        /// What was given.
        min_tokens: u32,
        /// The upper end.
        max_tokens: u32,
    },
    /// Too many stop ids.
    #[error("{count} stop token ids were given, at most {max} are allowed")]
    StopIds {
        /// What was given.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A tenant id out of range.
    #[error("tenant is {tenant}, allowed are ids below 2^31")]
    Tenant {
        /// What was given.
        tenant: u32,
    },
    /// A priority that the order of admission does not know.
    #[error("priority is {priority}, allowed is 0 unless the policy is priority")]
    Priority {
        /// What was given.
        priority: i32,
    },
    /// More spans than a request may name.
    #[error("{count} spans were given, at most {max} are allowed (max_segments)")]
    TooManySpans {
        /// What was given.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A span that is empty, out of order, overlapping or outside the prompt.
    #[error("span {index} is {start} + {len} tokens, allowed are at least 1 token within {low} to {high}")]
    Span {
        /// Which span.
        index: usize,
        /// Its first position.
        start: u32,
        /// Its tokens.
        len: u32,
        /// The end of the span before it.
        low: u32,
        /// Prompt tokens.
        high: usize,
    },
    /// A ratio that is no share.
    #[error("{field} is {value}, allowed is a share from 0 to 1")]
    Share {
        /// Which number.
        field: &'static str,
        /// What was given.
        value: f64,
    },
    /// Too many scoring rounds.
    #[error("{count} rounds were given, at most {max} are allowed")]
    Rounds {
        /// What was given.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A method that a plan cannot name.
    #[error("method_id is {method_id}, allowed are ids below 2^31")]
    Method {
        /// What was given.
        method_id: u32,
    },
    /// Scores that do not match the prompt.
    #[error("scores has {len} numbers, the prompt has {prompt_len} tokens")]
    Scores {
        /// What was given.
        len: usize,
        /// Prompt tokens.
        prompt_len: usize,
    },
    /// Too many rows repaired with each output token.
    #[error("decode_rows is {rows}, allowed are 0 to {max}")]
    DecodeRows {
        /// What was given.
        rows: u32,
        /// The limit.
        max: u32,
    },
    /// Log-probabilities of rows that are not computed.
    #[error("prompt_logprobs needs every prompt row computed, a blend reuses some: ask for one of them")]
    BlendedLogprobs,
    /// A segment that the model or the store cannot hold.
    #[error(
        "the segment has {len} tokens, at most {max} fit behind the canonical prefix and into the segments' blocks"
    )]
    SegmentTooLong {
        /// Its tokens.
        len: usize,
        /// The limit.
        max: u32,
    },
    /// Capacity, not blame: pinned segments hold what the request would need.
    #[error(
        "{needed} blocks are needed, there are {total} and pinned segments hold {pinned}: unpin some or retry later"
    )]
    Pinned {
        /// Blocks of the largest request that has to fit.
        needed: u32,
        /// Blocks of the pool, or those that segments may fill.
        total: u32,
        /// Blocks of pinned segments.
        pinned: u32,
    },
    /// Capacity, not blame: the same request may be accepted later.
    #[error("{waiting} requests are waiting, at most {max} may: retry later")]
    QueueFull {
        /// Requests waiting now.
        waiting: usize,
        /// The limit.
        max: usize,
    },
    /// Outputs that a request which goes on cannot have.
    #[error("outputs has {count} entries for n = {n}; every choice needs one, and at least one that has not ended")]
    Outputs {
        /// What was given.
        count: usize,
        /// Choices.
        n: u32,
    },
    /// An output after which its choice would have ended.
    #[error("outputs: choice {choice} has {len} tokens, allowed are fewer than max_tokens ({max_tokens})")]
    OutputTooLong {
        /// Which choice.
        choice: usize,
        /// Its tokens.
        len: usize,
        /// The limit.
        max_tokens: u32,
    },
    /// A handle that names nothing, or something that has ended.
    #[error("handle {handle} names no request that lives")]
    UnknownHandle {
        /// What was given.
        handle: i32,
    },
    /// A request that has no stream to move.
    #[error("request {handle} makes a segment, which does not move: let the other engine make it")]
    MakesSegment {
        /// Which request.
        handle: i32,
    },
    /// One move at a time.
    #[error("request {handle} is being exported already")]
    AlreadyExported {
        /// Which request.
        handle: i32,
    },
    /// No move was begun.
    #[error("request {handle} is not being exported: call export_begin first")]
    NotExported {
        /// Which request.
        handle: i32,
    },
    /// Plans may still name it.
    #[error("request {handle} is not frozen: freeze it and step until is_frozen")]
    NotFrozen {
        /// Which request.
        handle: i32,
    },
    /// A stage that never was or whose copy has ended.
    #[error("hold {hold} is unknown or was given back")]
    UnknownHold {
        /// What was given.
        hold: u32,
    },
    /// A reservation that never was, has expired, or was committed or cancelled.
    #[error("ticket {ticket} names no reservation; it may have expired")]
    UnknownTicket {
        /// What was given.
        ticket: u32,
    },
    /// Bytes that are no manifest of a request.
    #[error("the manifest cannot be used: {what}")]
    Manifest {
        /// Why.
        what: &'static str,
    },
    /// A manifest of an engine with which no KV can be shared.
    #[error("the manifest's {field} is {value}, this engine has {expected}")]
    OtherEngine {
        /// Which number.
        field: &'static str,
        /// The manifest's.
        value: u64,
        /// Ours.
        expected: u64,
    },
    /// A block that the reservation does not wait for.
    #[error("reservation {ticket} does not wait for block {index} of choice {choice}")]
    NotAwaited {
        /// Which reservation.
        ticket: u32,
        /// Which choice.
        choice: u32,
        /// Which block of it.
        index: u32,
    },
    /// A manifest that counts on KV which is not here.
    #[error("block {index} of choice {choice} has not arrived: import_filled is missing")]
    NotFilled {
        /// Which choice.
        choice: u32,
        /// Which block of it.
        index: u32,
    },
    /// Capacity, not blame: as many sequences run as may.
    #[error("{needed} rows are needed, {free} are free (max_num_seqs): retry later")]
    NoRows {
        /// Choices that live.
        needed: usize,
        /// Rows that nobody has.
        free: usize,
    },
    /// Capacity, not blame: the pool is promised to others.
    #[error("{needed} blocks are needed, {available} are free or cached and others were promised some: retry later")]
    NoBlocks {
        /// Blocks of the request.
        needed: usize,
        /// Free and cached ones.
        available: usize,
    },
    /// Capacity, not blame: copies to other engines have not ended.
    #[error("{count} stages are held, at most {max} may be: call transfer_done when a copy has ended")]
    TooManyHolds {
        /// Stages whose copies run.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// An arena of the wrong size.
    #[error("arena {arena_idx} has {len} integers, the plan layout has {expected}")]
    ArenaLength {
        /// Which arena.
        arena_idx: usize,
        /// What was given.
        len: usize,
        /// `Layout::len`.
        expected: usize,
    },
    /// There are two arenas.
    #[error("arena_idx is {arena_idx}, allowed are 0 and 1")]
    ArenaIndex {
        /// What was given.
        arena_idx: usize,
    },
    /// The plan in the arena that was about to be overwritten still runs.
    #[error("plan {plan_id} in arena {arena_idx} is not complete: write done_plan_id before the next step on it")]
    PlanOutstanding {
        /// The plan.
        plan_id: i32,
        /// Its arena.
        arena_idx: usize,
    },
}

impl CoreError {
    /// Whether the refusal is about capacity now (retry later), not about the request.
    pub fn is_capacity(&self) -> bool {
        use CoreError::{NoBlocks, NoRows, Pinned, QueueFull, TooManyHolds};
        matches!(self, QueueFull { .. } | Pinned { .. } | NoRows { .. } | NoBlocks { .. } | TooManyHolds { .. })
    }
}
