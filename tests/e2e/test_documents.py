"""Documents and blending through the official client, two tenants and an admin, on one server."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from kvlite.demo import read_script

from .conftest import DEADLINE_S, Server, openai_client

MODEL = "kvlite-small"
CHAT, DOCUMENTS = "/v1/chat/completions", "/v1/documents"
ONE, TWO, ADMIN = "key-one", "key-two", "key-admin"
SCRIPT = read_script()
QUESTION = [{"role": "system", "content": SCRIPT.system}, {"role": "user", "content": "Where does Edgar live?"}]
PUBLIC_TEXT = "Rain fell on the quiet harbor all winter. Walter lives in Oslo. Walter keeps a dog."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With keys, and one document that was published by a file."""
    path: Path = tmp_path_factory.mktemp("public") / "documents.jsonl"
    path.write_text(json.dumps({"id": "walter", "title": "Walter", "text": PUBLIC_TEXT}) + "\n")
    started = Server(
        "--deterministic", "--kv-cache-bytes", "64MiB", "--max-num-seqs", "16", "--api-key", f"{ONE},{TWO}",
        "--admin-key", ADMIN, "--public-documents", str(path), "--max-documents", "16",
        key=ONE,
    )  # fmt: skip
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def one(server: Server) -> openai.OpenAI:
    return openai_client(server, ONE)


def text(*numbers: int) -> list[dict[str, Any]]:
    """Documents of the demo, inline."""
    return [{"id": f"d{n}", "text": SCRIPT.documents[n]} for n in numbers]


def ask(client: openai.OpenAI, documents: list[dict[str, Any]], reuse: str = "blend", **more: Any) -> Any:
    """One answer; `reuse_options` and other fields beside OpenAI's go into `more`."""
    messages: Any = QUESTION
    body = {"documents": documents, "reuse": reuse, **more}
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, extra_body=body)


def block(reply: Any) -> dict[str, Any]:
    """The kvlite block, which must account for every token of the prompt."""
    found = reply.model_extra["kvlite"]
    counts = [found[f"{source}_tokens"] for source in ("prefix", "blended", "recomputed", "computed")]
    assert sum(counts) == reply.usage.prompt_tokens
    return found


def test_a_blended_answer_says_where_every_token_came_from(one: openai.OpenAI):
    cold = block(ask(one, text(8, 9)))
    assert {item["hit"] for item in cold["segments"]} == {"made"}
    warm = ask(one, text(0, 8, 9))
    found = block(warm)
    assert [(item["id"], item["hit"]) for item in found["segments"]] == [
        ("d0", "made"), ("d8", "device"), ("d9", "device"),
    ]  # fmt: skip
    reused = sum(item["tokens"] for item in found["segments"]) - max(0, found["prefix_tokens"] - 10)
    assert (found["reuse"], found["exact"], found["method"], found["recompute_ratio"]) == (
        "blend", False, "query", 0.15,
    )  # fmt: skip
    assert found["blended_tokens"] + found["recomputed_tokens"] <= reused
    assert found["recomputed_tokens"] == math.ceil(0.15 * (found["blended_tokens"] + found["recomputed_tokens"]) - 1e-9)
    assert warm.usage.prompt_tokens_details.cached_tokens == found["prefix_tokens"] + found["blended_tokens"]
    assert warm.choices[0].message.content.strip()


def test_every_mode_sees_the_same_prompt_and_ratio_one_answers_as_the_exact_one(one: openai.OpenAI):
    documents = text(3, 8, 9)
    replies = [
        ask(one, documents, reuse, return_token_ids=True, **more)
        for reuse, more in (
            ("blend", {"reuse_options": {"recompute_ratio": 1}}),
            ("verify", {}),
            ("prefix", {}),
            ("off", {}),
        )
    ]
    assert len({tuple(reply.choices[0].model_extra["prompt_token_ids"]) for reply in replies}) == 1
    assert len({reply.choices[0].message.content for reply in replies}) == 1
    assert [block(reply)["reuse"] for reply in replies] == ["blend", "verify", "prefix", "off"]
    assert replies[3].usage.prompt_tokens_details.cached_tokens == 0


