"""`python -m bench kernels --op attention --grouped`: decode attention behind a shared prefix, together and apart.

Physics. Apart, every sequence reads the prefix; together it is read once. Arithmetic stays the same. So each way costs
at least the larger of its bytes at the rate of a bare read over as many bytes and its multiply-adds at the rate of a
large product, and the gain that the machine allows is the ratio of the two bounds; `group_share_B_P` is the measured
gain over that one for B sequences and a prefix of P keys. Calls alternate; `x_group_B_P` is the median of the paired
ratios and `x_group_B_P_low` the lower end of their 95 % interval: grouping must not lose anywhere. On a GPU a time is
the device's own, a median of some calls with nothing in its cache; and apart, most reads of the prefix come from that
cache, which the bounds leave out. Both ways must give the same bits first. Keys with `_mha` are of as many KV heads as
query heads.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvlite.ops import Ops, select

from .errors import BenchError
from .kernel_cases import Case, Maker, Shared, shared_attention
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
    ways: Shared


def pair(make: Maker, batch: int, prefix: int) -> Pair:
    """`batch` sequences of one row each behind a common prefix, in blocks that lie anywhere."""
    return Pair(batch, prefix, shared_attention(make, f"{batch}x{prefix}", [batch], prefix, OWN_KEYS))


def pairs(make: Maker) -> Iterator[Pair]:
    """Every shape that POOL_BYTES hold."""
    for batch in BATCHES:
        for prefix in PREFIXES:
            per_key = 2 * make.shape.num_kv_heads * make.shape.head_dim * make.dtype.itemsize
            if (prefix + batch * OWN_KEYS) * per_key <= POOL_BYTES:
                yield pair(make, batch, prefix)


def check(each: Pair, ops: Ops) -> None:
    """The same bits every way. Raises BenchError."""
    found: list[list[torch.Tensor]] = []
    for case in (each.ways.apart, each.ways.together, each.ways.told_none):
        for output in case.outputs:
            output.fill_(math.nan)
        case.run(ops)
        found.append([output.clone() for output in case.outputs])
    for others in found[1:]:
        if not all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True)):
            raise BenchError(f"attention {each.batch}x{each.prefix}: together and apart differ, so no speed for it")


def ratios(each: Pair, case: Case, ops: Ops, clock: Clock, budget_s: float) -> list[float]:
    """Seconds apart over seconds of `case`, in turns: call by call, or on a GPU by the device's own clock."""

    def seconds(run: Case) -> float:
        if clock.device.type == "cuda":
            return clock.seconds(lambda: run.run(ops))
        start = time.perf_counter()
        run.run(ops)
        return time.perf_counter() - start

    seconds(each.ways.apart)
    found: list[float] = []
    end = time.perf_counter() + budget_s
    while len(found) < LEAST_PAIRS or (time.perf_counter() < end and len(found) < MOST_PAIRS):
        found.append(seconds(each.ways.apart) / seconds(case))
    return found


def lower(values: list[float]) -> float:
    """The lower end of the 95 % interval of their geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.mean(logs) - 1.96 * statistics.stdev(logs) / math.sqrt(len(logs)))


def gains(each: Pair, ops: Ops, clock: Clock, budget_s: float) -> dict[str, float]:
    """What grouping one shape gains, and the share of what the machine allows; both ways agree first."""
    check(each, ops)
    found = ratios(each, each.ways.together, ops, clock, budget_s)
    gain, allowed = statistics.median(found), clock.bound_s(each.ways.apart) / clock.bound_s(each.ways.together)
    return {"x": round(gain, 3), "low": round(lower(found), 3), "share": round(gain / allowed, 3)}


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
            found, key = gains(each, ops, clock, budget_s), f"{suffix}_{each.batch}_{each.prefix}"
            figures |= {f"x_group{key}": found["x"], f"x_group{key}_low": found["low"]}
            figures[f"group_share{key}"] = found["share"]
            print(
                f"{shape.num_heads:2}/{shape.num_kv_heads} heads, {each.batch:3} sequences, prefix {each.prefix:5}: "
                f"{found['x']:5.2f} x apart (at least {found['low']:.2f}), "
                f"the machine allows {found['x'] / found['share']:5.2f} x",
                flush=True,
            )
    return figures
