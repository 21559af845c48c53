"""/v1/documents: the lifecycle of a document, who sees it, and what is refused."""

import asyncio
from typing import Any

import pytest

from kvlite.config import EngineConfig
from kvlite.errors import CapacityError, EngineClosedError, InvalidRequestError

from .fakes import CHAT, FakeEngine, answer, run

PATH = "/v1/documents"
ONE, TWO, ADMIN = ({"authorization": f"Bearer {key}"} for key in ("key-one", "key-two", "key-admin"))


def tenants(**more: Any) -> FakeEngine:
    return FakeEngine(config=EngineConfig(api_key="key-one,key-two", admin_key="key-admin"), **more)


def test_a_document_is_made_shown_pinned_and_deleted():
    async def talk(client):
        made = await client.post(PATH, {"id": "lease", "title": "Lease", "text": "four", "ttl_s": 60})
        shown = await client.get(PATH + "/lease")
        pinned = await client.post(PATH + "/lease", {"pinned": True})
        kept = await client.open("PATCH", PATH + "/lease", {"ttl_s": None}).reply()
        deleted = await client.open("DELETE", PATH + "/lease").reply()
        return made, shown, pinned, kept, deleted, await client.get(PATH + "/lease")

    made, shown, pinned, kept, deleted, gone = run(FakeEngine(), talk)
    assert made.json == shown.json == {
        "id": "lease", "object": "document", "title": "Lease", "tokens": 4, "state": "ready", "pinned": False,
        "public": False, "created_at": 1_700_000_000, "expires_at": 1_700_000_060,
    }  # fmt: skip
    assert (pinned.json["pinned"], pinned.json["expires_at"]) == (True, 1_700_000_060)
    assert (kept.json["pinned"], kept.json["expires_at"]) == (True, None)
    assert deleted.json == {"id": "lease", "object": "document.deleted", "deleted": True}
    assert (gone.status, gone.error["code"], gone.error["param"]) == (404, "document_not_found", "id")


def test_a_list_is_made_in_order_and_read_page_by_page():
    async def talk(client):
        body = {"documents": [{"id": name, "text": name} for name in "abcde"]}
        made = await client.post(PATH, body)
        first = await client.get(PATH + "?limit=2")
        second = await client.get(PATH + "?limit=3&after=b")
        return made, first, second, await client.get(PATH)

    made, first, second, whole = run(FakeEngine(), talk)
    assert [item["id"] for item in made.json["data"]] == list("abcde")
    assert [item["id"] for item in first.json["data"]] == ["a", "b"]
    assert (first.json["first_id"], first.json["last_id"], first.json["has_more"]) == ("a", "b", True)
    assert [item["id"] for item in second.json["data"]] == ["c", "d", "e"]
    assert second.json["has_more"] is False
    assert whole.json["data"] == made.json["data"]


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [("limit=0", 400, "limit"), ("limit=101", 400, "limit"), ("limit=x", 400, "limit"), ("after=nobody", 404, "id")],
)
def test_a_page_that_is_not_there_is_refused(query: str, status: int, param: str):
    reply = run(FakeEngine(), lambda client: client.get(f"{PATH}?{query}"))
    assert (reply.status, reply.error["param"]) == (status, param)


def test_a_tenant_neither_sees_nor_changes_anothers_document():
    engine = tenants(scripts=[answer()])

    async def talk(client):
        await client.post(PATH, {"id": "mine", "text": "secret"}, ONE)
        own = await client.get(PATH + "/mine", ONE)
        asked = CHAT | {"documents": [{"id": "mine"}]}
        seen = [
            await client.get(PATH + "/mine", TWO),
            await client.open("DELETE", PATH + "/mine", headers=TWO).reply(),
            await client.post(PATH + "/mine", {"pinned": True}, TWO),
            await client.post("/v1/chat/completions", asked, TWO),
            await client.get(PATH + "/nobody", TWO),
            await client.get(PATH + "/mine", ADMIN),
        ]
        listed = await client.get(PATH, TWO)
        still = await client.post("/v1/chat/completions", asked, ONE)
        return own, seen, listed, still

    own, seen, listed, still = run(engine, talk)
    assert own.status == still.status == 200
    assert [(reply.status, reply.error["code"]) for reply in seen] == [(404, "document_not_found")] * 6
    assert seen[0].error["message"].replace("mine", "nobody") == seen[4].error["message"]
    assert seen[3].error["param"] == "documents[0].id"
    assert listed.json["data"] == []
    assert [options.tenant for options in engine.asked] == [0]


