//! `Owner` for Python: the stream owner's arbiter behind a lock, effects as tuples. Decides nothing.
//!
//! Called by the front-end of a fleet.

use std::sync::Mutex;

use kvlite_core::sched::frames::{Frame, FrameError};
use kvlite_core::sched::migrate::{OrderError, Owner as Machine, OwnerEffect};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::errors::invalid;
use crate::frames::from_frame;
use crate::mover::{frame_bytes, guarded, tuple};

type Effects<'py> = PyResult<Vec<Bound<'py, PyTuple>>>;

/// Who owns each request, under which epoch, and how far it was delivered.
#[pyclass(frozen, module = "kvlite._core")]
pub struct Owner {
    machine: Mutex<Machine>,
}

fn effect_tuple(py: Python<'_>, effect: OwnerEffect) -> PyResult<Bound<'_, PyTuple>> {
    match effect {
        OwnerEffect::Send { engine, frame } => tuple!(py, Owner::SEND, engine, frame_bytes(py, &frame)?),
        OwnerEffect::Switch { request, engine, epoch } => tuple!(py, Owner::SWITCH, request, engine, epoch),
        OwnerEffect::Deliver { request, choice, position, ids } => {
            tuple!(py, Owner::DELIVER, request, choice, position, ids)
        }
        OwnerEffect::Replay { request, preferred } => tuple!(py, Owner::REPLAY, request, preferred),
        OwnerEffect::Moved { request, result, to, stages, blocks, reason } => {
            tuple!(py, Owner::MOVED, request, result as i32, to, stages, blocks, reason)
        }
    }
}

fn tuples(py: Python<'_>, effects: Vec<OwnerEffect>) -> Effects<'_> {
    effects.into_iter().map(|effect| effect_tuple(py, effect)).collect()
}

fn from_order(error: &OrderError) -> PyErr {
    let param = match error {
        OrderError::NoChoices => "num_choices",
        OrderError::Engine { .. } => "engine",
        OrderError::Itself { .. } => "to",
        _ => "request",
    };
    invalid(param, error.to_string())
}

#[pymethods]
impl Owner {
    #[classattr]
    const SEND: i32 = 0;
    #[classattr]
    const SWITCH: i32 = 1;
    #[classattr]
    const DELIVER: i32 = 2;
    #[classattr]
    const REPLAY: i32 = 3;
    #[classattr]
    const MOVED: i32 = 4;

    #[new]
    fn new() -> Self {
        Owner { machine: Mutex::new(Machine::default()) }
    }

    /// A new request; returns its first epoch.
    fn add(&self, request: u64, engine: i32, num_choices: usize, wants_logprobs: bool) -> PyResult<u32> {
        guarded(&self.machine, |machine| machine.add(request, engine, num_choices, wants_logprobs))?
            .map_err(|error| from_order(&error))
    }

    /// (offset, count) of what is new; count 0: stale.
    fn tokens(
        &self,
        request: u64,
        engine: i32,
        epoch: u32,
        choice: u32,
        position: u32,
        count: u32,
    ) -> PyResult<(u32, u32)> {
        guarded(&self.machine, |machine| machine.tokens(request, engine, epoch, choice, position, count))?
            .map_err(|error| from_frame(&error))
    }

    /// A choice has ended. False: stale, or ended already.
    fn finish(&self, request: u64, engine: i32, epoch: u32, choice: u32) -> PyResult<bool> {
        guarded(&self.machine, |machine| machine.finish(request, engine, epoch, choice))
    }

    /// The stream has ended; whatever is claimed of it later is denied.
    fn remove(&self, request: u64) -> PyResult<()> {
        guarded(&self.machine, |machine| machine.remove(request))
    }

    /// Effects of calls that return none.
    fn due<'py>(&self, py: Python<'py>) -> Effects<'py> {
        tuples(py, guarded(&self.machine, Machine::due)?)
    }

    /// The REVOKED for an engine that speaks of a request under an epoch it does not own.
    fn fence<'py>(&self, py: Python<'py>, request: u64, engine: i32, epoch: u32) -> Effects<'py> {
        tuples(py, guarded(&self.machine, |machine| machine.fence(request, engine, epoch))?)
    }

    /// (engine, epoch), engine -1 while it waits for replay; None: no such request.
    fn owner(&self, request: u64) -> PyResult<Option<(i32, u32)>> {
        guarded(&self.machine, |machine| machine.owner(request))
    }

    /// Tokens delivered per choice.
    fn positions(&self, request: u64) -> PyResult<Vec<u32>> {
        guarded(&self.machine, |machine| machine.positions(request).map(<[u32]>::to_vec))?
            .ok_or_else(|| from_order(&OrderError::Unknown { request }))
    }

    /// Where it is ordered to move to.
    fn moving(&self, request: u64) -> PyResult<Option<i32>> {
        guarded(&self.machine, |machine| machine.moving(request))
    }

    /// Orders a move.
    fn order<'py>(&self, py: Python<'py>, request: u64, to: i32, replay: bool, now_ms: i64) -> Effects<'py> {
        let effects = guarded(&self.machine, |machine| machine.order(request, to, replay, now_ms))?;
        tuples(py, effects.map_err(|error| from_order(&error))?)
    }

    /// A frame from an engine.
    #[pyo3(signature = (engine, frame, now_ms))]
    fn frame<'py>(&self, py: Python<'py>, engine: i32, frame: &[u8], now_ms: i64) -> Effects<'py> {
        let _ = now_ms;
        let raise = |error: FrameError| from_frame(&error);
        let frame = Frame::decode(frame).map_err(raise)?;
        tuples(py, guarded(&self.machine, |machine| machine.frame(engine, frame))?.map_err(raise)?)
    }

    /// The link to an engine has ended.
    #[pyo3(signature = (engine, now_ms))]
    fn engine_down<'py>(&self, py: Python<'py>, engine: i32, now_ms: i64) -> Effects<'py> {
        let _ = now_ms;
        tuples(py, guarded(&self.machine, |machine| machine.engine_down(engine))?)
    }

    /// Gives a request to another engine under a new epoch, which it returns.
    fn replay(&self, request: u64, to: i32) -> PyResult<u32> {
        guarded(&self.machine, |machine| machine.replay(request, to))?.map_err(|error| from_order(&error))
    }
}
