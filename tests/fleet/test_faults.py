"""Real processes, killed, stopped and cut off at every message of a move: no stream loses, doubles or changes a token.

One fleet per group of scenarios. A scenario: four streams, one of them is ordered to move, and something happens when a
certain frame of the protocol passes. Afterwards every answer is that of a lone engine, and no engine holds a block.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from itertools import product

import pytest

from kvlite.fleet.moves import MoveHow
from tests.engines import essence
from tests.fleet.asks import config, neighbours, oracle, subject
from tests.fleet.faults import Action, Ask, Client, Passing, Trap, Yard, yard
from tests.fleet.proxy import Fault

BETWEEN_ENGINES = ("prepare", "reserved", "blocks", "ack", "tail")
WITH_OWNER = ("move", "claim", "granted", "revoked")
MESSAGES = (*BETWEEN_ENGINES, *WITH_OWNER)
ATTEMPTS = 4
"""A stream may end before the message is due."""
ALL = bool(os.environ.get("KVLITE_MOVES"))
"""Whether every combination is tried (make soak) or a third of them, drawn by KVLITE_SEED."""
SEED = int(os.environ.get("KVLITE_SEED", "0"))

Scenario = Callable[[Yard, str, int, int], Awaitable[Trap]]
"""(yard, the moved request, its engine, the other one) -> the trap that must have sprung."""


async def play(made: Yard, number: int, others: Sequence[Ask], moved: Ask, scenario: Scenario) -> bool:
    """Whether it came to what was to be tested; either way every answer must be right."""
    await made.all_up()
    asks = [others[number % len(others)], moved, others[(number + 2) % len(others)], others[(number + 4) % len(others)]]
    if number % 2:
        asks[0], asks[1] = asks[1], asks[0]
    clients = [Client(made.fleet, ask, f"{number}-{n}") for n, ask in enumerate(asks)]
    moving = clients[asks.index(moved)]
    await moving.reached(8)
    source = made.owner_of(moving.name)
    trap = await scenario(made, moving.name, source, 1 - source) if source is not None else None
    for client in clients:
        assert essence(await client.task) == oracle.answer(client.ask), f"scenario {number}, {client.name}"
    made.traps.clear()
    return trap is not None and trap.sprung.is_set()


async def play_all(made: Yard, scenarios: Sequence[tuple[str, Scenario]], moved: Sequence[Ask]) -> None:
    """Every scenario until it came to what it is about."""
    for number, (name, scenario) in enumerate(scenarios):
        for attempt in range(ATTEMPTS):
            if await play(made, number * ATTEMPTS + attempt, _others(), moved[number * ATTEMPTS + attempt], scenario):
                break
        else:
            raise AssertionError(f"{name}: it never came to that")
    await made.quiet()


_NEIGHBOURS: list[Ask] = []


def _others() -> list[Ask]:
    if not _NEIGHBOURS:
        _NEIGHBOURS.extend(neighbours())
        oracle.learn(_NEIGHBOURS)
    return _NEIGHBOURS


def run(scenarios: Sequence[tuple[str, Scenario]], kind: str = "tcp", **setup: float) -> None:
    """A fleet of its own for these scenarios, a part of them unless ALL."""
    chosen = list(scenarios)
    if not ALL:
        chosen = random.Random(SEED).sample(chosen, -(-len(chosen) // 3))
    moved = [subject(number) for number in range(len(chosen) * ATTEMPTS)]
    oracle.learn([*_others(), *moved])

    async def main() -> None:
        async with yard(config(), kind, **setup) as made:
            await play_all(made, chosen, moved)

    asyncio.run(main())


async def order(made: Yard, name: str, to: int, how: MoveHow = MoveHow.COPY) -> None:
    """A move, whatever becomes of it."""
    await made.move(name, to, how)


def strike(message: str, blow: Callable[[Yard, int, int], Action]) -> Scenario:
    """The move meets `blow(yard, source, destination)` at its first frame of that kind."""

    async def scenario(made: Yard, name: str, source: int, destination: int) -> Trap:
        trap = made.trap(message, blow(made, source, destination))
        await order(made, name, destination)
        return trap

    return scenario


def killed(victim: int) -> Callable[[Yard, int, int], Action]:
    """kill -9 of the source (0) or the destination (1), while the frame is on its way."""

    def blow(made: Yard, source: int, destination: int) -> Action:
        def act(passing: Passing) -> Fault:
            made.signal((source, destination)[victim], signal.SIGKILL)
            return Fault.NONE

        return act

    return blow


def test_an_engine_that_is_killed_at_any_message_loses_no_token() -> None:
    run([(f"{name}, {victim}", strike(name, killed(victim))) for name, victim in product(MESSAGES, (0, 1))])


def stopped(message: str, victim: int) -> Scenario:
    """SIGSTOP; it wakes up when it has been declared dead and every stream has gone on elsewhere."""

    async def scenario(made: Yard, name: str, source: int, destination: int) -> Trap:
        pids: list[int] = []

        def act(passing: Passing) -> Fault:
            pids.append(made.signal((source, destination)[victim], signal.SIGSTOP))
            return Fault.NONE

        trap = made.trap(message, act)
        await order(made, name, destination)
        for pid in pids:
            await made.fleet.until_down((source, destination)[victim])
            os.kill(pid, signal.SIGCONT)
            await made.exited(pid)
        return trap

    return scenario


def test_an_engine_that_wakes_up_when_it_was_declared_dead_says_nothing_any_more() -> None:
    scenarios = [(f"{name}, {victim}", stopped(name, victim)) for name, victim in product(MESSAGES, (0, 1))]
    run(scenarios, silence_s=1.0)


def paused(message: str, victim: int) -> Scenario:
    """SIGSTOP, until everybody else has given up what they waited for; nobody declares it dead."""

    async def scenario(made: Yard, name: str, source: int, destination: int) -> Trap:
        engines = (source, destination)

        def act(passing: Passing) -> Fault:
            made.signal(engines[victim], signal.SIGSTOP)
            return Fault.NONE

        trap = made.trap(message, act)
        moving = asyncio.ensure_future(order(made, name, destination))
        sprung = asyncio.ensure_future(trap.sprung.wait())
        await asyncio.wait({moving, sprung}, return_when=asyncio.FIRST_COMPLETED)
        sprung.cancel()
        if trap.sprung.is_set():
            await made.reports(engines[1 - victim], 16)
            made.signal(engines[victim], signal.SIGCONT)
        await moving
        return trap

    return scenario


def test_an_engine_that_sleeps_at_any_message_wakes_up_fenced() -> None:
    scenarios = [(f"{name}, {victim}", paused(name, victim)) for name, victim in product(MESSAGES, (0, 1))]
    run(scenarios, silence_s=60.0, ack_s=0.2, freeze_s=0.2, reserve_s=0.2, claim_s=0.1)


def faulty(fault: Fault) -> Callable[[Yard, int, int], Action]:
    """That fault of the link."""
    return lambda made, source, destination: lambda passing: fault


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_a_fault_of_the_link_between_engines_at_any_message_loses_no_token(kind: str) -> None:
    faults = [fault for fault in Fault if fault not in (Fault.NONE, Fault.FREEZE)]
    if kind == "shm":
        faults.remove(Fault.FLIP_PAYLOAD)
    scenarios = [
        (f"{name}, {fault.name}", strike(name, faulty(fault)))
        for name, fault in product(BETWEEN_ENGINES, faults)
        if fault is not Fault.FLIP_PAYLOAD or name == "blocks"
    ]
    run(scenarios, kind, ack_s=0.5, freeze_s=0.5, reserve_s=1.0, claim_s=0.2)


def test_a_link_between_engines_that_goes_silent_at_any_message_loses_no_token() -> None:
    scenarios = [(name, strike(name, faulty(Fault.FREEZE))) for name in BETWEEN_ENGINES]
    run(scenarios, silence_s=2.0, ack_s=0.5, freeze_s=0.5, reserve_s=1.0, claim_s=0.2)


def test_a_fault_of_the_link_to_the_front_end_at_any_message_loses_no_token() -> None:
    faults = (Fault.DROP, Fault.DOUBLE, Fault.SWAP, Fault.FLIP_FRAME, Fault.CUT, Fault.FREEZE)
    scenarios = [(f"{name}, {fault.name}", strike(name, faulty(fault))) for name, fault in product(WITH_OWNER, faults)]
    run(scenarios, silence_s=2.0)
