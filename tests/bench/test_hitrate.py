"""The optimum and the plain twin of `python -m bench hitrate`, its errors, and the real core between them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.hitrate import ORDERS, Served, Trace, belady, infinite, plain_lru, prefix, read_trace


def conversations(seed: int, num_requests: int) -> Trace:
    """Prompts that go on from one of few, at random: paths of a tree with a new id for every new block."""
    rng = random.Random(seed)
    fresh = itertools.count()
    prompts: Trace = [[next(fresh)] for _ in range(3)]
    for _ in range(num_requests):
        before = rng.choice(prompts[-6:])
        prompts.append(before[: rng.randint(1, len(before))][:5] + [next(fresh) for _ in range(rng.randint(1, 3))])
    return prompts


def best_of_all(trace: Trace, capacity: int) -> int:
    """The most hits that any choices give: tries every set of blocks that may be kept after each request."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    parents = {block: parent for ids in trace for parent, block in zip([-1, *ids], ids, strict=False)}
    for ids in trace:
        following: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            there = held | set(ids)
            others = sorted(there - set(ids))
            for size in range(len(others) + 1):
                for kept in itertools.combinations(others, size):
                    after = frozenset(kept) | frozenset(ids)
                    is_closed = all(parents[block] == -1 or parents[block] in after for block in after)
                    if is_closed and len(after) <= capacity:
                        total = hits + len(prefix(ids, held))
                        following[after] = max(following.get(after, 0), total)
        states = following
    return max(states.values())


@pytest.mark.parametrize("seed", range(6))
def test_beladys_hits_are_the_most_that_any_choice_gives(seed: int) -> None:
    trace = conversations(seed, 9)
    longest = max(len(ids) for ids in trace)
    for capacity in (longest, longest + 2):
        assert belady(trace, capacity) == best_of_all(trace, capacity)


@pytest.mark.parametrize("seed", range(4))
def test_the_core_under_lru_hits_what_plain_lru_hits_and_no_order_passes_belady(seed: int) -> None:
    trace = conversations(seed, 300)
    for capacity in (12, 30):
        served, hits = Served(trace, capacity, "lru", 0).run()
        assert (served, hits) == (list(range(len(trace))), plain_lru(trace, capacity))
        best = belady(trace, capacity)
        assert best <= infinite(trace)
        for order in ORDERS:
            for num_queued in (0, 5):
                assert sum(Served(trace, capacity, order, num_queued).run()[1]) <= best, (order, num_queued)


def test_with_the_whole_trace_in_the_queue_the_core_is_the_optimum() -> None:
    trace = conversations(1, 200)  # No more than the core watches.
    for capacity in (12, 30):
        assert sum(Served(trace, capacity, "lru", len(trace)).run()[1]) == belady(trace, capacity)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "line 2: a JSON object with hash_ids is wanted"),
        ('{"timestamp": 0}', "line 2: a JSON object with hash_ids is wanted"),
        ('{"hash_ids": [1, -2]}', "line 2: hash_ids is no list of numbers from 0"),
        ('{"hash_ids": []}', "line 2: hash_ids is no list"),
        ('{"hash_ids": [4, 2]}', "line 2: block 2 follows 4, before 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, error: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1, 2]}\n' + line + "\n")
    with pytest.raises(BenchError, match=f"trace.jsonl, {error}"):
        read_trace(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"nowhere\.jsonl: cannot be read"):
        read_trace(tmp_path / "nowhere.jsonl")
