"""Closed and open loops against a fake server on a virtual clock: every time is exact, nothing waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from kvlite.bench.client import Piece, RequestError
from kvlite.bench.load import closed_loop, open_loop
from kvlite.bench.metrics import Objective, Record, summary
from kvlite.bench.workloads import Job, poisson
from tests.bench.virtual import run_virtual


class FakeServer:
    """Serves one request at a time, in order of arrival: `first_s` to the first token, `next_s` to each further one."""

    def __init__(self, first_s: float, next_s: float) -> None:
        self.first_s, self.next_s = first_s, next_s
        self.arrivals: list[float] = []
        self.num_open = self.most_open = 0
        self._turn = asyncio.Lock()

    async def send(self, job: Job) -> AsyncGenerator[Piece]:
        self.arrivals.append(asyncio.get_running_loop().time())
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        async with self._turn:
            for at in range(job.max_tokens):
                await asyncio.sleep(self.first_s if at == 0 else self.next_s)
                yield Piece(1)
        self.num_open -= 1
        yield Piece(0, usage={"completion_tokens": job.max_tokens, "prompt_tokens_details": {"cached_tokens": 3}})


def jobs(*due_s: float, max_tokens: int = 1) -> list[Job]:
    return [Job((20, 21), max_tokens, at) for at in due_s]


def ignore(done: int, total: int) -> None:
    assert 0 < done <= total


def run_open(server: FakeServer, wanted: list[Job], timeout_s: float = 1e6) -> list[Record]:
    return run_virtual(open_loop(wanted, server.send, timeout_s, ignore))


def test_a_slow_answer_delays_no_later_request() -> None:
    server = FakeServer(first_s=100.0, next_s=0.0)
    run_open(server, jobs(0.0, 1.0, 2.5))
    assert server.arrivals == [0.0, 1.0, 2.5]
    assert server.most_open == 3


def test_a_stall_shows_in_every_request_that_it_hits() -> None:
    records = run_open(FakeServer(first_s=10.0, next_s=0.0), jobs(0.0, 1.0, 2.0))
    assert [record.ttft_s for record in records] == [10.0, 19.0, 28.0]


def test_waiting_counts_from_the_due_time_when_the_client_itself_was_late() -> None:
    async def late_client() -> list[Record]:
        loop = asyncio.get_running_loop()
        server = FakeServer(first_s=1.0, next_s=0.0)

        def block(done: int, total: int) -> None:
            if done == 1:
                loop._virtual.now += 5.0  # type: ignore[attr-defined]  the client's own process was held up

        return await open_loop(jobs(0.0, 2.0), server.send, 1e6, block)

    first, second = run_virtual(late_client())
    assert (first.due_s, first.ttft_s) == (0.0, 1.0)
    assert (second.due_s, second.sent_s, second.ttft_s) == (2.0, 6.0, 5.0)


def test_jobs_are_sent_in_order_of_their_due_times() -> None:
    server = FakeServer(first_s=0.5, next_s=0.0)
    records = run_open(server, jobs(4.0, 0.0, 2.0))
    assert server.arrivals == [0.0, 2.0, 4.0]
    assert [record.due_s for record in records] == [0.0, 2.0, 4.0]


def test_a_closed_loop_keeps_just_so_many_requests_open() -> None:
    server = FakeServer(first_s=1.0, next_s=0.0)
    records = run_virtual(closed_loop(jobs(*[0.0] * 7), server.send, 3, 1e6, ignore))
    assert server.most_open == 3
    assert len(records) == 7
    assert all(record.due_s == record.sent_s for record in records)


def test_times_of_tokens_are_those_of_the_server() -> None:
    record = run_open(FakeServer(first_s=2.0, next_s=0.25), jobs(1.0, max_tokens=5))[0]
    assert record.piece_s == [3.0, 3.25, 3.5, 3.75, 4.0]
    assert (record.ttft_s, record.tpot_s, record.end_s) == (2.0, 0.25, 4.0)
    assert (record.num_tokens, record.usage_tokens, record.cached_tokens) == (5, 5, 3)


def test_an_answer_that_does_not_end_in_time_is_a_failure_with_its_limit() -> None:
    records = run_open(FakeServer(first_s=1.0, next_s=3.0), jobs(0.0, max_tokens=4), timeout_s=5.0)
    assert records[0].error == "no end within 5 s"
    assert records[0].end_s == 5.0


def test_a_refused_request_and_an_empty_answer_are_failures_and_the_others_go_on() -> None:
    async def send(job: Job) -> AsyncGenerator[Piece]:
        if job.max_tokens == 1:
            raise RequestError("HTTP 400: no")
        if job.max_tokens == 3:
            yield Piece(1)

    wanted = [Job((20,), count) for count in (1, 2, 3)]
    records = run_virtual(open_loop(wanted, send, 1e6, ignore))
    assert [record.error for record in records] == ["HTTP 400: no", "an answer without a token", None]
    figures = summary(records, Objective(1000, 1000))
    assert (figures["requests"], figures["errors"], figures["output_tokens"]) == (3, 2, 1)
    assert figures["error_kinds"] == {"HTTP 400: no": 1, "an answer without a token": 1}


def test_poisson_arrivals_start_at_once_keep_their_rate_and_repeat_with_their_seed() -> None:
    due = [job.at_s for job in poisson(jobs(*[0.0] * 2000), rate=4.0, seed=7)]
    assert due[0] == 0.0
    assert due == sorted(due)
    assert due[-1] / (len(due) - 1) == pytest.approx(0.25, rel=0.1)
    assert due == [job.at_s for job in poisson(jobs(*[0.0] * 2000), rate=4.0, seed=7)]
    assert due != [job.at_s for job in poisson(jobs(*[0.0] * 2000), rate=4.0, seed=8)]
