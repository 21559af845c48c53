"""Workers in one process behind the real front-end: a request moves while its client reads, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvlite import FinishReason, InvalidRequestError, Reuse, Segment
from kvlite.fleet.moves import MoveConflictError, MoveHow
from tests.engines import engine, essence, ids, pool_of
from tests.fleet import small_fleet
from tests.fleet.small_fleet import GREEDY, SEEDED, Fleet, alone, fleet, run, together

PROMPT = ids(50, 3)
LONG = replace(GREEDY, max_tokens=180)
MIDDLE = replace(SEEDED, max_tokens=100)
SHORT = replace(GREEDY, max_tokens=2)
STYLES = {
    "greedy": GREEDY,
    "seeded, with log-probabilities": replace(SEEDED, logprobs=3),
    "penalties": replace(SEEDED, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3),
    "three choices": replace(SEEDED, n=3, logprobs=1),
    "prompt log-probabilities": replace(GREEDY, prompt_logprobs=2),
}


@pytest.mark.parametrize("how", [MoveHow.COPY, MoveHow.REPLAY])
@pytest.mark.parametrize("style", STYLES)
def test_a_request_that_moves_gives_what_it_gives_alone(style: str, how: MoveHow) -> None:
    (expected,) = alone(PROMPT, STYLES[style])

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(PROMPT, STYLES[style])
            await reader.until(5)
            moving = asyncio.create_task(made.front.move("r", 1, how))
            output = await reader.finish()
            report = await moving
            assert report.result == "moved", report.reason
            assert (report.blocks > 0) == (how is MoveHow.COPY)
            assert essence(output) == essence(expected)
            await made.settled()

    run(main())


def test_a_request_that_moves_to_and_fro_until_it_ends_changes_no_bit() -> None:
    params = replace(SEEDED, n=2, logprobs=2, max_tokens=80)
    (expected,) = alone(PROMPT, params)

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(PROMPT, params)
            reading = asyncio.create_task(reader.finish())
            moved = 0
            while not reading.done():
                owner = made.where()
                if owner is None:
                    break
                moved += await _try_move(made, 1 - owner[0])
            assert essence(await reading) == essence(expected)
            assert moved >= 3
            await made.settled()

    run(main())


async def _try_move(made: Fleet, to: int, name: str = "r") -> bool:
    try:
        return (await made.front.move(name, to, MoveHow.COPY)).moved
    except (InvalidRequestError, MoveConflictError):
        return False


def test_many_requests_move_at_once_beside_others_that_stay() -> None:
    prompts = [ids(20 + 7 * n, n) for n in range(6)]
    expected = together(prompts, SEEDED)

    async def main() -> None:
        async with fleet() as made:
            readers = [await made.stream(prompt, SEEDED, f"r{n}") for n, prompt in enumerate(prompts)]
            reading = [asyncio.create_task(reader.finish()) for reader in readers]
            owners = [made.where(f"r{n}") for n in range(4)]
            moving = [_try_move(made, 1 - owner[0], f"r{n}") for n, owner in enumerate(owners) if owner is not None]
            assert sum(await asyncio.gather(*moving)) >= 3
            outputs = await asyncio.gather(*reading)
            assert [essence(output) for output in outputs] == [essence(output) for output in expected]
            await made.settled()

    run(main())


def test_a_destination_without_room_refuses_and_the_request_goes_on() -> None:
    (expected,) = alone(PROMPT, SEEDED)

    async def main() -> None:
        async with fleet(kv_cache_bytes=pool_of(12)) as made:
            reader = await made.stream(PROMPT, SEEDED)
            other = await made.stream(ids(100, 1), GREEDY, "other")
            report = await made.front.move("r", 1, MoveHow.COPY)
            assert report.result == "refused" and "block" in report.reason
            assert made.where() == (0, 0)
            assert essence(await reader.finish()) == essence(expected)
            await other.deltas.aclose()
            await made.settled()

    run(main())


def test_a_request_that_waits_moves_to_where_there_is_room() -> None:
    (expected,) = alone(PROMPT, SEEDED)

    async def main() -> None:
        async with fleet(max_num_seqs=1, max_num_batched_tokens=64) as made:
            first = await made.stream(ids(20, 1), LONG, "first")
            second = await made.stream(ids(20, 2), SHORT, "second")
            reading = asyncio.create_task(made.stream(PROMPT, SEEDED))
            await second.finish()
            report = await made.front.move("r", 1)
            assert report.result == "moved", report.reason
            assert essence(await (await reading).finish()) == essence(expected)
            await first.deltas.aclose()
            await made.settled()

    run(main())


STEPS = ["prepare", "reserved", "blocks", "ack", "tail", "claim", "granted", "revoked"]
IMPATIENT: dict[str, Any] = {"reserve_s": 0.5, "ack_s": 0.3, "freeze_s": 0.3, "claim_s": 0.1}


def test_a_frame_that_is_lost_at_any_step_costs_nothing() -> None:
    """On links that live; the machine asks again or gives up."""
    results = _moves_with(lambda made, step: made.at(step, lose=True))
    early, late = dict.fromkeys(STEPS[:4], "aborted"), dict.fromkeys(STEPS[5:], "moved")
    assert results == early | {"tail": "reclaimed"} | late


def test_links_between_engines_that_break_at_any_step_cost_nothing() -> None:
    results = _moves_with(lambda made, step: made.at(step, made.cut))
    early, late = dict.fromkeys(STEPS[1:4], "aborted"), dict.fromkeys(STEPS[5:], "moved")
    assert results["tail"] in ("reclaimed", "moved")
    assert results == early | {"tail": results["tail"], "prepare": results["prepare"]} | late


def _moves_with(trouble: Callable[[Fleet, str], asyncio.Event]) -> dict[str, str]:
    """Moves one request after the other, with trouble at each step; checks that none loses a token. Results by step."""
    prompts = [ids(50, n) for n in range(len(STEPS))]
    expected = dict(zip(STEPS, together(prompts, MIDDLE), strict=True))
    results: dict[str, str] = {}

    async def main() -> None:
        async with fleet(setup=IMPATIENT) as made:
            for step, prompt in zip(STEPS, prompts, strict=True):
                made.slow()
                reader = await made.stream(prompt, MIDDLE, step)
                owner = made.where(step)
                assert owner is not None
                reached = trouble(made, step)
                report = await made.front.move(step, 1 - owner[0], MoveHow.COPY)
                made.hurry()
                assert reached.is_set()
                results[step] = report.result
                assert essence(await reader.finish()) == essence(expected[step]), step
                await made.settled()

    run(main())
    return results


def test_a_request_that_is_cancelled_at_any_step_leaves_nothing() -> None:
    async def main() -> None:
        async with fleet(setup=IMPATIENT) as made:
            for step in STEPS:
                reader = await made.stream(PROMPT, LONG, step)
                owner = made.where(step)
                assert owner is not None
                reached = made.at(step)
                moving = asyncio.create_task(_try_move(made, 1 - owner[0], step))
                await reached.wait()
                await reader.deltas.aclose()
                assert made.where(step) is None
                await moving
                await made.settled()

    run(main())


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("step", ["prepare", "blocks", "tail", "claim", "granted", "revoked"])
def test_an_engine_that_dies_in_a_move_loses_no_token(step: str, who: int) -> None:
    (expected,) = alone(PROMPT, MIDDLE)

    async def main() -> None:
        async with fleet(setup=IMPATIENT) as made:
            died = made.at(step, lambda: made.kill(who))
            reader = await made.stream(PROMPT, MIDDLE)
            moving = asyncio.create_task(_try_move(made, 1))
            await died.wait()
            made.hurry()
            assert essence(await reader.finish()) == essence(expected)
            await moving

    run(main())


def test_a_blended_request_moves_and_says_what_it_reused() -> None:
    prompt = [ids(20, 1), Segment(ids(40, 2), "a"), ids(10, 3), Segment(ids(50, 4), "b"), ids(12, 5)]
    reuse = Reuse.blend(0.3)
    with engine(deterministic=True) as plain:
        expected = plain.generate(prompt, SEEDED, reuse=reuse)
    assert expected.reuse is not None and expected.reuse.blended_tokens > 0

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(prompt, SEEDED, reuse=reuse)
            report = await made.front.move("r", 1, MoveHow.COPY)
            assert report.result == "moved" and report.blocks > 0, report.reason
            output = await reader.finish()
            assert essence(output) == essence(expected) and output.reuse == expected.reuse
            await made.settled()

    run(main())


def test_a_request_that_is_verified_stays_where_it_is() -> None:
    prompt = [ids(20, 1), Segment(ids(40, 2), "a"), ids(12, 5)]

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(prompt, SEEDED, reuse=Reuse.verify(0.3))
            report = await made.front.move("r", 1, MoveHow.COPY)
            assert report.result == "refused"
            output = await reader.finish()
            assert output.reuse is not None and output.reuse.verify is not None
            await made.settled()

    run(main())


def test_an_engine_that_drains_takes_no_request_in() -> None:
    (expected,) = alone(PROMPT, SEEDED)

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(PROMPT, SEEDED)
            assert await made.workers[1].engine.drain(1.0)
            report = await made.front.move("r", 1, MoveHow.COPY)
            assert report.result == "refused" and "drains" in report.reason
            assert essence(await reader.finish()) == essence(expected)
            await made.settled()

    run(main())


def test_choices_that_have_ended_stay_ended_behind_a_move() -> None:
    params = replace(SEEDED, n=3, max_tokens=100, logit_bias={6: 4.0}, ignore_eos=False)
    (expected,) = alone(PROMPT, params)
    lengths = sorted(len(choice.token_ids) for choice in expected.outputs)
    assert lengths[0] + 10 < lengths[-1], "one ends well before another"

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(PROMPT, params)
            await reader.until_one_ends()
            assert await _try_move(made, 1)
            assert essence(await reader.finish()) == essence(expected)
            await made.settled()

    run(main())


def test_a_stop_string_may_begin_before_the_move_and_end_behind_it() -> None:
    (whole,) = alone(PROMPT, GREEDY)
    text = whole.text
    stop = text[len(text) // 2 : len(text) // 2 + 6]
    params = replace(GREEDY, stop=(stop,))
    (expected,) = alone(PROMPT, params)
    assert expected.outputs[0].finish_reason is FinishReason.STOP

    async def main() -> None:
        async with fleet() as made:
            reader = await made.stream(PROMPT, params)
            moving = asyncio.create_task(_try_move(made, 1))
            assert essence(await reader.finish()) == essence(expected)
            await moving
            await made.settled()

    run(main())


def test_a_time_limit_holds_across_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_fleet, "STEP_S", 0.05)

    async def main() -> None:
        async with fleet(request_timeout_s=3.0) as made:
            reader = await made.stream(PROMPT, LONG)
            assert await _try_move(made, 1)
            output = await reader.finish()
            assert output.outputs[0].finish_reason is FinishReason.TIMEOUT
            await made.settled()

    run(main())
