"""Norm, embedding and attention as layers: the right op with the right constants, results where they belong."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvlite import ops
from kvlite.layers.attention import Attention
from kvlite.layers.embedding import Embedding
from kvlite.layers.norm import RmsNorm

CPU = torch.device("cpu")
OPS = ops.select(CPU, "reference")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Keys:
    last_key: torch.Tensor
    slot_mapping: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    seq_row: torch.Tensor
    block_table: torch.Tensor
    prefix_group: torch.Tensor | None = None
    group_seqs: torch.Tensor | None = None


def test_the_norm_adds_to_the_residual_in_place_before_it_normalises() -> None:
    x, residual, weight = numbers(5, 24), numbers(5, 24, seed=1), numbers(24, seed=2)
    total = x + residual
    out = torch.full_like(x, float("nan"))
    RmsNorm(weight, 1e-3, OPS).add(x, residual, out)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(total, (24,), weight, 1e-3))


def test_the_norm_of_heads_inside_a_wider_row_touches_nothing_else() -> None:
    row, weight = numbers(3, 5, 8), numbers(8, seed=1)
    before = row.clone()
    RmsNorm(weight, 1e-6, OPS)(row[:, :2], row[:, :2])
    torch.testing.assert_close(row[:, :2], torch.nn.functional.rms_norm(before[:, :2], (8,), weight, 1e-6))
    assert torch.equal(row[:, 2:], before[:, 2:])


def test_the_embedding_gathers_rows_for_both_widths_of_ids() -> None:
    table = numbers(10, 4)
    for ids in (int32(3, 0, 9), torch.tensor([3, 0, 9])):
        out = torch.empty(3, 4)
        Embedding(table)(ids, out)
        assert torch.equal(out, table[[3, 0, 9]])


def test_attention_stores_first_and_reads_only_the_window() -> None:
    q, k, v = numbers(6, 2, 4), numbers(6, 1, 4, seed=1), numbers(6, 1, 4, seed=2)
    cache = torch.full((3, 2, 4, 1, 4), float("nan"))
    slots = int32(8, 9, 10, 11, 0, 1)
    keys = Keys(int32(*range(6)), slots, int32(0, 6), int32(6), int32(0), int32(2, 0).view(1, 2))
    out, lse = torch.full((6, 2, 4), float("nan")), torch.full((6, 2), float("nan"))
    Attention(0.5, 3, OPS)((q, k, v), (cache[:, 0], cache[:, 1]), keys, out, lse)
    assert torch.equal(cache[2, 0], k[:4]) and torch.equal(cache[0, 1, :2], v[4:])
    for row in range(6):
        seen = slice(max(0, row - 2), row + 1)
        weight = torch.softmax(q[row] @ k[seen, 0].t() * 0.5, dim=-1)
        torch.testing.assert_close(out[row], weight @ v[seen, 0])
