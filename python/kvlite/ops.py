"""The device operations of the engine, chosen once at start: name -> Triton kernel, Rust CPU kernel or torch reference.

The only importer of `kvlite.kernels` and of the `cpu_*` functions of `kvlite._core`. Knows tensors only. Triton is
imported when its backend is selected and never before. Called by `layers` and `runner`, through one `Ops` value.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

Backend = Literal["reference", "triton", "cpu"]

FEW_ROWS = (8, 16, 24, 32)
"""Most rows that the Rust product may be for, ascending; `_few_rows` measures which ..."""
MANY_ROWS = 256
"""... but it has forms for many rows too: no slower than the library's here, it takes any number."""
ANY_ROWS = sys.maxsize
CROSSING_SHAPE = (2048, 1024)
"""Outputs and inputs of the weight that finds it: some megabytes, as those of a layer."""
CROSSING_REPEATS = 7
WIDENED_ROWS = 512
"""Rows of a 16-bit matrix that are widened at once for many fp32 rows: a few megabytes, still in a cache when used."""

AttentionOp = Callable[..., None]
"""As `kernels/attention/reference.py`; the last two arguments, who shares a prefix, may be missing."""
KeyMassOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]
RmsNormOp = Callable[[Tensor, Tensor, float, Tensor], None]
AddRmsNormOp = Callable[[Tensor, Tensor, Tensor, float, Tensor], None]
FiveTensorsOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
PlaceKvOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
LinearOp = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
SiluMulOp = Callable[[Tensor, Tensor], None]
SampleOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Record = Callable[[Callable[[], object]], Callable[[], None]]
"""Turns a function of fixed memory into a replay, which does to the same memory what the function's ops do."""


@dataclass(frozen=True)
class Ops:
    """One implementation of every op; arguments and shapes as in `reference.py` of each op."""

    backend: Backend
    attention: AttentionOp
    key_mass: KeyMassOp
    store_kv: FiveTensorsOp
    place_kv: PlaceKvOp
    rope: FiveTensorsOp
    rms_norm: RmsNormOp
    add_rms_norm: AddRmsNormOp
    silu_mul: SiluMulOp
    sample: SampleOp
    linear: LinearOp
    invariant_linear: LinearOp | None = None
    """As `linear`, with a row's bits depending on that row alone, where there is such a form."""
    shares_prefixes: bool = False
    """Whether `attention` reads keys that a prefix group shares once for all of it."""
    widens_weights: bool = False
    """Whether `linear` multiplies 16-bit weights with fp32 rows without a whole copy of them."""
    record: Record | None = None
    """Keeps the ops that a function calls, none computed, where the backend can; `linear` only up to `few_rows`."""
    few_rows: Callable[[torch.dtype, torch.dtype], int] | None = None
    """(format of rows, format of weights) -> the most rows that `linear` multiplies by a loop of the backend's own; the
    first call for two formats measures it, some tens of milliseconds."""


def select(device: torch.device, backend: Backend | None = None) -> Ops:
    """The ops for tensors on `device`; by default triton on CUDA and cpu elsewhere.

    Raises ValueError for an unknown backend or one that cannot serve the device, ImportError (with the way out in its
    text) when Triton or the compiled extension is missing.
    """
    if backend is None:
        backend = "triton" if device.type == "cuda" else "cpu"
    if backend == "reference":
        return _reference()
    if backend == "triton":
        # Triton's interpreter runs the kernels on CPU tensors.
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend 'triton' needs a CUDA device, not {device}: use 'cpu' or 'reference'")
        return _triton()
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend 'cpu' needs tensors on the CPU, not on {device}: use 'triton' or 'reference'")
        return _cpu()
    raise ValueError(f"unknown backend {backend!r}: one of 'reference', 'triton', 'cpu'")


def _reference() -> Ops:
    """Plain torch on any device."""
    from kvlite.kernels.attention.reference import attention
    from kvlite.kernels.key_mass.reference import key_mass
    from kvlite.kernels.linear.reference import linear
    from kvlite.kernels.place_kv.reference import place_kv
    from kvlite.kernels.rms_norm.reference import add_rms_norm, rms_norm
    from kvlite.kernels.rope.reference import rope
    from kvlite.kernels.sampling.reference import sample
    from kvlite.kernels.silu_mul.reference import silu_mul
    from kvlite.kernels.store_kv.reference import store_kv

    return Ops(
        "reference", attention, key_mass, store_kv, place_kv, rope, rms_norm, add_rms_norm, silu_mul, sample, linear
    )  # fmt: skip


