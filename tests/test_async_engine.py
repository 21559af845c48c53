"""AsyncEngine: many readers over one engine thread; leaving, closing and breaking are clean for everybody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from kvlite import (
    AsyncEngine,
    CapacityError,
    Delta,
    EngineClosedError,
    EngineError,
    FinishReason,
    InvalidRequestError,
    SamplingParams,
)
from tests.engines import engine, essence, ids
from tests.paced import TIMEOUT_S, Paced

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=200)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, TIMEOUT_S))


@asynccontextmanager
async def serving(**overrides: Any) -> AsyncIterator[AsyncEngine]:
    made = AsyncEngine(engine(deterministic=True, **overrides))
    try:
        yield made
    finally:
        made.close()
        assert not made._thread.is_alive()


async def idle(served: AsyncEngine) -> None:
    """Waits until the engine thread has nothing left, by its own signal."""
    assert await asyncio.to_thread(served._wait_until_idle, TIMEOUT_S)
    assert served.stats().owned_blocks == 0


async def collect(deltas: AsyncGenerator[Delta]) -> list[Delta]:
    return [delta async for delta in deltas]


def tokens(deltas: list[Delta]) -> tuple[int, ...]:
    return tuple(id for delta in deltas for id in delta.token_ids)


def test_many_readers_get_what_each_would_get_alone() -> None:
    prompts = [ids(3 + 5 * n, n) for n in range(12)]
    with engine(deterministic=True) as plain:
        expected = [essence(plain.generate(prompt, replace(GREEDY, n=1 + n % 3))) for n, prompt in enumerate(prompts)]

    async def main() -> None:
        async with serving() as served:
            calls = [served.generate(prompt, replace(GREEDY, n=1 + n % 3)) for n, prompt in enumerate(prompts)]
            assert [essence(output) for output in await asyncio.gather(*calls)] == expected
            assert served.healthy and not served.draining
            await idle(served)

    run(main())


def test_text_is_a_prompt_and_streams_add_up() -> None:
    async def main() -> None:
        async with serving() as served:
            whole = await served.generate("Nora lives in", GREEDY)
            deltas = await collect(served.stream("Nora lives in", GREEDY))
            assert "".join(delta.text for delta in deltas) == whole.text and tokens(deltas) == whole.token_ids
            assert [delta.usage is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]

    run(main())


@pytest.mark.parametrize("how", ["close", "cancel", "cancel in prefill"])
def test_a_reader_that_leaves_frees_everything_and_others_see_nothing(how: str) -> None:
    async def main() -> None:
        async with serving(max_num_batched_tokens=16) as served:
            expected = await served.generate(ids(20, 1), GREEDY)
            pace = Paced(served)
            neighbour = asyncio.create_task(served.generate(ids(20, 1), GREEDY))
            leaving = served.stream(ids(200, 3), replace(LONG, max_tokens=50))
            if how == "close":
                await pace.until(anext(leaving))
                await leaving.aclose()
            else:
                task = asyncio.create_task(collect(leaving))
                await pace.step()
                assert served._engine.num_unfinished == 2
                while how == "cancel" and served.stats().generated_tokens < 20:
                    await pace.step()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            pace.open()
            assert essence(await neighbour) == essence(expected)
            await idle(served)
            assert served.stats().finished[FinishReason.CANCELLED] == 1
            served._engine._core.audit()

    run(main())


def test_a_stream_that_is_never_read_starts_nothing() -> None:
    async def main() -> None:
        async with serving() as served:
            served.stream(ids(5), LONG)
            await served.generate(ids(5), GREEDY)
            assert served.stats().finished[FinishReason.LENGTH] == 1

    run(main())


def test_a_slow_reader_gets_fewer_larger_deltas_with_the_same_content() -> None:
    async def main() -> None:
        async with serving() as served:
            whole = await served.generate(ids(9), replace(LONG, logprobs=1))
            slow = served.stream(ids(9), replace(LONG, logprobs=1))
            first = await anext(slow)
            await idle(served)
            rest = await collect(slow)
            assert len(rest) <= 33
            assert tokens([first, *rest]) == whole.token_ids
            assert "".join(delta.text for delta in [first, *rest]) == whole.text
            assert tuple(found for delta in [first, *rest] for found in delta.logprobs) == whole.outputs[0].logprobs
            assert rest[-1].finish_reason is FinishReason.LENGTH and rest[-1].usage == whole.usage

    run(main())


def test_bad_requests_and_a_full_queue_are_refused_at_the_call() -> None:
    async def main() -> None:
        async with serving(max_num_waiting=1, max_num_seqs=1, max_num_batched_tokens=16) as served:
            with pytest.raises(InvalidRequestError, match="empty"):
                served.stream([])
            pace = Paced(served)
            tasks = [asyncio.create_task(collect(served.stream(ids(30), LONG)))]
            await pace.arrived()
            tasks.append(asyncio.create_task(collect(served.stream(ids(30, 1), LONG))))
            await pace.step()
            assert served._engine.num_waiting == 1
            with pytest.raises(CapacityError, match="max_num_waiting"):
                served.stream(ids(5))
            pace.open()
            assert [len(tokens(await task)) for task in tasks] == [200, 200]

    run(main())


def test_closing_while_generating_ends_every_stream_as_cancelled() -> None:
    async def main() -> None:
        async with serving() as served:
            pace = Paced(served)
            readers = [served.stream(ids(10, n), LONG) for n in range(3)]
            first = [await pace.until(anext(reader)) for reader in readers]
            unread = served.stream(ids(5), LONG)
            closing = asyncio.create_task(asyncio.to_thread(served.close))
            while not served._closing:
                await asyncio.sleep(0)
            pace.open()
            await closing
            for reader, delta in zip(readers, first, strict=True):
                rest = await collect(reader)
                assert rest[-1].finish_reason is FinishReason.CANCELLED and rest[-1].usage is not None
                assert rest[-1].usage.completion_tokens == len(tokens([delta, *rest]))
            assert not served.healthy
            with pytest.raises(EngineClosedError):
                await collect(unread)

    run(main())


def test_after_close_every_call_says_so_and_closing_twice_is_fine() -> None:
    async def main() -> None:
        async with serving() as served:
            served.close()
            served.close()
            with pytest.raises(EngineClosedError):
                served.stream(ids(5))
            with pytest.raises(EngineClosedError):
                await served.generate(ids(5))

    run(main())


def test_draining_refuses_new_requests_and_lets_running_ones_finish() -> None:
    async def main() -> None:
        async with serving() as served:
            pace = Paced(served)
            running = served.stream(ids(10), LONG)
            first = await pace.until(anext(running))
            assert not await served.drain(0.0)
            assert served.draining and served.healthy
            with pytest.raises(EngineClosedError):
                served.stream(ids(5))
            pace.open()
            assert await served.drain(TIMEOUT_S)
            assert len(tokens([first, *await collect(running)])) == 200

    run(main())


def test_an_engine_that_breaks_ends_every_stream_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as served:
            pace = Paced(served)
            reader = served.stream(ids(10), LONG)
            await pace.until(anext(reader))

            def broken() -> list[Delta]:
                raise EngineError("the core is broken: on purpose")

            monkeypatch.setattr(served._engine, "make_plan", broken)
            pace.open()
            rest = await collect(reader)
            assert rest[-1].finish_reason is FinishReason.ERROR and "on purpose" in (rest[-1].error or "")
            await asyncio.to_thread(served._thread.join)
            assert not served.healthy
            with pytest.raises(EngineError, match="on purpose"):
                served.stream(ids(5))

    run(main())


def test_a_failed_step_is_an_error_for_its_streams_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as served:
            expected = await served.generate(ids(10), GREEDY)
            decoder = served._engine._runner.decoder
            embed, failed = decoder.embed, threading.Event()

            def once(*args: Any) -> Any:
                if failed.is_set():
                    return embed(*args)
                failed.set()
                raise RuntimeError("on purpose")

            monkeypatch.setattr(decoder, "embed", once)
            deltas = await collect(served.stream(ids(10, 4), GREEDY))
            assert deltas[-1].finish_reason is FinishReason.ERROR and "on purpose" in (deltas[-1].error or "")
            assert essence(await served.generate(ids(10), GREEDY)) == essence(expected)
            assert served.healthy

    run(main())


def test_readers_whose_event_loop_is_gone_do_not_disturb_the_others() -> None:
    made = AsyncEngine(engine(deterministic=True))
    loop = asyncio.new_event_loop()
    reader = made.stream(ids(10), LONG)
    loop.run_until_complete(anext(reader))
    loop.close()

    async def main() -> None:
        output = await made.generate(ids(12), GREEDY)
        assert len(output.token_ids) == 12
        await idle(made)

    run(main())
    made.close()
