"""Two ends of a link in one event loop, for tests; and an end that has the key but speaks as the test wants."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from kvlite.fleet.auth import FleetKey, fingerprint
from kvlite.fleet.dial import connect, listen
from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.links import Link
from kvlite.fleet.tcp import Wire
from kvlite.fleet.wire import Channel, LinkError
from tests.fleet.proxy import Decide, Proxy

T = TypeVar("T")
KEY = FleetKey(bytes(range(32)))
MODEL = fingerprint("model", 1)
KINDS = ("tcp", "unix")
BOUND_S = 60.0


def run(main: Coroutine[Any, Any, T]) -> T:
    """A test's event loop; a hang becomes a TimeoutError."""
    return asyncio.run(asyncio.wait_for(main, BOUND_S))


def config(engine: int, **changes: Any) -> LinkConfig:
    """Small windows, so that tests reach them."""
    settings: dict[str, Any] = {"key": KEY, "fingerprint": MODEL, "block_bytes": 64, "window_bytes": 1 << 16}
    return LinkConfig(engine=engine, **(settings | changes))


def free_address(kind: str, folder: Any, name: str = "s") -> str:
    """Of a listener."""
    return "tcp:127.0.0.1:0" if kind == "tcp" else f"unix:{folder}/{name}"


@asynccontextmanager
async def pair(
    kind: str, folder: Any, one: LinkConfig | None = None, two: LinkConfig | None = None, decide: Decide | None = None
) -> AsyncIterator[tuple[Link, Link]]:
    """(caller's end, listener's end); engines 0 and 1 unless told; through a proxy when `decide` is given."""
    arrived: asyncio.Queue[Link] = asyncio.Queue()
    refused: list[LinkError] = []
    listener = await listen(free_address(kind, folder), two or config(1), arrived.put_nowait, refused.append)
    proxy = await Proxy.start(listener.address, decide, free_address(kind, folder, "p")) if decide else None
    caller = callee = None
    try:
        caller = await connect(proxy.address if proxy else listener.address, one or config(0))
        callee = await arrived.get()
        yield caller, callee
    finally:
        for part in (caller, callee, proxy, listener):
            if part is not None:
                part.close()
        await others_end()


async def others_end() -> None:
    """Every other task of the loop has ended: those of links do when they are closed."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    main = {task for task in others if task.get_name().startswith("Task-") and task.get_coro().__name__ == "wait_for"}
    if others - main:
        await asyncio.wait(others - main)


def stream_pair(kind: str) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, the first the caller's."""
    if kind == "unix":
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        two, _ = server.accept()
    return one, two


def bare(sock: socket.socket) -> Wire:
    """An end that says whatever it is told."""
    return Wire(sock, stall_s=BOUND_S)


async def take(link: Link, count: int) -> list[tuple[Channel, bytes, bytes | None]]:
    """The next frames, payloads copied."""
    found: list[tuple[Channel, bytes, bytes | None]] = []
    while len(found) < count:
        channel, frame, payload = await anext(link)
        found.append((channel, frame, None if payload is None else bytes(payload)))
    return found


async def drain(link: Link) -> list[bytes]:
    """Every frame until the link ends."""
    return [frame async for _channel, frame, _payload in link]


async def round_trip(one: Link, two: Link) -> None:
    """One frame from `two` to `one`: whatever `one` had begun before had its turn."""
    two.post(Channel.CONTROL, b"turn")
    while (await anext(one))[1] != b"turn":
        pass
