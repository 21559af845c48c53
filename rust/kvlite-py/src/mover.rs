//! `Mover` for Python: one engine's migration machine behind a lock, effects as tuples.
//!
//! Decides nothing. A frame goes through the format of `sched::frames` in both directions. Called by the worker's driver.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use kvlite_core::sched::frames::{BLOCKS, BlocksFrame, Frame, KINDS};
use kvlite_core::sched::migrate::{Choice, Effect, Limits, MoveId, MoveResult, Mover as Machine, OWNER};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::errors::{Fault, invalid, panic_message};
use crate::frames::from_frame;

/// Longest wait that a limit may name: a day.
const MAX_WAIT_MS: i64 = 86_400_000;

type Effects<'py> = PyResult<Vec<Bound<'py, PyTuple>>>;
/// (request, attempt, peer, whether it leaves, state)
type Underway = (u64, u32, i32, bool, &'static str);

/// Source and destination side of every move of one engine.
#[pyclass(frozen, module = "kvlite._core")]
pub struct Mover {
    machine: Mutex<Machine>,
}

/// Runs a machine's call; a panic is ours and becomes `Fault`.
pub fn guarded<M, T>(machine: &Mutex<M>, call: impl FnOnce(&mut M) -> T) -> PyResult<T> {
    let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
    catch_unwind(AssertUnwindSafe(|| call(&mut machine))).map_err(|panic| Fault::new_err(panic_message(&*panic)))
}

/// A tuple of any items.
macro_rules! tuple {
    ($py:ident, $($item:expr),+ $(,)?) => { PyTuple::new($py, [$($item.into_bound_py_any($py)?),+]) };
}
pub(crate) use tuple;

/// A frame as Python bytes.
pub fn frame_bytes<'py>(py: Python<'py>, frame: &Frame) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, &frame.encode().map_err(|error| from_frame(&error))?))
}

impl Mover {
    fn call<'py>(&self, py: Python<'py>, call: impl FnOnce(&mut Machine) -> Vec<Effect>) -> Effects<'py> {
        guarded(&self.machine, call)?.into_iter().map(|effect| effect_tuple(py, effect)).collect()
    }
}

