//! Which Python exception each Rust error becomes, and what becomes of a panic.
//!
//! The exceptions are plain and live here, because Rust cannot import `kvlite.errors` without a cycle; the engine
//! translates them. A panic is our fault and becomes `Fault`, an ordinary exception, so that an engine thread that
//! catches `Exception` sees it; pyo3's own `PanicException` would pass it by.

use std::any::Any;

use kvlite_core::CoreError;
use pyo3::exceptions::{PyException, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::{create_exception, intern};

create_exception!(
    kvlite._core,
    InvalidArgument,
    PyValueError,
    "The caller's argument cannot be served as given; `param` names it. Nothing has changed."
);
create_exception!(
    kvlite._core,
    CapacityError,
    PyException,
    "A limit is reached now and may not be later. Nothing has changed."
);
create_exception!(
    kvlite._core,
    Fault,
    PyRuntimeError,
    "An invariant of ours is broken; the message is the panic's. A core that raised it refuses every later call."
);

/// `InvalidArgument` with its `param`.
pub fn invalid(param: &str, message: String) -> PyErr {
    let error = InvalidArgument::new_err(message);
    Python::attach(|py| match error.value(py).setattr(intern!(py, "param"), param) {
        Ok(()) => error,
        Err(failure) => failure,
    })
}

/// An op's error; the first word of its sentence names the argument.
pub fn from_cpu(error: &kvlite_cpu::Error) -> PyErr {
    use kvlite_cpu::Error;
    let param = match error {
        Error::Shape { name, .. } | Error::Extent { name, .. } => name.rsplit(' ').next().unwrap_or(name),
        Error::HeadGroups { .. } => "q",
        Error::QueryStart { .. } => "query_start",
        Error::SeqRow { .. } => "seq_row",
        Error::ContextLen { .. } => "context_len",
        Error::Block { .. } => "block_table",
        Error::PrefixGroup { .. } | Error::GroupKeys { .. } => "prefix_group",
        Error::GroupSeq { .. } => "group_seqs",
        Error::Slot { .. } => "slot_mapping",
        Error::RowSlot { name, .. } | Error::SharedSlot { name, .. } => name,
        Error::QueryRow { .. } => "rows",
        Error::KeyRange { .. } => "end",
        Error::Position { .. } => "positions",
    };
    invalid(param, error.to_string())
}

/// A core's refusal, by blame. `ids`: what the caller calls the token ids.
pub fn from_core(error: &CoreError, ids: &'static str) -> PyErr {
    let param = match error {
        error if error.is_capacity() => return CapacityError::new_err(error.to_string()),
        CoreError::Config { field: "canonical_prefix_len", .. } => "canonical_prefix",
        CoreError::Config { field, .. } => field,
        CoreError::Watermark { .. } => "watermark_ratio",
        CoreError::SegmentCache { .. } => "segment_cache_ratio",
        CoreError::CanonicalPrefix { .. } => "canonical_prefix",
        CoreError::EmptyPrompt | CoreError::OutsideVocabulary { .. } => ids,
        CoreError::PromptTooLong { .. } | CoreError::SegmentTooLong { .. } => ids,
        CoreError::TooLong { .. } | CoreError::NeverFits { .. } | CoreError::NoOutput => "max_tokens",
        CoreError::Choices { .. } => "n",
        CoreError::MinTokens { .. } => "min_tokens",
        CoreError::StopIds { .. } => "stop_token_ids",
        CoreError::Tenant { .. } => "tenant",
        CoreError::Priority { .. } => "priority",
        CoreError::TooManySpans { .. } | CoreError::Span { .. } => "spans",
        CoreError::Share { field: "ratio", .. } => "ratio",
        CoreError::Share { .. } | CoreError::Rounds { .. } => "rounds",
        CoreError::Method { .. } => "method_id",
        CoreError::Scores { .. } => "scores",
        CoreError::DecodeRows { .. } => "decode_rows",
        CoreError::BlendedLogprobs => "blend",
        CoreError::Outputs { .. } | CoreError::OutputTooLong { .. } => "outputs",
        CoreError::UnknownHandle { .. } | CoreError::MakesSegment { .. } | CoreError::AlreadyExported { .. } => {
            "handle"
        }
        CoreError::NotExported { .. } | CoreError::NotFrozen { .. } => "handle",
        CoreError::UnknownHold { .. } => "hold",
        CoreError::UnknownTicket { .. } => "ticket",
        CoreError::Manifest { .. } | CoreError::OtherEngine { .. } => "manifest",
        CoreError::NotAwaited { .. } | CoreError::NotFilled { .. } => "index",
        CoreError::QueueFull { .. } | CoreError::Pinned { .. } => "capacity",
        CoreError::NoRows { .. } | CoreError::NoBlocks { .. } | CoreError::TooManyHolds { .. } => "capacity",
        CoreError::ArenaLength { .. } => "arenas",
        CoreError::ArenaIndex { .. } | CoreError::PlanOutstanding { .. } => "arena_idx",
    };
    invalid(param, error.to_string())
}

/// What a caught panic said.
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}

/// Adds the exception types.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("InvalidArgument", py.get_type::<InvalidArgument>())?;
    module.add("CapacityError", py.get_type::<CapacityError>())?;
    module.add("Fault", py.get_type::<Fault>())
}
