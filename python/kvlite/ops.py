"""The device operations of the engine, chosen once at start: name -> Triton kernel, Rust CPU kernel or torch reference.

The only importer of `kvlite.kernels` and of the `cpu_*` functions of `kvlite._core`. Knows tensors only. Triton is
imported when its backend is selected and never before. Called by `layers` and `runner`, through one `Ops` value.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

Backend = Literal["reference", "triton", "cpu"]

FEW_ROWS = 32
"""Most rows of fp32 that the Rust product is for: half the time of MKL at 8 rows, the same at 32 (Zen 3, AVX2)."""
FEW_HALF_ROWS = 16
"""The same for 16-bit rows, which oneDNN multiplies with the matrix units of newer machines."""
WIDENED_ROWS = 512
"""Rows of a 16-bit matrix that are widened at once for many fp32 rows: a few megabytes, still in a cache when used."""

AttentionOp = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int, Tensor, Tensor], None
]
KeyMassOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]
RmsNormOp = Callable[[Tensor, Tensor, float, Tensor], None]
AddRmsNormOp = Callable[[Tensor, Tensor, Tensor, float, Tensor], None]
FiveTensorsOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
PlaceKvOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
LinearOp = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
SiluMulOp = Callable[[Tensor, Tensor], None]
SampleOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


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
    widens_weights: bool = False
    """Whether `linear` multiplies 16-bit weights with fp32 rows without a whole copy of them."""


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
        "triton", attention, key_mass, store_kv, place_kv, rope, rms_norm, add_rms_norm, silu_mul, sample, linear
    )  # fmt: skip


_DTYPE_NAME = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _array(x: Tensor) -> npt.NDArray[Any]:
    """A numpy view of the same memory; 16-bit floats as uint16, because numpy has no bfloat16."""
    if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
        return x.view(torch.uint16).numpy()
    return x.numpy()


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
    ) -> None:
        """As `kernels/attention/reference.py`."""
        self._attention(
            _array(q),
            _array(k_cache),
            _array(v_cache),
            block_table.numpy(),
            query_start.numpy(),
            context_len.numpy(),
            seq_row.numpy(),
            last_key.numpy(),
            scale,
            window,
            _array(out),
            lse.numpy(),
            _DTYPE_NAME[q.dtype],
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
        table, row, last = block_table_row.numpy(), rows.numpy(), last_key.numpy()
        dtype = _DTYPE_NAME[q.dtype]
        self._key_mass(
            _array(q), lse.numpy(), _array(k_cache), table, row, last, start, end, scale, mass.numpy(), dtype
        )
        return mass

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """As `kernels/store_kv/reference.py`."""
        slots = slot_mapping.numpy()
        self._store_kv(_array(k), _array(v), _array(k_cache), _array(v_cache), slots, _DTYPE_NAME[k.dtype])

    def place_kv(
        self, kv_pool: Tensor, source_slot: Tensor, target_slot: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        """As `kernels/place_kv/reference.py`."""
        slots = source_slot.numpy(), target_slot.numpy()
        dtype = _DTYPE_NAME[kv_pool.dtype]
        self._place_kv(_array(kv_pool), *slots, positions.numpy(), cos.numpy(), sin.numpy(), dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """As `kernels/linear/reference.py`; a row's bits depend on that row alone."""
        b = None if bias is None else _array(bias)
        self._linear(_array(x), _array(weight), b, _array(out), _DTYPE_NAME[x.dtype], _DTYPE_NAME[weight.dtype])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """As `kernels/rms_norm/reference.py`."""
        self._rms_norm(_array(x), _array(weight), eps, _array(out), _DTYPE_NAME[x.dtype])

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """As `kernels/rms_norm/reference.py`."""
        self._add_rms_norm(_array(x), _array(residual), _array(weight), eps, _array(out), _DTYPE_NAME[x.dtype])

    def rope(self, q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
        """As `kernels/rope/reference.py`."""
        self._rope(_array(q), _array(k), positions.numpy(), cos.numpy(), sin.numpy(), _DTYPE_NAME[q.dtype])

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """As `kernels/silu_mul/reference.py`."""
        self._silu_mul(_array(gate_up), _array(out), _DTYPE_NAME[out.dtype])


def _cpu() -> Ops:
    """Rust for everything but sampling and products of many rows."""
    reference = _reference()
    try:
        rust = _RustKernels(importlib.import_module("kvlite._core"))
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"backend 'cpu' needs the compiled extension kvlite._core ({error}): run `make build`"
        ) from error

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if x.shape[0] <= (FEW_ROWS if x.dtype == torch.float32 else FEW_HALF_ROWS):
            rust.linear(x, weight, bias, out)
        elif weight.dtype == x.dtype:
            reference.linear(x, weight, bias, out)
        else:
            for start in range(0, weight.shape[0], WIDENED_ROWS):
                part = slice(start, start + WIDENED_ROWS)
                reference.linear(x, weight[part], None if bias is None else bias[part], out[:, part])

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
        sample=reference.sample,
        linear=linear,
        invariant_linear=rust.linear,
        widens_weights=True,
    )
