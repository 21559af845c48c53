"""`python -m bench offline`: a whole workload at hand, many prompts that begin alike, arriving in the worst order.

Physics. A prefix that many requests share is computed once instead of once for each, and a decode step reads its keys
and values once for all of them. So each way of serving costs at least: its computed prompt tokens and its drawn ones
through the linear layers and causal attention, at the rate of a large product; and the keys and values that decode
steps read, at the rate of a bare read. `allowed` is the ratio of the two floors, apart over together; `x_roofline` is
the measured gain over it. BatchLLM's shape, scaled: groups of 16, 2,000 shared and 200 own prompt tokens, 100 drawn;
requests of a group never stand beside each other. The pool holds POOL_SHARE of the distinct tokens, less
than the prefixes alone, so an order that does not look ahead evicts what it needs again.

Ways, in turns, the same pool: `grouped` is what `Engine.generate` of a list and `kvlite batch` do; `ungrouped` admits
in order of arrival, reads each prefix for each request, and has the limits of a server. `saving_share` is the prompt
tokens that were not computed over those that an infinite cache saves; `tokens_per_step` counts rows of the model. On
the nested workload (degrees 1 to 64, 8 to 136 drawn) `walk` is the same walk of the prefix tree without the order by
ratio. Correctness first: greedy tokens of a short prompt are transformers', and the ways agree on most first tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvlite import Engine, EngineConfig
from kvlite.models import load_config
from kvlite.progress import Bar
from kvlite.types import EngineStats

from . import peer
from .batches import BLOCK, DEGREE, DRAWN, OWN, SHARED, Count, Groups, nested
from .client import find_model
from .compare import TIMEOUT_S
from .embedded import gate, greedy
from .errors import BenchError, TargetError
from .limits import Limits, kv_bytes_per_token
from .load import closed_loop
from .make_model import SHAPES, make
from .options import add_model_options, model_directory, torch_dtype
from .report import finish, origin
from .targets import TARGETS, Launch, free_port, running
from .workloads import Job

POOL_SHARE = 0.2
AGREE_SHARE = 0.75
PEER_REQUESTS = 8
LARGE_ROWS = 512
"""Of a product that is bound by arithmetic."""


@dataclass(frozen=True)
class Way:
    """How kvlite is told to serve."""

    name: str
    settings: dict[str, Any]
    presorted: bool = False
    """Fed in the order of a walk of the prefix tree, and computed in order of arrival."""
    whole: bool = False
    """The core knows that all of it is one workload."""


def ways() -> tuple[Way, Way, Way]:
    """Together; apart; and together without the order by ratio."""
    known = EngineConfig.from_env({}, batch=True)
    batch = {name: getattr(known, name) for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting")}
    apart = {"prefix_grouping": False, "max_num_waiting": known.max_num_waiting}
    return Way("grouped", batch, whole=True), Way("ungrouped", apart), Way("walk", batch, presorted=True)


@dataclass(frozen=True)
class Run:
    """One way of serving a workload once."""

    seconds: float
    cached: int
    tokens_per_step: float
    preemptions: int
    firsts: tuple[int, ...]
    """First token of every job."""


@contextmanager
def opened(directory: Path, way: Way, options: argparse.Namespace, pool_tokens: int, longest: int) -> Iterator[Engine]:
    """An engine for a way, with a pool of so many tokens."""
    config, _family = load_config(directory)
    dtype = torch_dtype(options.dtype)
    pool = (pool_tokens + 2 * BLOCK) * kv_bytes_per_token(config, dtype)
    name = str(dtype).removeprefix("torch.")
    with Engine(
        str(directory), device="cpu", dtype=name, num_threads=options.threads, kv_cache_bytes=pool,
        max_model_len=min(config.max_position_embeddings, max(longest + BLOCK, 64)), **way.settings,
    ) as engine:  # fmt: skip
        yield engine


def serve(engine: Engine, way: Way, jobs: Sequence[Job]) -> Run:
    """All jobs from a cold cache; every one must draw all its tokens."""
    engine.clear_cache()
    before = engine.stats()
    order = sorted(range(len(jobs)), key=lambda n: jobs[n].prompt) if way.presorted else list(range(len(jobs)))
    requests = [engine.validate(jobs[n].prompt, greedy(jobs[n].max_tokens)) for n in order]
    start = time.perf_counter()
    tokens: dict[int, list[int]] = {n: [] for n in order}
    with Bar(f"  {way.name}", unit="requests") as bar:
        num_done = 0
        for at, outcome in engine.run(requests, is_workload=way.whole):
            if isinstance(outcome, Exception):
                raise BenchError(f"{way.name}: {outcome}")
            tokens[order[at]] += outcome.token_ids
            num_done += outcome.usage is not None
            bar.update(num_done, len(jobs))
    seconds = time.perf_counter() - start
    for n, job in enumerate(jobs):
        if len(tokens[n]) != job.max_tokens:
            raise BenchError(f"{way.name}: request {n} drew {len(tokens[n])} of {job.max_tokens} tokens")
    after = engine.stats()
    return Run(
        seconds,
        after.cached_tokens - before.cached_tokens,
        rows(before, after) / max(after.num_steps - before.num_steps, 1),
        after.num_preemptions - before.num_preemptions,
        tuple(tokens[n][0] for n in range(len(jobs))),
    )


def rows(before: EngineStats, after: EngineStats) -> int:
    """Rows of the model between two looks: prompt tokens that were computed, and tokens drawn."""

    def count(stats: EngineStats) -> int:
        return stats.prompt_tokens - stats.cached_tokens + stats.generated_tokens

    return count(after) - count(before)


def agree(one: Run, other: Run) -> float:
    """Share of jobs whose first token is the same. Raises BenchError below AGREE_SHARE."""
    found = sum(a == b for a, b in zip(one.firsts, other.firsts, strict=True)) / len(one.firsts)
    if found < AGREE_SHARE:
        raise BenchError(f"wrong before fast: {found:.0%} of the first tokens agree")
    return found


def with_transformers(directory: Path, options: argparse.Namespace, jobs: Sequence[Job]) -> float:
    """Drawn tokens per second of `generate` with a static cache over the first jobs, as one batch."""
    batch = jobs[:PEER_REQUESTS]
    model = peer.load(directory, torch_dtype(options.dtype))
    ids, num_drawn = torch.tensor([job.prompt for job in batch]), batch[0].max_tokens
    start = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_drawn, min_new_tokens=num_drawn, do_sample=False,
        cache_implementation="static", disable_compile=True, pad_token_id=0,
    )  # fmt: skip
    elapsed = time.perf_counter() - start
    if out.shape[1] - ids.shape[1] != num_drawn:
        raise BenchError(f"transformers drew {out.shape[1] - ids.shape[1]} of {num_drawn} tokens")
    return len(batch) * num_drawn / elapsed


def with_server(name: str, directory: Path, options: argparse.Namespace, jobs: list[Job], count: Count) -> float:
    """Drawn tokens per second of a peer's server that gets all jobs at once. Raises TargetError."""
    room = max(options.peer_kv_bytes, 1)
    launch = Launch(directory, free_port(), options.threads, options.dtype, count.longest + BLOCK, 256, room)

    async def ask(address: Any) -> float:
        send = TARGETS[name].sender(address, (await find_model(address, None))["id"])
        with Bar(f"  {name}", unit="requests") as bar:
            records = await closed_loop(jobs, send, len(jobs), TIMEOUT_S, bar.update)
        if failed := next((record.error for record in records if record.error is not None), None):
            raise TargetError(f"{name}: {failed}")
        return sum(r.num_tokens for r in records) / (max(r.end_s for r in records) - min(r.due_s for r in records))

    with running(TARGETS[name], launch) as started:
        return asyncio.run(ask(started.address))


