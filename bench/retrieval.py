"""W3 of `serve`: chats over documents on one server, blended and by prefix alone, in turns.

One client gives the times to the first token; with `--rate` and `--ramp`, Poisson arrivals at rising rates give the
most requests per second that meet the same objective. `x_ttft_w3` and `x_throughput_blend` compare the two. Documents
are in the store before; questions and orders are new in every request. Called by `serve`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from kvlite.progress import Bar

from . import workloads
from .errors import BenchError
from .load import closed_loop
from .metrics import Objective, Record
from .server import Server, conclude, ramp

MODES = ("prefix", "blend")
TURNS = 3
REFINE = 2
"""Rates between the last that held and the first that did not: the two bounds come within 11 %."""


def modes(server: Server, ratio: float) -> dict[str, Server]:
    """The server as asked in each mode."""
    options = {"method": "query", "recompute_ratio": ratio}
    blend = {"reuse": "blend", "reuse_options": options}
    return {"prefix": replace(server, extra={"reuse": "prefix"}), "blend": replace(server, extra=blend)}


async def run(server: Server, options: argparse.Namespace, objective: Objective) -> dict[str, Any]:
    """Warm, then one client in turns, then both ramps where they are asked for."""
    servers = modes(server, options.recompute_ratio)
    figures: dict[str, Any] = {"recompute_ratio": options.recompute_ratio}
    await warm(servers["blend"], options.timeout_s)
    count = options.num_requests or 24
    records: dict[str, list[Record]] = {mode: [] for mode in MODES}
    for turn in range(TURNS):
        for number, mode in enumerate(MODES):
            seed = options.seed + 1 + turn * len(MODES) + number
            jobs = workloads.retrieval(max(count // TURNS, 1), seed).jobs
            with Bar(f"w3 {mode}", unit="requests") as bar:
                records[mode] += await closed_loop(jobs, servers[mode].send, 1, options.timeout_s, bar.update)
    for mode in MODES:
        figures[f"w3_{mode}"] = found = conclude(f"w3 {mode}", records[mode], objective)
        found["prompt_tokens_mean"] = round(found["prompt_tokens"] / found["requests"], 1)
        found["cached_share"] = round(found["cached_tokens"] / max(found["prompt_tokens"], 1), 3)
    if figures["w3_blend"]["cached_share"] <= figures["w3_prefix"]["cached_share"]:
        raise BenchError(
            f"blended requests took {figures['w3_blend']['cached_share']} of their prompts from the cache, "
            f"others {figures['w3_prefix']['cached_share']}: documents are not reused"
        )
    times = {mode: figures[f"w3_{mode}"]["ttft_ms_p50"] for mode in MODES}
    figures["x_ttft_w3"] = round(times["prefix"] / times["blend"], 2)
    if options.ramp:
        for number, mode in enumerate(MODES):
            # New questions and orders at every rate: an old one would be a hit of its whole prompt.
            first = options.seed + 100 * (number + 1)
            figures[f"saturation_{mode}"] = await ramp(
                servers[mode],
                lambda stage, first=first: workloads.retrieval(count, first + stage).jobs,
                options,
                objective,
                REFINE,
            )
        held = {mode: figures[f"saturation_{mode}"]["saturation_rps"] for mode in MODES}
        if not held["prefix"]:
            raise BenchError(
                f"--rate {options.rate} misses the objective already: take a lower one, or a larger --slo-ttft-ms"
            )
        figures["x_throughput_blend"] = round(held["blend"] / held["prefix"], 2)
        print(f"w3: {held['prefix']:.2f} requests/s by prefix, {held['blend']:.2f} blended, within the objective")
    return figures


async def warm(server: Server, timeout_s: float) -> None:
    """Every document of the pool in one request or another."""
    halves = (workloads.W3_POOL[:6], workloads.W3_POOL[6:])
    jobs = [workloads.Job((), 1, documents=tuple(half), question="warm") for half in halves]
    for record in await closed_loop(jobs, server.send, 1, timeout_s, lambda done, total: None):
        if record.error is not None:
            raise BenchError(f"the first chat over documents failed: {record.error}")
