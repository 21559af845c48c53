//! The CPU ops for Python: NumPy arrays in, `kvlite_cpu` views out, handed to `tape::compute`.
//!
//! Owns how they compute (`EXEC`: instruction set and threads). Elements are float32, or uint16 with `dtype` naming the
//! 16-bit format. A call costs a few microseconds beyond its work. Called by `kvlite.ops`.

use std::sync::{Arc, PoisonError, RwLock};

use kvlite_cpu::{
    Attention, BlockTable, Exec, Isa, KeyMass, KvCache, KvCacheCells, PlaceKv, PoolMut, PrefixGroups, Rows, RowsMut,
    bf16, f16,
};
use pyo3::prelude::*;
use pyo3::wrap_pyfunction;

use crate::buffers::{Array, Exclusive, Stored};
use crate::errors::invalid;
use crate::tape::compute;

static EXEC: RwLock<Option<Arc<Exec>>> = RwLock::new(None);

/// How ops compute now.
pub(crate) fn exec() -> Arc<Exec> {
    if let Some(exec) = &*EXEC.read().unwrap_or_else(PoisonError::into_inner) {
        return exec.clone();
    }
    let mut slot = EXEC.write().unwrap_or_else(PoisonError::into_inner);
    let threads = || std::thread::available_parallelism().map_or(1, |n| n.get());
    slot.get_or_insert_with(|| Arc::new(Exec::detect(threads()))).clone()
}

/// Runs a generic function with the element type that `dtype` names.
macro_rules! with_dtype {
    ($dtype:expr, $function:ident $(::< $($first:ty),+ >)? ( $($arg:expr),* $(,)? )) => {
        match $dtype {
            "float32" => $function::<$($($first,)+)? f32>($($arg),*),
            "bfloat16" => $function::<$($($first,)+)? bf16>($($arg),*),
            "float16" => $function::<$($($first,)+)? f16>($($arg),*),
            other => Err(invalid("dtype", format!("dtype is {other:?}, allowed are float32, bfloat16 and float16"))),
        }
    };
}
pub(crate) use with_dtype;

fn cache_view<T: Stored + kvlite_cpu::Element>(array: &Array<T, 4>) -> Result<KvCache<'_, T>, kvlite_cpu::Error> {
    let [block, slot, head, _] = array.strides;
    KvCache::new(array.name, array.slice(), array.shape, [block, slot, head])
}

fn cell_view<'a, T: Stored + kvlite_cpu::Element>(
    name: &'static str,
    array: &'a Exclusive<T, 4>,
) -> Result<KvCacheCells<'a, T>, kvlite_cpu::Error> {
    let (shape, [block, slot, head, _]) = array.layout();
    KvCacheCells::new(name, array.cells(), shape, [block, slot, head])
}

/// [T, heads, dim] to read.
pub(crate) fn rows_view<T: Stored + kvlite_cpu::Element>(
    array: &Array<T, 3>,
) -> Result<Rows<'_, T>, kvlite_cpu::Error> {
    Rows::new(array.name, array.slice(), array.shape, array.strides[0])
}

/// An argument as Python gave it.
pub(crate) type Object<'a, 'py> = &'a Bound<'py, PyAny>;

/// Writes out and lse for the rows of every sequence; see kernels/attention.
#[pyfunction]
#[pyo3(signature = (q, k_cache, v_cache, block_table, query_start, context_len, seq_row, last_key, scale, window, out, lse,
                    dtype = "float32", prefix_group = None, group_seqs = None))]
