"""Real processes, killed, stopped and cut off at every message of a move: no stream loses or changes a token."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from itertools import product

import pytest

from kvlite.fleet.moves import MoveHow
from tests.fleet.faults import Action, Client, Passing, Trap, Yard
from tests.fleet.proxy import Fault
from tests.fleet.scenarios import (
    BETWEEN_ENGINES,
    MESSAGES,
    WITH_OWNER,
    Act,
    Scenario,
    check_all,
    first_of,
    order,
    strike,
)

PARTIES = ("source", "destination")
OVER = ("abort", "refused", "reclaimed", "revoked")
"""Messages that say that somebody has given up or taken over."""
BEATS = 60
"""Statistics of one engine for which another sleeps at most: longer than every time limit in SHORT."""
SHORT = {"ack_s": 1.0, "freeze_s": 1.0, "reserve_s": 1.0, "claim_s": 0.2}
REPLAYED = ("move", "prepare", "reserved", "tail", "claim", "granted", "revoked")


def killed(victim: int) -> Callable[[Yard, int, int], Action]:
    """kill -9 of the source (0) or the destination (1), while the frame is on its way."""

    def blow(made: Yard, source: int, destination: int) -> Action:
        def act(passing: Passing) -> Fault:
            made.signal((source, destination)[victim], signal.SIGKILL)
            return Fault.NONE

        return act

    return blow


def test_an_engine_that_is_killed_at_any_message_loses_no_token() -> None:
    parts = list(product(MESSAGES, (0, 1)))
    replays = list(product(REPLAYED, (0, 1)))
    check_all(
        [Scenario(f"{PARTIES[v]} killed at {name}", strike(name, killed(v))) for name, v in parts]
        + [
            Scenario(f"{PARTIES[v]} killed at {name}, replay", strike(name, killed(v), MoveHow.REPLAY))
            for name, v in replays
        ]
    )


def stopped(message: str, victim: int) -> Act:
    """SIGSTOP; it wakes up when it was declared dead and its requests have gone on elsewhere."""

    async def act(made: Yard, client: Client, source: int, destination: int) -> Trap:
        pids: list[int] = []

        def stop(passing: Passing) -> Fault:
            pids.append(made.signal((source, destination)[victim], signal.SIGSTOP))
            return Fault.NONE

        trap = made.trap(message, stop)
        await order(made, client, destination)
        for pid in pids:
            await made.fleet.until_gone(pid)
            await client.ended()
            os.kill(pid, signal.SIGCONT)
            await made.exited(pid)
        return trap

    return act


def test_an_engine_that_wakes_up_when_it_was_declared_dead_says_nothing_any_more() -> None:
    parts = product(MESSAGES, (0, 1))
    check_all([Scenario(f"{PARTIES[v]} stopped at {name}", stopped(name, v)) for name, v in parts], silence_s=1.0)


def paused(message: str, victim: int) -> Act:
    """SIGSTOP, until everybody else has given up what they waited for; nobody declares it dead."""

    async def act(made: Yard, client: Client, source: int, destination: int) -> Trap:
        engines = (source, destination)

        def stop(passing: Passing) -> Fault:
            made.signal(engines[victim], signal.SIGSTOP)
            return Fault.NONE

        trap = made.trap(message, stop)
        moving = asyncio.ensure_future(order(made, client, destination))
        await first_of(moving, trap.sprung.wait())
        if trap.sprung.is_set():
            over = [made.trap(name, lambda passing: Fault.NONE).sprung.wait() for name in OVER]
            await first_of(made.reports(engines[1 - victim], BEATS), *over)
            made.signal(engines[victim], signal.SIGCONT)
        await moving
        return trap

    return act


def test_an_engine_that_sleeps_at_any_message_wakes_up_fenced() -> None:
    parts = product(MESSAGES, (0, 1))
    check_all(
        [Scenario(f"{PARTIES[v]} sleeps at {name}", paused(name, v)) for name, v in parts], silence_s=60.0, **SHORT
    )


def faulty(fault: Fault) -> Callable[[Yard, int, int], Action]:
    """That fault of the link."""
    return lambda made, source, destination: lambda passing: fault


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_a_fault_of_the_link_between_engines_at_any_message_loses_no_token(kind: str) -> None:
    faults = [fault for fault in Fault if fault is not Fault.NONE]
    scenarios = [
        Scenario(f"{fault.name} of {name}", strike(name, faulty(fault)))
        for name, fault in product(BETWEEN_ENGINES, faults)
        if fault is not Fault.FLIP_PAYLOAD or (name == "blocks" and kind == "tcp")
    ]
    check_all(scenarios, kind, silence_s=2.0, **SHORT)


def test_a_fault_of_the_link_to_the_front_end_at_any_message_loses_no_token() -> None:
    faults = (Fault.DROP, Fault.DOUBLE, Fault.SWAP, Fault.FLIP_FRAME, Fault.CUT, Fault.FREEZE)
    parts = product(WITH_OWNER, faults)
    check_all(
        [Scenario(f"{fault.name} of {name}", strike(name, faulty(fault))) for name, fault in parts], silence_s=2.0
    )
