"""`python -m bench compare`: kvlite and its peers side by side, each a server in its own environment.

Physics. Nothing that is not measured in the same run can be compared: this machine's rates move by the minute. So the
engines take turns (A B A B ...), each started alone, with the same model directory, token ids, lengths, element type,
threads and KV pool; greedy, end-of-text ignored, one warm-up. Figures are the client's: tokens per second of decode at
batch 1 and 8 from the time per output token, seconds to the first token of a prompt, tokens per second of W1
(independent prompts) and W2 (shared prefixes). Medians over the rounds, with their spread.

Correctness first: the greedy first tokens of short prompts must be kvlite's for most prompts (rounding may part two
engines later). A peer that does not start, dies or says other tokens is a line in the table, never a zero.
`x_PEER_FIGURE` above 1 says that kvlite is faster.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from dataclasses import dataclass
from typing import Any

from . import workloads
from .client import Address, RequestError, find_model
from .errors import BenchError
from .load import closed_loop
from .make_model import available_bytes
from .metrics import Record, percentile
from .options import model_directory
from .report import finish, origin
from .server import Server
from .targets import TARGETS, Launch, Target, TargetError, free_port, running
from .workloads import Job, Workload

GATE_PROMPTS = 8
GATE_TOKENS = 4
GATE_SHARE = 0.75
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Plan:
    """What every engine is asked in every round."""

    figures: list[str]
    vocab: int
    seed: int
    num_requests: int

    def workload(self, figure: str) -> Workload:
        """The jobs behind one figure."""
        makers = {
            "b1": lambda: workloads.streams(2, self.vocab, self.seed, 1),
            "b8": lambda: workloads.streams(8, self.vocab, self.seed, 8),
            "w1": lambda: workloads.independent(self.num_requests, self.vocab, self.seed),
            "w2": lambda: workloads.shared_prefixes(self.num_requests, self.vocab, self.seed),
        }
        if figure in makers:
            return makers[figure]()
        length = int(figure.removeprefix("ttft_"))
        prompts = [workloads.tokens(f"prefill {self.seed} {idx} {length}", length, self.vocab) for idx in range(2)]
        return Workload(figure, [Job(prompt, 1) for prompt in prompts], 1)


def figure_of(name: str, records: list[Record]) -> float:
    """Tokens per second, or for a prompt milliseconds to its first token. Raises TargetError for a failed request."""
    failed = next((record.error for record in records if record.error is not None), None)
    if failed is not None:
        raise TargetError(f"{name}: {failed}")
    if name.startswith("ttft_"):
        return statistics.median(record.ttft_s for record in records) * 1e3
    if name.startswith("b"):
        return int(name[1:]) / percentile([record.tpot_s for record in records], 50)
    duration = max(record.end_s for record in records) - min(record.due_s for record in records)
    return sum(record.num_tokens for record in records) / duration


async def first_tokens(server: Server, vocab: int) -> list[tuple[int, ...]]:
    """Greedy ids after a few short prompts; also the warm-up."""
    found: list[tuple[int, ...]] = []
    for idx in range(GATE_PROMPTS):
        ids: tuple[int, ...] = ()
        async for piece in server.send(Job(workloads.tokens(f"gate {idx}", 24, vocab), GATE_TOKENS)):
            ids += piece.token_ids
        if len(ids) != GATE_TOKENS:
            raise TargetError(f"{len(ids)} ids for {GATE_TOKENS} tokens")
        found.append(ids)
    return found


def agreement(ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> float:
    """Share of prompts with the same first token. Raises TargetError below GATE_SHARE."""
    found = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)) / len(ours)
    if found < GATE_SHARE:
        raise TargetError(f"other tokens: {found:.0%} of the first ones are kvlite's, so its speed means nothing")
    return found


async def one_round(address: Address, plan: Plan) -> tuple[list[tuple[int, ...]], dict[str, float]]:
    """Gate ids and every figure of a running engine. Raises TargetError."""
    try:
        model = (await find_model(address, None))["id"]
        server = Server(address, model, None, plain=False)
        ids = await first_tokens(server, plan.vocab)
    except (BenchError, RequestError) as error:
        raise TargetError(str(error)) from None
    figures: dict[str, float] = {}
    for name in plan.figures:
        workload = plan.workload(name)
        records = await closed_loop(workload.jobs, server.send, workload.concurrency, TIMEOUT_S, lambda *done: None)
        figures[name] = figure_of(name, records)
    return ids, figures


class Comparison:
    """Rounds of every engine; an engine that failed once is out."""

    def __init__(self, targets: list[Target]) -> None:
        self.targets = targets
        self.rounds: dict[str, list[dict[str, float]]] = {target.name: [] for target in targets}
        self.ids: dict[str, list[tuple[int, ...]]] = {}
        self.failed: dict[str, str] = {}

    def turn(self, target: Target, launch: Launch, plan: Plan) -> None:
        """Starts one engine, asks everything, ends it."""
        if target.name in self.failed:
            return
        try:
            with running(target, launch) as address:
                ids, figures = asyncio.run(one_round(address, plan))
            self.ids.setdefault(target.name, ids)
            agreement(self.ids[self.targets[0].name], ids)
        except TargetError as error:
            self.failed[target.name] = str(error)
            if target is self.targets[0]:
                raise BenchError(f"{target.name}: {error}") from None
            print(f"  {target.name}: {error}", flush=True)
            return
        self.rounds[target.name].append(figures)
        print(f"  {target.name}: " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()), flush=True)

    def figures(self, names: list[str]) -> dict[str, Any]:
        """Medians, spreads and ratios; a failed engine has its reason instead."""
        found: dict[str, Any] = {"failed": self.failed}
        first = self.targets[0].name
        for target in self.targets:
            rounds = [] if target.name in self.failed else self.rounds[target.name]
            for name in names if rounds else []:
                values = [one[name] for one in rounds]
                found[f"{target.name}_{name}"] = round(statistics.median(values), 2)
                found[f"{target.name}_{name}_spread"] = round(max(values) - min(values), 2)
                if target.name != first:
                    ratio = found[f"{first}_{name}"] / found[f"{target.name}_{name}"]
                    found[f"x_{target.name}_{name}"] = round(1 / ratio if name.startswith("ttft") else ratio, 3)
            if rounds and target.name != first:
                found[f"agreement_{target.name}"] = agreement(self.ids[first], self.ids[target.name])
        return found

    def table(self, names: list[str], found: dict[str, Any]) -> str:
        """One line per engine."""
        lines = [f"{'':14}" + "".join(f"{name:>12}" for name in names)]
        for target in self.targets:
            if target.name in self.failed:
                lines.append(f"{target.name:14}failed: {self.failed[target.name]}")
            else:
                lines.append(f"{target.name:14}" + "".join(f"{found[f'{target.name}_{name}']:12.1f}" for name in names))
        return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Every round of every engine; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description="kvlite and its peers side by side")
    parser.add_argument("--model", default="small", help="small (the model that ships) or a directory (make-model)")
    parser.add_argument("--peers", default="transformers", help=f"of {', '.join(list(TARGETS)[1:])}; commas between")
    parser.add_argument("--figures", default="b1,b8,ttft_512,w1,w2", help="b1, b8, w1, w2, ttft_N; commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-requests", type=int, default=32, help="of W1 and W2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vocab", type=int, default=1024, help="prompts use ids from 16 up to this")
    parser.add_argument("--kv-bytes", type=int, default=1 << 30)
    parser.add_argument("--save", action="store_true", help="also write bench/results/compare.json")
    options = parser.parse_args(arguments)
    names = options.figures.split(",")
    lengths = {"b1": 192, "b8": 192, "w1": 576, "w2": 1152}
    try:
        longest = max(lengths[name] if name in lengths else int(name.removeprefix("ttft_")) + 1 for name in names)
        targets = [TARGETS["kvlite"], *(TARGETS[name] for name in options.peers.split(","))]
    except (KeyError, ValueError) as error:
        raise BenchError(f"{error} is no figure (b1, b8, w1, w2, ttft_N) and no peer ({', '.join(TARGETS)})") from None
    if options.kv_bytes > available_bytes():
        raise BenchError(f"--kv-bytes {options.kv_bytes}: {available_bytes()} bytes of memory are free")
    model = model_directory(options.model)
    comparison = Comparison(targets)
    figures: dict[str, Any] = origin() | {"model": model.name, "dtype": options.dtype, "threads": options.threads}
    for turn in range(options.rounds):
        plan = Plan(names, options.vocab, turn, options.num_requests)
        print(f"round {turn + 1} of {options.rounds}", flush=True)
        for target in targets:
            launch = Launch(model, free_port(), options.threads, options.dtype, longest + 8, 8, options.kv_bytes)
            comparison.turn(target, launch, plan)
    found = comparison.figures(names)
    print(comparison.table(names, found))
    finish("compare", figures | {"rounds": options.rounds} | found, options.save)
    return 0
