"""`Member`: one living engine as the front-end sees it: its link, what it said of itself, what it has and is asked.

Owns the link's sending side and the orders that wait for an answer; knows no stream. A message that finds no room means
that the worker does not take its messages: the link is closed, and whoever reads it lets the member go. One event
loop. Called by frontend.py and shelf.py.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from enum import StrEnum

from kvlite.errors import EngineClosedError
from kvlite.fleet.links import Link
from kvlite.fleet.messages import CancelOrder, FromOwner, Hello, Reply, Stats, encode
from kvlite.fleet.wire import Channel, LinkError, OversizedError


class EngineState(StrEnum):
    """Where an engine of the fleet is."""

    STARTING = "starting"
    UP = "up"
    DOWN = "down"
    """Its process is gone; it is started again, if it may."""
    GIVEN_UP = "given up"
    """It died too often."""


class Member:
    """From its Hello until its link ends."""

    def __init__(self, hello: Hello, link: Link) -> None:
        self.hello = hello
        self.requests: set[int] = set()
        """Those that it owns, and those that are on their way to it after a replay."""
        self.stats: Stats | None = None
        """The latest."""
        self._link = link
        self._orders: dict[int, asyncio.Future[Reply]] = {}
        self._numbers = itertools.count(1)

    @property
    def id(self) -> int:
        """The engine's number."""
        return self.hello.engine

    @property
    def num_orders(self) -> int:
        """Orders without an answer."""
        return len(self._orders)

    @property
    def has_room(self) -> bool:
        """Whether one more request may be sent: its queue has a place by its latest statistics."""
        running = 0 if self.stats is None else min(self.stats.stats.num_running, self.hello.max_num_seqs)
        return len(self.requests) - running < self.hello.max_num_waiting

    def post(self, message: FromOwner) -> None:
        """Sends a control message. Raises OversizedError; nothing when the link is down."""
        self._send(Channel.CONTROL, encode([message]))

    def post_frame(self, frame: bytes) -> None:
        """Sends a frame to its mover."""
        self._send(Channel.MIGRATION, frame)

    async def ask(self, make: Callable[[int], FromOwner]) -> Reply:
        """Sends the order that `make` gives for a number, and waits for its answer; cancelling it tells the worker.

        Raises what the worker answered, EngineClosedError when it goes first, OversizedError.
        """
        number = next(self._numbers)
        answer = self._orders[number] = asyncio.get_running_loop().create_future()
        try:
            self.post(make(number))
            reply = await answer
        except asyncio.CancelledError:
            self.post(CancelOrder(number))
            raise
        finally:
            self._orders.pop(number, None)
        if reply.failure is not None:
            raise reply.failure.error()
        return reply

    def answer(self, reply: Reply) -> None:
        """Hands an answer to whoever waits for it; one that nobody waits for is dropped."""
        waiting = self._orders.get(reply.order)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def gone(self) -> None:
        """The link has ended: nobody will answer."""
        for waiting in self._orders.values():
            if not waiting.done():
                waiting.set_exception(EngineClosedError(f"engine {self.id} is gone"))

    def hang_up(self) -> None:
        """Ends the link at once; who reads it learns that it is over."""
        self._link.close()

    async def farewell(self) -> None:
        """Sends what was posted, then ends the link."""
        await self._link.finish()

    def _send(self, channel: Channel, frame: bytes) -> None:
        try:
            self._link.post(channel, frame)
        except OversizedError:
            raise
        except LinkError:
            self.hang_up()
