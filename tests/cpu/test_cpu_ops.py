"""The Rust CPU ops, as Python calls them, against the torch references: formats, strides, poison, refusals.

The Rust tests (rust/kvlite-cpu/tests) hold the ops to f64 oracles and to bitwise laws; here it is the binding.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from kvlite import _core
from kvlite.kernels.attention.reference import attention as reference_attention
from kvlite.kernels.key_mass.reference import key_mass as reference_key_mass
from kvlite.kernels.store_kv.reference import store_kv as reference_store_kv

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


def array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same memory for NumPy."""
    return x.numpy() if x.dtype in (torch.float32, torch.int32) else x.view(torch.int16).numpy().view(np.uint16)


def nan(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@dataclass
class Problem:
    """Sequences of (context, rows at its end) over a shuffled pool, unused slots NaN; q is part of a QKV matrix."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    seq_row: torch.Tensor
    last_key: torch.Tensor
    scale: float
    window: int
    dtype: str

    def arguments(self) -> list[Any]:
        tensors = [self.q, self.k_cache, self.v_cache, self.block_table, self.query_start, self.context_len]
        return [*tensors, self.seq_row, self.last_key, self.scale, self.window]

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        t, h, d = self.q.shape
        return nan(t, h, d, dtype=self.q.dtype), nan(t, h, dtype=torch.float32)

    def run(self, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self.outputs()
        names = list(Problem.__dataclass_fields__)[:10]
        values: dict[str, Any] = dict(zip(names, self.arguments(), strict=True)) | {"out": out, "lse": lse} | changes
        arrays = {k: array(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        _core.cpu_attention(**arrays, dtype=self.dtype)
        return out, lse


def make(
    sequences: list[tuple[int, int]],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    block_size: int = 16,
    window: int = 0,
    dtype: str = "float32",
    layers: int = 2,
) -> Problem:
    generator = torch.Generator().manual_seed(1)
    blocks_of = [-(-context // block_size) for context, _ in sequences]
    num_blocks, rows = sum(blocks_of) + 2, sum(n for _, n in sequences)
    pool = nan(num_blocks, layers, 2, kv_heads, block_size, dim, dtype=DTYPES[dtype]).transpose(3, 4)
    table = torch.full((len(sequences) + 1, max(blocks_of) + 1), -5, dtype=torch.int32)
    order = torch.randperm(num_blocks, generator=generator).tolist()
    starts, contexts, last = [0], [], []
    for s, (context, n) in enumerate(sequences):
        for b in range(blocks_of[s]):
            block = order.pop()
            table[s + 1, b] = block
            used = min(block_size, context - b * block_size)
            pool[block, layers - 1, :, :used] = torch.randn(2, used, kv_heads, dim, generator=generator).to(pool.dtype)
        starts.append(starts[-1] + n)
        contexts.append(context)
        last += range(context - n, context)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, generator=generator).to(pool.dtype)
    return Problem(
        q=qkv[:, : heads * dim].view(rows, heads, dim),
        k_cache=pool[:, layers - 1, 0],
        v_cache=pool[:, layers - 1, 1],
        block_table=table,
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor(contexts, dtype=torch.int32),
        seq_row=torch.arange(1, len(sequences) + 1, dtype=torch.int32),
        last_key=torch.tensor(last, dtype=torch.int32),
        scale=dim**-0.5,
        window=window,
        dtype=dtype,
    )


SHAPES: list[dict[str, Any]] = [
    {"sequences": [(40, 40), (1, 1), (300, 1), (257, 3)]},
    {"sequences": [(9, 9), (31, 2), (256, 1)], "heads": 7, "kv_heads": 1, "dim": 20, "block_size": 3},
    {"sequences": [(5, 5), (600, 33)], "heads": 14, "kv_heads": 2, "window": 100},
    {"sequences": [(17, 4), (2, 1)], "heads": 3, "kv_heads": 3, "dim": 128, "block_size": 1},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_the_reference(shape: dict[str, Any], dtype: str):
    problem = make(**shape, dtype=dtype)
    expected, expected_lse = problem.outputs()
    reference_attention(*problem.arguments(), expected, expected_lse)
    out, lse = problem.run()
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-5)


def test_rows_outside_the_sequences_and_rows_without_keys():
    problem = make([(40, 6)])
    problem.query_start = torch.tensor([1, 5], dtype=torch.int32)
    problem.last_key[2] = -1
    out, lse = problem.run()
    assert out[[0, 5]].isnan().all() and lse[[0, 5]].isnan().all()
    assert (out[2] == 0).all() and (lse[2] == float("-inf")).all()
    assert out[[1, 3, 4]].isfinite().all()


def test_results_are_the_same_with_one_thread_and_with_three():
    problem = make([(40, 40), (1, 1), (600, 50), (300, 1)])
    before = _core.cpu_num_threads()
    try:
        _core.cpu_set_num_threads(1)
        out, lse = problem.run()
        _core.cpu_set_num_threads(3)
        assert _core.cpu_num_threads() == 3
        again, lse_again = problem.run()
    finally:
        _core.cpu_set_num_threads(before)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_other_python_threads_run_while_an_op_computes():
    problem = make([(2000, 500)])
    running, ticks = threading.Event(), [0]

    def tick() -> None:
        while not running.is_set():
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks[0]
    problem.run()
    during = ticks[0] - before
    running.set()
    thread.join()
    assert during > 100


def test_no_sequences_is_no_work():
    problem = make([(5, 1)])
    empty = torch.zeros(0, dtype=torch.int32)
    out, _ = problem.run(query_start=torch.zeros(1, dtype=torch.int32), context_len=empty, seq_row=empty)
    assert out.isnan().all()
    none = problem.run(
        q=problem.q[:0], out=torch.zeros(0, 4, 64), lse=torch.zeros(0, 4), last_key=empty, seq_row=empty,
        context_len=empty, query_start=torch.zeros(1, dtype=torch.int32),
    )  # fmt: skip
    assert none[0].isnan().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("block_table", lambda p: p.block_table + 1000),
        ("block_table", lambda p: p.block_table.long().numpy()),
        ("block_table", lambda p: p.block_table[0]),
        ("context_len", lambda p: p.context_len + 1000),
        ("seq_row", lambda p: p.seq_row + 3),
        ("query_start", lambda p: p.query_start + 1),
        ("last_key", lambda p: p.last_key[:-1]),
        ("window", lambda p: -1),
        ("q", lambda p: p.q.double().numpy()),
        ("q", lambda p: p.q.transpose(1, 2).contiguous().transpose(1, 2)),
        ("k_cache", lambda p: p.k_cache[..., :32]),
        ("v_cache", lambda p: p.v_cache[:-1]),
        ("v_cache", lambda p: p.v_cache[:, :, :1]),
        ("out", lambda p: torch.empty(1, 4, 64)),
        ("out", lambda p: p.q),
        ("out", lambda p: torch.empty(1, 4, 64).expand(7, 4, 64)),
        ("lse", lambda p: torch.empty(7, 3)),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(name: str, change: Any):
    problem = make([(40, 4), (20, 3)])
    out, lse = problem.outputs()
    before = problem.q.clone()
    with pytest.raises(_core.InvalidArgument) as caught:
        problem.run(**({"out": out, "lse": lse} | {name: change(problem)}))
    assert caught.value.param == name
    assert out.isnan().all() and lse.isnan().all() and torch.equal(problem.q, before)


def test_read_only_outputs_and_unknown_formats_are_refused():
    problem = make([(40, 4)])
    out, lse = problem.outputs()
    frozen = out.numpy()
    frozen.flags.writeable = False
    with pytest.raises(_core.InvalidArgument, match="read-only"):
        problem.run(out=frozen, lse=lse)
    problem.dtype = "int8"
    with pytest.raises(_core.InvalidArgument, match="int8"):
        problem.run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_kv_equals_the_reference_and_touches_nothing_else(dtype: str):
    qkv = torch.randn(5, 8 * 24).to(DTYPES[dtype])
    k, v = qkv[:, 96:144].view(5, 2, 24), qkv[:, 144:].view(5, 2, 24)
    slots = torch.tensor([7, -1, 0, 11, -1], dtype=torch.int32)
    pools = [nan(4, 3, 2, 3, 2, 24, dtype=DTYPES[dtype]) for _ in range(2)]
    reference_store_kv(k, v, pools[0][:, 1, 0], pools[0][:, 1, 1], slots)
    _core.cpu_store_kv(array(k), array(v), array(pools[1][:, 1, 0]), array(pools[1][:, 1, 1]), slots.numpy(), dtype)
    assert torch.equal(pools[0].view(torch.uint8), pools[1].view(torch.uint8))


def test_store_kv_refuses_a_slot_outside_the_pool_before_it_writes():
    k = torch.ones(2, 2, 8)
    pool = nan(4, 2, 3, 2, 8, dtype=torch.float32)
    with pytest.raises(_core.InvalidArgument, match=r"slot_mapping\[1\] is 12") as caught:
        _core.cpu_store_kv(array(k), array(k), array(pool[:, 0]), array(pool[:, 1]), np.array([0, 12], np.int32))
    assert caught.value.param == "slot_mapping"
    assert pool.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_key_mass_equals_the_reference(dtype: str):
    problem = make([(600, 50)], heads=6, kv_heads=2, dim=24, block_size=3, dtype=dtype)
    _, lse = problem.run()
    rows = torch.tensor([49, 3, 17], dtype=torch.int32)
    shared = (problem.q, lse, problem.k_cache, problem.block_table[1], rows, problem.last_key)
    expected = reference_key_mass(*shared, 100, 590, problem.scale)
    out = nan(490, dtype=torch.float32)
    _core.cpu_key_mass(*map(array, shared), 100, 590, problem.scale, out.numpy(), dtype)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(_core.InvalidArgument) as caught:
        _core.cpu_key_mass(*map(array, shared), 100, 700, problem.scale, np.zeros(600, np.float32), dtype)
    assert caught.value.param == "end"