def test_a_verified_answer_reports_the_difference(one: openai.OpenAI):
    reply = ask(one, text(4, 8, 9), "verify", reuse_options={"recompute_ratio": 0.3})
    found = block(reply)["verify"]
    assert found["kl"] >= 0 and math.isfinite(found["kl"])
    assert found["exact_tokens"] == reply.usage.completion_tokens
    assert 0 <= found["equal_tokens"] <= min(found["exact_tokens"], found["blended_tokens"])
    assert (found["first_difference"] is None) == (found["blended_text"] == reply.choices[0].message.content)


def test_a_stream_ends_with_the_reuse_and_blends_n_choices(one: openai.OpenAI):
    messages: Any = QUESTION
    chunks = list(
        one.chat.completions.create(
            model=MODEL, messages=messages, n=2, temperature=0, stream=True,
            extra_body={"documents": text(5, 8, 9), "reuse": "blend"},
        )
    )  # fmt: skip
    *before, last = chunks
    assert last.model_extra["kvlite"]["blended_tokens"] > 0
    assert not any("kvlite" in (chunk.model_extra or {}) for chunk in before)
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == ["stop", "stop"]


def test_a_document_lives_from_creation_to_deletion(server: Server, one: openai.OpenAI):
    status, made = server.call("POST", DOCUMENTS, {"id": "life", "title": "Life", "text": SCRIPT.documents[11]})
    assert (status, made["state"], made["pinned"], made["public"]) == (200, "ready", False, False)
    assert made["tokens"] > 20
    found = block(ask(one, [{"id": "life"}, *text(12)]))["segments"]
    assert (found[0]["id"], found[0]["tokens"], found[0]["hit"]) == ("life", made["tokens"], "device")

    assert server.call("POST", f"{DOCUMENTS}/life", {"pinned": True})[1]["pinned"] is True
    assert server.metrics()["kv_blocks_pinned"] > 0
    status, changed = server.call("PATCH", f"{DOCUMENTS}/life", {"pinned": False, "ttl_s": 3600})
    assert (changed["pinned"], changed["expires_at"] > time.time()) == (False, True)
    assert server.metrics()["kv_blocks_pinned"] == 0
    listed = server.call("GET", f"{DOCUMENTS}?limit=100")[1]["data"]
    assert [item for item in listed if item["id"] == "life"] == [changed]

    assert server.call("DELETE", f"{DOCUMENTS}/life")[1]["deleted"] is True
    assert server.call("GET", f"{DOCUMENTS}/life")[0] == 404
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(one, [{"id": "life"}])
    assert (unknown.value.code, unknown.value.param) == ("document_not_found", "documents[0].id")
    assert block(ask(one, text(11)))["segments"][0]["hit"] == "made", "nothing of it is left"


def test_a_document_is_gone_when_its_time_is_over(server: Server):
    assert server.call("POST", DOCUMENTS, {"id": "brief", "text": "Nora keeps a dog.", "ttl_s": 0.5})[0] == 200
    deadline = time.monotonic() + DEADLINE_S
    while server.call("GET", f"{DOCUMENTS}/brief")[0] == 200:
        assert time.monotonic() < deadline
    assert "brief" not in [item["id"] for item in server.call("GET", f"{DOCUMENTS}?limit=100")[1]["data"]]


def test_a_list_of_documents_is_ready_in_its_order(server: Server):
    body = {"documents": [{"id": f"list-{n}", "text": SCRIPT.documents[n]} for n in range(5)]}
    status, made = server.call("POST", DOCUMENTS, body)
    assert status == 200
    assert [(item["id"], item["state"]) for item in made["data"]] == [(f"list-{n}", "ready") for n in range(5)]
    for n in range(5):
        assert server.call("DELETE", f"{DOCUMENTS}/list-{n}")[0] == 200


