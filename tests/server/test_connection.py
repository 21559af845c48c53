"""Real sockets: clients that are slow with a header or a body are let go, others are not."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from kvlite.server import connection, gate

from .fakes import CHAT, Client, FakeEngine, answer

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def serve(engine: FakeEngine, talk: Callable[[Callable[[], Awaitable[Streams]]], Awaitable[Any]]) -> Any:
    """`talk` with a way to connect to the application behind uvicorn's loop and our connection class."""

    async def main() -> Any:
        config = uvicorn.Config(Client(engine).app, http=connection.Connection, ws="none", lifespan="off")
        config.load()
        state = uvicorn.server.ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: connection.Connection(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        port = server.sockets[0].getsockname()[1]
        try:
            async with asyncio.timeout(60):
                return await talk(lambda: asyncio.open_connection("127.0.0.1", port))
        finally:
            server.close()

    return asyncio.run(main())


def request(body: object) -> bytes:
    data = json.dumps(body).encode()
    return f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: "])
def test_a_connection_without_a_whole_header_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.05)

    async def talk(connect):
        reader, writer = await connect()
        writer.write(sent)
        return await reader.read()

    assert serve(FakeEngine(), talk) == b""


def test_the_second_header_of_a_connection_has_the_same_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.05)

    async def talk(connect):
        reader, writer = await connect()
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        first = await reader.readuntil(b"}")
        writer.write(b"GET /health")
        return first, await reader.read()

    first, rest = serve(FakeEngine(), talk)
    assert first.startswith(b"HTTP/1.1 200")
    assert rest == b""


def test_an_answer_may_take_longer_than_a_header(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.05)
    hold = asyncio.Event()
    engine = FakeEngine([[hold, *answer("Oslo")]])

    async def talk(connect):
        reader, writer = await connect()
        writer.write(request(CHAT))
        await engine.started.wait()
        # Timers fire in order: one that still watched the header would close the connection first.
        asyncio.get_running_loop().call_later(0.1, hold.set)
        return await reader.readuntil(b"Oslo")

    assert serve(engine, talk).startswith(b"HTTP/1.1 200")


def test_a_body_that_does_not_come_is_a_408(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "BODY_TIMEOUT_S", 0.05)

    async def talk(connect):
        reader, writer = await connect()
        writer.write(request(CHAT)[:-1])
        return await reader.read()

    reply = serve(FakeEngine(), talk)
    assert reply.startswith(b"HTTP/1.1 408")
    assert b'"code":"body_timeout"' in reply


def test_a_client_that_closes_its_socket_aborts_its_request():
    engine = FakeEngine([[asyncio.Event()]])

    async def talk(connect):
        _, writer = await connect()
        writer.write(request(CHAT))
        await engine.started.wait()
        writer.close()
        return await engine.aborted.wait()

    assert serve(engine, talk)
