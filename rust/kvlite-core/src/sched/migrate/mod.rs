//! The fenced protocol that moves a request from one engine to another, as pure machines: event in, effects out.
//!
//! `Mover` is one engine's part, `Owner` that of the front-end that holds the clients' streams and is the only arbiter. A
//! request is owned by (engine, epoch); a claim or a reclaim is a compare-and-swap on it. A source that has sent its tail goes
//! on only when the owner says so, a destination computes only when its claim is granted: at most one engine produces
//! what the owner delivers. Time and identity are arguments; sockets, blocks and requests are the driver's.
//! Llumnix (arXiv 2406.03243) moves so in stages; the fence is ours.

mod destination;
mod entry;
mod mover;
mod owner;
mod source;

pub use mover::Mover;
pub use owner::{NOBODY, OrderError, Owner, OwnerEffect};

use super::frames::Frame;

/// The peer number of the stream's owner.
pub const OWNER: i32 = -1;

/// One attempt to move one request. The owner counts attempts of a request upwards, whatever its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MoveId {
    /// The request's number in the fleet, never used twice.
    pub request: u64,
    /// Under which the source owns it.
    pub epoch: u32,
    /// From 1.
    pub attempt: u32,
}

/// How a move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MoveResult {
    /// The destination owns the request.
    Moved,
    /// The source cannot give it or the destination cannot take it.
    Refused,
    /// Something failed before the tail was sent; the source went on by itself.
    Aborted,
    /// Something failed after that; the source went on with the owner's leave.
    Reclaimed,
    /// The request ended before the move did.
    Ended,
    /// The source was lost, or never answered.
    Failed,
}

impl MoveResult {
    /// Names in the order of the codes.
    pub const NAMES: [&str; 6] = ["moved", "refused", "aborted", "reclaimed", "ended", "failed"];

    /// The result of a code.
    pub fn from_code(code: u8) -> Option<MoveResult> {
        use MoveResult::{Aborted, Ended, Failed, Moved, Reclaimed, Refused};
        [Moved, Refused, Aborted, Reclaimed, Ended, Failed].get(code as usize).copied()
    }
}

/// Where one choice of a request stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Choice {
    /// Tokens that it has produced.
    pub position: u32,
    /// Their ids; None: it has ended.
    pub ids: Option<Vec<i32>>,
}

/// Bounds of a `Mover`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Moves under way, out and in, each.
    pub max_moves: usize,
    /// A stage begins only while fewer bytes than this are sent and not acknowledged; a frozen request never waits.
    pub max_inflight_bytes: u64,
    /// Bytes of one block.
    pub block_bytes: u64,
    /// Stages that are copied while decoding goes on.
    pub max_stages: u32,
    /// A reservation without news ends after this.
    pub reserve_ms: i64,
    /// A source waits this long for an answer.
    pub ack_ms: i64,
    /// From the freeze to the tail, and from the tail to the reclaim.
    pub freeze_ms: i64,
    /// Between two claims or reclaims that nobody answered.
    pub claim_ms: i64,
}

/// What the driver of an engine must do. Items of one request are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the line of a variant says what its fields are")]
pub enum Effect {
    /// Hand a frame to the link.
    Send { peer: i32, frame: Frame },
    /// Begin to export the live request if its epoch is the move's; answer with `exported`.
    Export { id: MoveId },
    /// Send what another stage holds; answer with `staged`. `last`: frozen, partly filled blocks too.
    Stage { id: MoveId, to: i32, stage: u32, skip_blocks: u32, last: bool },
    /// Let no later plan name the request; answer with `frozen` when no earlier one does.
    Freeze { id: MoveId },
    /// Answer with `tail`: what the destination needs to go on.
    Tail { id: MoveId },
    /// The move is off: the request goes on here under `epoch`.
    Thaw { request: u64, attempt: u32, epoch: u32 },
    /// The request lives elsewhere: drop the live one if its epoch is not above `epoch`.
    Release { request: u64, attempt: u32, epoch: u32 },
    /// Make room for an arrival; answer with `reserved` or `refused`.
    Reserve { id: MoveId, source: i32, manifest: Vec<u8>, ttl_ms: i64, replay: bool },
    /// Drop an arrival.
    Cancel { id: MoveId },
    /// The arrival is a live request now, under `epoch`.
    Commit { id: MoveId, epoch: u32, manifest: Vec<u8>, replay: bool },
    /// A move has ended at its source.
    Done { id: MoveId, result: MoveResult, stages: u32, blocks: u32, reason: String },
}
