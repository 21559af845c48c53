"""The door: key, request id, body, vanished clients."""

import asyncio

import pytest

from kvlite.config import EngineConfig
from kvlite.errors import ConfigError
from kvlite.server.gate import Caller, ClientGone, Keys, unless_gone

from .fakes import CHAT, FakeEngine, answer, run

KEY = {"authorization": "Bearer sesame"}


def locked(**more) -> FakeEngine:
    return FakeEngine(config=EngineConfig(api_key="sesame"), **more)


@pytest.mark.parametrize(
    "path",
    [
        "/ready", "/version", "/metrics", "/v1/models", "/v1/models/fake", "/v1/chat/completions", "/openapi.json",
        "/nowhere", "//health", "/health/", "/%68ealth", "/HEALTH", "/health/../metrics", "/health;x", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
def test_nothing_but_health_opens_without_the_key(method: str, path: str):
    reply = run(locked(), lambda client: client.open(method, path).reply())
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_health_is_open():
    assert run(locked(), lambda client: client.get("/health")).status == 200


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Bearer sesam", "Bearer sesame2", "Basic sesame", "sesame", "Bearer Sesame"]
)
def test_a_wrong_key_does_not_open(value: str):
    assert run(locked(), lambda client: client.get("/version", {"authorization": value})).status == 401


def test_the_right_key_opens_whatever_the_case_of_the_scheme():
    for value in ("Bearer sesame", "bearer sesame"):
        assert run(locked(), lambda client, v=value: client.get("/version", {"authorization": v})).status == 200
    reply = run(locked(scripts=[answer()]), lambda client: client.post("/v1/chat/completions", CHAT, KEY))
    assert reply.status == 200


def test_each_key_is_a_tenant_and_the_admin_one_of_its_own():
    keys = Keys("a, b,c", "root")
    assert [keys.caller(b"Bearer " + key) for key in (b"a", b"b", b"c")] == [Caller(0), Caller(1), Caller(2)]
    assert keys.caller(b"Bearer root") == Caller(3, is_admin=True)
    assert keys.caller(b"Bearer a,b") is keys.caller(b"Bearer ") is keys.caller(b"") is None


def test_without_keys_everybody_is_the_first_tenant_but_the_admin():
    keys = Keys(None, "root")
    assert keys.is_open
    assert keys.caller(b"") == keys.caller(b"Bearer whatever") == Caller(0)
    assert keys.caller(b"Bearer root") == Caller(1, is_admin=True)


@pytest.mark.parametrize(
    ("api_key", "admin_key", "field"),
    [
        ("", None, "api_key"),
        ("a,,b", None, "api_key"),
        ("a,a", None, "api_key"),
        ("a b", None, "api_key"),
        ("ä", None, "api_key"),
        (None, " ", "admin_key"),
        ("a,b", "b", "admin_key"),
        (",".join(map(str, range(1025))), None, "api_key"),
    ],
)
def test_keys_that_name_nobody_or_two_are_refused(api_key: str | None, admin_key: str | None, field: str):
    with pytest.raises(ConfigError) as caught:
        Keys(api_key, admin_key)
    assert caught.value.field == field
    assert "a b" not in caught.value.message


def test_the_clients_request_id_is_kept_when_it_is_a_plain_word():
    async def talk(client):
        kept = await client.get("/health", {"x-request-id": "abc-1.2_3"})
        made = await client.get("/health", {"x-request-id": "bad id\r\nx: y"})
        return kept.headers["x-request-id"], made.headers["x-request-id"]

    kept, made = run(FakeEngine(), talk)
    assert kept == "abc-1.2_3"
    assert len(made) == 32


def test_the_request_id_names_the_answer():
    reply = run(
        FakeEngine([answer()]), lambda client: client.post("/v1/chat/completions", CHAT, {"x-request-id": "mine"})
    )
    assert reply.json["id"] == "chatcmpl-mine"


def test_a_client_that_leaves_while_it_sends_its_body_ends_the_request():
    engine = FakeEngine()

    async def talk(client):
        exchange = client.open("POST", "/v1/chat/completions", [b"{", b""])
        exchange._inbox = asyncio.Queue()
        exchange.leave()
        await exchange.task

    run(engine, talk)
    assert engine.prompts == []


def test_work_is_cancelled_and_awaited_when_the_client_leaves():
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("work")

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def main() -> None:
        with pytest.raises(ClientGone):
            await unless_gone(receive, work())
        ended.append("after")

    asyncio.run(main())
    assert ended == ["work", "after"]
