"""`python -m bench serve --url URL`: what a client of any OpenAI-compatible server waits for, and how much it gets.

Physics. A server decodes for everybody at once: more requests at a time give more tokens per second until its step is
bound by arithmetic, and each of them waits longer per token. So one figure says nothing: this prints time to first
token, between tokens and to the end, tokens per second, and goodput (requests per second that met the objective
`--slo-ttft-ms`, `--slo-tpot-ms`), for a closed loop of N clients, for Poisson arrivals, for a trace, or (w3) for chats
over documents, blended and by prefix; `--ramp` raises the Poisson rate by half until fewer than 90 % meet the
objective. Waiting counts from the due time (see load.py); `lag` is how late the client itself was, and must be small
beside the rest.

Correctness first: one request must give exactly the tokens that it asks for. Tokens are counted by this client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvlite.progress import Bar

from . import retrieval, workloads
from .client import Address, RequestError, find_model
from .errors import BenchError
from .load import closed_loop
from .metrics import Objective
from .report import finish, origin
from .server import Server, conclude, ramp, run_open
from .workloads import Job, Scaling, Workload

GATE_TOKENS = 8


async def check(server: Server, vocab: int) -> int:
    """One short request must give its tokens; returns how many. Raises BenchError."""
    count = 0
    job = Job(workloads.tokens("check", 16, vocab), GATE_TOKENS)
    try:
        async for piece in server.send(job):
            count += piece.num_tokens
            said = (piece.usage or {}).get("completion_tokens", GATE_TOKENS)
            if said != GATE_TOKENS:
                raise BenchError(f"{server.address}: {GATE_TOKENS} tokens were asked, usage says {said}")
    except RequestError as error:
        raise BenchError(f"{server.address}: the first request failed: {error}") from None
    if not 0 < count <= GATE_TOKENS or (count < GATE_TOKENS and not server.plain):
        print(f"warning: {count} tokens seen of {GATE_TOKENS}: the server sends several tokens in a piece without ids")
    if not count:
        raise BenchError(f"{server.address}: an answer without a token")
    return count


def closed_workloads(options: argparse.Namespace) -> list[Workload]:
    """What `--workload` names."""
    count, vocab, seed = options.num_requests, options.vocab, options.seed
    makers: dict[str, Callable[[], list[Workload]]] = {
        "w1": lambda: [workloads.independent(count or 32, vocab, seed, options.concurrency or 8)],
        "w2": lambda: [workloads.shared_prefixes(count or 32, vocab, seed, options.concurrency or 8)],
        "w4": lambda: [
            workloads.streams(count or 2 * clients, vocab, seed, clients)
            for clients in ([options.concurrency] if options.concurrency else [1, 8])
        ],
    }
    return makers[options.workload]()


def trace_workload(options: argparse.Namespace, max_len: int) -> tuple[Workload, int]:
    """The jobs of `--trace`, due at its times; and how many were too long."""
    scaling = Scaling(options.speedup, options.scale, options.max_len or max_len)
    arrivals = workloads.read_trace(options.trace)
    jobs, left_out = workloads.trace_jobs(arrivals, scaling, options.vocab, options.num_requests or 100)
    if not jobs:
        raise BenchError(f"--trace {options.trace}: no request fits {scaling.max_len} tokens; try --scale 0.1")
    if left_out:
        print(f"{left_out} requests of more than {scaling.max_len} tokens are left out")
    return Workload("trace", jobs, 0), left_out


async def run(server: Server, options: argparse.Namespace, max_len: int) -> dict[str, Any]:
    """Check, then everything that was asked for."""
    objective = Objective(options.slo_ttft_ms, options.slo_tpot_ms)
    figures: dict[str, Any] = {"gate_tokens": await check(server, options.vocab)}
    print(f"check: {figures['gate_tokens']} tokens of {server.model}")
    if options.trace is not None:
        workload, left_out = trace_workload(options, max_len)
        records = await run_open(server, workload.jobs, options, "trace")
        return figures | {"left_out": left_out, "trace": conclude("trace", records, objective)}
    if options.workload == "w3":
        return figures | await retrieval.run(server, options, objective)
    for workload in closed_workloads(options):
        if options.ramp:
            figures[workload.name] = await ramp(server, lambda _, jobs=workload.jobs: jobs, options, objective)
        elif options.rate is not None:
            jobs = workloads.poisson(workload.jobs, options.rate, options.seed)
            records = await run_open(server, jobs, options, workload.name)
            figures[workload.name] = {"rate": options.rate} | conclude(workload.name, records, objective)
        else:
            with Bar(workload.name, unit="requests") as bar:
                records = await closed_loop(
                    workload.jobs, server.send, workload.concurrency, options.timeout_s, bar.update
                )
            clients = {"concurrency": workload.concurrency}
            figures[workload.name] = clients | conclude(workload.name, records, objective)
    return figures


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked together. Raises BenchError."""
    parser = argparse.ArgumentParser(prog="python -m bench serve", description="load on an OpenAI-compatible server")
    parser.add_argument("--url", required=True, help="like http://127.0.0.1:8000")
    parser.add_argument("--model", help="name in the API (default: the first of /v1/models)")
    parser.add_argument("--api-key")
    parser.add_argument("--plain", action="store_true", help="send only fields that OpenAI knows")
    parser.add_argument("--workload", choices=("w1", "w2", "w3", "w4"), default="w1")
    parser.add_argument("--recompute-ratio", type=float, default=0.15, help="of w3's blended requests")
    parser.add_argument("--num-requests", type=int, help="requests per run")
    parser.add_argument("--concurrency", type=int, help="clients of a closed loop")
    parser.add_argument("--rate", type=float, help="requests per second, Poisson arrivals instead of a closed loop")
    parser.add_argument("--ramp", action="store_true", help="raise --rate until the objective is missed")
    parser.add_argument("--trace", type=Path, help="arrivals of a trace: .jsonl (Mooncake) or .csv (Azure)")
    parser.add_argument("--speedup", type=float, default=1.0, help="divides the times of a trace")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the lengths of a trace")
    parser.add_argument("--max-len", type=int, help="leave out longer requests of a trace (default: what fits)")
    parser.add_argument("--vocab", type=int, default=1024, help="prompts use ids from 16 up to this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=100.0)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of one request")
    parser.add_argument("--label", help="names the result in place of the model: what is measured, like vllm")
    parser.add_argument("--save", action="store_true", help="also write bench/results/serve-MODEL-RUN.json")
    options = parser.parse_args(arguments)
    if options.workload == "w3" and (options.plain or options.trace is not None or options.concurrency):
        raise BenchError("--workload w3 has documents, which --plain, --trace and --concurrency leave no room for")
    if options.ramp and (options.rate is None or options.trace is not None):
        raise BenchError("--ramp needs --rate, its first rate, and no --trace")
    if options.rate is not None and options.trace is not None:
        raise BenchError("--rate and --trace exclude each other: a trace has its own times (see --speedup)")
    for name in ("num_requests", "concurrency", "timeout_s", "max_len"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise BenchError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if options.vocab <= workloads.FIRST_ID:
        raise BenchError(f"--vocab {options.vocab}: must be above {workloads.FIRST_ID}")
    return options


def result_name(options: argparse.Namespace, model: str) -> str:
    """serve-MODEL-RUN, where RUN tells workload and arrivals: one file per question that was asked."""
    run = f"trace-{options.trace.stem}" if options.trace is not None else options.workload
    run += "-ramp" if options.ramp else "-poisson" if options.rate is not None else ""
    return "serve-" + re.sub(r"[^\w.-]+", "-", f"{options.label or Path(model).name}-{run}")


def main(arguments: list[str]) -> int:
    """Runs the load; the last line is one JSON object."""
    options = parse(arguments)
    address = Address.of(options.url)
    found = asyncio.run(find_model(address, options.api_key))
    max_len = found.get("max_model_len")
    server = Server(address, options.model or found["id"], options.api_key, options.plain)
    objective = {"slo": {"ttft_ms": options.slo_ttft_ms, "tpot_ms": options.slo_tpot_ms}}
    figures = origin() | {"url": str(address), "model": server.model} | objective
    room = max_len if isinstance(max_len, int) else workloads.LONGEST
    figures |= asyncio.run(run(server, options, room))
    finish(result_name(options, server.model), json.loads(json.dumps(figures)), options.save)
    return 0
