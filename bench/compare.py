"""`python -m bench compare`: kvlite and its peers side by side, each a server in its own environment.

Physics. Nothing that is not measured in the same run can be compared: this machine's rates move by the minute. So the
engines take turns (A B A B ...), each started alone, with the same model directory, token ids, lengths, threads and KV
pool; greedy, end-of-text ignored, one warm-up. The number format is one for all, or (`auto`) what each engine does best
with a 16-bit checkpoint on this CPU; the table names it. Figures are the client's: tokens per second of decode at batch
1 and 8 from the time per output token, milliseconds to the first token of a prompt, tokens per second of a prompt of
2,048 (`prefill`), tokens per second of W1 (independent prompts) and W2 (shared prefixes), seconds from start to ready.
Medians over the rounds, with their spread.

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
from pathlib import Path
from typing import Any

from kvlite.progress import Bar

from . import workloads
from .client import RequestError, find_model
from .errors import BenchError, TargetError
from .load import Send, closed_loop
from .make_model import available_bytes
from .metrics import Record, percentile
from .options import model_directory
from .report import finish, origin
from .targets import TARGETS, Launch, Started, Target, free_port, running
from .workloads import Job, Workload

GATE_PROMPTS = 8
GATE_TOKENS = 4
GATE_SHARE = 0.75
TIMEOUT_S = 600.0
MAX_NUM_SEQS = 8
ROOM = 8
"""Positions that some engines keep for themselves."""
PREFILL_LEN = 2048
PROMPTS = 3
"""Of a figure that is one prompt's."""
LENGTHS = {"b1": 192, "b8": 192, "prefill": PREFILL_LEN + 1, "w1": 576, "w2": 1152}
"""Tokens of a request, output included; ttft_N has N + 1."""


def longest_request(figures: list[str]) -> int:
    """Tokens of the longest request behind `figures`. Raises BenchError for what is no figure."""
    lengths: list[int] = []
    for name in figures:
        number = name.removeprefix("ttft_")
        if name not in LENGTHS and not (name.startswith("ttft_") and number.isdecimal() and int(number) > 0):
            raise BenchError(f"--figures: {name!r} is none of {', '.join(LENGTHS)} and ttft_N")
        lengths.append(LENGTHS.get(name) or int(number) + 1)
    return max(lengths)


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
        length = PREFILL_LEN if figure == "prefill" else int(figure.removeprefix("ttft_"))
        names = [f"prefill {self.seed} {idx} {length}" for idx in range(PROMPTS)]
        return Workload(figure, [Job(workloads.tokens(name, length, self.vocab), 1) for name in names], 1)


def figure_of(name: str, records: list[Record]) -> float:
    """Tokens per second, or for a prompt milliseconds to its first token. Raises TargetError for a failed request."""
    failed = next((record.error for record in records if record.error is not None), None)
    if failed is not None:
        raise TargetError(f"{name}: {failed}")
    if name == "prefill" or name.startswith("ttft_"):
        ttft_s = statistics.median(record.ttft_s for record in records)
        return PREFILL_LEN / ttft_s if name == "prefill" else ttft_s * 1e3
    if name.startswith("b"):
        return int(name[1:]) / percentile([record.tpot_s for record in records], 50)
    duration = max(record.end_s for record in records) - min(record.due_s for record in records)
    return sum(record.num_tokens for record in records) / duration


def less_is_better(name: str) -> bool:
    """Whether a figure is a time."""
    return name == "ready_s" or name.startswith("ttft_")


async def first_tokens(send: Send, vocab: int) -> list[tuple[int, ...]]:
    """Greedy ids after a few short prompts; also the warm-up."""
    found: list[tuple[int, ...]] = []
    for idx in range(GATE_PROMPTS):
        ids: tuple[int, ...] = ()
        count = 0
        async for piece in send(Job(workloads.tokens(f"gate {idx}", 24, vocab), GATE_TOKENS)):
            ids += piece.token_ids
            count += piece.num_tokens
        if count != GATE_TOKENS or not ids:
            raise TargetError(f"{count} tokens and {len(ids)} ids for {GATE_TOKENS} tokens")
        found.append(ids)
    return found


def agreement(ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> float:
    """Share of prompts with the same first token. Raises TargetError below GATE_SHARE."""
    found = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)) / len(ours)
    if found < GATE_SHARE:
        raise TargetError(f"other tokens: {found:.0%} of the first ones are kvlite's, so its speed means nothing")
    return found


