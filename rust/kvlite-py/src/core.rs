//! `Core` for Python: take the lock, let go of the GIL, make the one call.
//!
//! Owns the core, the two arenas (NumPy arrays that Python allocated, held for life) and the first panic's message: a
//! core that has panicked refuses every later call and says why. Decides nothing. Called by the engine's thread; other
//! threads may call too, one at a time. Nobody writes an arena while `step` runs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvlite_core::{CoreConfig, CoreError, EvictionKind, FinishReason, Layout, PolicyKind, Request};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::buffers::{Array, Exclusive};
use crate::errors::{Fault, from_core, invalid, panic_message};
use crate::migration::Outputs;
use crate::reuse::{Blend, BlendTuple, report_dict, segment_dict};

/// Puts fields into a dict under their own names.
macro_rules! items {
    ($dict:ident, $from:ident, $($name:ident),+ $(,)?) => { $($dict.set_item(stringify!($name), $from.$name)?;)+ };
}
pub(crate) use items;

/// Names of `CoreConfig`'s fields, all of them required.
const FIELDS: [&str; 23] = [
    "num_blocks",
    "host_blocks",
    "swap_cost_tokens",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "max_num_waiting",
    "vocab_size",
    "enable_prefix_caching",
    "policy",
    "max_passes",
    "eviction",
    "attention_cost_tokens",
    "attention_split_tokens",
    "group_cost_tokens",
    "reserve_tokens",
    "watermark_ratio",
    "segment_cache_ratio",
    "model_digest",
    "canonical_prefix",
    "max_segments",
    "hash_seed",
];

pub struct State {
    pub core: kvlite_core::Core,
    arenas: [Exclusive<i32, 1>; 2],
    /// The message of the panic that left the core in an unknown state.
    broken: Option<String>,
}

/// Scheduler and KV cache of one engine; keyword arguments as CoreConfig, arenas as two int32 arrays of arena_len.
#[pyclass(frozen, module = "kvlite._core")]
pub struct Core {
    state: Mutex<State>,
}

impl State {
    /// Panics are caught here, before the guard drops, so the lock is never poisoned.
    fn call<T>(&mut self, call: impl FnOnce(&mut State) -> Result<T, CoreError>) -> Outcome<T> {
        if let Some(cause) = &self.broken {
            return Err(format!("the core stopped after: {cause}"));
        }
        catch_unwind(AssertUnwindSafe(|| call(self))).map_err(|panic| {
            let message = panic_message(&*panic);
            self.broken = Some(message.clone());
            message
        })
    }
}

/// Err: the message of a panic.
type Outcome<T> = Result<Result<T, CoreError>, String>;

fn raise<T>(outcome: Outcome<T>, ids: &'static str) -> PyResult<T> {
    outcome.map_err(Fault::new_err)?.map_err(|error| from_core(&error, ids))
}

impl Core {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For calls of microseconds: they keep the GIL, because taking it back may cost a switch interval (5 ms).
    pub fn brief<T>(&self, call: impl FnOnce(&mut State) -> Result<T, CoreError>) -> PyResult<T> {
        raise(self.state().call(call), "prompt")
    }

    fn with_ids<T>(
        &self,
        tenant: i64,
        ids: &Bound<'_, PyAny>,
        call: impl FnOnce(&mut kvlite_core::Core, u32, &[i32]) -> Result<T, CoreError>,
    ) -> PyResult<T> {
        let (tenant, ids) = (unsigned("tenant", tenant)?, Array::<i32, 1>::new("ids", ids)?.packed_from(0)?);
        raise(self.state().call(|state| call(&mut state.core, tenant, ids.slice())), "ids")
    }

    fn detached<T: Send>(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&mut State) -> Result<T, CoreError> + Send,
    ) -> PyResult<T> {
        raise(py.detach(|| self.state().call(call)), "prompt")
    }
}

