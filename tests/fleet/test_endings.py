"""Requests that end while they move, and orders that contradict each other: clean, and nothing is left behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import product

import pytest

from kvlite.errors import InvalidRequestError
from kvlite.fleet.moves import MoveConflictError, MoveHow, UnknownRequestError
from kvlite.types import FinishReason
from tests.fleet.asks import config, oracle, stopping, subject
from tests.fleet.faults import Ask, Client, Passing, Trap, Yard, yard
from tests.fleet.proxy import Fault
from tests.fleet.scenarios import MESSAGES, Act, Scenario, check, check_all, first_of, order

LATE_BEATS = 16
"""Statistics of engines for which a frame is held when the request does not end meanwhile: it is frozen."""
TIMEOUT_S = 1.0
OPPOSITES = 10


def single(number: int) -> Ask:
    """One choice, so that its end is the request's."""
    ask = subject(number)
    return replace(ask, params=replace(ask.params, n=1))


def with_stop(number: int) -> Ask:
    return stopping(single(number))


def with_timeout(number: int) -> Ask:
    """Too long for its time."""
    ask = subject(number)
    return replace(
        ask,
        params=replace(ask.params, n=1, max_tokens=800),
        options=replace(ask.options, timeout_s=TIMEOUT_S),
    )


def held(message: str) -> Act:
    """The frame waits until the request has ended, or cannot, because it is frozen."""

    async def act(made: Yard, client: Client, source: int, destination: int) -> Trap:
        async def hold(passing: Passing) -> Fault:
            await first_of(client.ended(), made.any_reports(LATE_BEATS))
            return Fault.NONE

        trap = made.trap(message, hold)
        await order(made, client, destination)
        return trap

    return act


def left(message: str) -> Act:
    """The client leaves when the frame passes."""

    async def act(made: Yard, client: Client, source: int, destination: int) -> Trap:
        def leave(passing: Passing) -> Fault:
            client.task.cancel()
            return Fault.NONE

        trap = made.trap(message, leave)
        await order(made, client, destination)
        return trap

    return act


def test_a_request_that_ends_in_any_way_at_any_message_leaves_nothing_behind() -> None:
    check_all(
        [
            Scenario(f"{how} at {name}", act(name), ask, may_end)
            for name, (how, act, ask, may_end) in product(
                MESSAGES,
                [
                    ("cancel", left, single, (FinishReason.CANCELLED,)),
                    ("length", held, single, ()),
                    ("stop string", held, with_stop, ()),
                    ("timeout", held, with_timeout, (FinishReason.TIMEOUT,)),
                ],
            )
        ]
    )


def test_orders_that_make_no_sense_are_refused_by_name() -> None:
    ask = single(1)
    oracle.learn([ask])

    async def main() -> None:
        async with yard(config()) as made:
            client = Client(made.fleet, ask, "r")
            await client.reached(4)
            source = made.owner_of("r")
            assert source is not None
            with pytest.raises(InvalidRequestError, match="already"):
                await made.fleet.move("r", source)
            with pytest.raises(InvalidRequestError, match="out of range"):
                await made.fleet.move("r", 2)
            with pytest.raises(UnknownRequestError):
                await made.fleet.move("s", 1)
            check("refused orders", ask, await client.task)
            with pytest.raises(UnknownRequestError):
                await made.fleet.move("r", 1 - source)
            await made.quiet()

    asyncio.run(main())


def test_two_movers_with_opposite_orders_lose_no_token() -> None:
    asks = [single(10 + n) for n in range(4)]
    oracle.learn(asks)

    async def main() -> None:
        async with yard(config(), engines=3) as made:
            clients = [Client(made.fleet, ask, f"r{n}") for n, ask in enumerate(asks)]
            results: list[str] = []

            async def mover(to: int, how: MoveHow) -> None:
                for n in range(OPPOSITES * len(clients)):
                    client = clients[n % len(clients)]
                    if not await client.reached(2):
                        continue
                    try:
                        results.append((await made.fleet.move(client.name, to, how)).result)
                    except (InvalidRequestError, MoveConflictError) as error:
                        results.append(type(error).__name__)
                        await made.reports(to, 1)

            await asyncio.gather(mover(0, MoveHow.COPY), mover(1, MoveHow.COPY), mover(2, MoveHow.REPLAY))
            for client in clients:
                check("opposite orders", client.ask, await client.task)
            assert "moved" in results
            await made.quiet()

    asyncio.run(main())


def test_requests_that_wait_or_are_half_prefilled_move_too() -> None:
    asks = [single(30 + n) for n in range(10)]
    oracle.learn(asks)

    async def main() -> None:
        async with yard(config(max_num_seqs=2, max_num_batched_tokens=32)) as made:
            clients = [Client(made.fleet, ask, f"r{n}") for n, ask in enumerate(asks)]
            await made.fleet.until(lambda: made.owner_of("r9") is not None)
            orders: list[tuple[str, int]] = []
            for client in clients:
                source = made.owner_of(client.name)
                if source is not None and not client.num_tokens:
                    orders.append((client.name, 1 - source))
            reports = await asyncio.gather(*(made.move(name, to) for name, to in orders))
            for client in clients:
                check("moved before its first token", client.ask, await client.task)
            assert any(report is not None and report.moved for report in reports)
            await made.quiet()

    asyncio.run(main())
