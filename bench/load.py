"""Sends jobs and records what came back: closed loop, or open loop on a schedule that waits for nobody.

Physics of a fair client. In an open loop the schedule alone decides when a request is sent; a slow answer delays no
later request, and waiting counts from the due time, so a stall shows in every request that it hit. In a closed loop
each of N clients asks again when its answer ended. Time is the event loop's own clock, once per event; tests give a
loop whose clock they turn. Knows no HTTP: `Send` yields the pieces of one answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from .client import Piece, RequestError
from .metrics import Record
from .workloads import Job

Send = Callable[[Job], AsyncGenerator[Piece]]
OnDone = Callable[[int, int], None]
"""Gets (ended, in all) after each request."""


async def ask(job: Job, send: Send, due_s: float, timeout_s: float) -> Record:
    """Sends one job and reads its answer to the end; a failure is a record with `error`, never an exception."""
    clock = asyncio.get_running_loop().time
    record = Record(due_s=due_s, sent_s=clock(), prompt_tokens=len(job.prompt))
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in send(job):
                if piece.num_tokens:
                    record.piece_s.append(clock())
                    record.num_tokens += piece.num_tokens
                if piece.usage is not None:
                    record.usage_tokens = piece.usage.get("completion_tokens")
                    record.prompt_tokens = record.prompt_tokens or piece.usage.get("prompt_tokens") or 0
                    details = piece.usage.get("prompt_tokens_details") or {}
                    record.cached_tokens = details.get("cached_tokens") or 0
        if not record.piece_s:
            record.error = "an answer without a token"
    except RequestError as error:
        record.error = str(error)
    except TimeoutError:
        record.error = f"no end within {timeout_s:g} s"
    record.end_s = clock()
    return record


async def closed_loop(
    jobs: Sequence[Job], send: Send, concurrency: int, timeout_s: float, on_done: OnDone
) -> list[Record]:
    """`concurrency` clients take the jobs in order, each the next one when its answer has ended."""
    clock = asyncio.get_running_loop().time
    waiting = iter(enumerate(jobs))
    records: dict[int, Record] = {}

    async def client() -> None:
        for idx, job in waiting:
            records[idx] = await ask(job, send, clock(), timeout_s)
            on_done(len(records), len(jobs))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(jobs))):
            group.create_task(client())
    return [records[idx] for idx in range(len(jobs))]


async def open_loop(jobs: Sequence[Job], send: Send, timeout_s: float, on_done: OnDone) -> list[Record]:
    """Every job is sent at its due time, whatever became of the others."""
    clock = asyncio.get_running_loop().time
    start = clock()
    ended = 0

    async def one(job: Job) -> Record:
        nonlocal ended
        record = await ask(job, send, start + job.at_s, timeout_s)
        ended += 1
        on_done(ended, len(jobs))
        return record

    tasks: list[asyncio.Task[Record]] = []
    async with asyncio.TaskGroup() as group:
        for job in sorted(jobs, key=lambda job: job.at_s):
            await asyncio.sleep(max(start + job.at_s - clock(), 0))
            tasks.append(group.create_task(one(job)))
    return [task.result() for task in tasks]
