"""One server as `serve` and its workloads use it: how jobs are worded, a run under load, and its figures.

Owns no workload and no option of its own; waiting counts as load.py says. Called by `serve`, `retrieval` and `compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from kvlite.progress import Bar

from . import workloads
from .client import Address, Piece, completion
from .errors import BenchError
from .load import open_loop
from .metrics import Objective, Record, summary
from .workloads import Job

RAMP_FACTOR = 1.5
RAMP_STAGES = 16
SATURATED = 0.9
W3_SYSTEM = "Answer the question from the documents."


@dataclass(frozen=True)
class Server:
    """Where the jobs go, and how they are worded."""

    address: Address
    model: str
    api_key: str | None
    plain: bool
    """Only fields that OpenAI knows."""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further fields of every request."""

    async def send(self, job: Job) -> AsyncGenerator[Piece]:
        """The pieces of one answer, greedy, exactly `max_tokens` tokens."""
        fields: dict[str, Any] = {"model": self.model, "max_tokens": job.max_tokens, "temperature": 0.0, **self.extra}
        path = "/v1/completions"
        if job.documents:
            path = "/v1/chat/completions"
            roles = (("system", W3_SYSTEM), ("user", job.question))
            fields["messages"] = [{"role": role, "content": content} for role, content in roles]
            fields["documents"] = [{"text": text} for text in job.documents]
        else:
            fields["prompt"] = list(job.prompt)
        if not self.plain:
            fields |= {"ignore_eos": True, "return_token_ids": True}
        async with aclosing(completion(self.address, fields, self.api_key, path)) as pieces:
            async for piece in pieces:
                yield piece


def conclude(name: str, records: list[Record], objective: Objective) -> dict[str, Any]:
    """Prints one run; its figures. Raises BenchError when not one request succeeded."""
    figures = summary(records, objective)
    if figures["errors"] == len(records):
        raise BenchError(f"{name}: all {len(records)} requests failed: {records[0].error}")
    line = f"{name:12} {figures['tokens_per_s']:9.1f} tok/s  goodput {figures['goodput_rps']:7.2f} req/s"
    for kind in ("ttft", "itl", "e2e"):
        if f"{kind}_ms_p50" in figures:
            line += f"  {kind} {figures[f'{kind}_ms_p50']:.1f} / {figures[f'{kind}_ms_p99']:.1f} ms"
    print(line, flush=True)
    for error, count in figures.get("error_kinds", {}).items():
        print(f"  {count} failed: {error}")
    return figures


async def run_open(server: Server, jobs: list[Job], options: argparse.Namespace, name: str) -> list[Record]:
    """One open-loop run under a progress bar."""
    with Bar(name, unit="requests") as bar:
        return await open_loop(jobs, server.send, options.timeout_s, bar.update)


async def ramp(
    server: Server,
    jobs_of: Callable[[int], list[Job]],
    options: argparse.Namespace,
    objective: Objective,
    refine: int = 0,
) -> dict[str, Any]:
    """Poisson arrivals at rising rates until the objective is missed, then `refine` rates between the last that held
    and the first that did not; the last rate that held. `jobs_of` gives the jobs of a stage, from 0.
    """
    stages: list[dict[str, Any]] = []
    rate, held, missed = options.rate, 0.0, 0.0
    for stage in range(RAMP_STAGES):
        due = workloads.poisson(jobs_of(stage), rate, options.seed + stage)
        name = f"{rate:.2f} req/s"
        figures = conclude(name, await run_open(server, due, options, name), objective)
        stages.append({"rate": round(rate, 4)} | figures)
        if figures["slo_share"] < SATURATED:
            missed = rate
        else:
            held = rate
        if missed and (refine := refine - 1) < 0:
            break
        rate = (held * missed) ** 0.5 if held and missed else missed / RAMP_FACTOR if missed else rate * RAMP_FACTOR
    return {"saturation_rps": round(held, 4), "stages": stages}
