"""Scenarios: four streams, one of them is ordered to move, and something happens when a certain frame passes.

A scenario that never came to what it is about (its stream ended before) is played again with another request. After
each one every answer is that of a lone engine; after all of them no engine holds a block. KVLITE_MOVES is set by
`make soak`: then every combination is played, else a part of them, drawn by KVLITE_SEED.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvlite.fleet.moves import MoveHow
from kvlite.types import FinishReason, RequestOutput
from tests.engines import essence
from tests.fleet.asks import config, neighbours, oracle, subject
from tests.fleet.faults import Action, Ask, Client, Trap, Yard, yard

BETWEEN_ENGINES = ("prepare", "reserved", "blocks", "ack", "tail")
WITH_OWNER = ("move", "claim", "granted", "revoked")
MESSAGES = (*BETWEEN_ENGINES, *WITH_OWNER)
ATTEMPTS = 5
NUM_MOVES = int(os.environ.get("KVLITE_MOVES", "0"))
"""0: as many as continuous integration has time for."""
SEED = int(os.environ.get("KVLITE_SEED", "0"))
FEWER = 5
"""One in so many scenarios is played without KVLITE_MOVES."""

Act = Callable[[Yard, Client, int, int], Awaitable[Trap]]
"""(yard, the client whose request moves, its engine, the other one) -> the trap that must have sprung."""


@dataclass(frozen=True)
class Scenario:
    """What happens, and to what request."""

    name: str
    act: Act
    ask: Callable[[int], Ask] = subject
    """A new request for each number."""
    may_end: tuple[FinishReason, ...] = ()
    """How the moved request may end before a lone engine would end it; cancelled: its client has left."""


def part_of(scenarios: Sequence[Scenario]) -> list[Scenario]:
    """All of them, or those whose turn it is."""
    if NUM_MOVES:
        return list(scenarios)
    return random.Random(SEED).sample(list(scenarios), -(-len(scenarios) // FEWER))


@functools.cache
def others() -> list[Ask]:
    """The requests beside the one that moves."""
    found = neighbours()
    oracle.learn(found)
    return found


def check_all(scenarios: Sequence[Scenario], kind: str = "tcp", **setup: float) -> None:
    """Plays them one after the other in one fleet; what was played is written to standard output."""
    chosen = part_of(scenarios)
    firsts = [scenario.ask(number * ATTEMPTS) for number, scenario in enumerate(chosen)]
    oracle.learn([*others(), *firsts])

    async def main() -> None:
        async with yard(config(), kind, **setup) as made:
            for number, (scenario, first) in enumerate(zip(chosen, firsts, strict=True)):
                await play(made, number, scenario, first)
            await made.quiet()
            sys.stdout.write(f"{len(chosen)} of {len(scenarios)} scenarios, seed {SEED}, {made.num_deaths} deaths\n")

    asyncio.run(main())


async def play(made: Yard, number: int, scenario: Scenario, first: Ask) -> None:
    """Until it came to what it is about."""
    for attempt in range(ATTEMPTS):
        ask = scenario.ask(number * ATTEMPTS + attempt) if attempt else first
        came = await play_once(made, 2 * number + attempt, scenario, ask)
        sys.stdout.write(f"{scenario.name}{'' if came else ': not yet'}\n")
        if came:
            return
    raise AssertionError(f"{scenario.name}: it never came to that")


async def play_once(made: Yard, number: int, scenario: Scenario, moved: Ask) -> bool:
    """Whether the trap sprung; either way every answer must be right."""
    await made.all_up()
    beside = others()
    asks = [beside[(number + n) % len(beside)] for n in range(3)]
    asks.insert(number % 2, moved)
    made.num_played += 1
    clients = [Client(made.fleet, ask, f"{made.num_played}-{n}") for n, ask in enumerate(asks)]
    moving = clients[number % 2]
    await moving.reached(8)
    source = made.owner_of(moving.name)
    trap = await scenario.act(made, moving, source, 1 - source) if source is not None else None
    outputs = await asyncio.gather(*(client.task for client in clients), return_exceptions=True)
    oracle.learn([moved])
    for client, output in zip(clients, outputs, strict=True):
        what = f"{scenario.name}, {client.name}"
        check(what, client.ask, output, scenario.may_end if client is moving else ())
    made.traps.clear()
    return trap is not None and trap.sprung.is_set()


def check(what: str, ask: Ask, output: RequestOutput | BaseException, may_end: Sequence[FinishReason] = ()) -> None:
    """The answer is that of a lone engine, or its beginning when it `may_end`."""
    if isinstance(output, asyncio.CancelledError) and FinishReason.CANCELLED in may_end:
        return
    if isinstance(output, BaseException):
        raise output
    wanted = oracle.answer(ask)
    given = essence(output)
    for choice, whole in zip(given[1], wanted[1], strict=True):
        if choice[3] in may_end and choice[3] is not whole[3]:
            beginning = choice[0] == whole[0][: len(choice[0])] and choice[1] == whole[1][: len(choice[1])]
            assert beginning, f"{what}: no beginning of the right answer"
        else:
            assert choice == whole, f"{what}: ended with {choice[3]} after {len(choice[1])} of {len(whole[1])} tokens"
    assert given[0] == wanted[0], f"{what}: log-probabilities of the prompt"


async def order(made: Yard, client: Client, to: int, how: MoveHow = MoveHow.COPY) -> None:
    """A move, whatever becomes of it."""
    await made.move(client.name, to, how)


def strike(message: str, blow: Callable[[Yard, int, int], Action], how: MoveHow = MoveHow.COPY) -> Act:
    """The move meets `blow(yard, source, destination)` at its first frame of that kind."""

    async def act(made: Yard, client: Client, source: int, destination: int) -> Trap:
        trap = made.trap(message, blow(made, source, destination))
        await order(made, client, destination, how)
        return trap

    return act


async def first_of(*waited: Awaitable[Any]) -> None:
    """Returns when one of them is done; none of them is cancelled if it is a task."""
    tasks = [asyncio.ensure_future(one) for one in waited]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, one in zip(tasks, waited, strict=True):
        if task is not one:
            task.cancel()