def _triton() -> Ops:
    """Triton kernels on CUDA."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        raise ImportError("backend 'triton' needs the package triton: pip install 'triton>=3.6'") from error
    from kvlite.kernels.attention.kernel import attention
    from kvlite.kernels.key_mass.kernel import key_mass
    from kvlite.kernels.linear.kernel import linear
    from kvlite.kernels.place_kv.kernel import place_kv
    from kvlite.kernels.rms_norm.kernel import add_rms_norm, rms_norm
    from kvlite.kernels.rope.kernel import rope
    from kvlite.kernels.sampling.kernel import sample
    from kvlite.kernels.silu_mul.kernel import silu_mul
    from kvlite.kernels.store_kv.kernel import store_kv

    return Ops(
        "triton", attention, key_mass, store_kv, place_kv, rope, rms_norm, add_rms_norm, silu_mul, sample, linear,
        shares_prefixes=True,
    )  # fmt: skip


_DTYPE_NAME = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


_ARRAY = "_kvlite_array"


def _array(x: Tensor) -> npt.NDArray[Any]:
    """A numpy view of the same memory; 16-bit floats as uint16, because numpy has no bfloat16.

    Kept with the tensor: a decode step asks a thousand times for the views of the same weights and buffers, and making
    one costs as much as a call down. A tensor whose memory is exchanged (`set_`, `resize_`) must not come here.
    """
    found: npt.NDArray[Any] | None = getattr(x, _ARRAY, None)
    if found is None:
        # The view is a tensor of its own, so that the array does not keep `x` alive in a cycle.
        is_half = x.dtype == torch.bfloat16 or x.dtype == torch.float16
        found = x.view(torch.uint16).numpy() if is_half else x.detach().numpy()
        setattr(x, _ARRAY, found)
    return found


class _RustKernels:
    """The Rust twins behind the signatures of `Ops`: torch tensors in, numpy views of the same memory down."""

    def __init__(self, core: Any) -> None:
        self._attention = core.cpu_attention
        self._key_mass = core.cpu_key_mass
        self._store_kv = core.cpu_store_kv
        self._place_kv = core.cpu_place_kv
        self._linear = core.cpu_linear
        self._rms_norm = core.cpu_rms_norm
        self._add_rms_norm = core.cpu_add_rms_norm
        self._rope = core.cpu_rope
        self._silu_mul = core.cpu_silu_mul
        self._sample = core.cpu_sample
        self._tape = core.Tape
        self.num_threads: Callable[[], int] = core.cpu_num_threads

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        seq_row: Tensor,
        last_key: Tensor,
        scale: float,
        window: int,
        out: Tensor,
        lse: Tensor,
        prefix_group: Tensor | None = None,
        group_seqs: Tensor | None = None,
    ) -> None:
        """As `kernels/attention/reference.py`."""
        self._attention(
            _array(q),
            _array(k_cache),
            _array(v_cache),
            _array(block_table),
            _array(query_start),
            _array(context_len),
            _array(seq_row),
            _array(last_key),
            scale,
            window,
            _array(out),
            _array(lse),
            _DTYPE_NAME[q.dtype],
            None if prefix_group is None else _array(prefix_group),
            None if group_seqs is None else _array(group_seqs),
        )

    def key_mass(
        self,
        q: Tensor,
        lse: Tensor,
        k_cache: Tensor,
        block_table_row: Tensor,
        rows: Tensor,
        last_key: Tensor,
        start: int,
        end: int,
        scale: float,
    ) -> Tensor:
        """As `kernels/key_mass/reference.py`."""
        if not 0 <= start <= end:
            raise ValueError(f"key range [{start}, {end}) must start at 0 or later and not end before it starts")
        mass = torch.empty(end - start, dtype=torch.float32)
        table, row, last = _array(block_table_row), _array(rows), _array(last_key)
        dtype = _DTYPE_NAME[q.dtype]
        self._key_mass(
            _array(q), _array(lse), _array(k_cache), table, row, last, start, end, scale, _array(mass), dtype
        )
        return mass

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """As `kernels/store_kv/reference.py`."""
        slots = _array(slot_mapping)
        self._store_kv(_array(k), _array(v), _array(k_cache), _array(v_cache), slots, _DTYPE_NAME[k.dtype])

    def place_kv(
        self, kv_pool: Tensor, source_slot: Tensor, target_slot: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        """As `kernels/place_kv/reference.py`."""
        slots = _array(source_slot), _array(target_slot)
        dtype = _DTYPE_NAME[kv_pool.dtype]
        self._place_kv(_array(kv_pool), *slots, _array(positions), _array(cos), _array(sin), dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """As `kernels/linear/reference.py`."""
        self.invariant_linear(x, weight, bias, out, invariant=False)

    def invariant_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, invariant: bool = True
    ) -> None:
        """As `linear`; a row's bits depend on that row alone."""
        b = None if bias is None else _array(bias)
        dtypes = _DTYPE_NAME[x.dtype], _DTYPE_NAME[weight.dtype]
        self._linear(_array(x), _array(weight), b, _array(out), *dtypes, invariant)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """As `kernels/rms_norm/reference.py`."""
        self._rms_norm(_array(x), _array(weight), eps, _array(out), _DTYPE_NAME[x.dtype])

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """As `kernels/rms_norm/reference.py`."""
        self._add_rms_norm(_array(x), _array(residual), _array(weight), eps, _array(out), _DTYPE_NAME[x.dtype])

    def rope(self, q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
        """As `kernels/rope/reference.py`."""
        self._rope(_array(q), _array(k), _array(positions), _array(cos), _array(sin), _DTYPE_NAME[q.dtype])

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """As `kernels/silu_mul/reference.py`."""
        self._silu_mul(_array(gate_up), _array(out), _DTYPE_NAME[out.dtype])

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        position: Tensor,
    ) -> Tensor:
        """As `kernels/sampling/reference.py`."""
        token = torch.empty(logits.shape[0], dtype=torch.int32)
        each = [_array(x) for x in (temperature, top_k, top_p, min_p, seed, position, token)]
        self._sample(_array(logits), *each, _DTYPE_NAME[logits.dtype])
        return token

    def record(self, run: Callable[[], object]) -> Callable[[], None]:
        """As `Ops.record`: one call down replays them all."""
        replay: Callable[[], None] = self._tape.record(run).replay
        return replay