#[pymethods]
impl Core {
    #[new]
    #[pyo3(signature = (*, arenas, **config))]
    fn new(arenas: (Bound<'_, PyAny>, Bound<'_, PyAny>), config: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let config = parse_config(config)?;
        let expected = Layout::new(&config).len();
        let first = arena("arenas[0]", &arenas.0, expected)?;
        let second = arena("arenas[1]", &arenas.1, expected)?;
        let spans = [first.span(), second.span()];
        let arenas = [first.exclusive(&spans[1..])?, second.exclusive(&spans[..1])?];
        let core = kvlite_core::Core::new(config).map_err(|error| from_core(&error, ""))?;
        Ok(Core { state: Mutex::new(State { core, arenas, broken: None }) })
    }

    /// Offset and shape of every region of an arena, by name, in arena order.
    #[staticmethod]
    #[pyo3(signature = (**config))]
    fn layout<'py>(py: Python<'py>, config: Option<&Bound<'py, PyDict>>) -> PyResult<Bound<'py, PyDict>> {
        let regions = PyDict::new(py);
        for spec in Layout::new(&parse_config(config)?).regions() {
            let shape = if spec.cols == 1 { vec![spec.rows] } else { vec![spec.rows, spec.cols] };
            regions.set_item(spec.name, (spec.offset, pyo3::types::PyTuple::new(py, shape)?))?;
        }
        Ok(regions)
    }

    /// Integers in one arena.
    #[staticmethod]
    #[pyo3(signature = (**config))]
    fn arena_len(config: Option<&Bound<'_, PyDict>>) -> PyResult<usize> {
        Ok(Layout::new(&parse_config(config)?).len())
    }

