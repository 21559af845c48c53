"""The Rust ops over rows, as Python calls them: what the binding refuses, and that nothing is written then.

Numbers are compared in tests/kernels, which runs every backend, and in rust/kvlite-cpu/tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvlite import _core

Arrays = dict[str, Any]


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def nan(*shape: int) -> np.ndarray[Any, Any]:
    return np.full(shape, np.nan, np.float32)


def linear() -> Arrays:
    return {"x": floats(3, 8), "weight": floats(5, 8), "bias": floats(5), "out": nan(3, 5)}


def rms_norm() -> Arrays:
    return {"x": floats(3, 2, 8), "weight": floats(8), "eps": 1e-5, "out": nan(3, 2, 8)}


def add_rms_norm() -> Arrays:
    return {"x": floats(3, 8), "residual": floats(3, 8), "weight": floats(8), "eps": 1e-5, "out": nan(3, 8)}


def rope() -> Arrays:
    positions = np.array([0, 6, 2], np.int32)
    return {
        "q": floats(3, 2, 8),
        "k": floats(3, 1, 8),
        "positions": positions,
        "cos": floats(7, 4),
        "sin": floats(7, 4),
    }


def silu_mul() -> Arrays:
    return {"gate_up": floats(3, 10), "out": nan(3, 5)}


def sample() -> Arrays:
    each: Arrays = {"temperature": floats(3) ** 2, "top_p": floats(3) ** 2, "min_p": np.zeros(3, np.float32)}
    each |= {"top_k": np.array([0, 2, 9], np.int32), "seed": np.arange(3), "position": np.arange(3)}
    return {"logits": floats(3, 8), **each, "token": np.full(3, 77, np.int32)}


def place_kv() -> Arrays:
    return {
        "kv_pool": floats(2, 3, 2, 2, 4, 8),
        "source_slot": np.array([0, 3, 3], np.int32),
        "target_slot": np.array([7, 1, 4], np.int32),
        "positions": np.array([0, 6, 2], np.int32),
        "cos": floats(7, 4),
        "sin": floats(7, 4),
    }


OPS: dict[Callable[[], Arrays], tuple[Callable[..., None], tuple[str, ...]]] = {
    linear: (_core.cpu_linear, ("out",)),
    rms_norm: (_core.cpu_rms_norm, ("out",)),
    add_rms_norm: (_core.cpu_add_rms_norm, ("out", "residual")),
    rope: (_core.cpu_rope, ("q", "k")),
    silu_mul: (_core.cpu_silu_mul, ("out",)),
    sample: (_core.cpu_sample, ("token",)),
    place_kv: (_core.cpu_place_kv, ("kv_pool",)),
}


def frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


REFUSALS: list[tuple[Callable[[], Arrays], str, Callable[[Arrays], Any]]] = [
    (linear, "weight", lambda a: a["weight"][:, :7].copy()),
    (linear, "weight", lambda a: floats(8, 5).T),
    (linear, "x", lambda a: a["x"].astype(np.float64)),
    (linear, "x", lambda a: a["x"][0]),
    (linear, "bias", lambda a: floats(4)),
    (linear, "out", lambda a: nan(3, 6)),
    (linear, "out", lambda a: nan(2, 5)),
    (linear, "out", lambda a: frozen(nan(3, 5))),
    (linear, "out", lambda a: a["weight"][:3, :5]),
    (linear, "out", lambda a: np.broadcast_to(nan(1, 5), (3, 5)).view()),
    (linear, "dtype", lambda a: "int8"),
    (linear, "dtype", lambda a: "float16"),
    (rms_norm, "weight", lambda a: floats(7)),
    (rms_norm, "out", lambda a: nan(3, 8)),
    (rms_norm, "x", lambda a: a["x"][None]),
    (rms_norm, "out", lambda a: np.lib.stride_tricks.as_strided(nan(40), (3, 2, 8), (4, 32, 4))),
    (add_rms_norm, "residual", lambda a: a["x"]),
    (add_rms_norm, "residual", lambda a: floats(2, 8)),
    (add_rms_norm, "out", lambda a: a["weight"][None]),
    (rope, "positions", lambda a: np.array([0, 7, 2], np.int32)),
    (rope, "positions", lambda a: np.array([0, -1, 2], np.int32)),
    (rope, "positions", lambda a: np.array([0, 1], np.int32)),
    (rope, "cos", lambda a: floats(7, 5)),
    (rope, "sin", lambda a: floats(6, 4)),
    (rope, "k", lambda a: floats(3, 1, 6)),
    (place_kv, "source_slot", lambda a: np.array([0, 8, 3], np.int32)),
    (place_kv, "source_slot", lambda a: np.array([0, 7, 3], np.int32)),
    (place_kv, "target_slot", lambda a: np.array([7, 1], np.int32)),
    (place_kv, "target_slot", lambda a: np.array([7, 1, -1], np.int32)),
    (place_kv, "target_slot", lambda a: np.array([7, 1, 7], np.int32)),
    (place_kv, "positions", lambda a: np.array([0, 7, 2], np.int32)),
    (place_kv, "cos", lambda a: floats(7, 5)),
    (place_kv, "sin", lambda a: floats(6, 4)),
    (place_kv, "kv_pool", lambda a: floats(2, 3, 2, 2, 4, 16)[..., :8]),
    (place_kv, "kv_pool", lambda a: floats(2, 3, 3, 2, 4, 8)),
    (place_kv, "kv_pool", lambda a: frozen(floats(2, 3, 2, 2, 4, 8))),
    (silu_mul, "gate_up", lambda a: floats(3, 9)),
    (silu_mul, "out", lambda a: a["gate_up"][:, :5]),
    (sample, "logits", lambda a: a["logits"][:2]),
    (sample, "logits", lambda a: floats(8, 3).T),
    (sample, "top_k", lambda a: a["top_k"].astype(np.int64)),
    (sample, "seed", lambda a: a["seed"].astype(np.int32)),
    (sample, "position", lambda a: np.arange(4)),
    (sample, "token", lambda a: a["top_k"]),
]


MISMATCHES = (("cos", "sin"), ("out", "x"), ("logits", "temperature"))
"""Of two that do not fit together, (the one that was changed, the one that is named)."""


@pytest.mark.parametrize(("op", "name", "change"), REFUSALS)
def test_bad_arguments_are_named_before_anything_is_written(
    op: Callable[[], Arrays], name: str, change: Callable[[Arrays], Any]
) -> None:
    call, outputs = OPS[op]
    arrays = op()
    arrays[name] = change(arrays)
    before = {output: arrays[output].copy() for output in outputs}
    with pytest.raises(_core.InvalidArgument) as caught:
        call(**arrays)
    assert caught.value.param == name or (name, caught.value.param) in MISMATCHES
    for output in outputs:
        np.testing.assert_array_equal(arrays[output], before[output])


def test_a_good_call_of_each_is_accepted() -> None:
    for op, (call, outputs) in OPS.items():
        arrays = op()
        call(**arrays)
        assert all(np.isfinite(arrays[output]).all() for output in outputs)


def test_no_rows_is_no_work() -> None:
    out = nan(3, 5)
    _core.cpu_linear(floats(0, 8), floats(5, 8), None, out[:0])
    _core.cpu_rms_norm(floats(0, 5), floats(5), 1e-5, out[:0])
    _core.cpu_silu_mul(floats(0, 10), out[:0])
    _core.cpu_rope(floats(0, 2, 8), floats(0, 1, 8), np.zeros(0, np.int32), floats(7, 4), floats(7, 4))
    assert np.isnan(out).all()
