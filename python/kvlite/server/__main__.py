"""Starts and stops the server, of one engine or of a fleet: bind, load, say what fits, serve, drain.

Owns the start-up table, the refusal to listen beyond loopback without a key, and what signals mean: the first one stops
accepting and lets running requests finish for drain_s, the second one aborts them. Called by cli.py.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console
from rich.table import Table
from rich.text import Text
from starlette.types import ASGIApp

from kvlite.async_engine import AsyncEngine
from kvlite.config import EngineConfig
from kvlite.engine import Engine
from kvlite.errors import ConfigError
from kvlite.fleet.frontend import FleetEngine
from kvlite.fleet.launcher import Launcher, divided, load_text_side
from kvlite.fleet.log import log_to_stderr
from kvlite.fleet.settings import FleetSettings
from kvlite.reuse_types import Document
from kvlite.server.app import create_app
from kvlite.server.calls import model_name
from kvlite.server.connection import Connection
from kvlite.server.gate import Keys
from kvlite.server.public import publish, read_public_documents
from kvlite.server.serving import ServingEngine

KEEP_ALIVE_S = 15
HEADER_BYTES = 16 * 1024
MAX_CONNECTIONS = 4096
"""Sockets beyond this get a 503 at once; above the engine's own queue, which answers with a reason."""
LAST_WORDS_S = 2
"""Time in which cancelled answers reach their clients."""
LISTEN_BACKLOG = 2048
EXIT_ABORTED = 1


def check_address(config: EngineConfig) -> None:
    """Refuse to listen beyond this machine without a key. Raises ConfigError."""
    if not Keys(config.api_key, config.admin_key).is_open:
        return
    try:
        loopback = config.host == "localhost" or ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError("host", f"{config.host!r} is reachable from other machines: set KVLITE_API_KEY first")


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a port in use is known before the model loads. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError("host", f"{host!r} cannot be used: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError("port", f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients reach the server."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class DrainingServer(uvicorn.Server):
    """uvicorn with our signals: exit status 0 after a drain instead of dying of the signal again."""

    def __init__(self, config: uvicorn.Config, engine: ServingEngine, drain_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second aborts."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the door; answers that are under way go on, at most drain_s, then end as cancelled."""
        ending = asyncio.create_task(self._end_engine())
        await super().shutdown(sockets)
        if self.force_exit:
            await asyncio.to_thread(self._engine.close)
        await ending
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=LAST_WORDS_S)

    async def _end_engine(self) -> None:
        await self._engine.drain(self._drain_s)
        await asyncio.to_thread(self._engine.close)


def serve(config: EngineConfig) -> int:
    """Load the model and serve until a signal. Returns the exit status: 0 drained, 1 requests were aborted.

    Raises ConfigError (address, key), ModelLoadError, and whatever the engine says of its settings.
    """
    check_address(config)
    public = read_public_documents(config)
    with bind(config.host, config.port) as listener, Engine(config) as engine:
        engine.tokenizer.compile_templates()
        Console(stderr=True).print(startup_table(engine, url_of(listener)))
        return asyncio.run(_serve(engine, config, listener, public))


async def _serve(engine: Engine, config: EngineConfig, listener: socket.socket, public: Sequence[Document]) -> int:
    asynchronous = AsyncEngine(engine)
    app = create_app(asynchronous, config, model_name(config, Path(engine.startup.model)))
    return await _run(asynchronous, app, config, listener, public)


def serve_fleet(config: EngineConfig, settings: FleetSettings) -> int:
    """Start `settings.engines` processes of one engine each, and serve them as one until a signal.

    Returns and raises as `serve`.
    """
    check_address(config)
    public = read_public_documents(config)
    with log_to_stderr(), bind(config.host, config.port) as listener:
        directory, tokenizer, defaults = load_text_side(config)
        divided(config, settings.engines)

        async def run() -> int:
            fleet = FleetEngine(config, tokenizer, defaults, settings.engines)
            launcher = Launcher(fleet, settings)
            try:
                await launcher.start()
                Console(stderr=True).print(fleet_table(fleet, str(directory), config, url_of(listener)))
                app = create_app(fleet, config, model_name(config, directory), fleet=fleet)
                return await _run(fleet, app, config, listener, public)
            finally:
                await fleet.shut()
                await launcher.stop()

        return asyncio.run(run())


def startup_table(engine: Engine, url: str) -> Table:
    """What was loaded, what fits, how long it took, where it answers."""
    name = model_name(engine.config, Path(engine.startup.model))
    return _table((*engine.startup.rows(), ("API name", name), ("URL", url)))


def fleet_table(fleet: FleetEngine, directory: str, config: EngineConfig, url: str) -> Table:
    """The same of a fleet, a row for each engine."""
    rows = [("model", directory)]
    for member in fleet.members.values():
        hello = member.hello
        numbers = f"{hello.device}, {hello.dtype}{', deterministic' if hello.deterministic else ''}"
        speed = f"{hello.prefill_tokens_per_s:.0f} tokens/s of prompt, {hello.step_s * 1e3:.1f} ms a step"
        kv = f"{hello.num_blocks} blocks of {hello.block_size} tokens"
        rows.append((f"engine {hello.engine}", f"process {hello.pid}, {numbers}, {kv}, {speed}"))
    return _table((*rows, ("API name", model_name(config, Path(directory))), ("URL", url)))


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


async def _run(
    engine: ServingEngine, app: ASGIApp, config: EngineConfig, listener: socket.socket, public: Sequence[Document]
) -> int:
    settings = uvicorn.Config(
        app,
        http=Connection,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(config.drain_s) + LAST_WORDS_S,
        limit_concurrency=MAX_CONNECTIONS,
        backlog=LISTEN_BACKLOG,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
    )
    server = DrainingServer(settings, engine, config.drain_s)
    try:
        await publish(engine, public)
        await server.serve(sockets=[listener])
    finally:
        await asyncio.to_thread(engine.close)
    return EXIT_ABORTED if server.force_exit else 0


if __name__ == "__main__":
    from kvlite.cli import main

    main(["serve", *sys.argv[1:]])