    /// Queues a request; returns its handle. Raises InvalidArgument or CapacityError; nothing has changed then.
    #[pyo3(signature = (prompt_ids, *, n, max_tokens, min_tokens, stop_token_ids, priority, deadline_ms, tenant, use_cache,
                        prompt_logprobs, now_ms, blend = None, outputs = None))]
    #[expect(clippy::too_many_arguments, reason = "one keyword per field of a request")]
    fn add(
        &self,
        prompt_ids: &Bound<'_, PyAny>,
        n: i64,
        max_tokens: i64,
        min_tokens: i64,
        stop_token_ids: Vec<i32>,
        priority: i32,
        deadline_ms: Option<i64>,
        tenant: i64,
        use_cache: bool,
        prompt_logprobs: bool,
        now_ms: i64,
        blend: Option<BlendTuple<'_>>,
        outputs: Option<Vec<Option<Bound<'_, PyAny>>>>,
    ) -> PyResult<i32> {
        let prompt = Array::<i32, 1>::new("prompt_ids", prompt_ids)?.packed_from(0)?;
        let (n, tenant) = (unsigned("n", n)?, unsigned("tenant", tenant)?);
        let blend = blend.map(Blend::new).transpose()?;
        let (max_tokens, min_tokens) = (unsigned("max_tokens", max_tokens)?, unsigned("min_tokens", min_tokens)?);
        let outputs = outputs.map(Outputs::new).transpose()?;
        self.brief(|state| {
            let request = Request {
                prompt: prompt.slice(),
                n,
                max_tokens,
                min_tokens,
                stop_token_ids: &stop_token_ids,
                priority,
                deadline_ms,
                tenant,
                use_cache,
                prompt_logprobs,
                blend: blend.as_ref().map(Blend::request),
            };
            match &outputs {
                None => state.core.add(&request, now_ms),
                Some(outputs) => state.core.add_with_outputs(&request, &outputs.slices(), now_ms),
            }
        })
    }

    /// Queues the making of a segment; its handle finishes with stop once it is ready. Raises as add.
    #[pyo3(signature = (ids, *, tenant, pinned, deadline_ms, now_ms))]
    fn add_segment(
        &self,
        ids: &Bound<'_, PyAny>,
        tenant: i64,
        pinned: bool,
        deadline_ms: Option<i64>,
        now_ms: i64,
    ) -> PyResult<i32> {
        self.with_ids(tenant, ids, |core, tenant, ids| core.add_segment(ids, tenant, pinned, deadline_ms, now_ms))
    }

    /// The segment of these ids that tenant may read: its own, else a public one.
    fn segment<'py>(
        &self,
        py: Python<'py>,
        tenant: i64,
        ids: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let info = self.with_ids(tenant, ids, |core, tenant, ids| Ok(core.segment(tenant, ids)))?;
        info.map(|info| segment_dict(py, &info)).transpose()
    }

    /// A pinned segment is never evicted. False: tenant has none of its own. Raises CapacityError when requests need its room.
    fn pin_segment(&self, tenant: i64, ids: &Bound<'_, PyAny>, pinned: bool) -> PyResult<bool> {
        self.with_ids(tenant, ids, |core, tenant, ids| core.pin_segment(tenant, ids, pinned))
    }

    /// Forgets a segment; whoever uses it keeps it until done. False: tenant has none of its own.
    fn drop_segment(&self, tenant: i64, ids: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.with_ids(tenant, ids, |core, tenant, ids| Ok(core.drop_segment(tenant, ids)))
    }

    /// Tokens of a live blended request by source, and per span 0 prefix, 1 hit, 2 made, 3 hole, 4 recipe.
    fn reuse_report<'py>(&self, py: Python<'py>, handle: i32) -> PyResult<Option<Bound<'py, PyDict>>> {
        let report = self.brief(|state| Ok(state.core.reuse_report(handle).cloned()))?;
        report.map(|report| report_dict(py, &report)).transpose()
    }

    /// While on, all that waits is one workload known as a whole: it is admitted group by group, whatever the policy.
    fn set_workload(&self, is_workload: bool) -> PyResult<()> {
        self.brief(|state| {
            state.core.set_workload(is_workload);
            Ok(())
        })
    }

    /// Ends every choice of a request at the next step; False when it has ended already.
    fn abort(&self, handle: i32) -> PyResult<bool> {
        self.brief(|state| Ok(state.core.abort(handle)))
    }

    /// Ends one choice on behalf of its stream's owner, who keeps kept_len output tokens; False when it has ended already.
    fn finish(&self, handle: i32, choice: i64, kept_len: i64, reason: i32) -> PyResult<bool> {
        let (choice, kept_len) = (unsigned("choice", choice)?, unsigned("kept_len", kept_len)?);
        let reason = FinishReason::from_code(reason)
            .ok_or_else(|| invalid("reason", format!("reason is {reason}, allowed are 0 to 4")))?;
        self.brief(|state| Ok(state.core.finish(handle, choice, kept_len, reason)))
    }

    /// Commits every completed plan, then writes the next one into arena arena_idx.
    fn step(&self, py: Python<'_>, arena_idx: i64, now_ms: i64) -> PyResult<()> {
        let arena_idx = unsigned("arena_idx", arena_idx)? as usize;
        self.detached(py, |state| {
            let [first, second] = &mut state.arenas;
            state.core.step([first.slice(), second.slice()], arena_idx, now_ms)
        })
    }

    /// Counters and gauges; finished_total counts ends by reason code.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.brief(|state| Ok(state.core.stats()))?;
        let dict = PyDict::new(py);
        items!(
            dict,
            stats,
            num_running,
            num_waiting,
            num_requests,
            free_blocks,
            cached_blocks,
            owned_blocks,
            in_transfer_blocks,
            host_blocks,
            num_segments,
            segment_blocks,
            pinned_blocks,
            num_recipes,
            steps_total,
            requests_total,
            preemptions_total,
            prompt_tokens_total,
            prefix_hit_tokens_total,
            host_hit_tokens_total,
            demoted_blocks_total,
            promoted_blocks_total,
            segment_hit_tokens_total,
            blended_tokens_total,
            recomputed_tokens_total,
            segments_made_total,
            prefill_tokens_total,
            shared_keys_total,
            generated_tokens_total,
            discarded_tokens_total,
            failed_plans_total,
            migrations_out_total,
            migrations_in_total,
            imports_cancelled_total,
        );
        let [stop, length, cancelled, error, timeout] = stats.finished_total;
        dict.set_item("finished_total", (stop, length, cancelled, error, timeout))?;
        Ok(dict)
    }

    /// Checks every invariant, O(blocks); raises Fault with the first one broken.
    fn audit(&self, py: Python<'_>) -> PyResult<()> {
        self.detached(py, |state| {
            state.core.audit();
            Ok(())
        })
    }

    /// Drops every cached block; running sequences keep theirs.
    fn clear_cache(&self, py: Python<'_>) -> PyResult<()> {
        self.detached(py, |state| {
            state.core.clear_cache();
            Ok(())
        })
    }
}