def test_a_document_deleted_while_in_use_serves_its_reader_to_the_end(server: Server):
    assert server.call("POST", DOCUMENTS, {"id": "read", "text": SCRIPT.documents[13]})[0] == 200
    body = {
        "messages": QUESTION, "documents": [{"id": "read"}], "reuse": "blend", "stream": True, "max_tokens": 100,
        "ignore_eos": True,
    }  # fmt: skip
    response = server.open("POST", CHAT, body)
    assert response.readline().startswith(b"data: {")
    assert server.call("DELETE", f"{DOCUMENTS}/read")[1]["deleted"] is True
    events = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert server.call("POST", CHAT, body)[0] == 404
    server.wait_until_idle()


def test_tenants_share_nothing_but_what_was_published(server: Server, one: openai.OpenAI):
    two = openai_client(server, TWO)
    assert server.call("POST", DOCUMENTS, {"id": "own", "text": SCRIPT.documents[14]})[0] == 200
    for method, body in (("GET", None), ("DELETE", None), ("POST", {"pinned": True})):
        for id in ("own", "never-was"):
            status, reply = server.call(method, f"{DOCUMENTS}/{id}", body, TWO)
            assert (status, reply["error"]["code"]) == (404, "document_not_found")
            assert reply["error"]["message"] == f'document "{id}" does not exist'
    assert [item["id"] for item in server.call("GET", DOCUMENTS, key=TWO)[1]["data"]] == ["walter"]

    inline = [{"id": "x", "text": SCRIPT.documents[14]}]
    mine, theirs = ask(one, inline), ask(two, inline)
    assert block(mine)["segments"][0]["hit"] == "device"
    assert block(theirs)["segments"][0]["hit"] == "made"
    assert theirs.usage.prompt_tokens_details.cached_tokens <= block(theirs)["blended_tokens"]
    asked = {"messages": [{"role": "user", "content": PUBLIC_TEXT + " Where does Nora live now?"}]}
    cached = [
        server.call("POST", CHAT, asked, key)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        for key in (ONE, ONE, TWO)
    ]
    assert cached[1] > 0
    assert cached[0] == cached[2] == 0
    server.call("DELETE", f"{DOCUMENTS}/own")


def test_published_documents_are_used_by_all_and_changed_by_the_admin(server: Server):
    for key in (ONE, TWO):
        found = block(ask(openai_client(server, key), [*text(15), {"id": "walter"}]))["segments"][1]
        assert (found["id"], found["hit"]) == ("walter", "device")
        assert server.call("GET", f"{DOCUMENTS}/walter", key=key)[1]["public"] is True
        for method, body in (("DELETE", None), ("PATCH", {"pinned": True})):
            status, reply = server.call(method, f"{DOCUMENTS}/walter", body, key)
            assert (status, reply["error"]["code"]) == (403, "admin_key_required")
    body = {"id": "notice", "text": "Nora went to Rome.", "public": True}
    assert server.call("POST", DOCUMENTS, body)[0] == 403
    assert server.call("POST", DOCUMENTS, body, ADMIN)[1]["public"] is True
    assert server.call("GET", f"{DOCUMENTS}/notice", key=TWO)[0] == 200
    assert server.call("DELETE", f"{DOCUMENTS}/notice", key=ADMIN)[0] == 200
    assert server.call("GET", f"{DOCUMENTS}/notice", key=TWO)[0] == 404


def test_a_copy_of_a_public_document_gives_no_power_over_it(server: Server):
    for change in (("PATCH", {"pinned": True}), ("DELETE", None)):
        assert server.call("POST", DOCUMENTS, {"id": "copy", "text": PUBLIC_TEXT})[0] == 200
        assert server.call(change[0], f"{DOCUMENTS}/copy", change[1])[0] == 200
        public = server.call("GET", f"{DOCUMENTS}/walter", key=TWO)[1]
        assert (public["state"], public["pinned"]) == ("ready", False)
    assert block(ask(openai_client(server, TWO), [*text(2), {"id": "walter"}]))["segments"][1]["hit"] == "device"
    assert server.metrics()["kv_blocks_pinned"] == 0


