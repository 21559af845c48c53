"""Requests that do not run move too: half-prefilled and preempted ones, between workers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from kvlite.fleet.moves import MoveHow
from tests.engines import essence, ids, pool_of
from tests.fleet.small_fleet import SEEDED, Fleet, alone, fleet, run

LONG_PROMPT = ids(180, 3)
HALF = 48
PARAMS = replace(SEEDED, max_tokens=90)


def everything_at_0(made: Fleet) -> None:
    """New requests begin there."""
    made.front._requests._choose = lambda preferred=-1: made.front.members.get(0)  # type: ignore[method-assign]


def hold_back(made: Fleet, counter: str, least: int) -> asyncio.Event:
    """Once the counter is so high, engine 0 makes a step only when a move waits for its boundary. Set by then."""
    each, served, loop = made.engines[0], made.workers[0].engine, asyncio.get_running_loop()
    run_plan, is_held = each.run_plan, asyncio.Event()

    def held() -> None:
        stats: Any = each._core.stats()
        if stats[counter] >= least:
            loop.call_soon_threadsafe(is_held.set)
            while not (served._commands or served._calls or made.is_hurried):
                made.wait_a_step()
        run_plan()

    each.run_plan = held  # type: ignore[method-assign]
    return is_held


def test_a_half_prefilled_request_moves_with_the_blocks_that_it_has() -> None:
    (expected,) = alone(LONG_PROMPT, SEEDED, max_num_batched_tokens=16)

    async def main() -> None:
        async with fleet(max_num_batched_tokens=16) as made:
            everything_at_0(made)
            is_half = hold_back(made, "prefill_tokens_total", HALF)
            reading = asyncio.create_task(made.stream(LONG_PROMPT, SEEDED))
            await is_half.wait()
            report = await made.front.move("r", 1, MoveHow.COPY)
            assert report.result == "moved" and report.tokens == 0, report.reason
            assert HALF // 16 <= report.blocks < len(LONG_PROMPT) // 16
            assert essence(await (await reading).finish()) == essence(expected)
            rest: Any = made.engines[1]._core.stats()
            had = len(LONG_PROMPT) - rest["prefill_tokens_total"]
            assert 16 * (report.blocks - 1) < had <= 16 * report.blocks, "what came along was not computed again"
            await made.settled()

    run(main())


def test_a_preempted_request_moves_to_where_there_is_room() -> None:
    prompts = [ids(30, 1), ids(30, 2), ids(30, 3)]
    expected = [alone(prompt, PARAMS)[0] for prompt in prompts]

    async def main() -> None:
        async with fleet(kv_cache_bytes=pool_of(16), reserve_tokens=0) as made:
            everything_at_0(made)
            is_preempted = hold_back(made, "preemptions_total", 1)
            readers = [await made.stream(prompt, PARAMS, f"r{n}") for n, prompt in enumerate(prompts)]
            await is_preempted.wait()
            reports = [await made.front.move(f"r{n}", 1, MoveHow.COPY) for n in (2, 1, 0)]
            made.hurry()
            moved = [report for report in reports if report.result == "moved"]
            assert any(report.blocks == 0 and report.tokens > 0 for report in moved), "one had lost its blocks"
            for reader, one in zip(readers, expected, strict=True):
                assert essence(await reader.finish()) == essence(one)
            await made.settled()

    run(main())