fn arena(name: &'static str, object: &Bound<'_, PyAny>, expected: usize) -> PyResult<Array<i32, 1>> {
    let array = Array::<i32, 1>::new(name, object)?.packed_from(0)?;
    if array.shape != [expected] {
        return Err(invalid(name, format!("{name} has {} integers, expected {expected} (arena_len)", array.shape[0])));
    }
    Ok(array)
}

pub fn unsigned(name: &'static str, value: i64) -> PyResult<u32> {
    u32::try_from(value).map_err(|_| invalid(name, format!("{name} is {value}, allowed are 0 to {}", u32::MAX)))
}

fn parse_config(config: Option<&Bound<'_, PyDict>>) -> PyResult<CoreConfig> {
    let missing = |name: &str| invalid(name, format!("{name} is missing; a core needs {}", FIELDS.join(", ")));
    let config = config.ok_or_else(|| missing(FIELDS[0]))?;
    for key in config.keys() {
        let name: String = key.cast::<PyString>()?.extract()?;
        if !FIELDS.contains(&name.as_str()) {
            return Err(invalid(&name, format!("{name} is no setting of a core; it has {}", FIELDS.join(", "))));
        }
    }
    let value = |name: &'static str| config.get_item(name)?.ok_or_else(|| missing(name));
    let number = |name: &'static str| unsigned(name, value(name)?.extract()?);
    let policy: String = value("policy")?.extract()?;
    let eviction: String = value("eviction")?.extract()?;
    let kind = EvictionKind::ALL.into_iter().find(|(name, _)| *name == eviction).map(|(_, kind)| kind);
    let config = CoreConfig {
        num_blocks: number("num_blocks")?,
        host_blocks: number("host_blocks")?,
        swap_cost_tokens: number("swap_cost_tokens")?,
        block_size: number("block_size")?,
        max_num_seqs: number("max_num_seqs")?,
        max_num_batched_tokens: number("max_num_batched_tokens")?,
        max_model_len: number("max_model_len")?,
        max_num_waiting: number("max_num_waiting")?,
        vocab_size: number("vocab_size")?,
        enable_prefix_caching: value("enable_prefix_caching")?.extract()?,
        policy: match policy.as_str() {
            "fcfs" => PolicyKind::Fcfs,
            "priority" => PolicyKind::Priority,
            "hit-rate" => PolicyKind::HitRate,
            "cache-aware" => PolicyKind::CacheAware,
            "fair" => PolicyKind::Fair,
            "prefix-grouped" => PolicyKind::PrefixGrouped,
            other => {
                let allowed = "fcfs, priority, hit-rate, cache-aware, fair, prefix-grouped";
                return Err(invalid("policy", format!("policy is {other:?}, allowed are {allowed}")));
            }
        },
        max_passes: number("max_passes")?,
        eviction: kind.ok_or_else(|| {
            let names = EvictionKind::ALL.map(|(name, _)| name).join(", ");
            invalid("eviction", format!("eviction is {eviction:?}, allowed are {names}"))
        })?,
        attention_cost_tokens: number("attention_cost_tokens")?,
        attention_split_tokens: number("attention_split_tokens")?,
        group_cost_tokens: number("group_cost_tokens")?,
        reserve_tokens: number("reserve_tokens")?,
        watermark_ratio: value("watermark_ratio")?.extract()?,
        segment_cache_ratio: value("segment_cache_ratio")?.extract()?,
        model_digest: value("model_digest")?.extract()?,
        canonical_prefix: value("canonical_prefix")?.extract()?,
        max_segments: number("max_segments")?,
        hash_seed: value("hash_seed")?.extract()?,
    };
    config.validate().map_err(|error| from_core(&error, ""))?;
    Ok(config)
}
