//! Migration frames for Python: blocks and their digests, kinds, the cost of a move. Frames of machines are `mover`'s and
//! `owner`'s.
//!
//! Digests are computed without the GIL, and from the named rows alone: the engine writes other blocks of the pool meanwhile.

use kvlite_core::sched::cost::Costs;
use kvlite_core::sched::frames::{self, BlocksFrame, DIGEST_LEN};
use kvlite_core::sched::migrate::MoveId;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use pyo3::{create_exception, wrap_pyfunction};

use crate::buffers::Array;
use crate::errors::invalid;

create_exception!(
    kvlite._core,
    FrameError,
    PyValueError,
    "A migration frame is malformed, or an engine said what the protocol does not allow: close its link."
);

/// The exception of a frame's error.
pub fn from_frame(error: &frames::FrameError) -> PyErr {
    FrameError::new_err(error.to_string())
}

/// A BLOCKS frame: keys [K, 2] (choice, index) and a digest per row of pool that blocks [K] names.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "one per field of the frame")]
fn encode_blocks<'py>(
    py: Python<'py>,
    request: u64,
    epoch: u32,
    attempt: u32,
    stage: u32,
    part: u32,
    is_last: bool,
    keys: &Bound<'py, PyAny>,
    pool: &Bound<'py, PyAny>,
    blocks: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyBytes>> {
    let keys = Array::<i32, 2>::new("keys", keys)?.packed_from(0)?;
    let pool = Array::<u8, 2>::new("pool", pool)?.packed_from(1)?;
    let blocks = Array::<i32, 1>::new("blocks", blocks)?.packed_from(0)?;
    let count = blocks.shape[0];
    if keys.shape != [count, 2] {
        return Err(invalid("keys", format!("keys has shape {:?}, expected [{count}, 2]", keys.shape)));
    }
    if let Some(key) = keys.slice().iter().find(|&&key| key < 0) {
        return Err(invalid("keys", format!("keys has {key}, allowed are numbers from 0 up")));
    }
    let [num_blocks, row_len] = pool.shape;
    let block_bytes = u32::try_from(row_len)
        .map_err(|_| invalid("pool", format!("pool has rows of {row_len} bytes, at most {} fit", u32::MAX)))?;
    if let Some(block) = blocks.slice().iter().find(|&&block| usize::try_from(block).map_or(true, |b| b >= num_blocks))
    {
        return Err(invalid("blocks", format!("blocks has {block}, allowed are 0 to {num_blocks} (exclusive)")));
    }
    let frame = py.detach(|| {
        let row = |&block: &i32| pool.row(block as usize).map(frames::digest).unwrap_or_default();
        let digests = blocks.slice().iter().map(row).collect();
        let keys = keys.slice().chunks_exact(2).map(|key| (key[0], key[1])).collect();
        let id = MoveId { request, epoch, attempt };
        BlocksFrame { id, stage, part, is_last, block_bytes, keys, digests }.encode()
    });
    Ok(PyBytes::new(py, &frame.map_err(|error| invalid("blocks", error.to_string()))?))
}

type Decoded<'py> = (u64, u32, u32, u32, u32, bool, Bound<'py, PyAny>, Bound<'py, PyBytes>);

/// (request, epoch, attempt, stage, part, is_last, keys [K, 2], digests 32 K).
#[pyfunction]
fn decode_blocks<'py>(py: Python<'py>, frame: &[u8]) -> PyResult<Decoded<'py>> {
    let blocks = BlocksFrame::decode(frame).map_err(|error| from_frame(&error))?;
    let keys: Vec<u8> =
        blocks.keys.iter().flat_map(|&(choice, index)| [choice, index]).flat_map(i32::to_ne_bytes).collect();
    let keys = py.import("numpy")?.call_method1("frombuffer", (PyBytes::new(py, &keys), "int32"))?;
    let keys = keys.call_method1("reshape", (blocks.keys.len(), 2))?;
    let mut digests = Vec::with_capacity(blocks.digests.len() * DIGEST_LEN);
    blocks.digests.iter().for_each(|digest| digests.extend_from_slice(digest));
    let MoveId { request, epoch, attempt } = blocks.id;
    let digests = PyBytes::new(py, &digests);
    Ok((request, epoch, attempt, blocks.stage, blocks.part, blocks.is_last, keys, digests))
}

/// Whether payload is what the frame's digests say.
#[pyfunction]
fn verify_blocks(py: Python<'_>, frame: &[u8], payload: &Bound<'_, PyAny>) -> PyResult<bool> {
    let payload = Array::<u8, 1>::new("payload", payload)?.packed_from(0)?;
    let blocks = BlocksFrame::decode(frame).map_err(|error| from_frame(&error))?;
    Ok(py.detach(|| blocks.verify(payload.slice())))
}

/// Index of Mover.FRAME_KINDS, from the header alone.
#[pyfunction]
fn frame_kind(frame: &[u8]) -> PyResult<u8> {
    frames::kind(frame).map_err(|error| from_frame(&error))
}

/// (copy, copy_s, replay_s, gap_s); see sched/cost.rs.
#[pyfunction]
#[pyo3(signature = (*, len, hit, kv_bytes_per_token, link_bytes_per_s, prefill_tokens_per_s, decode_tokens_per_s, step_s))]
fn decide_move(
    len: u64,
    hit: u64,
    kv_bytes_per_token: u64,
    link_bytes_per_s: f64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    step_s: f64,
) -> PyResult<(bool, f64, f64, f64)> {
    for (name, value) in [
        ("link_bytes_per_s", link_bytes_per_s),
        ("prefill_tokens_per_s", prefill_tokens_per_s),
        ("decode_tokens_per_s", decode_tokens_per_s),
        ("step_s", step_s),
    ] {
        if !value.is_finite() || value < 0.0 {
            return Err(invalid(name, format!("{name} is {value}, allowed are finite numbers from 0 up")));
        }
    }
    if kv_bytes_per_token == 0 {
        return Err(invalid("kv_bytes_per_token", "kv_bytes_per_token is 0, at least 1 is needed".to_owned()));
    }
    let costs =
        Costs { len, hit, kv_bytes_per_token, link_bytes_per_s, prefill_tokens_per_s, decode_tokens_per_s, step_s };
    let decision = costs.decide();
    Ok((decision.copy, decision.copy_s, decision.replay_s, decision.gap_s))
}

/// Adds the functions and their exception.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("FrameError", module.py().get_type::<FrameError>())?;
    module.add_function(wrap_pyfunction!(encode_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(decode_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(verify_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(frame_kind, module)?)?;
    module.add_function(wrap_pyfunction!(decide_move, module)?)
}
