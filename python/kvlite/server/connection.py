"""uvicorn's HTTP/1.1 connection, with a limit on how long a client may take over a request's header.

Owns that one timer. uvicorn itself limits the pause between requests and the header's size; gate.py limits the body.
Knows no application. Handed to uvicorn by __main__.py.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 5.0


class Connection(H11Protocol):
    """Closed when a header is not complete HEADER_TIMEOUT_S after the connection or the header's first byte."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected; its first header is awaited."""
        super().connection_made(transport)
        self._await_header()

    def data_received(self, data: bytes) -> None:
        """Bytes came: either they complete a header or the clock runs on."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_header()
        else:
            self._header_came()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._header_came()
        super().connection_lost(exc)

    def _await_header(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def _header_came(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
