"""`python -m bench hitrate --trace FILE`: how much of a trace's prompts the prefix cache serves, against the optimum.

Physics. A block can be hit when a prompt repeats a path of blocks that some earlier prompt had; how many are is a
property of the trace (`infinite`). A pool holds only so many blocks, and of what it may keep, keeping what is needed
soonest is best: that is Belady's rule, which must know the future. In a tree a block is of use only below its parent,
and whoever takes the block whose next use is furthest away, the deepest on a tie, always takes a leaf; so block-level
Belady is the optimum here as well. No figure may pass it but in another order of requests, which has its own optimum.

Modelled: a trace of Mooncake's format, one JSON object per line with `hash_ids`: an id per block of 512 prompt tokens,
equal ids after equal ids. The online figures are the real core's (`kvlite._core.Core`), driven without a model: an id
is a token, a block is one token, one sequence runs at a time, so requests are served in the order in which they came,
each alone in the pool. `--queue N`: N further requests wait while one is served, and the core sees their prompts (it
watches 256, see `cache/wants.rs`); 0: none. A request's last block is always computed, as in the engine, where the last
token is; the optimum has the same rule. Each request writes one output token, which takes no block of its own; the
trace's outputs (2.8 % of its tokens) have no ids and are left out, as are arrival times: a queue of N is assumed.
Reordering is reported apart: `--policy cache-aware` over the longest queue.

Checked before a figure is printed: the hits of the real LRU core are those of a plain LRU in Python, request by
request; no online figure passes Belady's, and Belady's none the infinite cache's.
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvlite import _core
from kvlite.runner.plan import Header

from .errors import BenchError
from .report import finish, origin

TOKENS_PER_BLOCK = 512
ORDERS = ("lru", "depth-discounted", "cost-aware", "reuse-weighted")
DEFAULT_ORDER = "reuse-weighted"
CAPACITIES = "0.25,0.5,1,3,10"
# Requests over which the real core and the plain LRU must agree.
CHECKED = 1500
NEVER = 1 << 60

Trace = list[list[int]]


def read_trace(path: Path) -> Trace:
    """The blocks of every request. Raises BenchError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--trace {path}: cannot be read: {error}") from error
    trace: Trace = []
    for number, line in enumerate(lines, start=1):
        try:
            ids = json.loads(line)["hash_ids"]
        except (ValueError, TypeError, KeyError) as error:
            raise BenchError(f"{path}, line {number}: a JSON object with hash_ids is wanted ({error!r})") from error
        if not isinstance(ids, list) or not ids or not all(type(at) is int and 0 <= at < 1 << 31 for at in ids):
            raise BenchError(f"{path}, line {number}: hash_ids is no list of numbers from 0 to 2^31 - 1, or is empty")
        trace.append(ids)
    if not trace:
        raise BenchError(f"--trace {path}: no requests in it")
    check_paths(path, trace)
    return trace


def check_paths(path: Path, trace: Trace) -> None:
    """An id stands for a whole prefix: it must always follow the same id."""
    parents: dict[int, int] = {}
    for number, ids in enumerate(trace, start=1):
        for parent, block in zip([-1, *ids], ids, strict=False):
            if parents.setdefault(block, parent) != parent:
                raise BenchError(f"{path}, line {number}: block {block} follows {parent}, before {parents[block]}")


def infinite(trace: Trace) -> int:
    """Blocks that a cache which forgets nothing serves."""
    seen: set[int] = set()
    hits = 0
    for ids in trace:
        hits += sum(1 for _ in prefix(ids, seen))
        seen.update(ids)
    return hits


def prefix(ids: list[int], held: Any) -> list[int]:
    """The blocks that `held` serves: the longest stored beginning, but for the last block."""
    for at, block in enumerate(ids[:-1]):
        if block not in held:
            return ids[:at]
    return ids[:-1]


def belady(trace: Trace, capacity: int) -> int:
    """Hits of the optimum that serves the trace in order and holds a request's own blocks while it runs.

    A heap of (next use, depth): entries that are out of date are skipped when they come up. O(blocks log blocks).
    """
    uses: dict[int, list[int]] = {}
    for at, ids in enumerate(trace):
        for block in ids:
            uses.setdefault(block, [])
        for block in ids[:-1]:  # The last one is no hit.
            uses[block].append(at)
    for times in uses.values():
        times.reverse()
    held: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    hits = 0
    for ids in trace:
        found = prefix(ids, held)
        hits += len(found)
        for block in ids[:-1]:
            uses[block].pop()
        held |= dict.fromkeys(ids, -1)  # In use: no entry of the heap is about them now.
        while len(held) > capacity:
            while True:
                next_use, _, block = heapq.heappop(heap)
                if held.get(block) == -next_use:
                    del held[block]
                    break
        for depth, block in enumerate(ids):
            held[block] = uses[block][-1] if uses[block] else NEVER
            heapq.heappush(heap, (-held[block], -depth, block))
    return hits


