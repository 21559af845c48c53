"""The hand-written HTTP client against a scripted socket server: streams, broken answers, and what is no OpenAI API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from kvlite.bench.client import Address, Piece, RequestError, completion, find_model
from kvlite.bench.errors import BenchError

T = TypeVar("T")
MODELS = b'{"object": "list", "data": [{"id": "m", "max_model_len": 99}]}'


def plain(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def chunked(*parts: bytes, end: bool = True) -> bytes:
    body = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + (b"0\r\n\r\n" if end else b"")


def event(fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
TOKENS = event({"choices": [{"text": "ab", "token_ids": [5, 6]}]})
TEXT = event({"choices": [{"text": "c"}]})
USAGE = event({"choices": [], "usage": {"completion_tokens": 3}})


def against(answer: bytes, use: Callable[[Address], Awaitable[T]]) -> tuple[T, bytes]:
    """What `use` gives on a server that answers every request with `answer` and hangs up; and what it was sent."""
    seen = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")), 0
        )
        seen.extend(head + await reader.readexactly(length))
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def main() -> T:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await use(Address.of(f"http://127.0.0.1:{port}/v1"))

    return asyncio.run(main()), bytes(seen)


async def collect(address: Address) -> list[Piece]:
    return [piece async for piece in completion(address, {"prompt": [1]}, "key")]


def model(answer: bytes) -> dict[str, Any]:
    return against(answer, lambda address: find_model(address, None))[0]


@pytest.mark.parametrize(
    "answer",
    [
        chunked(TOKENS, TEXT, USAGE + DONE),
        chunked(*(bytes([byte]) for byte in TOKENS + TEXT + USAGE + DONE)),
        plain(b": comment\n\n" + (TOKENS + TEXT + USAGE + DONE).replace(b"\n", b"\r\n")),
        b"HTTP/1.0 200 OK\r\n\r\n" + TOKENS + TEXT + USAGE + DONE,
    ],
    ids=["chunked", "byte by byte", "with a length and CRLF", "until the end"],
)
def test_a_stream_gives_its_tokens_however_it_is_cut(answer: bytes) -> None:
    pieces, sent = against(answer, collect)
    assert [piece.num_tokens for piece in pieces] == [2, 1, 0]
    assert pieces[0].token_ids == (5, 6)
    assert pieces[2].usage == {"completion_tokens": 3}
    head, body = sent.split(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer key" in head
    assert json.loads(body) == {"prompt": [1], "stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (plain(b'{"error": {"message": "too long"}}', "400 Bad Request"), "HTTP 400: too long"),
        (plain(b"<html>oops</html>", "502 Bad Gateway"), "HTTP 502: <html>oops"),
        (chunked(TOKENS), r"without \[DONE\]"),
        (chunked(TOKENS, end=False), "broke off"),
        (chunked(TOKENS, event({"error": {"message": "engine died"}})), "engine died"),
        (chunked(b"data: {half\n\n"), "no completion chunk"),
        (chunked(b"data: [1]\n\n"), "no completion chunk"),
        (b"220 smtp ready\r\n\r\n", "answers no HTTP"),
        (b"", "answers no HTTP"),
    ],
)
def test_a_failed_answer_says_what_the_server_said_or_where_it_broke(answer: bytes, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        against(answer, collect)


def test_the_first_model_of_the_list_is_found() -> None:
    assert model(plain(MODELS)) == {"id": "m", "max_model_len": 99}


@pytest.mark.parametrize(
    "answer",
    [
        plain(b"<html>hello</html>"),
        plain(b'{"data": []}'),
        plain(b'{"data": [{"name": "m"}]}'),
        plain(b'["m"]'),
        plain(b"Not Found", "404 Not Found"),
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
    ],
)
def test_an_address_that_answers_no_openai_is_refused_by_name(answer: bytes) -> None:
    with pytest.raises(BenchError, match=r"127\.0\.0\.1:\d+ answers no (OpenAI API|HTTP)"):
        model(answer)


def test_a_port_where_nobody_listens_is_refused_by_name() -> None:
    async def closed_port() -> None:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        await find_model(Address.of(f"http://127.0.0.1:{port}"), None)

    with pytest.raises(BenchError, match="no connection to http://127"):
        asyncio.run(closed_port())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://host:99999"])
def test_what_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(BenchError, match="--url"):
        Address.of(url)


def test_an_address_may_name_v1_or_not() -> None:
    assert Address.of("http://a:1/v1") == Address.of("http://a:1/") == Address("a", 1, "", False)
    assert Address.of("https://a/x/v1") == Address("a", 443, "/x", True)
