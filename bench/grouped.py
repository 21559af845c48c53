"""`python -m bench kernels --op attention --grouped`: decode attention behind a shared prefix, together and apart.

Physics. Apart, every sequence reads the prefix; together it is read once. Arithmetic stays the same. So each way costs
at least the larger of its bytes at the rate of a bare read over as many bytes and its multiply-adds at the rate of a
large product, and the gain that the machine allows is the ratio of the two bounds; `group_share_B_P` is the measured
gain over that one for B sequences and a prefix of P keys. Calls alternate; `x_group_B_P` is the median of the paired
ratios and `x_group_B_P_low` the lower end of their 95 % interval: grouping must not lose anywhere. Both ways must give
the same bits first. Keys with `_mha` are of as many KV heads as query heads.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvlite.ops import Ops, select

from .errors import BenchError
from .kernel_cases import Case, Maker
from .kernels import Clock
from .make_model import SHAPES

BATCHES = (2, 4, 8, 16, 64)
PREFIXES = (256, 1024, 4096, 8192)
OWN_KEYS = 64
"""Of each sequence, behind the prefix."""
LEAST_PAIRS = 8
MOST_PAIRS = 200
POOL_BYTES = 2 << 30
"""Shapes whose keys and values need more are left out."""


@dataclass(frozen=True)
class Pair:
    """One shape, both ways over the same memory."""

    batch: int
    prefix: int
    apart: Case
    together: Case


def pairs(make: Maker) -> Iterator[Pair]:
    """Every shape that POOL_BYTES hold."""
    for batch in BATCHES:
        for prefix in PREFIXES:
            per_key = 2 * make.shape.num_kv_heads * make.shape.head_dim * make.dtype.itemsize
            if (prefix + batch * OWN_KEYS) * per_key <= POOL_BYTES:
                yield pair(make, batch, prefix, per_key)


def pair(make: Maker, batch: int, prefix: int, bytes_per_key: int) -> Pair:
    """`batch` sequences of one row each behind a common prefix, in blocks that lie anywhere."""
    size, heads, width = make.block_size, make.shape.num_heads, make.shape.head_dim
    shared, own = prefix // size, -(-OWN_KEYS // size)
    pool = make.normal(shared + batch * own, 2, size, make.shape.num_kv_heads, width)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.cat([order[:shared].expand(batch, shared), order[shared:].view(batch, own)], dim=1).contiguous()
    q, out = make.normal(batch, heads, width), make.poison(batch, heads, width)
    lse = make.poison(batch, heads, dtype=torch.float32)
    context, rows = prefix + OWN_KEYS, list(range(batch))
    arguments: tuple[Any, ...] = (
        q, pool[:, 0], pool[:, 1], table, make.ints([*rows, batch]), make.ints([context] * batch), make.ints(rows),
        make.ints([context - 1] * batch), width**-0.5, 0, out, lse,
    )  # fmt: skip
    groups = (make.ints([0, batch, prefix]).view(1, 3), make.ints(rows))
    flops = 4.0 * batch * context * heads * width
    name = f"{batch}x{prefix}"
    read_apart, read_together = batch * context * bytes_per_key, (prefix + batch * OWN_KEYS) * bytes_per_key
    apart = Case(name, read_apart, flops, lambda ops: ops.attention(*arguments), [out, lse])
    together = Case(name, read_together, flops, lambda ops: ops.attention(*arguments, *groups), [out, lse])
    return Pair(batch, prefix, apart, together)


def check(each: Pair, ops: Ops) -> None:
    """The same bits both ways. Raises BenchError."""
    found: list[list[torch.Tensor]] = []
    for case in (each.apart, each.together):
        for output in case.outputs:
            output.fill_(math.nan)
        case.run(ops)
        found.append([output.clone() for output in case.outputs])
    if not all(torch.equal(one, other) for one, other in zip(*found, strict=True)):
        raise BenchError(f"attention {each.apart.name}: together and apart differ, so no speed for it")


def ratios(each: Pair, ops: Ops, budget_s: float) -> list[float]:
    """Seconds apart over seconds together, call by call in turns."""

    def seconds(run: Callable[[Ops], object]) -> float:
        start = time.perf_counter()
        run(ops)
        return time.perf_counter() - start

    seconds(each.apart.run)
    found: list[float] = []
    end = time.perf_counter() + budget_s
    while len(found) < LEAST_PAIRS or (time.perf_counter() < end and len(found) < MOST_PAIRS):
        found.append(seconds(each.apart.run) / seconds(each.together.run))
    return found


def lower(values: list[float]) -> float:
    """The lower end of the 95 % interval of their geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.mean(logs) - 1.96 * statistics.stdev(logs) / math.sqrt(len(logs)))


@torch.inference_mode()
def measure(make: Maker, threads: int, budget_s: float) -> dict[str, Any]:
    """Both shapes of model, every batch and prefix."""
    ops = select(make.device)
    if not ops.shares_prefixes:
        raise BenchError(f"--grouped: backend {ops.backend} reads each sequence's keys; there is nothing to compare")
    figures: dict[str, Any] = {}
    for suffix, shape in (("", make.shape), ("_mha", SHAPES["mha"])):
        made = replace(make, shape=shape)
        clock = Clock(made, threads, budget_s)
        for each in pairs(made):
            check(each, ops)
            found = ratios(each, ops, budget_s)
            allowed = clock.bound_s(each.apart) / clock.bound_s(each.together)
            gain, low = statistics.median(found), lower(found)
            key = f"{suffix}_{each.batch}_{each.prefix}"
            figures |= {f"x_group{key}": round(gain, 3), f"x_group{key}_low": round(low, 3)}
            figures[f"group_share{key}"] = round(gain / allowed, 3)
            print(
                f"{shape.num_heads:2}/{shape.num_kv_heads} heads, {each.batch:3} sequences, prefix {each.prefix:5}: "
                f"{gain:5.2f} x apart (at least {low:.2f}), the machine allows {allowed:5.2f} x",
                flush=True,
            )
    return figures
