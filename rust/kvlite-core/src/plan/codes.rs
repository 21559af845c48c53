//! Numbers that rows of a plan carry and what they mean; `runner/plan.py` mirrors them.

/// Sample kind: draw the next token.
pub const SAMPLE: i32 = 0;
/// Sample kind: only the log-probability of the prompt token that follows is wanted.
pub const PROMPT_LOGPROB: i32 = 1;

/// Why a sequence appears in `Admitted`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Cause {
    /// First admission.
    New = 0,
    /// Back after a preemption.
    Resumed = 1,
    /// A further choice of an admitted request.
    Forked = 2,
    /// Arrived from another engine.
    Imported = 3,
}

/// Which way a row of `BlockCopy` goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum CopyDirection {
    /// Within the pool: a fork's tail, a block that fits in part.
    OnDevice = 0,
    /// From the pool to the host tier: what eviction took.
    ToHost = 1,
    /// From the host tier to the pool: a hit.
    FromHost = 2,
}
