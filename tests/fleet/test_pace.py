"""The pace of copies: their share of the time, what an idle pace saves up, whose turn it is; and what does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from kvlite.fleet import pace
from kvlite.fleet.exporter import Answer
from kvlite.fleet.moves import MoveHow
from kvlite.fleet.pace import ALLOWANCE_S, Pace
from kvlite.fleet.shared_memory import SharedPayloads
from kvlite.fleet.tcp import InlinePayloads
from tests.engines import essence, ids
from tests.fleet.small_fleet import SEEDED, alone, fleet, run

PROMPT = ids(50, 3)


class Clock:
    """Moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    monkeypatch.setattr(pace.asyncio, "sleep", made.sleep)
    yield made


def test_parts_take_their_share_of_the_time_and_no_more(clock: Clock) -> None:
    async def main() -> None:
        paced, start = Pace(0.02), clock.now
        for _ in range(100):
            await paced.turn()
            clock.now += 0.001
            paced.took(0.001)
        await paced.turn()
        assert clock.now - start == pytest.approx(100 * 0.001 / 0.02, abs=ALLOWANCE_S)

    asyncio.run(main())


def test_what_an_idle_pace_saves_up_is_one_allowance(clock: Clock) -> None:
    async def main() -> None:
        paced = Pace(0.5)
        for idle_s in (0.0, 5.0, 5000.0):
            clock.now += idle_s + ALLOWANCE_S
            start = clock.now
            paced.took(1.0)
            await paced.turn()
            assert clock.now - start == pytest.approx(2.0 - ALLOWANCE_S)

    asyncio.run(main())


def test_who_came_first_goes_first(clock: Clock) -> None:
    async def main() -> None:
        paced, went = Pace(0.5), list[int]()

        async def copy(number: int) -> None:
            await paced.turn()
            went.append(number)
            paced.took(1.0)

        await asyncio.gather(*(copy(n) for n in range(5)))
        assert went == list(range(5))
        assert clock.now == 1000.0 + 4 * 2.0 - ALLOWANCE_S

    asyncio.run(main())


@pytest.mark.parametrize("kind, cost", [("unix", SharedPayloads.cost), ("tcp", InlinePayloads.cost)])
def test_a_part_counts_for_what_its_way_costs(kind: str, cost: float) -> None:
    digests_s, took_s = list[float](), list[float]()

    async def main() -> None:
        async with fleet(kind=kind) as made:
            reader = await made.stream(PROMPT, SEEDED)
            exporter = made.workers[0]._mover._exporter
            make_part = exporter._part

            def part(*given: Any) -> Any:
                frame, payload, busy_s = make_part(*given)
                digests_s.append(busy_s)
                return frame, payload, busy_s

            exporter._part = part  # type: ignore[method-assign]
            exporter._pace.took = took_s.append  # type: ignore[method-assign]
            report = await made.front.move("r", 1, MoveHow.COPY)
            assert report.result == "moved" and report.bytes, report.reason
            await reader.finish()
            await made.settled()

    run(main())
    assert len(took_s) > 1
    assert took_s == pytest.approx([cost * busy_s for busy_s in digests_s])


def test_a_frozen_request_waits_for_no_pace() -> None:
    (expected,) = alone(PROMPT, SEEDED)

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(PROMPT, SEEDED)
            exporter = made.workers[0]._mover._exporter
            freeze = exporter.freeze

            async def freeze_exhausted(request: int, attempt: int) -> Answer:
                exporter._pace.took(1e6)
                return await freeze(request, attempt)

            exporter.freeze = freeze_exhausted  # type: ignore[method-assign]
            report = await made.front.move("r", 1, MoveHow.COPY)
            assert report.result == "moved" and report.stages > 1, report.reason
            assert essence(await reader.finish()) == essence(expected)
            await made.settled()

    run(main())