def plain_lru(trace: Trace, capacity: int) -> list[int]:
    """Hits per request of the obvious LRU: a request's blocks are the newest, its first the newest of all."""
    held: OrderedDict[int, None] = OrderedDict()
    hits: list[int] = []
    for ids in trace:
        hits.append(len(prefix(ids, held)))
        for block in ids[: hits[-1]]:
            held.move_to_end(block)  # In use: not the oldest.
        while len(held) + len(ids) - hits[-1] > capacity:
            held.popitem(last=False)
        for block in reversed(ids):
            held[block] = None
            held.move_to_end(block)
    return hits


class Served:
    """The real core with one block per token, and a model that answers everything with token 0."""

    def __init__(self, trace: Trace, capacity: int, order: str, num_queued: int, policy: str = "fcfs") -> None:
        longest = max(len(ids) for ids in trace)
        config: dict[str, Any] = {
            "num_blocks": capacity, "block_size": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1 << 16,
            "max_model_len": longest + 1, "max_num_waiting": num_queued + 1, "policy": policy,
            "max_passes": 64, "eviction": order,
            "vocab_size": max(max(ids) for ids in trace) + 1, "enable_prefix_caching": True,
            # A block stands for 512 tokens; attention is as dear as the rest at 4,096 of them.
            "attention_cost_tokens": 4096 // TOKENS_PER_BLOCK, "attention_split_tokens": 256, "group_cost_tokens": 0,
            "host_blocks": 0, "swap_cost_tokens": 0,
            "reserve_tokens": 0, "watermark_ratio": 1.0, "segment_cache_ratio": 0.0, "model_digest": 0,
            "canonical_prefix": [], "max_segments": 1, "hash_seed": 1,
        }  # fmt: skip
        layout = _core.Core.layout(**config)
        self._arenas = [np.zeros(_core.Core.arena_len(**config), np.int32) for _ in range(2)]
        self._regions = [
            {
                name: arena[offset : offset + int(np.prod(shape))].reshape(shape)
                for name, (offset, shape) in layout.items()
            }
            for arena in self._arenas
        ]
        self._core = _core.Core(arenas=(self._arenas[0], self._arenas[1]), **config)
        self._idx = 0
        self._trace, self._num_queued = trace, num_queued

    def run(self) -> tuple[list[int], list[int]]:
        """(request, blocks served from the cache) of every admission, in that order."""
        served: list[int] = []
        hits: list[int] = []
        num_added = 0
        while len(hits) < len(self._trace):
            while num_added < min(len(hits) + 1 + self._num_queued, len(self._trace)):
                self._add(self._trace[num_added])
                num_added += 1
            self._step(served, hits)
        return served, hits

    def _add(self, ids: list[int]) -> None:
        self._core.add(
            np.asarray(ids, np.int32), n=1, max_tokens=1, min_tokens=0, stop_token_ids=[], priority=0,
            deadline_ms=None, tenant=0, use_cache=True, prompt_logprobs=False, now_ms=0,
        )  # fmt: skip

    def _step(self, served: list[int], hits: list[int]) -> None:
        self._idx = 1 - self._idx
        self._core.step(self._idx, 0)
        regions = self._regions[self._idx]
        header = regions["header"]
        admitted = regions["admitted"][: header[Header.NUM_ADMITTED]]
        served.extend(admitted[:, 0].tolist())  # Handles count requests from 0.
        hits.extend(admitted[:, 4].tolist())
        regions["sampled"][: header[Header.NUM_SAMPLES]] = 0
        regions["status"][0] = 0
        regions["done_plan_id"][0] = header[Header.PLAN_ID]


def check(trace: Trace, capacity: int) -> None:
    """The real core under LRU hits what the obvious LRU hits."""
    part = trace[:CHECKED]
    real, plain = Served(part, capacity, "lru", 0).run()[1], plain_lru(part, capacity)
    differ = [at for at, (one, other) in enumerate(zip(real, plain, strict=True)) if one != other]
    if differ:
        at = differ[0]
        raise BenchError(
            f"request {at}: the core hits {real[at]} blocks, plain LRU {plain[at]}: the figures would be wrong"
        )


