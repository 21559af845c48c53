//! `Tape`: CPU ops noted instead of computed, to be computed over the same memory again and again by one call.
//!
//! A decode step of a small model is some two hundred ops of tens of microseconds, and each costs several on its way down
//! from Python. While a tape records, the ops that its thread calls are checked and kept (`compute`); a replay computes
//! them in order, with the GIL released. A tape holds the arrays that it uses. Called by `kvlite.ops`.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kvlite_cpu::{Error, Exec};
use pyo3::prelude::*;

use crate::cpu::exec;
use crate::errors::{Fault, from_cpu, invalid, panic_message};

type Op = Box<dyn FnMut(&Exec) -> Result<(), Error> + Send + Sync>;

thread_local! {
    /// What the tape that records on this thread has so far.
    static RECORDING: RefCell<Option<Vec<Op>>> = const { RefCell::new(None) };
}

/// Computes an op without the GIL and turns what can go wrong into exceptions; or keeps it, while a tape records.
pub(crate) fn compute(
    py: Python<'_>,
    mut op: impl FnMut(&Exec) -> Result<(), Error> + Send + Sync + 'static,
) -> PyResult<()> {
    if RECORDING.with_borrow(Option::is_some) {
        RECORDING.with_borrow_mut(|ops| ops.as_mut().expect("seen above").push(Box::new(op)));
        return Ok(());
    }
    let exec = exec();
    outcome(py, || op(&exec))
}

fn outcome(py: Python<'_>, run: impl FnOnce() -> Result<(), Error> + Send) -> PyResult<()> {
    // Unwind safety: a panic leaves nothing behind but outputs half written.
    let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(run)));
    outcome.map_err(|panic| Fault::new_err(panic_message(&*panic)))?.map_err(|error| from_cpu(&error))
}

/// Ops in the order of their calls.
#[pyclass]
pub struct Tape {
    ops: Vec<Op>,
}

#[pymethods]
impl Tape {
    /// Calls `run` and keeps the CPU ops that it calls on this thread; none of them computes.
    #[staticmethod]
    fn record(run: &Bound<'_, PyAny>) -> PyResult<Tape> {
        if RECORDING.with_borrow(Option::is_some) {
            return Err(invalid("run", "run is called while another tape records on this thread".to_owned()));
        }
        RECORDING.set(Some(Vec::new()));
        let result = run.call0();
        let ops = RECORDING.take().unwrap_or_default();
        result.map(|_| Tape { ops })
    }

    /// Computes all of them; an error names the argument, as that of a single call, and ends the replay.
    fn replay(&mut self, py: Python<'_>) -> PyResult<()> {
        let exec = exec();
        outcome(py, || self.ops.iter_mut().try_for_each(|op| op(&exec)))
    }

    fn __len__(&self) -> usize {
        self.ops.len()
    }
}
