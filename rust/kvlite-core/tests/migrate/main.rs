//! The migration protocol: every interleaving of small worlds (`explore`), long random lives of larger ones (`simulate`), and
//! frames of all sorts (`frames`). `engine` is a driver and an engine in one, `world` what lies between engines and the
//! stream's owner, with the checker of every promise.

mod actions;
mod engine;
mod explore;
mod frames;
#[path = "../common/seeds.rs"]
mod seeds;
mod simulate;
mod units;
mod world;
