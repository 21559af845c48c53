"""What is asked, and when: workloads W1 to W4, Poisson arrivals, and traces (Mooncake's JSON lines, Azure's CSV).

Pure: a workload is a list of jobs, a function of its arguments and seed; nothing here waits or sends. Prompts are token
ids, so that every engine gets the same ones. A bad line of a trace is an error that names file, line and field.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import BenchError

FIRST_ID = 16
"""Ids below are special in the models of make-model and the shipped one."""
MOONCAKE_BLOCK = 512
"""Tokens that one hash id of a Mooncake trace stands for."""
LONGEST = 1 << 20
"""A longer request in a trace is taken for a broken line."""


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class Job:
    """One request; `at_s` is its due time after the start, unused in a closed loop."""

    prompt: tuple[int, ...]
    max_tokens: int
    at_s: float = 0.0
    documents: tuple[str, ...] = ()
    """Texts of a chat over documents, which then has no `prompt` ..."""
    question: str = ""
    """... but a question; every such chat has one system message."""


@dataclass(frozen=True)
class Workload:
    """Jobs and how many clients ask at once."""

    name: str
    jobs: list[Job]
    concurrency: int


@dataclass(frozen=True)
class Arrival:
    """One line of a trace: when, how long, and which blocks its prompt is made of (none: its own)."""

    at_s: float
    prompt_len: int
    output_len: int
    blocks: tuple[int, ...] = ()


@lru_cache(maxsize=65_536)
def tokens(seed: str, length: int, vocab: int) -> tuple[int, ...]:
    """`length` random ids that depend on the arguments alone."""
    draw = random.Random(seed)
    return tuple(draw.randrange(FIRST_ID, vocab) for _ in range(length))


def independent(num_requests: int, vocab: int, seed: int, concurrency: int = 8) -> Workload:
    """W1: prompts that share nothing, 512 in, 64 out."""
    jobs = [Job(tokens(f"w1 {seed} {idx}", 512, vocab), 64) for idx in range(num_requests)]
    return Workload("w1", jobs, concurrency)


def shared_prefixes(num_requests: int, vocab: int, seed: int, concurrency: int = 8) -> Workload:
    """W2: groups of 4 that share 1,024 tokens, 64 of their own, 64 out; the groups are mixed."""
    jobs = [
        Job(tokens(f"w2 {seed} {idx // 4}", 1024, vocab) + tokens(f"w2 own {seed} {idx}", 64, vocab), 64)
        for idx in range(num_requests)
    ]
    random.Random(seed).shuffle(jobs)
    return Workload("w2", jobs, concurrency)


def words(seed: str, count: int) -> str:
    """A text that depends on the arguments alone: letters and digits, one or two tokens each in any tokenizer."""
    draw = random.Random(seed)
    return " ".join(draw.choice(LETTERS) for _ in range(count))


def retrieval(num_requests: int, seed: int, concurrency: int = 1) -> Workload:
    """W3: chats over 6 of 12 documents of some 256 tokens in random order, a question of some 32, 16 out."""
    draw = random.Random(f"w3 {seed}")
    jobs = [
        Job((), 16, documents=tuple(draw.sample(W3_POOL, 6)), question=words(f"w3 asks {seed} {idx}", 24))
        for idx in range(num_requests)
    ]
    return Workload("w3", jobs, concurrency)


def streams(num_requests: int, vocab: int, seed: int, concurrency: int) -> Workload:
    """W4: decode with 1 or 8 streams at once, 64 in, 128 out."""
    jobs = [Job(tokens(f"w4 {seed} {idx}", 64, vocab), 128) for idx in range(num_requests)]
    return Workload(f"w4_{concurrency}", jobs, concurrency)


W3_POOL = [words(f"w3 document {idx}", 200) for idx in range(12)]


def poisson(jobs: list[Job], rate: float, seed: int) -> list[Job]:
    """The same jobs, due at the times of a Poisson process of `rate` requests per second, the first at 0."""
    if not 0 < rate < math.inf:
        raise BenchError(f"--rate {rate:g}: requests per second, above 0")
    draw = random.Random(seed)
    at = 0.0
    due: list[Job] = []
    for job in jobs:
        due.append(replace(job, at_s=at))
        at += draw.expovariate(rate)
    return due


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals in order of time, the first at 0; .jsonl is Mooncake's form, .csv Azure's. Raises BenchError."""
    readers: dict[str, Callable[[Path], list[Arrival]]] = {".jsonl": _read_mooncake, ".csv": _read_azure}
    if path.suffix not in readers:
        raise BenchError(f"--trace {path}: .jsonl (Mooncake) or .csv (Azure) is wanted")
    try:
        found = readers[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--trace {path}: {error}") from None
    if not found:
        raise BenchError(f"--trace {path}: it has no requests")
    found.sort(key=lambda arrival: arrival.at_s)
    return [replace(arrival, at_s=arrival.at_s - found[0].at_s) for arrival in found]


def _read_mooncake(path: Path) -> list[Arrival]:
    arrivals: list[Arrival] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                fields: Any = json.loads(line)
            except ValueError:
                raise BenchError(f"{where}: no JSON: {line.strip()[:60]!r}") from None
            if not isinstance(fields, dict):
                raise BenchError(f"{where}: an object is wanted: {line.strip()[:60]!r}")
            prompt_len = _count(where, "input_length", fields.get("input_length"))
            blocks = fields.get("hash_ids")
            if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
                raise BenchError(f"{where}: hash_ids is {str(blocks)[:40]}: a list of integers is wanted")
            if len(blocks) != -(-prompt_len // MOONCAKE_BLOCK):
                raise BenchError(
                    f"{where}: {len(blocks)} hash_ids for {prompt_len} tokens, one per {MOONCAKE_BLOCK} is wanted"
                )
            at = fields.get("timestamp")
            if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at < math.inf:
                raise BenchError(f"{where}: timestamp is {at!r}: milliseconds, 0 or more")
            output_len = _count(where, "output_length", fields.get("output_length"))
            arrivals.append(Arrival(at / 1e3, prompt_len, output_len, tuple(blocks)))
    return arrivals


def _read_azure(path: Path) -> list[Arrival]:
    wanted = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
    arrivals: list[Arrival] = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header != wanted:
            raise BenchError(f"{path}:1: the header is {','.join(header)[:80]!r}, {','.join(wanted)} is wanted")
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if len(row) != len(wanted):
                raise BenchError(f"{where}: {len(row)} fields, {len(wanted)} are wanted")
            try:
                at = datetime.fromisoformat(row[0]).timestamp()
            except ValueError:
                raise BenchError(f"{where}: TIMESTAMP is {row[0]!r}: a date and a time are wanted") from None
            lengths = [_count(where, name, _integer(text)) for name, text in zip(wanted[1:], row[1:], strict=True)]
            arrivals.append(Arrival(at, lengths[0], lengths[1]))
    return arrivals


def _integer(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _count(where: str, name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LONGEST:
        raise BenchError(f"{where}: {name} is {value!r}: a number from 1 to {LONGEST} is wanted")
    return value


@dataclass(frozen=True)
class Scaling:
    """How a trace is made to fit a server; `speedup` divides times, `length` multiplies lengths."""

    speedup: float = 1.0
    length: float = 1.0
    max_len: int = LONGEST
    """Requests with more tokens than this, output included, are left out (and counted)."""


def trace_jobs(arrivals: list[Arrival], scaling: Scaling, vocab: int, num_requests: int) -> tuple[list[Job], int]:
    """The first `num_requests` jobs that fit, and how many before them were left out."""
    if not scaling.speedup > 0 or not scaling.length > 0:
        raise BenchError("--speedup and --scale must be above 0")
    jobs: list[Job] = []
    left_out = 0
    block_len = max(round(MOONCAKE_BLOCK * scaling.length), 1)
    for idx, arrival in enumerate(arrivals):
        if len(jobs) == num_requests:
            break
        prompt_len = max(round(arrival.prompt_len * scaling.length), 1)
        output_len = max(round(arrival.output_len * scaling.length), 1)
        if prompt_len + output_len > scaling.max_len:
            left_out += 1
            continue
        prompt = tuple(token for block in arrival.blocks for token in tokens(f"block {block}", block_len, vocab))
        prompt += tokens(f"own {idx}", max(prompt_len - len(prompt), 0), vocab)
        jobs.append(Job(prompt[:prompt_len], output_len, arrival.at_s / scaling.speedup))
    return jobs, left_out
