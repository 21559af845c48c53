"""`python -m bench decode`: one token for every sequence of a batch, against the least that a step can cost.

Physics. A decode step reads every weight once, whatever the batch, and the keys and values of every sequence. At batch
1 its floor is those bytes over the read rate. With more rows the products cost more than the read; the floor is then
the best 8-row (32-row, ...) loop over the same weights, plus the KV bytes over the read rate. Both limits are measured
anew before and after the steps of each round (see limits.py); limits and steps of a round count with their best
repetition, because neighbours move this machine's memory by a third within minutes. A share above 1 stops the run.

`share_bB` is floor over step at batch B; `x_transformers_bB` compares tokens per second with transformers' generate on
a static cache, decode steps alone, in turns; `context_cost_N` is what context N adds to a step (of the first context
of its batch, in turns) over what its KV bytes cost at the read rate; `outside_bB` is the share of a step outside ops
and products, from a second engine with timers. Correctness first: greedy tokens are transformers'.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

from kvlite import Engine
from kvlite.models import ModelConfig, load_config

from . import peer
from .embedded import KernelClock, Setup, decode_steps, gate, kernel_clock, opened, prompts
from .errors import BenchError
from .limits import Limits, kv_bytes_per_token, share
from .options import add_model_options, integers, model_directory, pairs, torch_dtype
from .report import finish, origin

ROUNDS = 5


@dataclass(frozen=True)
class Point:
    """So many sequences, each with so many tokens before the first measured step."""

    batch: int
    context: int

    @property
    def name(self) -> str:
        """Suffix of its keys: the batch, and the context when it is not the first."""
        return f"b{self.batch}_c{self.context}"


def floor_s(limits: Limits, point: Point, kv_bytes: int, num_steps: int) -> float:
    """The least time of a step: weights and KV through memory, or the products where those are slower."""
    return limits.decode_s(point.batch, point.batch * (point.context + num_steps // 2) * kv_bytes)


def measure(
    engine: Engine, limits: Limits, peers: dict[int, Any], points: list[Point], num_steps: int
) -> dict[str, Any]:
    """Every point in ROUNDS turns: steps, limits, and transformers where `peers` has it for the batch."""
    config, _family = load_config(engine.startup.model)
    kv_bytes = kv_bytes_per_token(config, limits.dtype)
    figures: dict[str, Any] = {}

    def steps_s(point: Point) -> list[float]:
        batch = prompts(config, point.batch, point.context, seed=point.batch)
        return decode_steps(engine, batch, num_steps, KernelClock())

    for point in points:
        first = next(other for other in points if other.batch == point.batch)
        more = point.batch * (point.context - first.context) * kv_bytes
        times: list[float] = []
        shares: list[float] = []
        costs: list[float] = []
        peer_times: list[float] = []
        for _ in range(ROUNDS):
            limits.forget()
            floor_s(limits, point, kv_bytes, num_steps)
            steps = steps_s(point)
            times.append(statistics.median(steps))
            shares.append(floor_s(limits, point, kv_bytes, num_steps) / min(steps))
            if more > 0:
                costs.append(context_cost(min(steps), min(steps_s(first)), more, limits.read_rate()))
            if point.batch in peers and point is first:
                peer_times.append(peer.step_s(peers[point.batch], prompts(config, point.batch, point.context, seed=1)))
        step, found = statistics.median(times), statistics.median(shares)
        share(f"a step at batch {point.batch}, context {point.context},", found * step, step)
        figures |= {
            f"step_ms_{point.name}": round(step * 1e3, 3),
            f"step_ms_{point.name}_spread": round((max(times) - min(times)) * 1e3, 3),
            f"share_{point.name}": round(found, 3),
            f"tokens_per_s_{point.name}": round(point.batch / step, 1),
        }
        figures.setdefault(f"share_b{point.batch}", round(found, 3))
        line = f"batch {point.batch:3}, context {point.context:5}: step {step * 1e3:8.2f} ms, {found:.2f} of its limit"
        if peer_times:
            ratio = statistics.median(theirs / ours for theirs, ours in zip(peer_times, times, strict=True))
            figures[f"x_transformers_b{point.batch}"] = round(ratio, 2)
            line += f", {ratio:.2f} x transformers"
        if costs:
            figures[f"context_cost_{point.context}"] = round(statistics.median(costs), 3)
            line += f", {statistics.median(costs):.2f} of what more KV costs to read"
        print(line, flush=True)
    return figures


def context_cost(long_s: float, short_s: float, more_bytes: int, read_rate: float) -> float:
    """What more context adds to a step, over what its bytes cost; 1 is the floor."""
    return (long_s - short_s) / (more_bytes / read_rate)


def first_of_each_batch(points: list[Point]) -> list[Point]:
    """One point per batch, the first."""
    firsts: dict[int, Point] = {}
    for point in points:
        firsts.setdefault(point.batch, point)
    return list(firsts.values())


def outside(setup: Setup, config: ModelConfig, points: list[Point], num_steps: int) -> dict[str, float]:
    """Share of a step outside ops and products, per batch; from an engine with timers."""
    shares: dict[str, float] = {}
    with kernel_clock() as clock, opened(setup) as engine:
        for point in first_of_each_batch(points):
            batch = prompts(config, point.batch, point.context, seed=point.batch)
            found: list[tuple[float, float]] = []
            for _ in range(ROUNDS):
                total = sum(decode_steps(engine, batch, num_steps, clock))
                found.append((total - clock.seconds, total))
            rest, total = min(found)
            shares[f"outside_b{point.batch}"] = round(rest / total, 3)
            shares[f"outside_us_b{point.batch}"] = round(rest / num_steps * 1e6, 1)
            print(f"batch {point.batch:3}: {rest / num_steps * 1e6:.0f} us of a step are outside ops and products")
    return shares


def fitting(points: list[Point], room: int, num_steps: int) -> list[Point]:
    """The points that the model's positions allow; says which are left out."""
    kept: list[Point] = []
    for point in points:
        if point.context + num_steps + point.batch + 4 < room:
            kept.append(point)
        else:
            print(f"context {point.context} is left out: the model has {room} positions")
    if not kept:
        raise BenchError(f"no point fits the {room} positions of the model")
    return kept


