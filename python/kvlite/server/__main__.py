"""Starts and stops the server: bind, load, say what fits, serve, drain.

Owns the start-up table, the refusal to listen beyond loopback without a key, and what signals mean: the first one stops
accepting and lets running requests finish for drain_s, the second one aborts them. Called by cli.py.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
import time
from types import FrameType

import uvicorn
from rich.console import Console
from rich.table import Table

from kvlite.async_engine import AsyncEngine
from kvlite.config import EngineConfig
from kvlite.engine import Engine
from kvlite.errors import ConfigError
from kvlite.server.app import create_app

KEEP_ALIVE_S = 15
HEADER_BYTES = 16 * 1024
MAX_CONNECTIONS = 4096
"""Sockets beyond this get a 503 at once; above the engine's own queue, which answers with a reason."""
EXIT_ABORTED = 1


def serve(config: EngineConfig) -> int:
    """Load the model and serve until a signal. Returns the exit status: 0 drained, 1 requests were aborted.

    Raises ConfigError (address, key), ModelLoadError, and whatever the engine says of its settings.
    """
    check_address(config)
    listener = bind(config.host, config.port)
    console = Console(stderr=True)
    with listener:
        start = time.monotonic()
        engine = Engine(config)
        loaded = time.monotonic()
        asynchronous = AsyncEngine(engine)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        console.print(startup_table(engine, loaded - start, url))
        return asyncio.run(_run(asynchronous, config, listener))
