"""Prefix groups: they change how keys are read, not what comes out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvlite.ops import Ops
from tests.kernels.conftest import INTERPRETED
from tests.kernels.paged import Batch, Shape, ints, make_batch, oracle, poison

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


def test_a_window_ignores_groups(ops: Ops) -> None:
    batch = shared_batch(Shape(num_heads=4, kv_heads=2, head_dim=32, block_size=16, window=40), 256)
    alone, together = batch.run(ops), batch.run(ops, torch.tensor([[0, 4, 256]], dtype=torch.int32), ints(*MEMBERS))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_the_shared_keys_are_those_of_the_first_member() -> None:
    """The reference reads them there: what the others' tables say of them is not looked at."""
    from kvlite.kernels.attention.reference import attention

    batch = shared_batch(Shape(num_heads=2, kv_heads=1, head_dim=16, block_size=16), 256)
    table = batch.block_table.clone()
    table[batch.seq_row[1], :16] = table[batch.seq_row[4], 0]
    wrong = replace(batch, block_table=table)
    out, lse = poison(*batch.q.shape), poison(*batch.q.shape[:2])
    attention(
        wrong.q, wrong.k_cache, wrong.v_cache, table, wrong.query_start, wrong.context_len, wrong.seq_row,
        wrong.last_key, wrong.scale, 0, out, lse, ints(0, 2, 256).view(1, 3), ints(0, 1),
    )  # fmt: skip
    torch.testing.assert_close(out.double(), torch.from_numpy(oracle(batch)[0]), atol=1e-5, rtol=1e-5)