def main(arguments: list[str]) -> int:
    """Gate, then every point; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench decode", description="decode steps of an embedded engine")
    add_model_options(parser)
    parser.add_argument("--points", default="1x64,8x64,32x64,1x4096", help="batch x context, separated by commas")
    parser.add_argument("--peer-batches", default="1,8,32", help="batches that transformers runs too; 0 for none")
    parser.add_argument("--steps", type=int, default=16, help="measured steps per round")
    parser.add_argument("--budget-s", type=float, default=0.1, help="seconds per loop of the limits")
    options = parser.parse_args(arguments)
    directory = model_directory(options.model)
    config, _family = load_config(directory)
    wanted = [Point(*pair) for pair in pairs("--points", options.points)]
    points = fitting(wanted, config.max_position_embeddings, options.steps)
    peer_batches = set() if options.peer_batches == "0" else set(integers("--peer-batches", options.peer_batches))
    dtype = torch_dtype(options.dtype)
    figures: dict[str, Any] = origin() | {"model": directory.name, "dtype": str(dtype).removeprefix("torch.")}
    kv_tokens = max(point.batch * (point.context + options.steps + point.batch) for point in points)
    setup = Setup(directory, options.dtype, options.threads, max(point.batch for point in points), kv_tokens)
    limits = Limits(config, dtype, options.threads, options.budget_s)
    with opened(setup) as engine:
        transformers = peer.load(directory, dtype)
        figures |= {"threads": options.threads, "gate_tokens": gate(engine, transformers, config)}
        print(f"check: {figures['gate_tokens']} greedy tokens as transformers'")
        figures |= measure(engine, limits, dict.fromkeys(peer_batches, transformers), points, options.steps)
    figures |= outside(setup, config, points, options.steps) | {"loops": limits.loops}
    finish("decode", figures, options.save)
    return 0
