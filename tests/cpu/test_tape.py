"""Tapes of CPU ops: recording computes nothing, a replay computes everything over the memory as it is then."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kvlite import _core


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def nan(*shape: int) -> np.ndarray[Any, Any]:
    return np.full(shape, np.nan, np.float32)


def test_a_replay_computes_in_order_what_recording_did_not() -> None:
    x, weight, norm, hidden, out = floats(2, 8), floats(6, 8), floats(8), nan(2, 8), nan(2, 6)

    def run() -> None:
        _core.cpu_rms_norm(x, norm, 1e-5, hidden)
        _core.cpu_linear(hidden, weight, None, out)

    tape = _core.Tape.record(run)
    assert len(tape) == 2 and np.isnan(hidden).all() and np.isnan(out).all()
    for _ in range(3):
        x[:] = x + 1  # a replay reads what lies there now
        tape.replay()
        replayed = hidden.copy(), out.copy()
        hidden[:], out[:] = np.nan, np.nan
        run()
        assert np.array_equal(replayed[0], hidden) and np.array_equal(replayed[1], out)
        assert not np.isnan(out).any()


def test_a_tape_keeps_the_arrays_that_it_uses() -> None:
    out = nan(2, 5)
    tape = _core.Tape.record(lambda: _core.cpu_silu_mul(np.ones((2, 10), np.float32), out))
    junk = [np.full((2, 10), 7, np.float32) for _ in range(100)]
    tape.replay()
    np.testing.assert_allclose(out, 1 / (1 + np.exp(-1)), rtol=1e-6)
    assert len(junk) == 100


def test_bad_arguments_are_refused_while_recording_and_those_of_a_replay_by_the_replay() -> None:
    with pytest.raises(_core.InvalidArgument) as caught:
        _core.Tape.record(lambda: _core.cpu_silu_mul(floats(2, 10).astype(np.float64), nan(2, 5)))
    assert caught.value.param == "gate_up"
    positions, q, out = np.zeros(1, np.int32), floats(1, 1, 4), nan(1, 2)

    def run() -> None:
        _core.cpu_rope(q, floats(1, 1, 4), positions, floats(3, 2), floats(3, 2))
        _core.cpu_silu_mul(floats(1, 4), out)

    tape = _core.Tape.record(run)
    positions[0] = 3
    with pytest.raises(_core.InvalidArgument) as caught:
        tape.replay()
    assert caught.value.param == "positions" and np.isnan(out).all()
    positions[0] = 2
    tape.replay()
    assert not np.isnan(out).any()


def test_recording_ends_when_the_function_raises_and_does_not_nest() -> None:
    def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        _core.Tape.record(fails)
    with pytest.raises(_core.InvalidArgument, match="another tape records"):
        _core.Tape.record(lambda: _core.Tape.record(lambda: None))
    out = nan(1, 2)
    _core.cpu_silu_mul(floats(1, 4), out)
    assert not np.isnan(out).any()


def test_other_threads_compute_while_one_records() -> None:
    out = nan(1, 2)

    def run() -> None:
        other = threading.Thread(target=_core.cpu_silu_mul, args=(floats(1, 4), out))
        other.start()
        other.join()

    assert len(_core.Tape.record(run)) == 0
    assert not np.isnan(out).any()
