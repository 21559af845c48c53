//! The part of kvlite that decides: scheduler, radix-tree block allocator, batch plans.
//!
//! Pure: no Python, no tensors, no clock, no sockets, no threads. `Core` is the one door; `plan` is the contract with
//! whoever computes.
#![forbid(unsafe_code)]

mod blend;
pub mod cache;
mod config;
mod core;
mod error;
mod ids;
pub mod plan;
pub mod sched;
mod sequence;

pub use crate::blend::{MAX_SCORING_ROWS, Round, Scope};
pub use crate::core::{
    BlendRequest, Core, CoreStats, ExportRow, MAX_DECODE_ROWS, MAX_HOLDS, MAX_ROUNDS, MAX_STOP_TOKEN_IDS, Request,
    ReuseReport, SegmentInfo, SpanOutcome,
};
pub use config::{CoreConfig, EvictionKind, PolicyKind};
pub use error::CoreError;
pub use ids::{BlockId, Label, Lookup, TenantId, Token, Waiter};
pub use plan::Layout;
pub use sequence::FinishReason;
