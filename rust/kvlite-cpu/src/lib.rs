//! CPU twins of `kernels/`: one file per op, same names and contracts.
//!
//! Knows slices and strides, neither tensors nor Python. Every op checks its arguments whole before it writes anything
//! and returns an `Error` instead of reading out of bounds. A row's result depends on that row and its visible keys
//! alone: never on batch mates, chunking, block size or the number of threads.
//!
//! `element` (f32, bf16, f16) · `view` (checked strided views) · `lanes` (inner loops) · `isa` (instruction sets) ·
//! `tiles` (products of AMX) · `threads` (who computes which task) · `attention`, `key_mass`, `linear`, `place_kv`, `rms_norm`, `rope`, `sample`,
//! `silu_mul`, `store_kv` (the ops).

mod attention;
mod element;
mod error;
mod isa;
mod key_mass;
mod lanes;
mod linear;
mod place_kv;
mod rms_norm;
mod rope;
mod sample;
mod silu_mul;
mod store_kv;
mod threads;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod view;

pub use attention::{Attention, PrefixGroups, attention};
pub use element::Element;
pub use error::Error;
pub use half::{bf16, f16};
pub use isa::Isa;
pub use key_mass::{KeyMass, key_mass};
pub use linear::{Linear, linear};
pub use place_kv::{PlaceKv, place_kv};
pub use rms_norm::{add_rms_norm, rms_norm};
pub use rope::rope;
pub use sample::{Sampling, sample};
pub use silu_mul::silu_mul;
pub use store_kv::store_kv;
pub use threads::Threads;
pub use view::{BlockTable, KvCache, KvCacheCells, PoolMut, Rows, RowsCells, RowsMut};

/// How an op computes: instruction set and threads. Fixed at start; results differ between instruction sets by rounding only.
#[derive(Debug)]
pub struct Exec {
    /// Instruction set of the inner loops.
    pub isa: Isa,
    /// Threads that share the tasks of one call.
    pub threads: Threads,
}

impl Exec {
    /// The widest instruction set of this machine and `num_threads` threads (at least 1).
    pub fn detect(num_threads: usize) -> Exec {
        Exec { isa: Isa::detect(), threads: Threads::new(num_threads) }
    }
}