def in_turns(
    directory: Path, options: argparse.Namespace, chosen: Sequence[Way], jobs: list[Job], count: Count
) -> dict[str, list[Run]]:
    """Every way in every round, each with an engine that stays; the gate before the first."""
    config, _family = load_config(directory)
    pool_tokens = max(int(POOL_SHARE * (count.distinct + count.drawn)), 2 * count.longest)
    runs: dict[str, list[Run]] = {way.name: [] for way in chosen}
    with ExitStack() as stack:
        engines = [stack.enter_context(opened(directory, way, options, pool_tokens, count.longest)) for way in chosen]
        gate(engines[0], peer.load(directory, torch_dtype(options.dtype)), config)
        for turn in range(options.rounds):
            for way, engine in zip(chosen, engines, strict=True):
                run = serve(engine, way, jobs)
                runs[way.name].append(run)
                print(
                    f"  round {turn + 1}, {way.name:9}: {run.seconds:7.1f} s, {count.drawn / run.seconds:8.1f} drawn "
                    f"tokens/s, {run.tokens_per_step:6.0f} rows a step, {saving(run, count):.1%} of what can be saved, "
                    f"{run.preemptions} preemptions",
                    flush=True,
                )
    return runs


def saving(run: Run, count: Count) -> float:
    """Prompt tokens that were not computed, over those that an infinite cache saves."""
    return run.cached / max(count.prompt - count.distinct, 1)