fn effect_tuple(py: Python<'_>, effect: Effect) -> PyResult<Bound<'_, PyTuple>> {
    match effect {
        Effect::Send { peer, frame } => tuple!(py, Mover::SEND, peer, frame_bytes(py, &frame)?),
        Effect::Export { id } => tuple!(py, Mover::EXPORT, id.request, id.attempt, id.epoch),
        Effect::Stage { id, to, stage, skip_blocks, last } => {
            tuple!(py, Mover::STAGE, id.request, id.attempt, id.epoch, to, stage, skip_blocks, last)
        }
        Effect::Freeze { id } => tuple!(py, Mover::FREEZE, id.request, id.attempt),
        Effect::Tail { id } => tuple!(py, Mover::TAIL, id.request, id.attempt),
        Effect::Thaw { request, attempt, epoch } => tuple!(py, Mover::THAW, request, attempt, epoch),
        Effect::Release { request, attempt, epoch } => tuple!(py, Mover::RELEASE, request, attempt, epoch),
        Effect::Reserve { id, source, manifest, ttl_ms, replay } => {
            let manifest = PyBytes::new(py, &manifest);
            tuple!(py, Mover::RESERVE, id.request, id.attempt, source, manifest, ttl_ms, replay)
        }
        Effect::Cancel { id } => tuple!(py, Mover::CANCEL, id.request, id.attempt),
        Effect::Commit { id, epoch, manifest, replay } => {
            let manifest = PyBytes::new(py, &manifest);
            tuple!(py, Mover::COMMIT, id.request, id.attempt, epoch, manifest, replay)
        }
        Effect::Done { id, result, stages, blocks, reason } => {
            tuple!(py, Mover::DONE, id.request, id.attempt, result as i32, stages, blocks, reason)
        }
    }
}

fn wait(name: &'static str, value: i64) -> PyResult<i64> {
    bounded(name, value, MAX_WAIT_MS)
}

fn bounded(name: &'static str, value: i64, max: i64) -> PyResult<i64> {
    if (1..=max).contains(&value) {
        return Ok(value);
    }
    Err(invalid(name, format!("{name} is {value}, allowed are 1 to {max}")))
}

#[pymethods]
impl Mover {
    #[classattr]
    const OWNER: i32 = OWNER;
    #[classattr]
    const SEND: i32 = 0;
    #[classattr]
    const EXPORT: i32 = 1;
    #[classattr]
    const STAGE: i32 = 2;
    #[classattr]
    const FREEZE: i32 = 3;
    #[classattr]
    const TAIL: i32 = 4;
    #[classattr]
    const THAW: i32 = 5;
    #[classattr]
    const RELEASE: i32 = 6;
    #[classattr]
    const RESERVE: i32 = 7;
    #[classattr]
    const CANCEL: i32 = 8;
    #[classattr]
    const COMMIT: i32 = 9;
    #[classattr]
    const DONE: i32 = 10;
    #[classattr]
    const BLOCKS: i32 = BLOCKS as i32;

    #[classattr]
    #[pyo3(name = "RESULTS")]
    fn results(py: Python<'_>) -> PyResult<Bound<'_, PyTuple>> {
        PyTuple::new(py, MoveResult::NAMES)
    }

    #[classattr]
    #[pyo3(name = "FRAME_KINDS")]
    fn frame_kinds(py: Python<'_>) -> PyResult<Bound<'_, PyTuple>> {
        PyTuple::new(py, KINDS)
    }

    #[new]
    #[pyo3(signature = (engine, *, max_moves, max_inflight_bytes, block_bytes, max_stages, reserve_ms, ack_ms, freeze_ms, claim_ms))]
    #[expect(clippy::too_many_arguments, reason = "one keyword per limit")]
    fn new(
        engine: i32,
        max_moves: i64,
        max_inflight_bytes: i64,
        block_bytes: i64,
        max_stages: i64,
        reserve_ms: i64,
        ack_ms: i64,
        freeze_ms: i64,
        claim_ms: i64,
    ) -> PyResult<Self> {
        if engine < 0 {
            return Err(invalid("engine", format!("engine is {engine}, allowed are numbers from 0 up")));
        }
        let limits = Limits {
            max_moves: bounded("max_moves", max_moves, 1 << 12)? as usize,
            max_inflight_bytes: bounded("max_inflight_bytes", max_inflight_bytes, 1 << 50)? as u64,
            block_bytes: bounded("block_bytes", block_bytes, 1 << 32)? as u64,
            max_stages: bounded("max_stages", max_stages, 64)? as u32,
            reserve_ms: wait("reserve_ms", reserve_ms)?,
            ack_ms: wait("ack_ms", ack_ms)?,
            freeze_ms: wait("freeze_ms", freeze_ms)?,
            claim_ms: wait("claim_ms", claim_ms)?,
        };
        Ok(Mover { machine: Mutex::new(Machine::new(engine, limits)) })
    }

    /// The owner's order, as its MOVE frame gives it to frame.
    #[pyo3(signature = (request, epoch, to, replay, attempt, now_ms))]
    #[expect(clippy::too_many_arguments, reason = "the fields of a MOVE frame")]
    fn r#move<'py>(
        &self,
        py: Python<'py>,
        request: u64,
        epoch: u32,
        to: i32,
        replay: bool,
        attempt: u32,
        now_ms: i64,
    ) -> Effects<'py> {
        let frame = Frame::Move { id: MoveId { request, epoch, attempt }, to, replay };
        let effects = guarded(&self.machine, |machine| machine.frame(OWNER, frame, now_ms))?;
        effects.map_err(|error| from_frame(&error))?.into_iter().map(|effect| effect_tuple(py, effect)).collect()
    }

    /// Any frame but BLOCKS.
    fn frame<'py>(&self, py: Python<'py>, peer: i32, frame: &[u8], now_ms: i64) -> Effects<'py> {
        let frame = Frame::decode(frame).map_err(|error| from_frame(&error))?;
        let effects = guarded(&self.machine, |machine| machine.frame(peer, frame, now_ms))?;
        effects.map_err(|error| from_frame(&error))?.into_iter().map(|effect| effect_tuple(py, effect)).collect()
    }

    /// A BLOCKS frame whose payload is stored; not ok: wrong digests, no room, no such arrival.
    fn blocks<'py>(&self, py: Python<'py>, peer: i32, frame: &[u8], ok: bool, now_ms: i64) -> Effects<'py> {
        let frame = BlocksFrame::decode(frame).map_err(|error| from_frame(&error))?;
        self.call(py, |machine| machine.blocks(peer, &frame, ok, now_ms))
    }

    /// The link to a peer has ended or cannot be opened.
    fn link_down<'py>(&self, py: Python<'py>, peer: i32, now_ms: i64) -> Effects<'py> {
        self.call(py, |machine| machine.link_down(peer, now_ms))
    }

    /// What is due by now.
    fn tick<'py>(&self, py: Python<'py>, now_ms: i64) -> Effects<'py> {
        self.call(py, |machine| machine.tick(now_ms))
    }

    /// When tick has something to do.
    fn next_wake_ms(&self) -> PyResult<Option<i64>> {
        guarded(&self.machine, |machine| machine.next_wake_ms())
    }

    /// The live request has finished, was cancelled or timed out here.
    #[pyo3(signature = (request, now_ms))]
    fn ended<'py>(&self, py: Python<'py>, request: u64, now_ms: i64) -> Effects<'py> {
        let _ = now_ms;
        self.call(py, |machine| machine.ended(request))
    }

    /// Answers EXPORT; None: it cannot be moved.
    fn exported<'py>(
        &self,
        py: Python<'py>,
        request: u64,
        attempt: u32,
        manifest: Option<Vec<u8>>,
        num_choices: u32,
        now_ms: i64,
    ) -> Effects<'py> {
        self.call(py, |machine| machine.exported(request, attempt, manifest, num_choices, now_ms))
    }

    /// Answers STAGE.
    #[expect(clippy::too_many_arguments, reason = "what the stage was and what is left")]
    fn staged<'py>(
        &self,
        py: Python<'py>,
        request: u64,
        attempt: u32,
        stage: u32,
        num_blocks: u32,
        left_after: u32,
        now_ms: i64,
    ) -> Effects<'py> {
        self.call(py, |machine| machine.staged(request, attempt, stage, num_blocks, left_after, now_ms))
    }

    /// Answers FREEZE.
    #[pyo3(signature = (request, attempt, now_ms))]
    fn frozen<'py>(&self, py: Python<'py>, request: u64, attempt: u32, now_ms: i64) -> Effects<'py> {
        let _ = now_ms;
        self.call(py, |machine| machine.frozen(request, attempt))
    }

    /// Answers TAIL.
    #[expect(clippy::too_many_arguments, reason = "what the tail says")]
    fn tail<'py>(
        &self,
        py: Python<'py>,
        request: u64,
        attempt: u32,
        manifest: Vec<u8>,
        positions: Vec<u32>,
        outputs: Vec<Option<Vec<i32>>>,
        now_ms: i64,
    ) -> Effects<'py> {
        if positions.is_empty() || positions.len() != outputs.len() {
            let (given, expected) = (outputs.len(), positions.len().max(1));
            return Err(invalid("outputs", format!("outputs has {given} choices, expected {expected}")));
        }
        for (choice, (&position, ids)) in positions.iter().zip(&outputs).enumerate() {
            if let Some(ids) = ids.as_ref().filter(|ids| ids.len() != position as usize) {
                let message = format!("outputs[{choice}] has {} ids, its position is {position}", ids.len());
                return Err(invalid("outputs", message));
            }
        }
        let choices = positions.into_iter().zip(outputs).map(|(position, ids)| Choice { position, ids }).collect();
        self.call(py, |machine| machine.tail(request, attempt, manifest, choices, now_ms))
    }

    /// Answers any effect of the source that could not be carried out.
    #[pyo3(signature = (request, attempt, reason, now_ms))]
    fn failed<'py>(&self, py: Python<'py>, request: u64, attempt: u32, reason: &str, now_ms: i64) -> Effects<'py> {
        let _ = now_ms;
        self.call(py, |machine| machine.failed(request, attempt, reason))
    }

    /// Answers RESERVE.
    fn reserved<'py>(&self, py: Python<'py>, request: u64, attempt: u32, hit_blocks: u32, now_ms: i64) -> Effects<'py> {
        self.call(py, |machine| machine.reserved(request, attempt, hit_blocks, now_ms))
    }

    /// Answers RESERVE, or takes a reservation back before the claim.
    #[pyo3(signature = (request, attempt, reason, now_ms))]
    fn refused<'py>(&self, py: Python<'py>, request: u64, attempt: u32, reason: &str, now_ms: i64) -> Effects<'py> {
        let _ = now_ms;
        self.call(py, |machine| machine.refused(request, attempt, reason))
    }

    /// (request, attempt, peer, whether it leaves, state) of every move under way.
    fn moves(&self) -> PyResult<Vec<Underway>> {
        guarded(&self.machine, |machine| machine.moves())
    }
}
