"""AsyncEngine for whoever moves requests: calls on the engine thread, raw streams, adopting and detaching them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvlite import (
    AsyncEngine,
    CapacityError,
    Delta,
    Engine,
    EngineClosedError,
    EngineError,
    FinishReason,
    InvalidRequestError,
    SamplingParams,
)
from kvlite.fleet import parcel, spec
from kvlite.migration import Moving
from kvlite.readers import RawStream
from kvlite.request import ValidatedRequest
from tests.engines import engine, ids
from tests.moving import assert_clean
from tests.paced import TIMEOUT_S, Paced

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(n=2, temperature=1.0, seed=9, max_tokens=20, ignore_eos=True, logprobs=2, prompt_logprobs=1)
PROMPT = ids(40, 4)
CHUNKED: dict[str, Any] = {"deterministic": True, "max_num_batched_tokens": 16}


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, TIMEOUT_S))


@asynccontextmanager
async def serving(**overrides: Any) -> AsyncIterator[AsyncEngine]:
    made = AsyncEngine(engine(**(CHUNKED | overrides)))
    try:
        yield made
        assert await asyncio.to_thread(made._wait_until_idle, TIMEOUT_S)
        await made.call(lambda engine: assert_clean([engine]))
    finally:
        made.close()


def raw(served: AsyncEngine, params: SamplingParams = GREEDY, seed: int = 9) -> ValidatedRequest:
    """As a fleet's worker gets it."""
    request = served._engine.validate(PROMPT, params)
    return spec.decode(served.limits, spec.encode(request, seed))


def tokens(deltas: list[Delta], choice: int = 0) -> tuple[int, ...]:
    return tuple(id for delta in deltas if delta.index == choice for id in delta.token_ids)


def scores(deltas: list[Delta], choice: int = 0) -> list[tuple[int, float]]:
    """(id, log-probability) of every output token."""
    found = [each for delta in deltas if delta.index == choice for each in delta.logprobs]
    return [(each.chosen.token_id, each.chosen.logprob) for each in found]


async def drained(stream: RawStream) -> list[Delta]:
    return [delta async for delta in stream]


async def expected(served: AsyncEngine, params: SamplingParams) -> list[tuple[int, ...]]:
    output = await served.generate(PROMPT, params)
    return [choice.token_ids for choice in output.outputs]


# Calls


def test_a_call_runs_on_the_engine_thread_of_an_idle_engine_and_brings_answers_and_errors() -> None:
    async def main() -> None:
        async with serving() as served:
            assert await served.call(lambda engine: threading.current_thread()) is served._thread
            assert await served.call(lambda engine: engine.num_unfinished) == 0

            def fails(engine: Engine) -> None:
                raise CapacityError("on purpose")

            with pytest.raises(CapacityError, match="on purpose"):
                await served.call(fails)
            with pytest.raises(CapacityError, match="on purpose"):
                await served.call(lambda engine: 1, when=fails)  # type: ignore[arg-type]
            assert served.healthy and len(tokens([d async for d in served.stream(PROMPT, GREEDY)])) == 20

    run(main())


def test_a_call_waits_for_its_condition_and_sees_a_commit_before_the_next_plan_is_computed() -> None:
    async def main() -> None:
        async with serving() as served:
            pace = Paced(served)
            stream = await served.stream_raw(raw(served))
            await pace.arrived()
            seen: list[int] = []
            call = asyncio.create_task(
                served.call(
                    lambda engine: seen.append(engine.stats().num_steps),
                    when=lambda engine: engine.stats().generated_tokens >= 2,
                )
            )
            while not seen:
                assert served.stats().generated_tokens < 2
                await pace.step()
            # The thread stands before the plan that the same step made.
            assert seen == [served.stats().num_steps] and served.stats().generated_tokens == 2
            await call
            pace.open()
            assert len(tokens(await drained(stream))) == 20

    run(main())


