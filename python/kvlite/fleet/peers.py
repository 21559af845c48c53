"""`Peers`: the links of one worker to the others, opened and measured as soon as both are up.

Owns who is where, one task per link that reads, and what waits for a link that is being opened. A peer whose link ends
is down as a whole: `on_down` hears of it once, and the next frame dials again. Frames of blocks are stored before the
next frame of that link is read. Called by worker.py and mover.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from kvlite import _core
from kvlite.errors import KvliteError
from kvlite.fleet.dial import connect
from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.links import Link
from kvlite.fleet.wire import Channel, LinkClosedError, LinkDownError, LinkError, Payload

WAITING_MAX = 1024
"""Frames for a link that is being opened."""

log = logging.getLogger("kvlite.fleet")


@dataclass(eq=False)
class _Peer:
    links: list[Link] = field(default_factory=list[Link])
    """The first is sent on. There are two when both sides dialled at once."""
    waiting: list[bytes] = field(default_factory=list[bytes])
    up: asyncio.Future[Link] | None = None
    """While somebody dials."""


class Peers:
    """`on_frame(peer, frame)` and `await on_blocks(peer, frame, payload)` may raise `_core.FrameError`."""

    def __init__(
        self,
        config: LinkConfig,
        on_frame: Callable[[int, bytes], None],
        on_blocks: Callable[[int, bytes, memoryview | None], Awaitable[None]],
        on_down: Callable[[int], None],
    ) -> None:
        self._config = config
        self._on_frame = on_frame
        self._on_blocks = on_blocks
        self._on_down = on_down
        self._addresses: dict[int, str] = {}
        self._peers: dict[int, _Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def update(self, addresses: Mapping[int, str]) -> None:
        """Where the living engines listen. Links to others, and to one that moved, end; new ones are opened.

        Of two engines the one with the smaller number calls, unless the other has something to send earlier.
        """
        before, self._addresses = self._addresses, dict(addresses)
        for peer in list(self._peers):
            if addresses.get(peer) != before.get(peer):
                self._down(peer, LinkDownError("the front-end says that it is gone"))
        for peer in addresses:
            if peer > self._config.engine and addresses[peer] != before.get(peer):
                self._dial(peer, self._peers.setdefault(peer, _Peer()))

    def rates(self) -> dict[int, float]:
        """Measured bytes per second, by peer; one that nothing went to yet is absent."""
        rates = {id: peer.links[0].bytes_per_s for id, peer in self._peers.items() if peer.links}
        return {id: rate for id, rate in rates.items() if rate > 0}

    def payload_cost(self, to: int) -> float:
        """`Payloads.cost` of the link to a peer; 0.0 while there is none."""
        peer = self._peers.get(to)
        return peer.links[0].payload_cost if peer is not None and peer.links else 0.0

    def accept(self, link: Link) -> None:
        """A worker has called."""
        if link.peer < 0:
            log.warning("engine %d: the front-end may not call here", self._config.engine)
            link.close()
            return
        peer = self._peers.setdefault(link.peer, _Peer())
        self._take(link.peer, peer, link)

    def post(self, to: int, frame: bytes) -> None:
        """Sends a frame, in order; dials first when there is no link."""
        peer = self._peers.setdefault(to, _Peer())
        if peer.links:
            try:
                peer.links[0].post(Channel.MIGRATION, frame)
            except LinkError as error:
                self._down(to, error)
        elif len(peer.waiting) < WAITING_MAX:
            peer.waiting.append(frame)
            self._dial(to, peer)
        else:
            self._down(to, LinkDownError(f"{WAITING_MAX} frames wait for a link"))

    async def send(self, to: int, frame: bytes, payload: Payload) -> None:
        """Sends blocks; returns when their memory may be used again. Raises LinkError."""
        peer = self._peers.setdefault(to, _Peer())
        link = peer.links[0] if peer.links else await self._dial(to, peer)
        await link.send(Channel.MIGRATION, frame, payload)

    def close(self) -> None:
        """Ends every link."""
        for task in self._tasks:
            task.cancel()
        for peer in self._peers.values():
            for link in peer.links:
                link.close()

    def _dial(self, to: int, peer: _Peer) -> asyncio.Future[Link]:
        if peer.up is None:
            peer.up = asyncio.get_running_loop().create_future()
            peer.up.add_done_callback(_seen)
            self._spawn(self._open(to, peer))
        return peer.up

    async def _open(self, to: int, peer: _Peer) -> None:
        address = self._addresses.get(to)
        try:
            if address is None:
                raise LinkDownError(f"engine {to} is not known here")
            link = await connect(address, self._config, to)
        except KvliteError as error:
            if self._peers.get(to) is peer and not peer.links:
                self._down(to, error)
            return
        if self._peers.get(to) is peer:
            self._take(to, peer, link)
        else:
            link.close()

    def _take(self, id: int, peer: _Peer, link: Link) -> None:
        peer.links.append(link)
        self._spawn(self._read(id, peer, link))
        self._spawn(_measure(link))
        waiting, peer.waiting = peer.waiting, []
        for frame in waiting:
            self.post(id, frame)
        if peer.up is not None and not peer.up.done():
            peer.up.set_result(link)
        peer.up = None

    async def _read(self, id: int, peer: _Peer, link: Link) -> None:
        error: Exception = LinkClosedError("the other side closed the link")
        try:
            async for channel, frame, payload in link:
                if channel is not Channel.MIGRATION:
                    raise LinkError(f"engine {id} sent a frame of channel {channel}")
                if _core.frame_kind(frame) == _core.Mover.BLOCKS:
                    await self._on_blocks(id, frame, payload)
                else:
                    self._on_frame(id, frame)
        except (LinkError, _core.FrameError) as found:
            error = found
        except Exception as found:  # ours: moves with this peer end, all others go on
            log.exception("a frame of engine %d", id)
            error = found
        finally:
            link.close()
        if self._peers.get(id) is peer:
            self._down(id, error)

    def _down(self, id: int, error: Exception) -> None:
        """Ends everything with a peer, and says so."""
        peer = self._peers.pop(id, None)
        if peer is None:
            return
        level = logging.INFO if isinstance(error, LinkClosedError) else logging.WARNING
        log.log(level, "the link to engine %d is down: %s", id, error)
        for link in peer.links:
            link.close()
        if peer.up is not None and not peer.up.done():
            peer.up.set_exception(LinkDownError(str(error)))
        asyncio.get_running_loop().call_soon(self._on_down, id)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _measure(link: Link) -> None:
    """What the front-end weighs copies with, before the first one."""
    try:
        await link.measure()
    except LinkError as error:
        log.info("the link to engine %d ended while it was measured: %s", link.peer, error)


def _seen(future: asyncio.Future[Link]) -> None:
    """An error that nobody waits for is none."""
    if not future.cancelled():
        future.exception()
