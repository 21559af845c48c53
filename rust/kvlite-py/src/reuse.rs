//! Blended reuse as Python says and hears it: the blend tuple of `add`, a segment's state, a request's report.
//!
//! Only shapes and signs are checked here; what a value may be is the core's to say. Called by `core.rs`.

use kvlite_core::cache::SegmentState;
use kvlite_core::{BlendRequest, ReuseReport, Round, Scope, SegmentInfo};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::buffers::Array;
use crate::core::{items, unsigned};
use crate::errors::invalid;

/// (spans [k, 2], method_id, ratio, rounds of (scope, cost, ratio), scores [prompt_len], decode_rows).
pub type BlendTuple<'py> = (Bound<'py, PyAny>, i64, f64, Vec<(i64, f64, f64)>, Option<Bound<'py, PyAny>>, i64);

/// A blend tuple with its buffers held.
pub struct Blend {
    spans: Vec<(u32, u32)>,
    method_id: u32,
    ratio: f64,
    rounds: Vec<Round>,
    scores: Option<Array<f32, 1>>,
    decode_rows: u32,
}

impl Blend {
    pub fn new((spans, method_id, ratio, rounds, scores, decode_rows): BlendTuple<'_>) -> PyResult<Self> {
        let spans = Array::<i32, 2>::new("spans", &spans)?.packed_from(0)?;
        if spans.shape[1] != 2 {
            return Err(invalid("spans", format!("spans has rows of {}, expected (start, len)", spans.shape[1])));
        }
        let number = |&value: &i32| unsigned("spans", value.into());
        let span = |span: &[i32]| Ok((number(&span[0])?, number(&span[1])?));
        let round = |(scope, cost, ratio): (i64, f64, f64)| match scope {
            0 => Ok(Round { scope: Scope::New, cost, ratio }),
            1 => Ok(Round { scope: Scope::All, cost, ratio }),
            _ => Err(invalid("rounds", format!("rounds has a scope of {scope}, allowed are 0 (new) and 1 (all)"))),
        };
        Ok(Blend {
            spans: spans.slice().chunks_exact(2).map(span).collect::<PyResult<_>>()?,
            method_id: unsigned("method_id", method_id)?,
            ratio,
            rounds: rounds.into_iter().map(round).collect::<PyResult<_>>()?,
            scores: scores.map(|scores| Array::new("scores", &scores)?.packed_from(0)).transpose()?,
            decode_rows: unsigned("decode_rows", decode_rows)?,
        })
    }

    pub fn request(&self) -> BlendRequest<'_> {
        BlendRequest {
            spans: &self.spans,
            method_id: self.method_id,
            ratio: self.ratio,
            rounds: &self.rounds,
            scores: self.scores.as_ref().map(Array::slice),
            decode_rows: self.decode_rows,
        }
    }
}

pub fn segment_dict<'py>(py: Python<'py>, info: &SegmentInfo) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    items!(dict, info, len, tenant, pinned, num_users, num_hits, num_blocks);
    let state = match info.state {
        SegmentState::Wanted => "wanted",
        SegmentState::Making => "making",
        SegmentState::Ready => "ready",
    };
    dict.set_item("state", state)?;
    Ok(dict)
}

pub fn report_dict<'py>(py: Python<'py>, report: &ReuseReport) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    items!(dict, report, prefix_tokens, blended_tokens, recomputed_tokens, computed_tokens);
    dict.set_item("spans", report.spans.iter().map(|&outcome| outcome as i32).collect::<Vec<_>>())?;
    Ok(dict)
}
