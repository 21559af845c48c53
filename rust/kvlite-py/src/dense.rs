//! The CPU ops over rows for Python: products with weights, norms, rotation, gate, samples. As `cpu.rs`, whose helpers it uses.
//!
//! Rows are the first dimension and may lie apart; the others are packed. A missing head dimension counts as one head.

use kvlite_cpu::{Element, Exec, Linear, Rows, RowsCells, RowsMut, Sampling, bf16, f16};
use pyo3::prelude::*;
use pyo3::wrap_pyfunction;

use crate::buffers::{Array, Exclusive, Stored};
use crate::cpu::{Object, rows_view, with_dtype};
use crate::errors::invalid;
use crate::tape::compute;

fn cells_view<'a, T: Stored + Element>(
    name: &'static str,
    array: &'a Exclusive<T, 3>,
) -> Result<RowsCells<'a, T>, kvlite_cpu::Error> {
    let (shape, [row, ..]) = array.layout();
    RowsCells::new(name, array.cells(), shape, row)
}

fn rows<T: Stored>(name: &'static str, object: Object<'_, '_>) -> PyResult<Array<T, 3>> {
    Array::with_heads(name, object)?.packed_from(1)
}

/// Writes out = x weight^T + bias; see kernels/linear.
#[pyfunction]
#[pyo3(signature = (x, weight, bias, out, dtype = "float32", weight_dtype = "float32", invariant = true))]
fn cpu_linear(
    x: Object<'_, '_>,
    weight: Object<'_, '_>,
    bias: Option<Object<'_, '_>>,
    out: Object<'_, '_>,
    dtype: &str,
    weight_dtype: &str,
    invariant: bool,
) -> PyResult<()> {
    let operands = (x, weight, bias, out);
    match (dtype, weight_dtype) {
        ("float32", _) => with_dtype!(weight_dtype, run_linear::<f32>(operands, invariant)),
        ("bfloat16", "bfloat16") => run_linear::<bf16, bf16>(operands, invariant),
        ("float16", "float16") => run_linear::<f16, f16>(operands, invariant),
        _ => {
            Err(invalid("dtype", format!("dtype is {dtype:?} beside weights of {weight_dtype:?}: float32 or the same")))
        }
    }
}

/// x, weight, bias, out.
type Operands<'a, 'py> = (Object<'a, 'py>, Object<'a, 'py>, Option<Object<'a, 'py>>, Object<'a, 'py>);

fn run_linear<A: Stored + Element, W: Stored + Element>(
    (x, weight, bias, out): Operands<'_, '_>,
    invariant: bool,
) -> PyResult<()> {
    let py = x.py();
    let x = Array::<A, 2>::new("x", x)?.packed_from(1)?;
    let weight = Array::<W, 2>::new("weight", weight)?.packed_from(1)?;
    let bias = bias.map(|bias| Array::<W, 1>::new("bias", bias)?.packed_from(0)).transpose()?;
    let mut read = vec![x.span(), weight.span()];
    read.extend(bias.as_ref().map(Array::span));
    let mut out = Array::<A, 2>::new("out", out)?.packed_from(1)?.exclusive(&read)?;
    compute(py, move |exec| {
        let ([num_rows, inputs], [outputs, columns]) = (x.shape, weight.shape);
        let args = Linear {
            x: Rows::new("x", x.slice(), [num_rows, 1, inputs], x.strides[0])?,
            weight: Rows::new("weight", weight.slice(), [outputs, 1, columns], weight.strides[0])?,
            bias: bias.as_ref().map(Array::slice),
            invariant,
        };
        let ([num_rows, outputs], [row, _]) = out.layout();
        kvlite_cpu::linear(exec, &args, &mut RowsMut::new("out", out.slice(), [num_rows, outputs, 1], row)?)
    })
}

/// Writes out = weight * x / rms(x); see kernels/rms_norm.
#[pyfunction]
#[pyo3(signature = (x, weight, eps, out, dtype = "float32"))]
fn cpu_rms_norm(x: Object<'_, '_>, weight: Object<'_, '_>, eps: f32, out: Object<'_, '_>, dtype: &str) -> PyResult<()> {
    with_dtype!(dtype, run_rms_norm(x, None, weight, eps, out))
}

/// residual += x, then out = weight * residual / rms(residual); see kernels/rms_norm.
#[pyfunction]
#[pyo3(signature = (x, residual, weight, eps, out, dtype = "float32"))]
fn cpu_add_rms_norm(
    x: Object<'_, '_>,
    residual: Object<'_, '_>,
    weight: Object<'_, '_>,
    eps: f32,
    out: Object<'_, '_>,
    dtype: &str,
) -> PyResult<()> {
    with_dtype!(dtype, run_rms_norm(x, Some(residual), weight, eps, out))
}

fn run_rms_norm<T: Stored + Element>(
    x: Object<'_, '_>,
    residual: Option<Object<'_, '_>>,
    weight: Object<'_, '_>,
    eps: f32,
    out: Object<'_, '_>,
) -> PyResult<()> {
    let py = x.py();
    let weight = Array::<T, 1>::new("weight", weight)?.packed_from(0)?;
    let (x, out) = (rows::<T>("x", x)?, rows::<T>("out", out)?);
    let others = [x.span(), out.span(), weight.span()];
    let residual = residual.map(|residual| rows::<T>("residual", residual)?.exclusive(&others)).transpose()?;
    let (x, out) = (x.exclusive(&others[2..])?, out.exclusive(&others[2..])?);
    let op = move |exec: &Exec| {
        let (x, out) = (cells_view("x", &x)?, cells_view("out", &out)?);
        match &residual {
            Some(residual) => {
                kvlite_cpu::add_rms_norm(exec, &x, &cells_view("residual", residual)?, weight.slice(), eps, &out)
            }
            None => kvlite_cpu::rms_norm(exec, &x, weight.slice(), eps, &out),
        }
    };
    compute(py, op)
}

