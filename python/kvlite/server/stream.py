"""From deltas to OpenAI's answers: chunks of a stream, or one whole body.

Owns the order of events and the merging of several prompts into one answer; answer.py and wire.py spell them. Sees the
engine as `Source`. Closing an iterator from here aborts what it still runs. Called by app.py, one `Call` a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import msgspec

from kvlite.errors import KvliteError
from kvlite.server.answer import Answer, check_end, envelope
from kvlite.server.failures import error_body
from kvlite.server.usage import reuse_fields, usage_fields
from kvlite.server.wire import Call, Chunk, Prompt, Wire
from kvlite.types import Delta

MERGE_QUEUE = 16
"""Deltas of a batch that wait for a slow client before the prompts' own queues hold them."""

Source = Callable[[Prompt], AsyncGenerator[Delta, None]]
"""Starts one prompt and gives its deltas; closing the generator aborts the request."""


async def merged(source: Source, prompts: Sequence[Prompt]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(number of the prompt, delta) as they come. A failure of one prompt ends all; closing aborts all."""
    if len(prompts) == 1:
        async with aclosing(source(prompts[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue(MERGE_QUEUE)

    async def pump(number: int, prompt: Prompt) -> None:
        try:
            async with aclosing(source(prompt)) as deltas:
                async for delta in deltas:
                    await queue.put((number, delta))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(number, prompt)) for number, prompt in enumerate(prompts)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole_answer(source: Source, call: Call, wire: Wire) -> Chunk:
    """The answer in one piece. Raises what the engine raises, and for every choice that did not end well."""
    answer = Answer(call, wire)
    async with aclosing(merged(source, call.prompts)) as deltas:
        async for number, delta in deltas:
            answer.add(number, delta)
    return answer.body()


async def event_stream(source: Source, call: Call, wire: Wire) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events. Raises before the first event only; later failures are an event.

    The `kvlite` block is in the last chunk: that of the usage, when it was asked for.
    """
    ends: list[Delta] = []
    opened: set[int] = set()
    try:
        async with aclosing(merged(source, call.prompts)) as deltas:
            async for number, delta in deltas:
                index = number * call.params.n + delta.index
                if index not in opened:
                    # An error before the first chunk still becomes a status code.
                    check_end(delta)
                    opened.add(index)
                    if (choice := wire.opening(index)) is not None:
                        yield _event(call, wire, [choice], first=len(opened) == 1)
                if delta.usage is not None:
                    ends.append(delta)
                is_last = len(ends) == len(call.prompts) and not call.options.include_usage
                if (choice := wire.piece(index, delta)) is not None:
                    yield _event(call, wire, [choice], cost=reuse_fields(call, ends) if is_last else None)
                check_end(delta)
        if call.options.include_usage:
            yield _event(call, wire, [], cost=usage_fields(call, ends))
    except KvliteError as error:
        if not opened:
            raise
        yield sse(error_body(error))
    yield b"data: [DONE]\n\n"


def sse(value: Chunk) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _event(call: Call, wire: Wire, choices: list[Chunk], *, first: bool = False, cost: Chunk | None = None) -> bytes:
    body = envelope(call, wire.chunk_object)
    body["choices"] = choices
    if cost is not None:
        body |= cost
    elif call.options.include_usage:
        body["usage"] = None
    if first and call.options.warnings:
        body["warnings"] = call.options.warnings
    return sse(body)