#[expect(clippy::too_many_arguments, reason = "the kernel contract's own list")]
fn cpu_attention(
    q: Object<'_, '_>,
    k_cache: Object<'_, '_>,
    v_cache: Object<'_, '_>,
    block_table: Object<'_, '_>,
    query_start: Object<'_, '_>,
    context_len: Object<'_, '_>,
    seq_row: Object<'_, '_>,
    last_key: Object<'_, '_>,
    scale: f32,
    window: i64,
    out: Object<'_, '_>,
    lse: Object<'_, '_>,
    dtype: &str,
    prefix_group: Option<Object<'_, '_>>,
    group_seqs: Option<Object<'_, '_>>,
) -> PyResult<()> {
    let window = usize::try_from(window).map_err(|_| invalid("window", format!("window is {window}, 0 means none")))?;
    let ints = AttentionInts {
        block_table: Array::new("block_table", block_table)?.packed_from(1)?,
        query_start: Array::new("query_start", query_start)?.packed_from(0)?,
        context_len: Array::new("context_len", context_len)?.packed_from(0)?,
        seq_row: Array::new("seq_row", seq_row)?.packed_from(0)?,
        last_key: Array::new("last_key", last_key)?.packed_from(0)?,
        groups: groups(prefix_group, group_seqs)?,
    };
    with_dtype!(dtype, run_attention(q, k_cache, v_cache, ints, scale, window, out, lse))
}

struct AttentionInts {
    block_table: Array<i32, 2>,
    query_start: Array<i32, 1>,
    context_len: Array<i32, 1>,
    seq_row: Array<i32, 1>,
    last_key: Array<i32, 1>,
    /// [G, 3] and [M].
    groups: Option<(Array<i32, 2>, Array<i32, 1>)>,
}

fn groups(
    prefix_group: Option<Object<'_, '_>>,
    group_seqs: Option<Object<'_, '_>>,
) -> PyResult<Option<(Array<i32, 2>, Array<i32, 1>)>> {
    let (Some(groups), Some(seqs)) = (prefix_group, group_seqs) else { return Ok(None) };
    let groups = Array::new("prefix_group", groups)?.packed_from(0)?;
    if groups.shape[1] != 3 {
        return Err(invalid("prefix_group", format!("prefix_group has {} columns, expected 3", groups.shape[1])));
    }
    Ok(Some((groups, Array::new("group_seqs", seqs)?.packed_from(0)?)))
}

#[expect(clippy::too_many_arguments, reason = "the kernel contract's own list")]
fn run_attention<T: Stored + kvlite_cpu::Element>(
    q: Object<'_, '_>,
    k_cache: Object<'_, '_>,
    v_cache: Object<'_, '_>,
    ints: AttentionInts,
    scale: f32,
    window: usize,
    out: Object<'_, '_>,
    lse: Object<'_, '_>,
) -> PyResult<()> {
    let py = q.py();
    let q = Array::<T, 3>::new("q", q)?.packed_from(1)?;
    let k_cache = Array::<T, 4>::new("k_cache", k_cache)?.packed_from(3)?;
    let v_cache = Array::<T, 4>::new("v_cache", v_cache)?.packed_from(3)?;
    let out = Array::<T, 3>::new("out", out)?.packed_from(1)?;
    let lse = Array::<f32, 2>::new("lse", lse)?.packed_from(1)?;
    let AttentionInts { block_table, query_start, context_len, seq_row, last_key, groups } = ints;
    let mut others = vec![q.span(), k_cache.span(), v_cache.span(), block_table.span(), query_start.span()];
    others.extend([context_len.span(), seq_row.span(), last_key.span()]);
    others.extend(groups.iter().flat_map(|(groups, seqs)| [groups.span(), seqs.span()]));
    others.push(lse.span());
    let mut out = out.exclusive(&others)?;
    others.pop();
    let mut lse = lse.exclusive(&others)?;
    compute(py, move |exec| {
        let args = Attention {
            q: rows_view(&q)?,
            k_cache: cache_view(&k_cache)?,
            v_cache: cache_view(&v_cache)?,
            block_table: BlockTable::new(block_table.slice(), block_table.shape, block_table.strides[0])?,
            query_start: query_start.slice(),
            context_len: context_len.slice(),
            seq_row: seq_row.slice(),
            last_key: last_key.slice(),
            scale,
            window,
            groups: groups
                .as_ref()
                .map(|(groups, seqs)| PrefixGroups { groups: groups.slice().as_chunks().0, seqs: seqs.slice() }),
        };
        let (shape, [row, ..]) = out.layout();
        let mut out = RowsMut::new("out", out.slice(), shape, row)?;
        let ([rows, heads], [row, _]) = lse.layout();
        let mut lse = RowsMut::new("lse", lse.slice(), [rows, heads, 1], row)?;
        kvlite_cpu::attention(exec, &args, &mut out, &mut lse)
    })
}

