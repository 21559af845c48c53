//! What callers say and hear about blended reuse: spans and rules of a request, segments by their ids, what became of them.
//!
//! Owns plain data and its checks; decides nothing. Spans mark reusable text in a prompt; the rule says how many of the
//! reused rows are computed again and how they are found. Used by `add.rs` and the binding.

use std::sync::Arc;

use crate::blend::{Round, Rule};
use crate::cache::SegmentState;
use crate::config::CoreConfig;
use crate::error::CoreError;

/// Rounds of one rule.
pub const MAX_ROUNDS: usize = 16;
/// Reused rows that one decode step computes again, at most.
pub const MAX_DECODE_ROWS: u32 = 16;

/// How a request blends segments into its prompt.
#[derive(Clone, Copy, Debug)]
pub struct BlendRequest<'a> {
    /// (start, length) in the prompt, ascending, disjoint, not empty; at most `max_segments`.
    pub spans: &'a [(u32, u32)],
    /// Whoever scores; opaque here, part of a recipe's identity.
    pub method_id: u32,
    /// Share of the reused rows that is computed again, 0 to 1.
    pub ratio: f64,
    /// Scoring rounds in order; none: `scores` decide.
    pub rounds: &'a [Round],
    /// Per prompt position, higher first; none: lower positions first. Read when there are no rounds.
    pub scores: Option<&'a [f32]>,
    /// Reused rows computed again with each output token.
    pub decode_rows: u32,
}

/// Where the tokens of a span came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum SpanOutcome {
    /// Inside the exact prefix hit.
    Prefix = 0,
    /// Its segment was there.
    Hit = 1,
    /// Its segment was made while this request waited.
    Made = 2,
    /// Computed as new text: no segment could be had.
    Hole = 3,
    /// Inside the hit on a recipe's blocks.
    Recipe = 4,
}

/// Where the tokens of a blended prompt came from; the four counts add up to the prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReuseReport {
    /// Found as blocks, exact or under a recipe.
    pub prefix_tokens: u32,
    /// Placed from segments and kept.
    pub blended_tokens: u32,
    /// Placed from segments and computed again.
    pub recomputed_tokens: u32,
    /// New text.
    pub computed_tokens: u32,
    /// One per span.
    pub spans: Box<[SpanOutcome]>,
}

/// A stored segment, or one that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Tokens.
    pub len: u32,
    /// Blocks that it holds.
    pub num_blocks: u32,
    /// How far it is.
    pub state: SegmentState,
    /// Sequences that place it now.
    pub num_users: u32,
    /// Times it was placed.
    pub num_hits: u64,
    /// Whether eviction spares it.
    pub pinned: bool,
    /// Whose it is.
    pub tenant: u32,
}

impl BlendRequest<'_> {
    pub(super) fn rule(&self) -> Arc<Rule> {
        Arc::new(Rule {
            spans: self.spans.into(),
            method_id: self.method_id,
            ratio: self.ratio,
            rounds: self.rounds.into(),
            scores: self.scores.map(Into::into),
            decode_rows: self.decode_rows,
        })
    }

    /// The first thing that is out of range.
    pub(super) fn check(&self, prompt_len: usize, config: &CoreConfig) -> Result<(), CoreError> {
        let max = config.max_segments as usize;
        if self.spans.len() > max {
            return Err(CoreError::TooManySpans { count: self.spans.len(), max });
        }
        let mut end = 0;
        for (index, &(start, len)) in self.spans.iter().enumerate() {
            let past = u64::from(start) + u64::from(len);
            if start < end || len == 0 || past > prompt_len as u64 {
                return Err(CoreError::Span { index, start, len, low: end, high: prompt_len });
            }
            end = past as u32;
        }
        let shares = self.rounds.iter().flat_map(|round| [("round ratio", round.ratio), ("round cost", round.cost)]);
        for (field, value) in [("ratio", self.ratio)].into_iter().chain(shares) {
            if !(0.0..=1.0).contains(&value) {
                return Err(CoreError::Share { field, value });
            }
        }
        if self.rounds.len() > MAX_ROUNDS {
            return Err(CoreError::Rounds { count: self.rounds.len(), max: MAX_ROUNDS });
        }
        if self.method_id > i32::MAX as u32 {
            return Err(CoreError::Method { method_id: self.method_id });
        }
        if let Some(scores) = self.scores.filter(|scores| scores.len() != prompt_len) {
            return Err(CoreError::Scores { len: scores.len(), prompt_len });
        }
        if self.decode_rows > MAX_DECODE_ROWS {
            return Err(CoreError::DecodeRows { rows: self.decode_rows, max: MAX_DECODE_ROWS });
        }
        Ok(())
    }
}
