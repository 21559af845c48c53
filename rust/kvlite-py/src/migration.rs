//! Moving a request between engines, as Python says it: the export, the import and the replay of `Core`.
//!
//! Only shapes and signs are checked here. Every call is brief: it touches block numbers, never KV. Called by the thread
//! that steps the core, between steps.

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};

use crate::buffers::Array;
use crate::core::{Core, unsigned};

/// What choices of a replayed request have produced, with its buffers held; none: that choice has ended.
pub struct Outputs(Vec<Option<Array<i32, 1>>>);

impl Outputs {
    pub fn new(outputs: Vec<Option<Bound<'_, PyAny>>>) -> PyResult<Self> {
        let array = |output: Bound<'_, PyAny>| Array::<i32, 1>::new("outputs", &output)?.packed_from(0);
        let arrays = outputs.into_iter().map(|output| output.map(array).transpose());
        Ok(Outputs(arrays.collect::<PyResult<_>>()?))
    }

    pub fn slices(&self) -> Vec<Option<&[i32]>> {
        self.0.iter().map(|output| output.as_ref().map(Array::slice)).collect()
    }
}

/// Rows of three as an int32 array [K, 3] of NumPy's.
fn rows_array<'py>(py: Python<'py>, rows: &[[i32; 3]]) -> PyResult<Bound<'py, PyAny>> {
    let bytes: Vec<u8> = rows.as_flattened().iter().flat_map(|number| number.to_ne_bytes()).collect();
    let numpy = py.import("numpy")?;
    let flat = numpy.call_method1("frombuffer", (PyByteArray::new(py, &bytes), numpy.getattr("int32")?))?;
    flat.call_method1("reshape", (rows.len(), 3))
}

#[pymethods]
impl Core {
    /// Starts an export; returns the manifest as of now.
    fn export_begin<'py>(&self, py: Python<'py>, handle: i32) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.brief(|state| state.core.export_begin(handle))?))
    }

    /// The blocks that can go now and have not: a hold's number, and rows of choice, block index, pool block.
    fn export_stage<'py>(&self, py: Python<'py>, handle: i32, skip_blocks: i64) -> PyResult<(u32, Bound<'py, PyAny>)> {
        let skip_blocks = unsigned("skip_blocks", skip_blocks)?;
        let (hold, rows) = self.brief(|state| state.core.export_stage(handle, skip_blocks))?;
        Ok((hold, rows_array(py, &rows)?))
    }

    /// The copy of a stage has ended; also after the request has ended or moved.
    fn transfer_done(&self, hold: i64) -> PyResult<()> {
        let hold = unsigned("hold", hold)?;
        self.brief(|state| state.core.transfer_done(hold))
    }

    /// Blocks that export_stage would give out now.
    fn export_left(&self, handle: i32) -> PyResult<usize> {
        self.brief(|state| state.core.export_left(handle))
    }

    /// No later plan names the request; idempotent.
    fn freeze(&self, handle: i32) -> PyResult<()> {
        self.brief(|state| state.core.freeze(handle))
    }

    /// True once the request is frozen and no plan in flight names it.
    fn is_frozen(&self, handle: i32) -> PyResult<bool> {
        self.brief(|state| state.core.is_frozen(handle))
    }

    /// The manifest of a frozen request: what import_commit needs.
    fn export_final<'py>(&self, py: Python<'py>, handle: i32) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.brief(|state| state.core.export_final(handle))?))
    }

    /// Thaws a request: back to where it was; False when it has ended.
    fn export_abort(&self, handle: i32) -> PyResult<bool> {
        self.brief(|state| Ok(state.core.export_abort(handle)))
    }

    /// The request lives elsewhere now: it is gone here, without an end; False when it has ended.
    fn export_commit(&self, handle: i32) -> PyResult<bool> {
        self.brief(|state| state.core.export_commit(handle))
    }

    /// Makes room for a request of another engine: a ticket, and how many prompt blocks are here already.
    #[pyo3(signature = (manifest, now_ms, deadline_ms, *, method_id = None))]
    fn reserve(
        &self,
        manifest: Vec<u8>,
        now_ms: i64,
        deadline_ms: Option<i64>,
        method_id: Option<i64>,
    ) -> PyResult<(u32, u32)> {
        let method_id = method_id.map(|id| unsigned("method_id", id)).transpose()?;
        self.brief(|state| state.core.reserve(&manifest, method_id, deadline_ms.map(|deadline| deadline.max(now_ms))))
    }

    /// The pool block to write to; the same one when asked again.
    fn import_block(&self, ticket: i64, choice: i64, index: i64) -> PyResult<u32> {
        let (ticket, choice, index) = key(ticket, choice, index)?;
        self.brief(|state| state.core.import_block(ticket, choice, index))
    }

    /// The bytes of that block are there and verified.
    fn import_filled(&self, ticket: i64, choice: i64, index: i64) -> PyResult<()> {
        let (ticket, choice, index) = key(ticket, choice, index)?;
        self.brief(|state| state.core.import_filled(ticket, choice, index))
    }

    /// Another deadline for a reservation; None: it stays until it is committed or cancelled.
    #[pyo3(signature = (ticket, deadline_ms))]
    fn import_extend(&self, ticket: i64, deadline_ms: Option<i64>) -> PyResult<()> {
        let ticket = unsigned("ticket", ticket)?;
        self.brief(|state| state.core.import_extend(ticket, deadline_ms))
    }

    /// The reservation becomes a request; returns its handle.
    #[pyo3(signature = (ticket, manifest, now_ms, *, method_id = None))]
    fn import_commit(&self, ticket: i64, manifest: Vec<u8>, now_ms: i64, method_id: Option<i64>) -> PyResult<i32> {
        let ticket = unsigned("ticket", ticket)?;
        let method_id = method_id.map(|id| unsigned("method_id", id)).transpose()?;
        self.brief(|state| state.core.import_commit(ticket, &manifest, method_id, now_ms))
    }

    /// Gives a reservation back, once no copy into its blocks is under way; False when there is none.
    fn import_cancel(&self, ticket: i64) -> PyResult<bool> {
        let ticket = unsigned("ticket", ticket)?;
        self.brief(|state| Ok(state.core.import_cancel(ticket)))
    }
}

fn key(ticket: i64, choice: i64, index: i64) -> PyResult<(u32, u32, u32)> {
    Ok((unsigned("ticket", ticket)?, unsigned("choice", choice)?, unsigned("index", index)?))
}
