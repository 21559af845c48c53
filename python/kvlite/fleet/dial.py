"""Opening links: addresses, connecting, listening, and the handshake over a fresh socket.

An address is `unix:PATH` (one host: payloads through shared memory) or `tcp:HOST:PORT`. Owns the listener with its
bound on strangers that shake hands at once. A link is handed out only when both sides have proved the key and agree
on the model; everything before that ends within `handshake_s`. Called by worker.py and frontend.py.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvlite.errors import ConfigError
from kvlite.fleet.auth import (
    ANYBODY,
    HELLO_BYTES,
    PROOF_BYTES,
    HandshakeError,
    Identity,
    Transcript,
    agree,
    read_hello,
)
from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.links import Link
from kvlite.fleet.shared_memory import exchange_memory
from kvlite.fleet.tcp import InlinePayloads, Wire
from kvlite.fleet.traffic import Payloads
from kvlite.fleet.wire import CutFrameError, Limits, LinkDownError, LinkError

BACKLOG = 64
STRANGERS_MAX = 32
"""Connections that have not proved the key yet; more are closed at once."""
ACCEPT_PAUSE_S = 0.1
UNIX_PATH_BYTES_MAX = 103
"""Of macOS; Linux has four more."""
_PEER_CREDENTIALS = struct.Struct("3i")


async def connect(address: str, config: LinkConfig, peer: int = ANYBODY) -> Link:
    """A link to who listens at `address`; `peer`: who that must be.

    Raises LinkDownError (nobody listens, too slow), HandshakeError (wrong key, other model or version), ConfigError.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(config.handshake_s):
            family, where = await _resolve(address)
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, where)
            except BaseException:
                sock.close()
                raise
    except TimeoutError:
        raise LinkDownError(f"{address} did not answer within {config.handshake_s:g} s") from None
    except OSError as error:
        raise LinkDownError(f"{address} cannot be reached: {error}") from None
    return await shake_hands(sock, config, peer, caller=True)


async def listen(
    address: str, config: LinkConfig, on_link: Callable[[Link], object], on_refused: Callable[[LinkError], object]
) -> Listener:
    """Listens until `close`. `tcp:HOST:0` takes any port, a unix path must be free and gets mode 0600.

    `on_link` is called on the loop with every link that is up, `on_refused` with why somebody was sent away. Raises
    ConfigError, or OSError when the address cannot be had.
    """
    family, where = await _resolve(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        if family == socket.AF_UNIX:
            os.chmod(str(where), stat.S_IRUSR | stat.S_IWUSR)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return Listener(sock, config, on_link, on_refused)


class Listener:
    """Takes connections; made by `listen`."""

    def __init__(
        self,
        sock: socket.socket,
        config: LinkConfig,
        on_link: Callable[[Link], object],
        on_refused: Callable[[LinkError], object],
    ) -> None:
        self._sock = sock
        self._config = config
        self._on_link, self._on_refused = on_link, on_refused
        self._strangers: set[asyncio.Task[None]] = set()
        name = sock.getsockname()
        self._path = Path(name) if sock.family == socket.AF_UNIX else None
        self.address = f"unix:{name}" if self._path else f"tcp:{_bracketed(name[0])}:{name[1]}"
        """Where to connect, with the port that was taken."""
        self._accepting = asyncio.get_running_loop().create_task(self._accept(), name=f"listen {self.address}")

    def close(self) -> None:
        """Takes nobody any more; handshakes under way end, links that are up stay. Twice is fine."""
        for task in (self._accepting, *self._strangers):
            task.cancel()
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _address = await loop.sock_accept(self._sock)
            except OSError as error:  # out of descriptors: a moment later there may be some
                self._on_refused(LinkError(f"{self.address} cannot take a connection: {error}"))
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._strangers) >= STRANGERS_MAX:
                sock.close()
                self._on_refused(HandshakeError(f"{STRANGERS_MAX} connections have not proved the key yet: too many"))
                continue
            task = loop.create_task(self._welcome(sock))
            self._strangers.add(task)
            task.add_done_callback(self._strangers.discard)

    async def _welcome(self, sock: socket.socket) -> None:
        try:
            link = await shake_hands(sock, self._config, ANYBODY, caller=False)
        except LinkError as error:
            self._on_refused(error)
            return
        try:
            self._on_link(link)
        except BaseException:
            link.close()
            raise


async def shake_hands(sock: socket.socket, config: LinkConfig, peer: int = ANYBODY, *, caller: bool) -> Link:
    """The link over a connected stream socket, which it owns from now on. Exactly one side is the caller.

    Raises HandshakeError or LinkDownError within `handshake_s`; the socket is closed then.
    """
    wire = Wire(sock, stall_s=config.handshake_s, bytes_per_s_limit=config.bytes_per_s_limit)
    try:
        async with asyncio.timeout(config.handshake_s):
            link = await _shake(wire, sock, config, peer, caller)
    except TimeoutError:
        wire.close()
        raise HandshakeError(f"the handshake took longer than {config.handshake_s:g} s") from None
    except CutFrameError:
        wire.close()
        raise HandshakeError("the other side left during the handshake: has it another fleet key or model?") from None
    except OSError as error:
        wire.close()
        raise HandshakeError(f"the handshake failed: {error}") from None
    except BaseException:
        wire.close()
        raise
    return link


async def _shake(wire: Wire, sock: socket.socket, config: LinkConfig, peer: int, caller: bool) -> Link:
    shares_memory = sock.family == socket.AF_UNIX
    if shares_memory:
        _check_user(sock)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limits = Limits(config.frame_bytes_limit, config.payload_bytes_limit, config.window_bytes)
    own = Identity(config.engine, peer, shares_memory, config.fingerprint, config.block_bytes, limits)
    hello = own.hello(secrets.token_bytes(32))
    if caller:
        await wire.write([hello])
        theirs = await wire.read_exactly(HELLO_BYTES)
        other = read_hello(theirs)
        transcript = Transcript(config.key, hello, theirs)
        transcript.check(await wire.read_exactly(PROOF_BYTES), caller=False)
        await wire.write([transcript.proof(caller=True)])
    else:
        theirs = await wire.read_exactly(HELLO_BYTES)
        other = read_hello(theirs)
        transcript = Transcript(config.key, theirs, hello)
        await wire.write([hello, transcript.proof(caller=False)])
        transcript.check(await wire.read_exactly(PROOF_BYTES), caller=True)
    agreed = agree(own, other)
    keys = transcript.session_key(caller), transcript.session_key(not caller)
    payloads: Payloads = InlinePayloads(wire)
    if shares_memory and agreed.window:
        payloads = await exchange_memory(wire, sock, keys, agreed.window)
    wire.stall_s = config.stall_s
    return Link(wire, config, other.engine, agreed, keys, payloads)


def _check_user(sock: socket.socket) -> None:
    if hasattr(socket, "SO_PEERCRED"):
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        _pid, user, _group = _PEER_CREDENTIALS.unpack(credentials)
        if user != os.getuid():
            raise HandshakeError(f"the other side runs as user {user}, must be {os.getuid()}")


async def _resolve(address: str) -> tuple[int, Any]:
    """Socket family, and what to bind or connect to."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest and len(rest.encode()) <= UNIX_PATH_BYTES_MAX:
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not host or not port.isdecimal() or int(port) >= 1 << 16:
        allowed = f"unix:PATH (at most {UNIX_PATH_BYTES_MAX} bytes) nor tcp:HOST:PORT"
        raise ConfigError("address", f"{address[:200]!r} is neither {allowed}")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    return found[0][0], found[0][4]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
