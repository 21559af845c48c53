"""A client for OpenAI-compatible servers: HTTP/1.1 by hand on asyncio streams, one connection per request.

Owns the bytes: chunked bodies, server-sent events, errors as sentences. The time of a piece is when its bytes were
parsed; no library sits between. Needs the standard library only, so the same client measures every engine.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .errors import BenchError

BODY_LIMIT = 1 << 24
NAME = "kvlite-bench"


class RequestError(Exception):
    """One request failed; the text is what the server said, or what went wrong on the way."""


@dataclass(frozen=True)
class Piece:
    """One event of a stream."""

    num_tokens: int
    token_ids: tuple[int, ...] = ()
    usage: dict[str, Any] | None = None


@dataclass(frozen=True)
class Address:
    """Where a server is, out of a URL with or without /v1."""

    host: str
    port: int
    base: str
    tls: bool

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises BenchError for what is no http(s) URL."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise BenchError(f"--url {url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchError(f"--url {url}: an address like http://127.0.0.1:8000 is wanted")
        tls = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), base, tls)

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}{self.base}"


@dataclass(frozen=True)
class Response:
    """Status and headers (lower case); the body is still on its way."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The body in the parts in which it arrives. Raises RequestError when it breaks off."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await self.reader.readline()).split(b";")[0], 16):
                    yield await self.reader.readexactly(size)
                    await self.reader.readexactly(2)
            elif "content-length" in self.headers:
                yield await self.reader.readexactly(int(self.headers["content-length"]))
            else:
                while part := await self.reader.read(1 << 16):
                    yield part
        except (asyncio.IncompleteReadError, ValueError, OSError) as error:
            raise RequestError(f"the answer broke off: {type(error).__name__}") from None

    async def whole(self) -> bytes:
        """The whole body, at most BODY_LIMIT bytes."""
        body = b""
        async for part in self.chunks():
            body += part
            if len(body) > BODY_LIMIT:
                raise RequestError(f"an answer of more than {BODY_LIMIT} bytes")
        return body


@asynccontextmanager
async def exchange(
    address: Address, method: str, path: str, body: bytes = b"", api_key: str | None = None
) -> AsyncGenerator[Response]:
    """One request on a connection of its own. Raises RequestError when there is no HTTP answer."""
    context = ssl.create_default_context() if address.tls else None
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, limit=1 << 20)
    except OSError as error:
        raise RequestError(f"no connection to {address}: {error.strerror or error}") from None
    try:
        head = [f"{method} {address.base}{path} HTTP/1.1", f"Host: {address.host}:{address.port}", "Connection: close"]
        head += [f"User-Agent: {NAME}", "Accept: application/json, text/event-stream"]
        head += [f"Authorization: Bearer {api_key}"] if api_key else []
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
        try:
            writer.write("\r\n".join([*head, "", ""]).encode() + body)
            await writer.drain()
            status, headers = _parse_head(await reader.readuntil(b"\r\n\r\n"))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, OSError) as error:
            raise RequestError(f"{address} answers no HTTP: {type(error).__name__}") from None
        yield Response(status, headers, reader)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers. Raises ValueError for what is no HTTP."""
    first, *lines = head.decode("latin-1").split("\r\n")
    version, status, *_ = first.split(" ", 2)
    if not version.startswith("HTTP/1."):
        raise ValueError(first)
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return int(status), {name.strip().lower(): value.strip() for name, value in pairs}


def complaint(status: int, body: bytes) -> str:
    """A failed answer in one line: OpenAI's error message where there is one."""
    try:
        error = json.loads(body)["error"]
        message = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        message = body[:120].decode("utf-8", "replace")
    return f"HTTP {status}: {' '.join(message.split())[:200]}"


async def find_model(address: Address, api_key: str | None, timeout_s: float = 10.0) -> dict[str, Any]:
    """The first entry of /v1/models. Raises BenchError when the address answers no OpenAI API."""
    try:
        async with asyncio.timeout(timeout_s), exchange(address, "GET", "/v1/models", api_key=api_key) as response:
            body = await response.whole()
    except RequestError as error:
        raise BenchError(str(error)) from None
    except TimeoutError:
        raise BenchError(f"{address}: no answer to GET /v1/models within {timeout_s:g} s") from None
    if response.status != 200:
        raise BenchError(f"{address} answers no OpenAI API: GET /v1/models: {complaint(response.status, body)}")
    try:
        models = json.loads(body)["data"]
        if isinstance(models[0]["id"], str):
            return dict(models[0])
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    raise BenchError(f"{address} answers no OpenAI API: GET /v1/models gave {body[:80]!r}")


async def events(
    address: Address, path: str, fields: dict[str, Any], api_key: str | None = None
) -> AsyncGenerator[bytes]:
    """The data of each server-sent event of an answer, until the server ends it. Raises RequestError for an error."""
    async with exchange(address, "POST", path, json.dumps(fields).encode(), api_key) as response:
        if response.status != 200:
            raise RequestError(complaint(response.status, await response.whole()))
        pending = b""
        async for part in response.chunks():
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:") and (event := line.removeprefix(b"data:").strip()):
                    yield event


async def completion(
    address: Address, fields: dict[str, Any], api_key: str | None, path: str = "/v1/completions"
) -> AsyncGenerator[Piece]:
    """Streams the answer. Raises RequestError for an error, also in mid-stream, and for a stream without end."""
    wanted = fields | {"stream": True, "stream_options": {"include_usage": True}}
    async with aclosing(events(address, path, wanted, api_key)) as found:
        async for event in found:
            if event == b"[DONE]":
                return
            yield parse_event(event)
    raise RequestError("the stream ended without [DONE]")


def parse_event(event: bytes) -> Piece:
    """One event of a stream. Its tokens: the ids where the server sends them, else one for a piece with text."""
    try:
        chunk = json.loads(event)
        if chunk.get("error"):
            raise RequestError(complaint(200, event))
        choices = chunk.get("choices") or []
        ids = tuple(int(token) for choice in choices for token in choice.get("token_ids") or ())
        text = any(choice.get("text") or (choice.get("delta") or {}).get("content") for choice in choices)
        return Piece(len(ids) or int(text), ids, chunk.get("usage"))
    except (ValueError, AttributeError, TypeError):
        raise RequestError(f"an event that is no completion chunk: {event[:80]!r}") from None
