"""The door: request id, key and body size, before any route is looked at.

Owns `Gate` (pure ASGI: nothing but /health passes without a key, compared on the raw path), which key is which tenant,
the body reader and the watch on vanished clients. Knows no endpoint. Wrapped around the application by app.py.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvlite.errors import ConfigError
from kvlite.server.failures import HttpError, error_body, headers_of, status_of

T = TypeVar("T")

OPEN_PATH = b"/health"
BODY_TIMEOUT_S = 30.0
MAX_KEYS = 1024
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class ClientGone(Exception):
    """The client closed the connection; nobody is left to tell."""


@dataclass(frozen=True)
class Caller:
    """Who sends a request. Comes from the key alone, never from anything that a client can write elsewhere."""

    tenant: int
    is_admin: bool = False
    """May publish documents for every tenant."""


class Keys:
    """Keys to callers: the n-th API key is tenant n, the admin key has a tenant of its own behind them.

    Without API keys everybody is tenant 0, except for the admin. Raises ConfigError.
    """

    def __init__(self, api_key: str | None, admin_key: str | None) -> None:
        clients = [] if api_key is None else [key.strip() for key in api_key.split(",")]
        if len(clients) > MAX_KEYS:
            raise ConfigError("api_key", f"{len(clients)} keys, at most {MAX_KEYS} are allowed")
        self.is_open = not clients
        """Whether no key is needed."""
        self._known: list[tuple[bytes, Caller]] = []
        for tenant, key in enumerate(clients):
            self._learn("api_key", key, Caller(tenant))
        if admin_key is not None:
            self._learn("admin_key", admin_key.strip(), Caller(max(1, len(clients)), is_admin=True))

    def _learn(self, field: str, key: str, caller: Caller) -> None:
        if not key or not all("!" <= char <= "~" for char in key):
            raise ConfigError(field, "a key must be printable ASCII text without blanks, and not empty")
        if any(key.encode() == known for known, _ in self._known):
            raise ConfigError(field, "two keys are the same: each must name one tenant")
        self._known.append((key.encode(), caller))

    def caller(self, authorization: bytes) -> Caller | None:
        """Who sent this Authorization header; None: nobody that is known. Looks at every key, whichever matches."""
        scheme, _, key = authorization.partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else b""
        found = Caller(0) if self.is_open else None
        for known, caller in self._known:
            if hmac.compare_digest(given, known):
                found = caller
        return found


class Gate:
    """Deny by default. Adds x-request-id to every answer; takes the client's when it is a plain word."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        caller = self._keys.caller(headers.get(b"authorization", b""))
        scope.setdefault("state", {}).update(request_id=request_id.decode(), caller=caller)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        if caller is not None or scope.get("raw_path", b"") == OPEN_PATH:
            # A task is cancelled only when the server gives up waiting for it: an end, not a fault to log.
            with suppress(asyncio.CancelledError):
                await self._app(scope, receive, send_with_id)
        else:
            refusal = HttpError(
                401, "invalid_api_key", "send the server's key as: Authorization: Bearer <key>",
                {"www-authenticate": "Bearer"},
            )  # fmt: skip
            await send_error(refusal, send_with_id)


async def send_error(error: Exception, send: Send) -> None:
    """An error as a whole ASGI answer."""
    body = msgspec.json.encode(error_body(error))
    headers = {"content-type": "application/json", "content-length": str(len(body)), **headers_of(error)}
    await send(
        {
            "type": "http.response.start",
            "status": status_of(error),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The request's body, counted as it streams. Raises HttpError 413 or 408, ClientGone."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part: bytes = message.get("body", b"")
                size += len(part)
                if size > max_bytes:
                    # Closed, so that the rest of the body is not read as the next request.
                    closing = {"connection": "close"}
                    raise HttpError(413, "body_too_large", f"body: larger than {max_bytes} bytes", closing)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        closing = {"connection": "close"}
        raise HttpError(408, "body_timeout", f"body: not complete after {BODY_TIMEOUT_S:g} s", closing) from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client disconnects first, `work` is cancelled, awaited, and ClientGone raised."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