/// Stores new keys and values in their slots; see kernels/store_kv.
#[pyfunction]
#[pyo3(signature = (k, v, k_cache, v_cache, slot_mapping, dtype = "float32"))]
fn cpu_store_kv(
    k: Object<'_, '_>,
    v: Object<'_, '_>,
    k_cache: Object<'_, '_>,
    v_cache: Object<'_, '_>,
    slot_mapping: Object<'_, '_>,
    dtype: &str,
) -> PyResult<()> {
    let slot_mapping = Array::new("slot_mapping", slot_mapping)?.packed_from(0)?;
    with_dtype!(dtype, run_store_kv(k, v, k_cache, v_cache, slot_mapping))
}

fn run_store_kv<T: Stored + kvlite_cpu::Element>(
    k: Object<'_, '_>,
    v: Object<'_, '_>,
    k_cache: Object<'_, '_>,
    v_cache: Object<'_, '_>,
    slot_mapping: Array<i32, 1>,
) -> PyResult<()> {
    let py = k.py();
    let k = Array::<T, 3>::new("k", k)?.packed_from(1)?;
    let v = Array::<T, 3>::new("v", v)?.packed_from(1)?;
    let inputs = [k.span(), v.span(), slot_mapping.span()];
    let k_cache = Array::<T, 4>::new("k_cache", k_cache)?.packed_from(3)?.exclusive(&inputs)?;
    let v_cache = Array::<T, 4>::new("v_cache", v_cache)?.packed_from(3)?.exclusive(&inputs)?;
    compute(py, move |_| {
        let (k_cells, v_cells) = (cell_view("k_cache", &k_cache)?, cell_view("v_cache", &v_cache)?);
        kvlite_cpu::store_kv(&rows_view(&k)?, &rows_view(&v)?, &k_cells, &v_cells, slot_mapping.slice())
    })
}

/// Copies rows of all layers to other slots and rotates their keys; see kernels/place_kv.
#[pyfunction]
#[pyo3(signature = (kv_pool, source_slot, target_slot, positions, cos, sin, dtype = "float32"))]
fn cpu_place_kv(
    kv_pool: Object<'_, '_>,
    source_slot: Object<'_, '_>,
    target_slot: Object<'_, '_>,
    positions: Object<'_, '_>,
    cos: Object<'_, '_>,
    sin: Object<'_, '_>,
    dtype: &str,
) -> PyResult<()> {
    let ints = [
        Array::new("source_slot", source_slot)?.packed_from(0)?,
        Array::new("target_slot", target_slot)?.packed_from(0)?,
        Array::new("positions", positions)?.packed_from(0)?,
    ];
    let tables = [Array::with_heads("cos", cos)?.packed_from(1)?, Array::with_heads("sin", sin)?.packed_from(1)?];
    with_dtype!(dtype, run_place_kv(kv_pool, ints, tables))
}

fn run_place_kv<T: Stored + kvlite_cpu::Element>(
    kv_pool: Object<'_, '_>,
    [source_slot, target_slot, positions]: [Array<i32, 1>; 3],
    [cos, sin]: [Array<f32, 3>; 2],
) -> PyResult<()> {
    let py = kv_pool.py();
    let read = [source_slot.span(), target_slot.span(), positions.span(), cos.span(), sin.span()];
    let mut kv_pool = Array::<T, 6>::new("kv_pool", kv_pool)?.packed_from(0)?.exclusive(&read)?;
    compute(py, move |exec| {
        let args = PlaceKv {
            source_slot: source_slot.slice(),
            target_slot: target_slot.slice(),
            positions: positions.slice(),
            cos: rows_view(&cos)?,
            sin: rows_view(&sin)?,
        };
        let (shape, _) = kv_pool.layout();
        kvlite_cpu::place_kv(exec, &args, &mut PoolMut::new("kv_pool", kv_pool.slice(), shape)?)
    })
}

