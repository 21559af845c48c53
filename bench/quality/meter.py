"""What an engine really computes, and a mask that is wrong on purpose. Both stand between the engine and its ops.

The meter counts multiply-adds of the linear layers, in units of one row through one layer: selection, half layers and
all, with no word asked of any method. The mask is the one that stock kernels give to rows that are not the last ones of
their context: aligned at the bottom right, so that recomputed rows see keys of later text. It lives here alone, as the
ablation that shows what it costs. Knows ops, neither requests nor methods.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from kvlite.models import ModelConfig
from kvlite.ops import Ops


@dataclass
class Meter:
    """Of every engine that is opened inside `metered`."""

    row_weights: int
    """Weights that one row meets in one layer."""
    head_shape: tuple[int, int]
    """Of the one matrix that belongs to no layer."""
    multiplied: int = 0
    bottom_right: bool = False
    """Whether attention uses the wrong mask."""

    @property
    def token_layers(self) -> float:
        """Rows times layers that were computed since `reset`."""
        return self.multiplied / self.row_weights

    def reset(self) -> None:
        """Counts from nothing again."""
        self.multiplied = 0

    def ops(self, ops: Ops) -> Ops:
        """The same ops, watched."""
        watched = replace(ops, linear=self._counted(ops.linear), attention=self._masked(ops.attention))
        if ops.invariant_linear is None:
            return watched
        return replace(watched, invariant_linear=self._counted(ops.invariant_linear))

    def _counted(self, linear: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
            if tuple(weight.shape) != self.head_shape:
                self.multiplied += x.shape[0] * weight.numel()
            return linear(x, weight, *rest)

        return run

    def _masked(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if not self.bottom_right:
                return attention(*arguments)
            query_start, context_len, seq_row, last_key = arguments[4:8]
            wrong = bottom_right_last_key(query_start, context_len, last_key)
            return attention(*arguments[:4], query_start, context_len, seq_row, wrong, *arguments[8:])

        return run


def bottom_right_last_key(query_start: torch.Tensor, context_len: torch.Tensor, last_key: torch.Tensor) -> torch.Tensor:
    """What a kernel that counts from the end takes for the last visible key of each row; shapes as in attention.

    Row i of M in a context of N keys sees keys up to N - M + i. Exact for rows that are the last ones of their context.
    """
    wrong = last_key.clone()
    for (first, end), keys in zip(pairwise(query_start.tolist()), context_len.tolist(), strict=True):
        wrong[first:end] = torch.arange(keys - (end - first), keys, dtype=wrong.dtype)
    return wrong


def row_weights(config: ModelConfig) -> int:
    """Weights that one row meets in one layer: Q, K, V, output, gate, up and down."""
    width, head = config.hidden_size, config.head_dim
    attention = width * head * (config.num_heads + 2 * config.num_kv_heads) + width * head * config.num_heads
    return attention + 3 * width * config.intermediate_size


@contextmanager
def metered(config: ModelConfig) -> Generator[Meter]:
    """Engines that are opened inside run under the meter."""
    from kvlite import startup

    meter = Meter(row_weights(config), (config.vocab_size, config.hidden_size))
    select = startup.select
    startup.select = lambda *arguments: meter.ops(select(*arguments))
    try:
        yield meter
    finally:
        startup.select = select