async def one_round(target: Target, started: Started, plan: Plan) -> tuple[list[tuple[int, ...]], dict[str, float]]:
    """Gate ids and every figure of a running engine. Raises TargetError."""
    try:
        model = (await find_model(started.address, None))["id"]
        send = target.sender(started.address, model)
        ids = await first_tokens(send, plan.vocab)
    except (BenchError, RequestError) as error:
        raise TargetError(str(error)) from None
    figures: dict[str, float] = {"ready_s": started.ready_s}
    for name in plan.figures:
        workload = plan.workload(name)
        with Bar(f"  {target.name} {name}", unit="requests") as bar:
            records = await closed_loop(workload.jobs, send, workload.concurrency, TIMEOUT_S, bar.update)
        figures[name] = figure_of(name, records)
    return ids, figures


class Comparison:
    """Rounds of every engine; an engine that failed once is out."""

    def __init__(self, targets: list[Target], dtype: str) -> None:
        self.targets = targets
        self.dtype = dtype
        self.rounds: dict[str, list[dict[str, float]]] = {target.name: [] for target in targets}
        self.ids: dict[str, list[tuple[int, ...]]] = {}
        self.failed: dict[str, str] = {}

    def turn(self, target: Target, launch: Launch, plan: Plan) -> None:
        """Starts one engine, asks everything, ends it."""
        if target.name in self.failed:
            return
        try:
            with running(target, launch) as started:
                ids, figures = asyncio.run(one_round(target, started, plan))
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
                    found[f"x_{target.name}_{name}"] = round(1 / ratio if less_is_better(name) else ratio, 3)
            if rounds and target.name != first:
                found[f"agreement_{target.name}"] = agreement(self.ids[first], self.ids[target.name])
        return found

    def table(self, names: list[str], found: dict[str, Any]) -> str:
        """One line per engine, its number format first."""
        lines = [f"{'':14}{'format':10}" + "".join(f"{name:>11}" for name in names)]
        for target in self.targets:
            line = f"{target.name:14}"
            if target.name in self.failed:
                line += f"failed: {self.failed[target.name]}"
            else:
                line += f"{target.dtype(self.dtype):10}"
                line += "".join(f"{found[f'{target.name}_{name}']:11.1f}" for name in names)
            lines.append(line)
        return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked. Raises BenchError."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description="kvlite and its peers side by side")
    parser.add_argument("--model", default="small", help="small (the model that ships) or a directory (make-model)")
    parser.add_argument("--peers", default="transformers", help=f"of {', '.join(list(TARGETS)[1:])}; commas between")
    parser.add_argument("--figures", default="b1,b8,ttft_512,w1,w2", help=f"{', '.join(LENGTHS)}, ttft_N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-requests", type=int, default=32, help="of W1 and W2")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="one for all engines, or what each does best here with 16-bit weights",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vocab", type=int, default=1024, help="prompts use ids from 16 up to this")
    parser.add_argument("--kv-bytes", type=int, default=1 << 30)
    parser.add_argument("--save", action="store_true", help="also write bench/results/compare-MODEL.json")
    options = parser.parse_args(arguments)
    for name in ("rounds", "num_requests", "threads", "kv_bytes"):
        if getattr(options, name) < 1:
            raise BenchError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be above 0")
    if options.vocab <= workloads.FIRST_ID:
        raise BenchError(f"--vocab {options.vocab}: must be above {workloads.FIRST_ID}")
    for name in options.peers.split(","):
        if name not in list(TARGETS)[1:]:
            raise BenchError(f"--peers: {name!r} is none of {', '.join(list(TARGETS)[1:])}")
    if options.kv_bytes > available_bytes():
        raise BenchError(f"--kv-bytes {options.kv_bytes}: {available_bytes()} bytes of memory are free")
    return options


def main(arguments: list[str]) -> int:
    """Every round of every engine; the last line is one JSON object."""
    options = parse(arguments)
    wanted = options.figures.split(",")
    max_len = longest_request(wanted) + ROOM
    targets = [TARGETS["kvlite"], *(TARGETS[name] for name in options.peers.split(","))]
    model = model_directory(options.model)
    figures: dict[str, Any] = origin() | {"model": options.model, "threads": options.threads}
    figures |= {"rounds": options.rounds} | {f"{target.name}_dtype": target.dtype(options.dtype) for target in targets}
    comparison = Comparison(targets, options.dtype)
    for turn in range(options.rounds):
        plan = Plan(wanted, options.vocab, turn, options.num_requests)
        print(f"round {turn + 1} of {options.rounds}", flush=True)
        for target in targets:
            launch = Launch(model, free_port(), options.threads, options.dtype, max_len, MAX_NUM_SEQS, options.kv_bytes)
            comparison.turn(target, launch, plan)
    names = [*wanted, "ready_s"]
    found = comparison.figures(names)
    print(comparison.table(names, found))
    finish(f"compare-{Path(options.model).name}", figures | found, options.save)
    return 0
