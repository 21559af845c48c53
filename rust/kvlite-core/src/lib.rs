//! The part of kvlite that decides: scheduler, radix-tree block allocator, batch plans.
//!
//! Pure: no Python, no tensors, no clock, no sockets, no threads. `Core` is the one door.
#![forbid(unsafe_code)]

pub mod cache;
mod config;
mod error;
mod ids;

pub use config::{CoreConfig, PolicyKind};
pub use error::CoreError;
pub use ids::{BlockId, Handle, Namespace, SeqRow, TenantId, Token};
