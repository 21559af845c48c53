//! What the core remembers of requests and of plans in flight: plain data, and the ways to make it.
//!
//! Owns no rule: `add.rs`, `import.rs` fill these in, `schedule.rs` and `commit.rs` keep them in step with the plans.

use super::export::Export;
use super::reuse::ReuseReport;
use crate::ids::{BlockId, Token};

/// In `RequestState::choices`: this choice's sequence is gone.
pub(super) const NO_SLOT: u32 = u32::MAX;
/// The handle of the core's own requests, which no caller ever hears of.
pub(super) const NO_HANDLE: i32 = -1;

/// One request while any of its choices lives.
#[derive(Debug)]
pub(super) struct RequestState {
    pub handle: i32,
    pub num_choices: u32,
    /// Slot per choice, `NO_SLOT` once it is gone; choices above 0 exist from admission on.
    pub choices: Vec<u32>,
    /// Choices that have not finished.
    pub num_unfinished: u32,
    /// Sequences that still exist.
    pub num_present: u32,
    /// Whether `admitted` has named it; before that an end concerns every choice at once.
    pub announced: bool,
    pub stop_token_ids: Box<[Token]>,
    pub min_tokens: u32,
    /// As the caller gave it; its rank is the sequences'.
    pub priority: i32,
    pub deadline_ms: Option<i64>,
    pub use_cache: bool,
    pub prompt_logprobs: bool,
    /// Ends when its segment is ready, and whether that is to be pinned.
    pub precomputes: bool,
    pub pins: bool,
    /// Where the tokens of a blended prompt came from, from admission on.
    pub reuse: Option<Box<ReuseReport>>,
    /// No plan names it any more: it is about to move.
    pub frozen: bool,
    /// What has been given out of it, while it moves.
    pub export: Option<Box<Export>>,
}

impl RequestState {
    /// Of a request with `num_choices` that asks for nothing special; it has no sequence yet.
    pub fn new(num_choices: u32) -> RequestState {
        RequestState {
            handle: 0,
            num_choices,
            choices: Vec::with_capacity(num_choices as usize),
            num_unfinished: num_choices,
            num_present: 0,
            announced: false,
            stop_token_ids: [].into(),
            min_tokens: 0,
            priority: 0,
            deadline_ms: None,
            use_cache: false,
            prompt_logprobs: false,
            precomputes: false,
            pins: false,
            reuse: None,
            frozen: false,
            export: None,
        }
    }
}

/// What one plan does to one sequence once it completes.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlanEntry {
    pub slot: u32,
    /// `committed_len` after the plan.
    pub len_after: u32,
    pub first_sample: u32,
    /// Samples of this sequence, prompt log-probabilities first.
    pub num_samples: u32,
    /// Whether the last of them draws a token.
    pub draws: bool,
    /// Whether it places rows of segments.
    pub places: bool,
    /// The first of its rows in `scored`.
    pub scored: Option<u32>,
}

impl PlanEntry {
    /// Names a sequence and nothing else: what the plan does is added.
    pub fn of(slot: u32, len_after: u32) -> PlanEntry {
        PlanEntry { slot, len_after, first_sample: 0, num_samples: 0, draws: false, places: false, scored: None }
    }
}

/// A block that a plan or a copy to another engine reads or writes, though no sequence needs it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hold {
    /// Private: a merged duplicate, the source of a fork's copy, or what is being sent.
    Private(BlockId),
    /// In the tree: the source of a partial hit, or the end of a path that is being sent.
    InTree(BlockId),
    /// On the host, and copied from there.
    HostRead(BlockId),
    /// On the host: what eviction took is copied there.
    HostWrite(BlockId),
}

/// A plan in flight: what to do when it completes. `number` 0 means none.
#[derive(Debug, Default)]
pub(super) struct PlanRecord {
    pub number: u64,
    pub num_tokens: u32,
    pub entries: Vec<PlanEntry>,
    pub holds: Vec<Hold>,
}
