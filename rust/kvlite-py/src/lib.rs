//! `kvlite._core`: the names that Python sees, and nothing else.
//!
//! `core` (the scheduler behind a lock) · `cpu` (the ops over the paged cache) · `dense` (the ops over rows) · `tape` (ops kept to be
//! computed again) · `buffers` (Python memory as checked slices; the one place with `unsafe`) · `mover`, `owner`, `frames` (the machines that move requests, and what they say) · `reuse` (blends and segments as Python sees them) · `migration` (moving a request) · `errors` (which exception each error becomes). The stub is `python/kvlite/_core.pyi`; a test compares them.

mod buffers;
mod core;
mod cpu;
mod dense;
mod errors;
mod frames;
mod migration;
mod mover;
mod owner;
mod reuse;
mod tape;

use pyo3::prelude::*;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    errors::register(module)?;
    module.add_class::<core::Core>()?;
    cpu::register(module)?;
    dense::register(module)?;
    frames::register(module)?;
    module.add_class::<tape::Tape>()?;
    module.add_class::<mover::Mover>()?;
    module.add_class::<owner::Owner>()
}