/// Writes the attention that keys start..end receive from the chosen rows; see kernels/key_mass.
#[pyfunction]
#[pyo3(signature = (q, lse, k_cache, block_table_row, rows, last_key, start, end, scale, out, dtype = "float32"))]
#[expect(clippy::too_many_arguments, reason = "the kernel contract's own list")]
fn cpu_key_mass(
    q: Object<'_, '_>,
    lse: Object<'_, '_>,
    k_cache: Object<'_, '_>,
    block_table_row: Object<'_, '_>,
    rows: Object<'_, '_>,
    last_key: Object<'_, '_>,
    start: usize,
    end: usize,
    scale: f32,
    out: Object<'_, '_>,
    dtype: &str,
) -> PyResult<()> {
    let ints = KeyMassInts {
        block_table: Array::new("block_table_row", block_table_row)?.packed_from(0)?,
        rows: Array::new("rows", rows)?.packed_from(0)?,
        last_key: Array::new("last_key", last_key)?.packed_from(0)?,
    };
    with_dtype!(dtype, run_key_mass(q, lse, k_cache, ints, start..end, scale, out))
}

struct KeyMassInts {
    block_table: Array<i32, 1>,
    rows: Array<i32, 1>,
    last_key: Array<i32, 1>,
}

fn run_key_mass<T: Stored + kvlite_cpu::Element>(
    q: Object<'_, '_>,
    lse: Object<'_, '_>,
    k_cache: Object<'_, '_>,
    ints: KeyMassInts,
    keys: std::ops::Range<usize>,
    scale: f32,
    out: Object<'_, '_>,
) -> PyResult<()> {
    let py = q.py();
    let q = Array::<T, 3>::new("q", q)?.packed_from(1)?;
    let lse = Array::<f32, 2>::new("lse", lse)?.packed_from(1)?;
    let k_cache = Array::<T, 4>::new("k_cache", k_cache)?.packed_from(3)?;
    let out = Array::<f32, 1>::new("out", out)?.packed_from(0)?;
    let KeyMassInts { block_table, rows, last_key } = ints;
    let read = [q.span(), lse.span(), k_cache.span(), block_table.span(), rows.span(), last_key.span()];
    let mut out = out.exclusive(&read)?;
    compute(py, move |exec| {
        let [num_rows, heads] = lse.shape;
        let args = KeyMass {
            q: rows_view(&q)?,
            lse: Rows::new("lse", lse.slice(), [num_rows, heads, 1], lse.strides[0])?,
            k_cache: cache_view(&k_cache)?,
            block_table: BlockTable::new(block_table.slice(), [1, block_table.shape[0]], 0)?,
            rows: rows.slice(),
            last_key: last_key.slice(),
            scale,
            keys: keys.clone(),
        };
        kvlite_cpu::key_mass(exec, &args, out.slice())
    })
}

/// Threads that share one call, the caller's included.
#[pyfunction]
fn cpu_num_threads() -> usize {
    exec().threads.count()
}

/// Sets the threads that share one call; results stay the same bit for bit.
#[pyfunction]
fn cpu_set_num_threads(num_threads: usize) -> PyResult<()> {
    if !(1..=1024).contains(&num_threads) {
        return Err(invalid("num_threads", format!("num_threads is {num_threads}, allowed are 1 to 1024")));
    }
    *EXEC.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(Exec::detect(num_threads)));
    Ok(())
}

/// The instruction set in use: portable, avx2, avx512, avx512_bf16 or amx.
#[pyfunction]
fn cpu_isa() -> &'static str {
    Isa::detect().name()
}

/// Adds the ops.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cpu_attention, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_store_kv, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_place_kv, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_key_mass, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_set_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_isa, module)?)
}
