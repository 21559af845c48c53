"""The law of deterministic mode for requests that move: mixes of everything, at random, between two small engines."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from kvlite import CapacityError, Delta, Engine, InvalidRequestError
from kvlite.output import Collector
from tests.engines import alone, engine, essence, pool_of
from tests.moving import STEPS_MAX, assert_clean
from tests.test_engine_law import workload


class Crowd:
    """Requests on two engines; each delta finds its request wherever that is."""

    def __init__(self, engines: list[Engine], seed: int) -> None:
        self.engines = engines
        prompts, params = workload(seed, max_tokens=24)
        self.requests = [engines[0].validate(*pair) for pair in zip(prompts, params, strict=True)]
        self.collectors = [Collector(request) for request in self.requests]
        self.where: dict[tuple[int, int], int] = {}
        """(engine, handle) of the living, to the index of the request."""
        self.moved: Counter[str] = Counter()

    def add(self, at: int, index: int) -> None:
        self.where[at, self.engines[at].add_validated(self.requests[index])] = index

    def step(self, at: int) -> None:
        self.take(at, self.engines[at].step())

    def take(self, at: int, deltas: list[Delta]) -> None:
        for delta in deltas:
            if self.collectors[self.where[at, delta.handle]].push(delta):
                del self.where[at, delta.handle]

    def move(self, rng: random.Random) -> None:
        """One of the living, any way; a refusal is fine, it goes on then."""
        at, handle = rng.choice(sorted(self.where))
        source = self.engines[at]
        try:
            report = source.migrate(handle, self.engines[1 - at], how=rng.choice(["copy", "copy", "replay"]))
        except CapacityError:
            self.moved["refused"] += 1
        except InvalidRequestError as error:
            assert "has ended" in str(error)
            self.moved["ended"] += 1
        else:
            self.moved[report.how] += 1
        # What came out while it moved came out under its old number.
        unread, source._unread = source._unread, []
        self.take(at, unread)
        if (at, handle) in self.where and source.migration._inflight.get(handle) is None:
            self.where[1 - at, report.handle] = self.where.pop((at, handle))


@pytest.mark.parametrize("seed", range(3))
def test_random_moves_of_everything_give_the_same(seed: int) -> None:
    rng = random.Random(seed)
    with engine(deterministic=True, enable_prefix_caching=False) as plain:
        expected = alone(plain, *workload(seed, max_tokens=24))

    def small() -> Engine:
        blocks, chunk = rng.choice([16, 24, 40]), rng.choice([16, 33, 128])
        return engine(
            deterministic=True, kv_cache_bytes=pool_of(blocks), max_num_batched_tokens=chunk, reserve_tokens=0
        )

    with small() as first, small() as second:
        crowd = Crowd([first, second], seed)
        coming: list[Any] = list(range(len(crowd.requests)))
        for _ in range(STEPS_MAX):
            while coming and rng.random() < 0.3:
                crowd.add(rng.randrange(2), coming.pop())
            if crowd.where and rng.random() < 0.7:
                crowd.move(rng)
            crowd.step(rng.randrange(2))
            if not coming and not crowd.where:
                break
        assert [essence(collector.output()) for collector in crowd.collectors] == expected
        assert crowd.moved["copy"] > 10 and crowd.moved["replay"] > 3, crowd.moved
        assert_clean([first, second])
