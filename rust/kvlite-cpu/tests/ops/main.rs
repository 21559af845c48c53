//! The ops against naive f64 oracles, with poisoned outputs and poisoned unreachable memory, on every instruction set.

mod attention;
mod groups;
mod key_mass;
mod linear;
mod oracle;
mod place_kv;
mod rows;
mod sample;
mod store_kv;