_crossings: dict[tuple[torch.dtype, torch.dtype, int], int] = {}
"""What `_few_rows` found for formats of rows and weights and a number of threads: one per process, so that its engines
compute alike."""


@torch.inference_mode()
def _few_rows(dtype: torch.dtype, weight_dtype: torch.dtype, few: LinearOp, many: LinearOp) -> int:
    """The most rows of FEW_ROWS, or ANY_ROWS, for which `few` is not slower than `many`, with the present threads.

    The crossing depends on the machine: some multiply matrices with units of their own, some have no 16-bit products.
    Costs a tenth or two of a second, once for each pair of formats.
    """
    weight = torch.randn(CROSSING_SHAPE, generator=torch.Generator().manual_seed(0)).to(weight_dtype)

    def best_s(multiply: LinearOp, num_rows: int) -> float:
        x = torch.ones(num_rows, weight.shape[1], dtype=dtype)
        out = torch.empty(num_rows, weight.shape[0], dtype=dtype)
        times: list[float] = []
        for _ in range(CROSSING_REPEATS):
            # As in a layer, where Rust ops come between two products: torch's workers have gone to sleep meanwhile.
            few(x[:1], weight, None, out[:1])
            start = time.perf_counter()
            multiply(x, weight, None, out)
            times.append(time.perf_counter() - start)
        return min(times)

    if best_s(few, MANY_ROWS) <= best_s(many, MANY_ROWS):
        return ANY_ROWS
    for num_rows in reversed(FEW_ROWS[1:]):
        if best_s(few, num_rows) <= best_s(many, num_rows):
            return num_rows
    return FEW_ROWS[0]


def _cpu() -> Ops:
    """Rust for everything but those products of many rows for which torch is faster."""
    reference = _reference()
    try:
        rust = _RustKernels(importlib.import_module("kvlite._core"))
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"backend 'cpu' needs the compiled extension kvlite._core ({error}): run `make build`"
        ) from error

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        num_rows = x.shape[0]
        if num_rows <= FEW_ROWS[0] or num_rows <= few_rows(x.dtype, weight.dtype):
            rust.linear(x, weight, bias, out)
        else:
            many_rows(x, weight, bias, out)

    def many_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if weight.dtype == x.dtype:
            reference.linear(x, weight, bias, out)
        else:
            for start in range(0, weight.shape[0], WIDENED_ROWS):
                part = slice(start, start + WIDENED_ROWS)
                reference.linear(x, weight[part], None if bias is None else bias[part], out[:, part])

    def few_rows(dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
        key = dtype, weight_dtype, rust.num_threads()
        if key not in _crossings:
            _crossings[key] = _few_rows(dtype, weight_dtype, rust.linear, many_rows)
        return _crossings[key]

    return Ops(
        backend="cpu",
        attention=rust.attention,
        key_mass=rust.key_mass,
        store_kv=rust.store_kv,
        place_kv=rust.place_kv,
        rope=rust.rope,
        rms_norm=rust.rms_norm,
        add_rms_norm=rust.add_rms_norm,
        silu_mul=rust.silu_mul,
        sample=rust.sample,
        linear=linear,
        invariant_linear=rust.invariant_linear,
        shares_prefixes=True,
        widens_weights=True,
        record=rust.record,
        few_rows=few_rows,
    )