def test_a_cancelled_call_never_runs_and_one_that_waits_for_ever_ends_with_the_engine() -> None:
    async def main() -> None:
        async with serving() as served:
            ran: list[int] = []
            calls = [
                asyncio.create_task(served.call(lambda engine: ran.append(1), when=lambda engine: False))
                for _ in range(2)
            ]
            await served.call(lambda engine: None)
            calls[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await calls[0]
            await served.call(lambda engine: None)
            served.close()
            with pytest.raises(EngineClosedError):
                await calls[1]
            with pytest.raises(EngineClosedError):
                await served.call(lambda engine: None)
            assert not ran

    async def closing() -> None:
        try:
            await main()
        except EngineClosedError:  # of `serving`, which asks the closed engine for its counts
            return

    run(closing())


def test_calls_of_a_broken_engine_say_what_broke_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        served = AsyncEngine(engine(**CHUNKED))
        waiting = asyncio.create_task(served.call(lambda engine: None, when=lambda engine: False))
        await served.call(lambda engine: None)

        def broken() -> list[Delta]:
            raise EngineError("on purpose")

        monkeypatch.setattr(served._engine, "make_plan", broken)
        with pytest.raises(EngineError, match="on purpose"):
            await waiting
        await asyncio.to_thread(served._thread.join)
        with pytest.raises(EngineError, match="on purpose"):
            await served.call(lambda engine: None)

    run(main())


# Raw streams


def test_a_raw_stream_gives_ids_and_log_probabilities_of_the_same_request_without_text() -> None:
    async def main() -> None:
        async with serving() as served:
            whole = await served.generate(PROMPT, SEEDED)
            deltas = await drained(await served.stream_raw(raw(served, SEEDED)))
            for n, choice in enumerate(whole.outputs):
                assert tokens(deltas, n) == choice.token_ids
                assert scores(deltas, n) == [(each.chosen.token_id, each.chosen.logprob) for each in choice.logprobs]
            assert {delta.text for delta in deltas} == {""}
            shown = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
            assert len(shown) == 1 and whole.prompt_logprobs is not None
            assert [each and each.chosen.logprob for each in shown[0]] == [
                each and each.chosen.logprob for each in whole.prompt_logprobs
            ]
            assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == 40

    run(main())


def test_a_raw_choice_ends_where_its_owner_says_and_the_others_go_on() -> None:
    async def main() -> None:
        async with serving() as served:
            params = replace(SEEDED, logprobs=None, prompt_logprobs=None)
            first, second = await expected(served, params)
            pace = Paced(served)
            stream = await served.stream_raw(raw(served, params))
            deltas = [await pace.until(anext(stream)) for _ in range(6)]
            assert await pace.until(served.call(lambda engine: engine.finish(stream.handle, 1, 2))) is True
            with pytest.raises(InvalidRequestError, match="choice"):
                await pace.until(served.call(lambda engine: engine.finish(stream.handle, 2, 0)))
            pace.open()
            deltas += await drained(stream)
            assert tokens(deltas, 0) == first
            assert tokens(deltas, 1)[:2] == second[:2] and len(tokens(deltas, 1)) < 20
            ends = {delta.index: delta.finish_reason for delta in deltas if delta.finish_reason is not None}
            assert ends == {0: FinishReason.LENGTH, 1: FinishReason.STOP}
            assert await served.call(lambda engine: engine.finish(stream.handle, 0, 2)) is False

    run(main())


@pytest.mark.parametrize("at", [0, 1, 7, 19])
def test_a_replayed_request_goes_on_behind_its_outputs(at: int) -> None:
    async def main() -> None:
        async with serving() as served:
            whole = await expected(served, SEEDED)
            await served.call(lambda engine: engine.clear_cache())
            outputs = [np.array(choice[:at], np.int32) for choice in whole]
            stream = await served.stream_raw(raw(served, SEEDED), outputs)
            deltas = await drained(stream)
            assert [tokens(deltas, n) for n in range(2)] == [choice[at:] for choice in whole]
            shown = [delta for delta in deltas if delta.prompt_logprobs is not None]
            assert len(shown) == (1 if at == 0 else 0)
            assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == 40

    run(main())


def test_a_replay_leaves_out_choices_that_had_ended() -> None:
    async def main() -> None:
        async with serving() as served:
            whole = await expected(served, SEEDED)
            outputs = [None, np.array(whole[1][:5], np.int32)]
            deltas = await drained(await served.stream_raw(raw(served, SEEDED), outputs))
            assert tokens(deltas, 0) == () and tokens(deltas, 1) == whole[1][5:]
            assert {delta.index for delta in deltas} == {1} and deltas[-1].usage is not None

    run(main())


def test_an_adoption_that_is_cancelled_or_fails_leaves_nothing() -> None:
    async def main() -> None:
        async with serving() as served:
            pace = Paced(served)
            other = await served.stream_raw(raw(served))
            await pace.arrived()
            task = asyncio.create_task(served.stream_raw(raw(served)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

            def refuses(engine: Engine) -> int:
                raise CapacityError("no room")

            failing = asyncio.create_task(served.adopt(refuses, 1))
            pace.open()
            with pytest.raises(CapacityError, match="no room"):
                await failing
            assert len(tokens(await drained(other))) == 20

    run(main())


def test_aborting_a_raw_stream_ends_it_as_cancelled() -> None:
    async def main() -> None:
        async with serving() as served:
            pace = Paced(served)
            stream = await served.stream_raw(raw(served))
            await pace.until(anext(stream))
            stream.abort()
            pace.open()
            assert (await drained(stream))[-1].finish_reason is FinishReason.CANCELLED

    run(main())


# Moves


async def move(source: AsyncEngine, target: AsyncEngine, stream: RawStream, num_choices: int) -> RawStream:
    """As a mover does it: parcels as bytes, the first blocks while the source goes on, the rest once it is frozen."""
    handle = stream.handle
    first = parcel.pack(await source.call(lambda engine: engine.migration.export_begin(handle)))
    there = parcel.unpack(target.limits, first)
    ticket, hits = await target.call(lambda engine: engine.migration.reserve(there))

    def take() -> None:
        target._engine.migration.take_from(source._engine.migration, handle, ticket, hits)

    try:
        await source.call(lambda engine: take())
        await source.call(lambda engine: engine.migration.freeze(handle))
        await source.call(lambda engine: take(), when=lambda engine: engine.migration.is_frozen(handle))
        sent = await source.call(lambda engine: engine.migration.export_final(handle))
    except InvalidRequestError:
        await target.call(lambda engine: engine.migration.import_cancel(ticket))
        raise
    final = parcel.unpack(target.limits, parcel.pack(sent, with_request=False), there)
    moved = await target.adopt(lambda engine: engine.migration.import_commit(ticket, final), num_choices)
    await source.detach(handle)
    return moved


@pytest.mark.parametrize("at", range(0, 61, 6))
@pytest.mark.parametrize(
    "params",
    [replace(GREEDY, max_tokens=60), replace(SEEDED, max_tokens=60)],
    ids=["greedy", "two choices, log-probabilities"],
)
def test_a_raw_stream_moves_between_two_served_engines(at: int, params: SamplingParams) -> None:
    async def main() -> None:
        async with serving() as here, serving() as there:
            whole = await here.generate(PROMPT, params)
            await here.call(lambda engine: engine.clear_cache())
            pace = Paced(here)
            stream = await here.stream_raw(raw(here, params))
            for _ in range(at):
                await pace.step()
            before: list[Delta] = []
            reading = asyncio.create_task(collect(stream, before))
            try:
                moved = await pace.drive(move(here, there, stream, params.n))
            except InvalidRequestError as error:
                assert "ended" in str(error) and at > 40, "a move takes a few steps"
                await reading
                return
            await reading
            assert not any(delta.usage is not None for delta in before), "the stream ends without a last delta"
            deltas = before + await drained(moved)
            for n, choice in enumerate(whole.outputs):
                assert tokens(deltas, n) == choice.token_ids
                assert scores(deltas, n) == [(each.chosen.token_id, each.chosen.logprob) for each in choice.logprobs]
            shown = [delta for delta in deltas if delta.prompt_logprobs is not None]
            assert len(shown) == (params.prompt_logprobs is not None)
            assert deltas[-1].reuse is not None

    run(main())


async def collect(stream: RawStream, into: list[Delta]) -> None:
    async for delta in stream:
        into += [delta]


def test_a_stream_whose_request_was_not_frozen_is_not_detached() -> None:
    async def main() -> None:
        async with serving() as served:
            pace = Paced(served)
            stream = await served.stream_raw(raw(served))
            await pace.arrived()
            with pytest.raises(InvalidRequestError):
                detaching = asyncio.create_task(served.detach(stream.handle))
                await pace.until(detaching)
            pace.open()
            assert len(tokens(await drained(stream))) == 20

    run(main())


def test_a_moving_request_as_bytes_has_no_text() -> None:
    async def main() -> None:
        async with serving() as served:
            pace = Paced(served)
            stream = await served.stream_raw(raw(served))
            await pace.until(anext(stream))
            moving: Moving = await pace.until(served.call(lambda engine: engine.migration.export_begin(stream.handle)))
            assert moving.request.text is None and moving.request.raw and moving.seed == 9
            assert await pace.until(served.call(lambda engine: engine.migration.export_abort(stream.handle)))
            stream.abort()
            pace.open()
            await drained(stream)

    run(main())
