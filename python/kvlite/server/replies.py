"""Answers as ASGI: one JSON value, or server-sent events whose source closes with them.

Owns how bytes leave; knows no endpoint and no engine. Called by app.py and documents.py.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from kvlite.server.gate import ClientGone, unless_gone


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`value` as a JSON answer."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


class EventStream(Response):
    """Server-sent events whose source is closed when the last one is sent, the client goes, or sending fails."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI answer."""
        async with aclosing(self._rest):
            with suppress(ClientGone):
                await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._rest:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_STATUSES = {
    400: "A field has a value that is not allowed; `param` names it.",
    401: "The key is missing or wrong.",
    403: "The server's admin key is needed.",
    404: "No such model, document or request.",
    408: "The body did not arrive in time.",
    409: "The request or the engine is in a state in which the move cannot begin.",
    413: "The body is larger than --max-body-bytes.",
    429: "The server is full; come back after retry-after seconds.",
    500: "A step failed; the server goes on.",
    503: "The server shuts down, or is not ready.",
    504: "The request reached its time limit.",
}

_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What /openapi.json says of the errors that a route may answer. FastAPI's own 422, never sent, stays out."""
    content = {"application/json": {"schema": _ERROR_SCHEMA}}
    named: dict[int | str, dict[str, Any]] = {
        status: {"description": _STATUSES[status], "content": content} for status in statuses
    }
    return named | {"default": {"description": "Any other error, in the same shape.", "content": content}}
