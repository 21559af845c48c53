"""Prefix groups: they change how keys are read, not what comes out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvlite.ops import Ops
from tests.kernels.conftest import INTERPRETED
from tests.kernels.paged import Batch, Shape, ints, make_batch, oracle

SEQUENCES = [(530, [529]), (700, [697, 698, 699]), (300, [299]), (515, [514]), (60, [59])]
MEMBERS = (0, 1, 2, 3)


def shared_batch(shape: Shape, num_keys: int) -> Batch:
    """MEMBERS have their first `num_keys` keys in the blocks of the first of them."""
    batch = make_batch(shape, SEQUENCES, seed=4)
    blocks = -(-num_keys // shape.block_size)
    leader = batch.seq_row[0]
    for s in MEMBERS[1:]:
        batch.block_table[batch.seq_row[s], :blocks] = batch.block_table[leader, :blocks]
        for own, first in ((batch.keys[s], batch.keys[0]), (batch.values[s], batch.values[0])):
            own[: blocks * shape.block_size] = first[: min(blocks * shape.block_size, len(own))]
    return batch


@pytest.mark.parametrize(
    ("num_keys", "groups", "members"),
    [
        (256, [[0, 4, 256]], MEMBERS),
        (288, [[2, 2, 256], [0, 0, 0], [0, 2, 256]], (3, 0, 2, 1)),
        (288, [[1, 3, 288], [0, 0, 7]], (9, 2, 0, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_group_get_what_they_get_alone(
    ops: Ops, dtype: torch.dtype, num_keys: int, groups: list[list[int]], members: tuple[int, ...]
) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("fp32 takes the same way under the interpreter")
    batch = shared_batch(Shape(num_heads=4, kv_heads=2, head_dim=32, block_size=16, dtype=dtype), num_keys)
    alone = batch.run(ops)
    together = batch.run(ops, torch.tensor(groups, dtype=torch.int32), ints(*members))
    if ops.backend == "reference":  # two sums merged instead of one
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other, one)
    else:
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    expected, expected_lse = oracle(batch)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(together[0].double(), torch.from_numpy(expected), atol=bound, rtol=bound)
    torch.testing.assert_close(together[1].double(), torch.from_numpy(expected_lse), atol=1e-2, rtol=1e-3)


def prefixed_batch(shape: Shape, sequences: list[tuple[int, list[int]]], groups: list[tuple[list[int], int]]) -> Batch:
    """Sequences of each group (numbers of sequences, keys) have those keys, whole blocks, in the first one's blocks."""
    batch = make_batch(shape, sequences, seed=5)
    for members, num_keys in groups:
        blocks, leader = num_keys // shape.block_size, members[0]
        for s in members[1:]:
            batch.block_table[batch.seq_row[s], :blocks] = batch.block_table[batch.seq_row[leader], :blocks]
            batch.keys[s][:num_keys], batch.values[s][:num_keys] = (
                batch.keys[leader][:num_keys],
                batch.values[leader][:num_keys],
            )
    return batch


def tables(groups: list[tuple[list[int], int]], room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """prefix_group and group_seqs, with at least `room` entries each, as a decode graph has them."""
    rows, members = [], []
    for seqs, num_keys in groups:
        rows += [[len(members), len(seqs), num_keys]]
        members += seqs
    rows += [[0, 0, 0]] * (room - len(rows))
    return torch.tensor(rows, dtype=torch.int32), ints(*members, *[0] * (room - len(members)))


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an op allocates is NaN: parts that an earlier call left in the same memory could pass for written ones."""
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: torch.full(*size, math.nan, **kind))
    if INTERPRETED:  # searches take several turns, and a program walks all splits
        monkeypatch.setattr("kvlite.kernels.attention.splits._SEARCH", 4)
        monkeypatch.setattr("kvlite.kernels.attention.kernel._DECODE_PROGRAMS", 1)


# Groups that fill a tile of 16 rows, exceed it and leave rows of it empty; one alone; nothing shared; a padding row.
GROUPS = [([5, 1, 3, 2, 6], 512), ([4], 0), ([8], 256), ([0, 7], 256)]
DECODES = [*((context, [context - 1]) for context in (257, 520, 515, 513, 30, 512, 600, 256, 270)), (0, [-1])]
PREFILL = (300, [297, 298, 299])
CASES = {
    "4 heads to 1": (Shape(num_heads=4, kv_heads=1, head_dim=16, block_size=32), []),
    "beside a prefill": (Shape(num_heads=4, kv_heads=1, head_dim=16, block_size=32), [PREFILL]),
    "7 heads to 1": (Shape(num_heads=7, kv_heads=1, head_dim=24, block_size=128), []),
    "1 to 1, two of them": (Shape(num_heads=2, kv_heads=2, head_dim=8, block_size=16), []),
}


@pytest.mark.parametrize(("shape", "more"), CASES.values(), ids=CASES)
def test_groups_of_any_size_change_no_bit(ops: Ops, shape: Shape, more: list[tuple[int, list[int]]]) -> None:
    groups = [*GROUPS[:3], ([*GROUPS[3][0], *range(10, 10 + len(more))], 256)]
    batch = prefixed_batch(shape, DECODES + more, groups)
    alone, together = batch.run(ops), batch.run(ops, *tables(groups, room=12))
    assert_same(ops, alone, together)
    expected, expected_lse = oracle(batch)
    torch.testing.assert_close(together[0].double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1].double(), torch.from_numpy(expected_lse), atol=1e-5, rtol=1e-5)


def assert_same(ops: Ops, alone: tuple[torch.Tensor, ...], together: tuple[torch.Tensor, ...]) -> None:
    """Bit for bit; the reference merges two sums instead of one."""
    for one, other in zip(alone, together, strict=True):
        bound = 2e-6 if ops.backend == "reference" else 0.0
        torch.testing.assert_close(other, one, atol=bound, rtol=bound)


def test_splits_that_grow_with_the_distance_are_shared_too(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.backend == "triton":  # splits of 64 keys from key 1,024 on, the group's last one cut short
        monkeypatch.setattr("kvlite.kernels.attention.kernel.SPLIT", 32)
    groups = [([0, 1], 1184)]
    batch = prefixed_batch(Shape(1, 1, 8, 32), [(1290, [1289]), (1200, [1199])], groups)
    together = batch.run(ops, *tables(groups))
    assert_same(ops, batch.run(ops), together)
    torch.testing.assert_close(together[0].double(), torch.from_numpy(oracle(batch)[0]), atol=1e-5, rtol=1e-5)


def test_a_tile_reads_shared_splits_where_its_first_member_has_them(ops: Ops) -> None:
    """So it reads them once: in the blocks that another member's table names there lies NaN."""
    if ops.backend == "cpu":
        pytest.skip("it refuses tables that differ")
    groups = [([0, 1, 2], 256)]
    batch = prefixed_batch(Shape(4, 2, 16, 16), [(300, [299]), (270, [269]), (256, [255])], groups)
    table = batch.block_table.clone()
    for s in (1, 2):
        table[batch.seq_row[s], :16] = len(batch.k_cache) - 1
    together = replace(batch, block_table=table).run(ops, *tables(groups))
    torch.testing.assert_close(together[0].double(), torch.from_numpy(oracle(batch)[0]), atol=1e-5, rtol=1e-5)


def test_a_window_ignores_groups(ops: Ops) -> None:
    batch = shared_batch(Shape(num_heads=4, kv_heads=2, head_dim=32, block_size=16, window=40), 256)
    alone, together = batch.run(ops), batch.run(ops, torch.tensor([[0, 4, 256]], dtype=torch.int32), ints(*MEMBERS))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
