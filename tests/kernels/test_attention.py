"""Paged attention against a float64 loop: rows of every kind, poison where nobody may look, bits that must not move."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from kvlite.ops import Ops
from tests.kernels.conftest import INTERPRETED
from tests.kernels.paged import INTERPRETER_DTYPES, TOLERANCE, Batch, Shape, ints, make_batch, oracle

MIXED = [(20, [17, 18, 19]), (7, [6]), (300, [100, 3, -1, 298, 299]), (41, [40])]
DECODE = [(700, [699]), (7, [6]), (300, [299]), (1, [0]), (256, [255]), (257, [256])]
SHAPES = {
    "grouped": Shape(),
    "odd": Shape(num_heads=6, kv_heads=2, head_dim=24, block_size=48),
    "one kv head": Shape(num_heads=7, kv_heads=1, head_dim=16, block_size=32),
    "window": Shape(num_heads=2, kv_heads=2, window=5),
    "wide window": Shape(num_heads=2, kv_heads=1, window=70),
}
DTYPES = [dtype for dtype in TOLERANCE if not INTERPRETED or dtype in INTERPRETER_DTYPES]


def check(ops: Ops, batch: Batch) -> None:
    out, lse = batch.run(ops)
    expected_out, expected_lse = oracle(batch)
    tolerance = TOLERANCE[batch.shape.dtype]
    np.testing.assert_allclose(out.double().numpy(), expected_out, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse.double().numpy(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequences", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_lse_equal_a_float64_loop(ops: Ops, shape: Shape, sequences: list[tuple[int, list[int]]]) -> None:
    check(ops, make_batch(shape, sequences))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_type_stays_within_its_rounding(ops: Ops, dtype: torch.dtype) -> None:
    check(ops, make_batch(Shape(head_dim=16, dtype=dtype), [*MIXED, (33, [32])]))


def test_a_row_may_see_more_keys_than_splits_of_256_have_room_for(ops: Ops) -> None:
    check(ops, make_batch(Shape(num_heads=1, kv_heads=1), [(8500, [8450])]))


def test_more_sequences_than_rows_is_a_batch_like_any_other(ops: Ops) -> None:
    check(ops, make_batch(Shape(), [(9, []), (20, [4, 19]), (5, []), (12, [11]), (3, [])]))


def test_rows_outside_every_sequence_are_untouched(ops: Ops) -> None:
    batch = make_batch(Shape(), MIXED)
    out, lse = replace(batch, query_start=ints(3, 4, 4, 9, 9)).run(ops)
    assert out[:3].isnan().all() and out[9:].isnan().all() and lse[:3].isnan().all() and lse[9:].isnan().all()
    assert not lse[3].isnan().any()


def test_a_row_that_sees_nothing_gets_zero_and_minus_infinity(ops: Ops) -> None:
    batch = make_batch(Shape(), [(4, [-1]), (0, [5]), (4, [-1, 3])])
    out, lse = batch.run(ops)
    assert torch.equal(out[:3], torch.zeros_like(out[:3])) and lse[:3].isneginf().all()
    assert lse[3].isfinite().all()


@pytest.mark.parametrize("window", [0, 5])
def test_a_sequence_gets_the_same_bits_alone_and_among_others(ops: Ops, window: int) -> None:
    batch = make_batch(Shape(num_heads=6, window=window), [*MIXED, (700, [699])])
    out, lse = batch.run(ops)
    for s, (first, end) in enumerate(zip(batch.query_start[:-1], batch.query_start[1:], strict=True)):
        alone_out, alone_lse = batch.alone(s).run(ops)
        assert torch.equal(out[first:end], alone_out) and torch.equal(lse[first:end], alone_lse)


def test_a_prefill_row_gets_the_same_bits_in_any_chunk_of_two_rows_or_more(ops: Ops) -> None:
    batch = make_batch(Shape(), [(150, list(range(150)))])
    out, lse = batch.run(ops)
    # The interpreter's matrix product is numpy's, whose bits depend on a row's place in its tile of 16.
    cuts = (0, 64, 80, 150) if INTERPRETED else (0, 70, 72, 150)
    atol = 1e-6 if ops.backend == "reference" else 0
    for first, end in pairwise(cuts):
        chunk = replace(
            batch, q=batch.q[first:end], last_key=batch.last_key[first:end], query_start=ints(0, end - first)
        )
        chunk_out, chunk_lse = chunk.run(ops)
        assert torch.allclose(chunk_out, out[first:end], rtol=0, atol=atol)
        assert torch.allclose(chunk_lse, lse[first:end], rtol=0, atol=atol)


def test_keys_after_last_key_never_change_a_row(ops: Ops) -> None:
    batch = make_batch(Shape(), [(300, [10, 150, 299]), (300, [120]), (300, [299])])
    out, lse = batch.run(ops)
    bs = batch.shape.block_size
    for s, last in ((0, 150), (1, 120)):
        for n in range(last + 1, 300):
            block = batch.block_table[batch.seq_row[s], n // bs]
            batch.k_cache[block, n % bs] = 300.0
            batch.v_cache[block, n % bs] = -700.0
    changed_out, changed_lse = batch.run(ops)
    same = [0, 1, 3, 4]
    assert torch.equal(out[same], changed_out[same]) and torch.equal(lse[same], changed_lse[same])
    assert not torch.equal(out[2], changed_out[2])


def test_the_block_size_does_not_change_a_bit(ops: Ops) -> None:
    small, large = (make_batch(Shape(block_size=size), MIXED, seed=3) for size in (16, 80))
    large = replace(large, q=small.q)
    for s, context in enumerate(small.context_len.tolist()):
        for n in range(context):
            source = small.block_table[small.seq_row[s], n // 16], n % 16
            target = large.block_table[large.seq_row[s], n // 80], n % 80
            large.k_cache[target], large.v_cache[target] = small.k_cache[source], small.v_cache[source]
    for a, b in zip(small.run(ops), large.run(ops), strict=True):
        assert torch.equal(a, b)