def median(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    """Over the rounds."""
    return statistics.median(value(run) for run in runs)


def gain(runs: dict[str, list[Run]], one: str, other: str) -> float:
    """How much faster `one` is, the median of the rounds' ratios."""
    return statistics.median(b.seconds / a.seconds for a, b in zip(runs[one], runs[other], strict=True))


def groups_figures(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The first workload: together and apart, the limits, and the peers."""
    config, _family = load_config(directory)
    lengths = (max(int(length * options.scale), 1) for length in (SHARED, OWN, DRAWN))
    groups = Groups(options.groups, options.degree, *lengths)
    jobs = groups.jobs(config.vocab_size)
    count = Count.of(jobs)
    grouped, ungrouped, _walk = ways()
    print(
        f"{groups.num_jobs} requests in {groups.num_groups} groups, {count.prompt} prompt tokens, {count.drawn} drawn"
    )
    runs = in_turns(directory, options, (grouped, ungrouped), jobs, count)
    agreement = min(agree(*pair) for pair in zip(runs["grouped"], runs["ungrouped"], strict=True))
    x_ungrouped = gain(runs, "grouped", "ungrouped")
    limits = Limits(config, torch_dtype(options.dtype), options.threads, options.budget_s)
    apart = count.prompt - int(median(runs["ungrouped"], lambda run: run.cached))
    # Measured once: a floor over another must not depend on which was asked for first.
    flop_rate, key_rate = limits.flop_rate(LARGE_ROWS), limits.read_rate() / kv_bytes_per_token(config, limits.dtype)

    def floor_s(computed: int, readers: int) -> float:
        flops, keys = groups.work(config, computed, readers)
        return flops / flop_rate + keys / key_rate

    least = floor_s(count.distinct, groups.degree)
    allowed = floor_s(apart, 1) / least
    seconds = median(runs["grouped"], lambda run: run.seconds)
    rate = count.drawn / seconds
    figures: dict[str, Any] = {
        "groups": groups.num_groups, "degree": groups.degree, "requests": groups.num_jobs,
        "saving_share": round(median(runs["grouped"], lambda run: saving(run, count)), 4),
        "saving_share_ungrouped": round(median(runs["ungrouped"], lambda run: saving(run, count)), 4),
        "x_ungrouped": round(x_ungrouped, 3), "allowed": round(allowed, 3),
        "x_roofline": round(x_ungrouped / allowed, 3),
        "share_of_floor": round(least / seconds, 3), "tokens_per_s": round(rate, 2),
        "tokens_per_step": round(median(runs["grouped"], lambda run: run.tokens_per_step), 1),
        "tokens_per_step_fcfs": round(median(runs["ungrouped"], lambda run: run.tokens_per_step), 1),
        "agreement": round(agreement, 4),
    }  # fmt: skip
    print(f"together is {x_ungrouped:.2f} x apart, the machine allows {allowed:.2f} x; {least:.1f} s are the floor")
    if "transformers" in options.peers:
        figures["x_transformers_offline"] = round(rate / with_transformers(directory, options, jobs), 2)
        print(f"{figures['x_transformers_offline']} x transformers")
    for name in [name for name in options.peers if name != "transformers"]:
        try:
            figures[f"x_{name}_offline"] = round(rate / with_server(name, directory, options, jobs, count), 3)
            print(f"{figures[f'x_{name}_offline']} x {name}")
        except TargetError as error:
            figures.setdefault("failed", {})[name] = str(error)
            print(f"{name}: {error}")
    return figures


def nested_figures(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The second workload: with the order by ratio, without it, and in order of arrival."""
    config, _family = load_config(directory)
    jobs = nested(options.trees, options.scale, config.vocab_size)
    count = Count.of(jobs)
    print(
        f"nested: {len(jobs)} requests, {count.prompt} prompt tokens ({count.distinct} distinct), {count.drawn} drawn"
    )
    grouped, ungrouped, walk = ways()
    runs = in_turns(directory, options, (grouped, walk, ungrouped), jobs, count)
    return {
        "nested_saving_share": round(median(runs["grouped"], lambda run: saving(run, count)), 4),
        "nested_x_ungrouped": round(gain(runs, "grouped", "ungrouped"), 3),
        "nested_x_ratio_order": round(gain(runs, "grouped", "walk"), 3),
        "nested_tokens_per_step": round(median(runs["grouped"], lambda run: run.tokens_per_step), 1),
        "nested_tokens_per_step_walk": round(median(runs["walk"], lambda run: run.tokens_per_step), 1),
        "nested_tokens_per_step_fcfs": round(median(runs["ungrouped"], lambda run: run.tokens_per_step), 1),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked. Raises BenchError."""
    parser = argparse.ArgumentParser(prog="python -m bench offline", description="a whole workload at hand")
    add_model_options(parser)
    parser.set_defaults(model="small-long")
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument("--degree", type=int, default=DEGREE)
    parser.add_argument("--trees", type=int, default=2, help="of the nested workload; 0 leaves it out")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", default="transformers,vllm", help="of transformers, vllm, llamacpp; none for none")
    parser.add_argument("--peer-kv-bytes", type=int, default=1 << 30, help="a server's pool; vLLM takes whole GiB")
    parser.add_argument("--budget-s", type=float, default=0.1, help="seconds per loop of the limits")
    options = parser.parse_args(arguments)
    for name in ("groups", "degree", "rounds"):
        if getattr(options, name) < 1:
            raise BenchError(f"--{name} {getattr(options, name)}: must be above 0")
    if options.trees < 0 or not 0 < options.scale <= 4:
        raise BenchError(f"--trees {options.trees} --scale {options.scale:g}: 0 or more, and above 0 to 4 are wanted")
    options.peers = [] if options.peers == "none" else options.peers.split(",")
    for name in options.peers:
        if name not in list(TARGETS)[1:]:
            raise BenchError(f"--peers: {name!r} is none of {', '.join(list(TARGETS)[1:])}")
    return options


def main(arguments: list[str]) -> int:
    """Both workloads; the last line is one JSON object. `--model small-long` is made on the spot."""
    options = parse(arguments)
    figures: dict[str, Any] = origin() | {"model": Path(options.model).name, "threads": options.threads}
    figures |= {"dtype": str(torch_dtype(options.dtype)).removeprefix("torch.")}
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made) / options.model
        if options.model in SHAPES:
            make(SHAPES[options.model], directory)
        else:
            directory = model_directory(options.model)
        figures |= groups_figures(directory, options)
        if options.trees:
            figures |= nested_figures(directory, options)
    finish(f"offline-{Path(options.model).name}", figures, options.save)
    return 0