def test_tokens_are_counted_by_source(server: Server, one: openai.OpenAI):
    documents = text(6, 7)
    ask(one, documents)
    before = server.wait_until_idle()
    found = block(ask(one, [*text(16), *documents]))
    after = server.wait_until_idle()

    def gained(name: str) -> float:
        return after[name] - before[name]

    for source in ("prefix", "blend", "recomputed", "computed"):
        assert gained(f"prompt_tokens_total/{source}") == found[f"{source.replace('blend', 'blended')}_tokens"]
    assert gained("blend_recomputed_tokens_total") == found["recomputed_tokens"] > 0
    assert gained("segment_hits_tokens_total") == found["blended_tokens"] + found["recomputed_tokens"]
    assert after["num_segments"] >= 3
    assert after["kv_blocks_segments"] > 0


GIANT = {"text": " Oslo" * 3000}

REFUSALS: list[tuple[str, str, dict[str, Any], int, str | None]] = [
    (CHAT, "unknown method", {"reuse": "blend", "reuse_options": {"method": "magic"}}, 400, "reuse_options.method"),
    (CHAT, "unknown option", {"reuse": "blend", "reuse_options": {"magic": 1}}, 400, "reuse_options.magic"),
    (CHAT, "ratio above 1", {"reuse": "blend", "reuse_options": {"recompute_ratio": 1.5}}, 400,
     "reuse_options.recompute_ratio"),
    (CHAT, "unknown mode", {"reuse": "magic"}, 400, "reuse"),
    (CHAT, "unknown id", {"documents": [{"id": "nobody"}]}, 404, "documents[0].id"),
    (CHAT, "an id twice", {"documents": [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]}, 400, "documents[1].id"),
    (CHAT, "empty", {"documents": [{"text": ""}]}, 400, "documents[0].text"),
    (CHAT, "giant", {"documents": [GIANT]}, 400, "documents[0].text"),
    (CHAT, "too many", {"documents": [{"text": "x"}] * 17}, 400, "documents"),
    (CHAT, "prompt_logprobs", {"documents": [{"text": "x"}], "reuse": "blend", "prompt_logprobs": 1}, 400,
     "prompt_logprobs"),
    ("/v1/completions", "documents", {"prompt": "a", "documents": [{"text": "x"}]}, 400, "documents"),
    ("/v1/completions", "blend", {"prompt": "a", "reuse": "blend"}, 400, "reuse"),
    (DOCUMENTS, "nothing", {}, 400, "text"),
    (DOCUMENTS, "giant", GIANT, 400, "text"),
    (DOCUMENTS, "giant in a list", {"documents": [{"text": "x"}, GIANT]}, 400, "documents[1].text"),
    (DOCUMENTS, "bad id", {"id": "../x", "text": "x"}, 400, "id"),
    (DOCUMENTS, "bad ttl", {"text": "x", "ttl_s": -1}, 400, "ttl_s"),
    (DOCUMENTS, "not the admin", {"text": "x", "public": True}, 403, "public"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [pytest.param(path, body, *more, id=f"{path} {name}") for path, name, body, *more in REFUSALS],
)
def test_nonsense_is_refused_by_name(server: Server, path: str, body: dict[str, Any], status: int, param: str | None):
    got, reply = server.call("POST", path, {"messages": QUESTION, **body} if path == CHAT else body)
    assert got == status, reply
    assert reply["error"]["param"] == param
    assert 10 < len(reply["error"]["message"]) < 600


def test_a_ratio_that_is_no_number_is_no_json(server: Server):
    body = b'{"messages": [], "reuse_options": {"recompute_ratio": NaN}}'
    status, reply = server.call("POST", CHAT, body)
    assert (status, reply["error"]["param"]) == (400, "body")


def test_a_client_that_leaves_ends_the_making_of_its_documents(server: Server):
    before = server.wait_until_idle()
    long = [{"id": f"left-{n}", "text": " ".join(SCRIPT.documents[n:] + SCRIPT.documents[:n])} for n in range(8)]
    connection = server.post_raw(DOCUMENTS, {"documents": long})
    server.wait_until(lambda m: m["num_steps_total"] > before["num_steps_total"])
    connection.close()
    server.wait_until_idle()
    listed = [item["id"] for item in server.call("GET", f"{DOCUMENTS}?limit=100")[1]["data"]]
    assert "left-7" not in listed
