//! Requests that move between two engines: by hand, as damaged bytes, and by seed against an oracle that knows no engine.

#[path = "../common/mod.rs"]
mod common;

mod fleet;
mod manifests;
mod refusals;
mod scenarios;