def measure(trace: Trace, millions: float, queues: list[int], most: int) -> dict[str, Any]:
    """Blocks served at one capacity by the optimum and by every order with every queue; `most`: with no bound."""
    capacity = int(millions * 1e6 / TOKENS_PER_BLOCK)
    longest = max(len(ids) for ids in trace)
    if capacity < longest:
        raise BenchError(f"--capacities {millions:g}: the longest prompt alone has {longest * TOKENS_PER_BLOCK} tokens")
    check(trace, capacity)
    best = belady(trace, capacity)
    rows: dict[str, Any] = {}
    for order in ORDERS:
        for num_queued in queues:
            served, hits = Served(trace, capacity, order, num_queued).run()
            if served != list(range(len(trace))) or sum(hits) > best or best > most:
                raise BenchError(
                    f"{order}, queue {num_queued}: {sum(hits)} hits, Belady {best}, infinite {most}, in order"
                )
            rows[f"{order} q{num_queued}"] = sum(hits)
    return {"belady": best, "orders": rows, "reordered": reordered(trace, capacity, max(queues))}


def reordered(trace: Trace, capacity: int, num_queued: int) -> tuple[int, int]:
    """Hits where the least work of a queue is served first (cache-aware), and the optimum of the order that it made."""
    served, hits = Served(trace, capacity, DEFAULT_ORDER, num_queued, "cache-aware").run()
    order = [trace[at] for at in served]
    best, most = belady(order, capacity), infinite(order)
    if sorted(served) != list(range(len(trace))) or not sum(hits) <= best <= most:
        raise BenchError(f"cache-aware, queue {num_queued}: {sum(hits)} hits, Belady {best}, infinite {most}")
    return sum(hits), best


def report(trace: Trace, measured: dict[float, dict[str, Any]], most: int) -> dict[str, Any]:
    """Prints the table and returns it as shares."""
    total = sum(len(ids) for ids in trace)
    names = list(next(iter(measured.values()))["orders"])
    print(f"\n{len(trace)} requests, {total} blocks of {TOKENS_PER_BLOCK} tokens; infinite cache {most / total:.1%}")
    print("hit rate (share of Belady)  " + "".join(f"{millions:>12g} M" for millions in measured))
    print(f"{'belady':28}" + "".join(f"{at['belady'] / total:>14.1%}" for at in measured.values()))
    table: dict[str, Any] = {}
    for name in names:
        cells = [(at["orders"][name], at["belady"]) for at in measured.values()]
        print(f"{name:28}" + "".join(f"{hits / total:>7.1%} ({hits / best:4.0%})" for hits, best in cells))
        pairs = zip(measured, cells, strict=True)
        table[name] = {
            f"{millions:g}m": {"rate": round(hits / total, 4), "of_belady": round(hits / best, 4)}
            for millions, (hits, best) in pairs
        }
    cells = [at["reordered"] for at in measured.values()]
    print("served in another order (cache-aware), with the longest queue; Belady of that order beside it")
    print(f"{DEFAULT_ORDER:28}" + "".join(f"{hits / total:>7.1%} ({hits / best:4.0%})" for hits, best in cells))
    again = {
        f"{millions:g}m": {"rate": round(hits / total, 4), "belady": round(best / total, 4)}
        for millions, (hits, best) in zip(measured, cells, strict=True)
    }
    optimum = {f"{millions:g}m": round(at["belady"] / total, 4) for millions, at in measured.items()}
    return {"infinite": round(most / total, 4), "belady": optimum, "orders": table, "cache_aware": again}


def main(arguments: Sequence[str]) -> int:
    """Replays the trace; the last line is one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m bench hitrate", description="prefix hits of a trace, against Belady"
    )
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines with hash_ids (Mooncake's format)")
    parser.add_argument("--capacities", default=CAPACITIES, help="millions of tokens, separated by commas")
    parser.add_argument("--queue", default="0,256", help="requests that wait and are known while one is served")
    parser.add_argument("--save", action="store_true", help="also write bench/results/hitrate.json")
    options = parser.parse_args(arguments)
    capacities = numbers("--capacities", options.capacities, float)
    queues = numbers("--queue", options.queue, int)
    trace = read_trace(options.trace)
    most = infinite(trace)
    measured: dict[float, dict[str, Any]] = {}
    for millions in capacities:
        start = time.perf_counter()
        measured[millions] = measure(trace, millions, queues, most)
        print(f"{millions:g} M tokens: {time.perf_counter() - start:.0f} s", flush=True)
    figures: dict[str, Any] = (
        origin() | {"trace": options.trace.name, "default_order": DEFAULT_ORDER} | report(trace, measured, most)
    )
    for num_queued in queues:
        row = figures["orders"][f"{DEFAULT_ORDER} q{num_queued}"]
        figures |= {f"belady_share_{capacity}_q{num_queued}": cell["of_belady"] for capacity, cell in row.items()}
    finish("hitrate", figures, options.save)
    return 0


def numbers(option: str, text: str, kind: Any) -> list[Any]:
    """Numbers, for a queue from 0 on, else above 0. Raises BenchError."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or (kind is float and not 0 < min(found) <= max(found) < 1e6):
        raise BenchError(
            f"{option} {text}: numbers {'from' if kind is int else 'above'} 0 are wanted, separated by commas"
        )
    return found
