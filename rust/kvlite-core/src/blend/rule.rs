//! What a request says of its blend: rounds, spans, ratio; and where each span's rows are to come from.

use std::ops::Range;

/// Which rows a scoring round runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Rows that are not reused, in all layers: those before the first reused row are done then. Those behind the last
    /// reused row score it, the last `MAX_SCORING_ROWS` of them.
    New,
    /// Every row behind the hit; from the second round on those kept so far and the new ones. All of them score.
    All,
}

/// One pass that scores reused rows before some of them are computed again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Round {
    /// Rows that run.
    pub scope: Scope,
    /// Share of a full pass that one row costs, 0 to 1.
    pub cost: f64,
    /// Share of the reused rows that is kept; the last round's is the request's own ratio.
    pub ratio: f64,
}

/// A request's rule, shared by its choices. Fields as in `BlendRequest`.
#[derive(Debug)]
pub(crate) struct Rule {
    pub spans: Box<[(u32, u32)]>,
    pub method_id: u32,
    pub ratio: f64,
    pub rounds: Box<[Round]>,
    pub scores: Option<Box<[f32]>>,
    pub decode_rows: u32,
}

impl Rule {
    /// Whether the same choice gives the same KV under `other`; scores only lead to the choice.
    pub fn makes_the_same(&self, other: &Rule) -> bool {
        let plain = |rule: &Rule| (rule.method_id, rule.ratio.to_bits(), rule.decode_rows);
        plain(self) == plain(other) && self.spans == other.spans
    }

    /// Positions of span `index`.
    pub fn span(&self, index: usize) -> Range<usize> {
        let (start, len) = self.spans[index];
        start as usize..(start + len) as usize
    }

    /// The span that holds `position`.
    pub fn span_of(&self, position: u32) -> usize {
        self.spans.partition_point(|&(start, _)| start <= position) - 1
    }

    /// Where the last span ends; 0 without spans.
    pub fn spans_end(&self) -> u32 {
        self.spans.last().map_or(0, |&(start, len)| start + len)
    }
}

/// Where a span's rows are to come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The store, as far as is known.
    Store,
    /// The store, after this sequence waited for the segment.
    Made,
    /// Computed as new text.
    Hole,
}