def test_public_documents_are_the_admins_to_change_and_everybodys_to_use():
    engine = tenants(scripts=[answer()])

    async def talk(client):
        denied = await client.post(PATH, {"id": "law", "text": "x", "public": True}, ONE)
        made = await client.post(PATH, {"id": "law", "text": "x", "public": True}, ADMIN)
        seen = await client.get(PATH + "/law", TWO)
        used = await client.post("/v1/chat/completions", CHAT | {"documents": [{"id": "law"}]}, TWO)
        kept = [
            await client.open("DELETE", PATH + "/law", headers=TWO).reply(),
            await client.post(PATH + "/law", {"pinned": True}, TWO),
        ]
        pinned = await client.post(PATH + "/law", {"pinned": True}, ADMIN)
        deleted = await client.open("DELETE", PATH + "/law", headers=ADMIN).reply()
        return denied, made, seen, used, kept, pinned, deleted, await client.get(PATH + "/law", TWO)

    denied, made, seen, used, kept, pinned, deleted, gone = run(engine, talk)
    assert (denied.status, denied.error["code"]) == (403, "admin_key_required")
    assert made.json["public"] is True and seen.json == made.json
    assert used.status == 200
    assert [reply.status for reply in kept] == [403, 403]
    assert pinned.json["pinned"] is True
    assert deleted.status == 200
    assert gone.status == 404


def test_a_client_that_leaves_ends_the_making_of_every_document():
    engine = FakeEngine()
    engine.hold = asyncio.Event()

    async def talk(client):
        exchange = client.open("POST", PATH, {"documents": [{"text": "a"}, {"text": "b"}]})
        while engine.num_making < 2:
            await asyncio.sleep(0)
        exchange.leave()
        await exchange.task

    run(engine, talk)
    assert engine.num_abandoned == 2


@pytest.mark.parametrize(
    ("failure", "status", "param", "code"),
    [
        (CapacityError("the store is full"), 429, None, "rate_limit_exceeded"),
        (EngineClosedError(), 503, None, "shutting_down"),
        (InvalidRequestError("document.text", "has 9 tokens, at most 8"), 400, "text", "invalid_value"),
    ],
)
def test_a_document_that_cannot_be_kept_says_why(failure: Exception, status: int, param: str | None, code: str):
    async def talk(client):
        return await client.post(PATH, {"text": "bad"}), await client.post(PATH, {"documents": [{"text": "bad"}]})

    engine = FakeEngine()
    engine.failure = failure
    one, listed = run(engine, talk)
    assert (one.status, one.error["param"], one.error["code"]) == (status, param, code)
    assert (listed.status, listed.error["param"]) == (status, param and f"documents[0].{param}")


def test_the_api_description_names_every_status_of_every_route():
    paths = run(FakeEngine(), lambda client: client.get("/openapi.json")).json["paths"]
    document = paths["/v1/documents/{document_id}"]
    assert set(document) == {"get", "post", "patch", "delete"}
    assert {"200", "401", "403", "404"} <= set(document["delete"]["responses"])
    assert {"200", "400", "413", "429"} <= set(paths["/v1/documents"]["post"]["responses"])
    assert {"200", "400", "404", "429", "503"} <= set(paths["/v1/chat/completions"]["post"]["responses"])
    every = [route["responses"] for methods in paths.values() for route in methods.values()]
    assert all("200" in responses and "422" not in responses for responses in every)
    names = [route["operationId"] for methods in paths.values() for route in methods.values()]
    assert len(names) == len(set(names))
