"""The admin routes and metrics of a fleet: who may use them, what they say, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvlite.fleet.messages import Add
from kvlite.server.app import create_app
from kvlite.types import FinishReason
from tests.fleet.fake_worker import IDS, Fleet, fleet
from tests.fleet.link_pairs import run
from tests.server.fakes import Exchange, Reply

ADMIN = {"authorization": "Bearer master"}
STREAM = {"prompt": "Hello there", "stream": True, "max_tokens": 40, "return_token_ids": True}


class Door:
    """The server of a fleet."""

    def __init__(self, cluster: Fleet) -> None:
        self.cluster = cluster
        self.app: Any = create_app(cluster.engine, cluster.engine.config, "fake", fleet=cluster.engine)

    def open(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Exchange:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return Exchange(self.app, method, path, headers or {}, [raw])

    async def call(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Reply:
        return await self.open(method, path, body, headers).reply()

    async def move(self, body: object, headers: dict[str, str] | None = None) -> Reply:
        return await self.call("POST", "/v1/fleet/move", body, headers)


@asynccontextmanager
async def door(num_engines: int = 2, **settings: Any) -> AsyncIterator[Door]:
    async with fleet(num_engines, **settings) as cluster:
        yield Door(cluster)


def test_a_running_answer_is_moved_by_its_id_and_its_stream_is_whole():
    async def main() -> None:
        async with door() as server:
            source, target = server.cluster.workers[0], server.cluster.workers[1]
            exchange = server.open("POST", "/v1/completions", STREAM, {"x-request-id": "abc"})
            (add,) = await source.heard(Add)
            source.give(add.request, *IDS[:3])
            await exchange.sent.get()
            await exchange.sent.get()
            status = (await server.call("GET", "/v1/fleet")).json
            assert status["object"] == "fleet"
            assert [(each["id"], each["state"], each["pid"]) for each in status["engines"]] == [
                (0, "up", 1000), (1, "up", 1001),
            ]  # fmt: skip
            (shown,) = status["engines"][0]["requests"]
            assert (shown["name"], shown["engine"], shown["epoch"], shown["tokens"]) == ("cmpl-abc", 0, 0, 3)
            moving = asyncio.create_task(server.move({"request": "cmpl-abc", "engine": 1, "how": "copy"}))
            while target.epochs.get(add.request) != 1:
                target._news.clear()
                await target._news.wait()
            target.requests[add.request] = IDS[:3]
            target.give(add.request, *IDS[3:])
            reply = await moving
            assert reply.status == 200
            told = reply.json
            assert (told["object"], told["result"], told["source"], told["to"]) == ("fleet.move", "moved", 0, 1)
            assert told["gap_s"] >= 0 and told["seconds"] > 0 and told["bytes"] == 12345
            target.end(add.request, FinishReason.LENGTH)
            events = (await exchange.reply()).events
            ids = [id for event in events for choice in event["choices"] for id in choice.get("token_ids", ())]
            assert ids == IDS
            metrics = (await server.call("GET", "/metrics")).body.decode()
            assert 'kvlite:migrations_total{model_name="fake",result="moved"} 1.0' in metrics
            assert 'kvlite:migrations_total{model_name="fake",result="refused"} 0.0' in metrics
            assert 'kvlite:migration_gap_seconds_count{model_name="fake"} 1.0' in metrics
            assert 'kvlite:migration_bytes_sum{model_name="fake"} 12345.0' in metrics
            assert 'kvlite:engine_up{engine="1",model_name="fake"} 1.0' in metrics

    run(main())


def test_a_move_without_room_says_so_and_counts():
    async def main() -> None:
        async with door() as server:
            server.open("POST", "/v1/completions", STREAM)
            (add,) = await server.cluster.workers[0].heard(Add)
            server.cluster.workers[1].has_room = False
            reply = await server.move({"request": add.request, "engine": 1})
            assert (reply.status, reply.json["result"], reply.json["gap_s"]) == (200, "refused", None)
            metrics = (await server.call("GET", "/metrics")).body.decode()
            assert 'kvlite:migrations_total{model_name="fake",result="refused"} 1.0' in metrics
            await server.cluster.kill(1)
            metrics = (await server.call("GET", "/metrics")).body.decode()
            assert 'kvlite:engine_up{engine="1",model_name="fake"} 0.0' in metrics

    run(main())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, "body"),
        (b"[]", 400, "body"),
        ({}, 400, "request"),
        ({"request": "", "engine": 1}, 400, "request"),
        ({"request": "x" * 129, "engine": 1}, 400, "request"),
        ({"request": True, "engine": 1}, 400, "request"),
        ({"request": 0, "engine": 1}, 400, "request"),
        ({"request": ["1"], "engine": 1}, 400, "request"),
        ({"request": "1"}, 400, "engine"),
        ({"request": "1", "engine": "1"}, 400, "engine"),
        ({"request": "1", "engine": -1}, 400, "engine"),
        ({"request": "1", "engine": 1 << 40}, 400, "engine"),
        ({"request": "1", "engine": 2}, 400, "engine"),
        ({"request": "1", "engine": 0}, 400, "engine"),
        ({"request": "1", "engine": 1, "how": "fast"}, 400, "how"),
        ({"request": "1", "engine": 1, "now": True}, 400, "now"),
        ({"request": "cmpl-other", "engine": 1}, 404, "request"),
        ({"request": 99, "engine": 1}, 404, "request"),
        (b"x" * 2000, 413, None),
    ],
)
def test_a_bad_order_is_refused_with_its_field_and_moves_nothing(body: object, status: int, param: str | None):
    async def main() -> None:
        async with door(max_body_bytes=1024) as server:
            server.open("POST", "/v1/completions", STREAM)
            await server.cluster.workers[0].heard(Add)
            reply = await server.move(body)
            assert reply.status == status, reply.body
            assert reply.error["param"] == param
            assert server.cluster.engine.status().engines[0].requests[0].moving_to is None

    run(main())


def test_an_engine_that_is_down_is_a_conflict():
    async def main() -> None:
        async with door() as server:
            server.open("POST", "/v1/completions", STREAM)
            await server.cluster.workers[0].heard(Add)
            await server.cluster.kill(1)
            reply = await server.move({"request": "1", "engine": 1})
            assert (reply.status, reply.error["code"]) == (409, "move_conflict")

    run(main())


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({}, {}, 200),
        ({"admin_key": "master"}, {}, 403),
        ({"admin_key": "master"}, ADMIN, 200),
        ({"api_key": "one"}, {}, 401),
        ({"api_key": "one"}, {"authorization": "Bearer one"}, 403),
        ({"api_key": "one", "admin_key": "master"}, {"authorization": "Bearer one"}, 403),
        ({"api_key": "one", "admin_key": "master"}, {"authorization": "Bearer two"}, 401),
        ({"api_key": "one", "admin_key": "master"}, ADMIN, 200),
    ],
)
def test_the_fleet_is_the_admins_wherever_there_are_keys(settings: Any, headers: dict[str, str], status: int):
    async def main() -> None:
        async with door(**settings) as server:
            assert (await server.call("GET", "/v1/fleet", headers=headers)).status == status
            expected = 404 if status == 200 else status
            reply = await server.move({"request": "cmpl-none", "engine": 1}, headers)
            assert reply.status == expected

    run(main())


def test_prompts_of_one_call_have_names_of_their_own():
    async def main() -> None:
        async with door() as server:
            server.open("POST", "/v1/completions", STREAM | {"prompt": ["a", "b"]}, {"x-request-id": "two"})
            await server.cluster.workers[0].heard(Add)
            await server.cluster.workers[1].heard(Add)
            status = (await server.call("GET", "/v1/fleet")).json
            names = [request["name"] for engine in status["engines"] for request in engine["requests"]]
            assert sorted(names) == ["cmpl-two-0", "cmpl-two-1"]

    run(main())


def test_a_fleet_answers_the_routes_of_documents():
    async def main() -> None:
        async with door() as server:
            made = await server.call("POST", "/v1/documents", {"id": "nora", "text": "Nora lives in Oslo."})
            assert (made.status, made.json["state"]) == (200, "ready")
            assert (await server.call("GET", "/v1/documents/nora")).json["id"] == "nora"
            assert [each["id"] for each in (await server.call("GET", "/v1/documents")).json["data"]] == ["nora"]
            changed = await server.call("POST", "/v1/documents/nora", {"pinned": True})
            assert changed.json["pinned"] is True
            assert (await server.call("DELETE", "/v1/documents/nora")).json["deleted"] is True
            assert (await server.call("GET", "/v1/documents/nora")).status == 404

    run(main())


def test_without_an_engine_the_answer_is_503_and_the_server_is_alive():
    async def main() -> None:
        async with door(1) as server:
            await server.cluster.kill(0)
            reply = await server.call("POST", "/v1/completions", STREAM)
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert (await server.call("GET", "/health")).status == 200
            server.cluster.engine.give_up(0)
            assert (await server.call("GET", "/health")).status == 503

    run(main())