/// Rotates q and k in place; see kernels/rope.
#[pyfunction]
#[pyo3(signature = (q, k, positions, cos, sin, dtype = "float32"))]
fn cpu_rope(
    q: Object<'_, '_>,
    k: Object<'_, '_>,
    positions: Object<'_, '_>,
    cos: Object<'_, '_>,
    sin: Object<'_, '_>,
    dtype: &str,
) -> PyResult<()> {
    let positions = Array::new("positions", positions)?.packed_from(0)?;
    let (cos, sin) = (rows("cos", cos)?, rows("sin", sin)?);
    with_dtype!(dtype, run_rope(q, k, positions, cos, sin))
}

fn run_rope<T: Stored + Element>(
    q: Object<'_, '_>,
    k: Object<'_, '_>,
    positions: Array<i32, 1>,
    cos: Array<f32, 3>,
    sin: Array<f32, 3>,
) -> PyResult<()> {
    let py = q.py();
    let read = [positions.span(), cos.span(), sin.span()];
    let q = rows::<T>("q", q)?.exclusive(&read)?;
    let k = rows::<T>("k", k)?.exclusive(&read)?;
    compute(py, move |exec| {
        let (q, k) = (cells_view("q", &q)?, cells_view("k", &k)?);
        kvlite_cpu::rope(exec, &q, &k, positions.slice(), &rows_view(&cos)?, &rows_view(&sin)?)
    })
}

/// Writes out = silu(gate) * up; see kernels/silu_mul.
#[pyfunction]
#[pyo3(signature = (gate_up, out, dtype = "float32"))]
fn cpu_silu_mul(gate_up: Object<'_, '_>, out: Object<'_, '_>, dtype: &str) -> PyResult<()> {
    with_dtype!(dtype, run_silu_mul(gate_up, out))
}

fn run_silu_mul<T: Stored + Element>(gate_up: Object<'_, '_>, out: Object<'_, '_>) -> PyResult<()> {
    let py = gate_up.py();
    let gate_up = rows::<T>("gate_up", gate_up)?;
    let out = rows::<T>("out", out)?.exclusive(&[gate_up.span()])?;
    compute(py, move |exec| kvlite_cpu::silu_mul(exec, &rows_view(&gate_up)?, &cells_view("out", &out)?))
}

/// Writes one token per row of logits; see kernels/sampling.
#[pyfunction]
#[pyo3(signature = (logits, temperature, top_k, top_p, min_p, seed, position, token, dtype = "float32"))]
#[expect(clippy::too_many_arguments, reason = "the kernel contract's own list")]
fn cpu_sample(
    logits: Object<'_, '_>,
    temperature: Object<'_, '_>,
    top_k: Object<'_, '_>,
    top_p: Object<'_, '_>,
    min_p: Object<'_, '_>,
    seed: Object<'_, '_>,
    position: Object<'_, '_>,
    token: Object<'_, '_>,
    dtype: &str,
) -> PyResult<()> {
    let choice = SamplingArrays {
        temperature: Array::new("temperature", temperature)?.packed_from(0)?,
        top_k: Array::new("top_k", top_k)?.packed_from(0)?,
        top_p: Array::new("top_p", top_p)?.packed_from(0)?,
        min_p: Array::new("min_p", min_p)?.packed_from(0)?,
        seed: Array::new("seed", seed)?.packed_from(0)?,
        position: Array::new("position", position)?.packed_from(0)?,
    };
    with_dtype!(dtype, run_sample(logits, choice, token))
}

struct SamplingArrays {
    temperature: Array<f32, 1>,
    top_k: Array<i32, 1>,
    top_p: Array<f32, 1>,
    min_p: Array<f32, 1>,
    seed: Array<i64, 1>,
    position: Array<i64, 1>,
}

fn run_sample<T: Stored + Element>(
    logits: Object<'_, '_>,
    choice: SamplingArrays,
    token: Object<'_, '_>,
) -> PyResult<()> {
    let py = logits.py();
    let logits = rows::<T>("logits", logits)?;
    let SamplingArrays { temperature, top_k, top_p, min_p, seed, position } = choice;
    let mut read = vec![logits.span(), temperature.span(), top_k.span(), top_p.span(), min_p.span()];
    read.extend([seed.span(), position.span()]);
    let mut token = Array::<i32, 1>::new("token", token)?.packed_from(0)?.exclusive(&read)?;
    compute(py, move |exec| {
        let args = Sampling {
            temperature: temperature.slice(),
            top_k: top_k.slice(),
            top_p: top_p.slice(),
            min_p: min_p.slice(),
            seed: seed.slice(),
            position: position.slice(),
        };
        kvlite_cpu::sample(exec, &rows_view(&logits)?, &args, token.slice())
    })
}

/// Adds the ops.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cpu_linear, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_rms_norm, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_add_rms_norm, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_rope, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_silu_mul, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_sample, module)?)
}
