"""`python -m bench policies`: orders of admission on a mix of hit rates, each against fcfs in the same run.

Physics. An order creates no capacity: while the queue is never empty, the rows to compute are the same in any order,
but for hits that eviction takes first. What it moves is who waits. Serving requests of work w_i one after the other,
the mean wait is least in ascending order of w (shortest job first). With a share h of requests that cost next to
nothing, these wait for each other instead of for everybody: their median falls by about the cold share of the work,
and the cold ones pay with their tail, which `max_passes` bounds. Without a queue every order is the same; so the load
is open (Poisson times from a seed) and above what one engine serves: `--load` times the rate of a run by arrival in
which all requests are there from the start.

The mix: 60 % of the prompts begin with one of 4 warm prefixes and add 1/16 of their own, 20 % share half of one, 20 %
are cold; all have one length. Three quarters come from tenant 0, the rest from tenant 1. Time to the first token
counts from the due time. Each round runs every policy in turn over the same jobs, cache cleared and prefixes computed
before; `x_*_POLICY` is fcfs over the policy (throughput: the policy over fcfs) in the same round, the median over
rounds, above 1 where the policy is better. `light` is tenant 1, `cold` the cold fifth. `priority` is left out: without
levels it is fcfs. Correctness first: with `deterministic`, every policy gives the same tokens to every request.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from kvlite import Engine, RequestOptions
from kvlite.config import Policy
from kvlite.models import load_config

from . import workloads
from .embedded import greedy
from .errors import BenchError
from .limits import kv_bytes_per_token
from .metrics import percentile
from .options import add_model_options, model_directory, torch_dtype
from .report import finish, origin

POLICIES = tuple(policy for policy in Policy if policy is not Policy.PRIORITY)
NUM_PREFIXES = 4
NUM_TOKENS = 8
MAX_NUM_SEQS = 4
GATE_JOBS = 24


class Kind(StrEnum):
    """How much of a prompt is warm."""

    HIT = "hit"
    HALF = "half"
    COLD = "cold"


@dataclass(frozen=True)
class Request:
    """One request of the mix."""

    job: workloads.Job
    tenant: int
    kind: Kind


@dataclass(frozen=True)
class Seen:
    """What became of one request; seconds."""

    ttft_s: float
    end_s: float
    """Since the start of the run."""
    tokens: tuple[int, ...]


def mix(count: int, length: int, vocab: int, seed: int) -> tuple[list[tuple[int, ...]], list[Request]]:
    """The warm prefixes and `count` requests, due at once; prompts of `length` tokens."""
    draw = random.Random(seed)

    def fresh(num_tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(workloads.FIRST_ID, vocab) for _ in range(num_tokens))

    prefixes = [fresh(length - length // 16) for _ in range(NUM_PREFIXES)]
    requests: list[Request] = []
    for _ in range(count):
        kind = draw.choices(list(Kind), (60, 20, 20))[0]
        shared = {Kind.HIT: len(prefixes[0]), Kind.HALF: length // 2, Kind.COLD: 0}[kind]
        prompt = draw.choice(prefixes)[:shared] + fresh(length - shared)
        requests.append(Request(workloads.Job(prompt, NUM_TOKENS), int(draw.random() < 0.25), kind))
    return prefixes, requests


def warm(engine: Engine, prefixes: Sequence[Sequence[int]]) -> None:
    """Forgets everything and computes the prefixes, for both tenants."""
    engine.clear_cache()
    for tenant in (0, 1):
        for prefix in prefixes:
            engine.add([*prefix, workloads.FIRST_ID], greedy(1), RequestOptions(tenant=tenant))
            while engine.num_unfinished:
                engine.step()


def run(engine: Engine, requests: Sequence[Request]) -> list[Seen]:
    """Sends every request at its due time, whatever became of the others, and steps until all have ended."""
    start = time.perf_counter()
    handles: dict[int, int] = {}
    first: dict[int, float] = {}
    end: dict[int, float] = {}
    tokens: list[list[int]] = [[] for _ in requests]
    coming = 0
    while len(end) < len(requests):
        now = time.perf_counter() - start
        while coming < len(requests) and requests[coming].job.at_s <= now:
            request = requests[coming]
            options = RequestOptions(tenant=request.tenant)
            handles[engine.add(list(request.job.prompt), greedy(request.job.max_tokens), options)] = coming
            coming += 1
        if not engine.num_unfinished:
            time.sleep(max(requests[coming].job.at_s - now, 0.0))
            continue
        for delta in engine.step():
            now, number = time.perf_counter() - start, handles[delta.handle]
            if delta.token_ids:
                first.setdefault(number, now)
                tokens[number].extend(delta.token_ids)
            if delta.finish_reason is not None:
                end[number] = now
    if unanswered := [number for number, given in enumerate(tokens) if len(given) != requests[number].job.max_tokens]:
        raise BenchError(f"requests {unanswered} got fewer tokens than they asked for")
    due = [request.job.at_s for request in requests]
    return [Seen(first[n] - due[n], end[n], tuple(tokens[n])) for n in range(len(requests))]


def figures_of(requests: Sequence[Request], seen: Sequence[Seen]) -> dict[str, float]:
    """Times to the first token in ms, and output tokens per second."""
    waits = [one.ttft_s * 1e3 for one in seen]
    light = [wait for wait, request in zip(waits, requests, strict=True) if request.tenant == 1]
    cold = [wait for wait, request in zip(waits, requests, strict=True) if request.kind is Kind.COLD]
    return {
        "ttft_p50": percentile(waits, 50),
        "ttft_p99": percentile(waits, 99),
        "ttft_mean": statistics.mean(waits),
        "ttft_p50_light": percentile(light, 50),
        "ttft_max_cold": max(cold),
        "tokens_per_s": sum(len(one.tokens) for one in seen) / max(one.end_s for one in seen),
    }


def ratio(name: str, policy: float, fcfs: float) -> float:
    """Above 1 where the policy is better."""
    return policy / fcfs if name == "tokens_per_s" else fcfs / policy


def opened(directory: Path, policy: Policy, options: argparse.Namespace, *, deterministic: bool = False) -> Engine:
    """An engine whose pool holds the warm prefixes and what runs, and little else."""
    config, _family = load_config(directory)
    tokens = (2 * NUM_PREFIXES + 2 * MAX_NUM_SEQS) * (options.length + 64)
    return Engine(
        str(directory), device="cpu", dtype=str(torch_dtype(options.dtype)).removeprefix("torch."),
        num_threads=options.threads, policy=policy, max_passes=options.max_passes, max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=512, max_num_waiting=max(options.num_requests, 1), deterministic=deterministic,
        kv_cache_bytes=tokens * kv_bytes_per_token(config, torch_dtype(options.dtype)),
    )  # fmt: skip


def gate(
    directory: Path, prefixes: Sequence[Sequence[int]], requests: Sequence[Request], options: argparse.Namespace
) -> int:
    """The same tokens under every policy; returns how many requests were compared."""
    answers: list[list[tuple[int, ...]]] = []
    for policy in POLICIES:
        with opened(directory, policy, options, deterministic=True) as engine:
            warm(engine, prefixes)
            answers.append([seen.tokens for seen in run(engine, requests)])
        if answers[-1] != answers[0]:
            raise BenchError(f"policy {policy.value} changes the answers")
    return len(requests)


def measure(
    engines: dict[Policy, Engine], prefixes: Sequence[Sequence[int]], requests: Sequence[Request],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Every round's runs, by turns, and what they say together."""
    warm(engines[Policy.FCFS], prefixes)
    burst = run(engines[Policy.FCFS], requests)
    served = len(requests) / max(one.end_s for one in burst)
    print(f"by arrival {served:.1f} requests/s are served; {options.load:g} times as many come", flush=True)
    rounds: dict[Policy, list[dict[str, float]]] = {policy: [] for policy in engines}
    for number in range(options.rounds):
        due = workloads.poisson([request.job for request in requests], options.load * served, options.seed + number)
        timed = [Request(job, was.tenant, was.kind) for job, was in zip(due, requests, strict=True)]
        for policy, engine in engines.items():
            warm(engine, prefixes)
            rounds[policy].append(figures_of(timed, run(engine, timed)))
    figures: dict[str, Any] = {"served_rps": round(served, 2)}
    for policy, found in rounds.items():
        suffix = policy.value.replace("-", "_")
        for name in found[0]:
            figures[f"{name}_{suffix}"] = round(statistics.median(one[name] for one in found), 2)
            if policy is not Policy.FCFS:
                pairs = zip(found, rounds[Policy.FCFS], strict=True)
                ratios = [ratio(name, ours[name], fcfs[name]) for ours, fcfs in pairs]
                figures[f"x_{name}_{suffix}"] = round(statistics.median(ratios), 3)
        values = {name: figures[f"{name}_{suffix}"] for name in found[0]}
        print(f"{policy.value:15}" + ", ".join(f"{name} {value:.0f}" for name, value in values.items()), flush=True)
    return figures


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked together. Raises BenchError."""
    parser = argparse.ArgumentParser(prog="python -m bench policies", description="orders of admission")
    add_model_options(parser)
    parser.add_argument("--num-requests", type=int, default=96, help="requests per run")
    parser.add_argument("--length", type=int, default=1024, help="tokens per prompt")
    parser.add_argument("--load", type=float, default=1.3, help="requests that come, of those that are served")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-passes", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, low in (("num_requests", 8), ("length", 64), ("rounds", 1), ("max_passes", 0)):
        if (value := getattr(options, name)) < low:
            raise BenchError(f"--{name.replace('_', '-')} {value}: at least {low} is wanted")
    if not options.load > 0:
        raise BenchError(f"--load {options.load:g}: must be above 0")
    return options


def main(arguments: list[str]) -> int:
    """Gate, then every policy in turns; the last line is one JSON object."""
    options = parse(arguments)
    directory = model_directory(options.model)
    config, _family = load_config(directory)
    if options.length + NUM_TOKENS > config.max_position_embeddings:
        raise BenchError(f"--length {options.length}: the model has {config.max_position_embeddings} positions")
    prefixes, requests = mix(options.num_requests, options.length, config.vocab_size, options.seed)
    head = min(GATE_JOBS, len(requests))
    figures: dict[str, Any] = origin() | {"model": directory.name, "load": options.load}
    figures["gate_requests"] = gate(directory, prefixes, requests[:head], options)
    print(f"check: {head} requests get the same tokens under {', '.join(POLICIES)}", flush=True)
    engines = {policy: opened(directory, policy, options) for policy in POLICIES}
    try:
        figures |= measure(engines, prefixes, requests, options)
    finally:
        for engine in engines.values():
            engine.close()
    finish("policies", figures, options.save)
    return 0
