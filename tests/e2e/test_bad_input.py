"""Requests that cannot be served: each a clear refusal, and the server goes on as before."""

import json
from typing import Any

import openai
import pytest

from .conftest import Server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]

REFUSALS: list[tuple[str, object, int, str | None]] = [
    (TEXT, {"prompt": [300] * 2048}, 400, "prompt"),
    (TEXT, {"prompt": " Oslo" * 3000}, 400, "prompt"),
    (CHAT, {"messages": [{"role": "user", "content": " Oslo" * 3000}]}, 400, "messages"),
    (TEXT, {"prompt": [[300], [300] * 2048]}, 400, "prompt[1]"),
    (TEXT, {"prompt": [300] * 2000, "max_tokens": 100}, 400, "max_tokens"),
    (TEXT, {"prompt": ""}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {}, 400, "prompt"),
    (CHAT, {"messages": []}, 400, "messages"),
    (TEXT, {"prompt": [1394]}, 400, "prompt[0]"),
    (TEXT, {"prompt": [5, -1]}, 400, "prompt[1]"),
    (TEXT, b'{"prompt": "a", "temperature": NaN}', 400, "body"),
    (TEXT, b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
    (TEXT, {"prompt": "a", "n": 0}, 400, "n"),
    (TEXT, {"prompt": "a", "n": 9}, 400, "n"),
    (TEXT, {"prompt": "a", "n": 16384}, 400, "n"),
    (TEXT, {"prompt": "a", "stop": "x" * 1_000_000}, 400, "stop"),
    (TEXT, {"prompt": "a", "logprobs": 1000}, 400, "logprobs"),
    (TEXT, {"prompt": "a", "min_tokens": 9, "max_tokens": 3}, 400, "min_tokens"),
    (TEXT, {"prompt": "a", "logit_bias": {"1394": 1}}, 400, "logit_bias"),
    (TEXT, {"prompt": "a", "model": "gpt-5"}, 404, "model"),
    (TEXT, {"prompt": "a", "tools": [{}]}, 400, "tools"),
    (TEXT, b'{"prompt": "a"', 400, "body"),
    (TEXT, b"", 400, "body"),
    (TEXT, b"[" * 100_000, 400, "body"),
    (TEXT, b'{"prompt": "a", "prompt": "b"}', 400, "body"),
    (TEXT, b'{"prompt": "\\ud800"}', 400, "body"),
    (TEXT, b'{"prompt": "' + b"x" * (1 << 20) + b'"}', 413, None),
    (CHAT, {"messages": USER, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("/v1/nowhere", {}, 404, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSALS)
def test_a_request_that_cannot_be_served_is_refused_by_name(
    server: Server, path: str, body: object, status: int, param: str | None
):
    got, reply = server.call("POST", path, body)
    assert got == status, reply
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert reply["error"]["param"] == param
    assert 10 < len(reply["error"]["message"]) < 600


def test_refusals_leave_a_running_stream_as_it_was(server: Server):
    body = {
        "prompt": " Nora lives in", "max_tokens": 64, "temperature": 1.5, "seed": 5, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    _, alone = server.call("POST", TEXT, body)

    response = server.open("POST", TEXT, body | {"stream": True})
    ids: list[int] = []
    bad = iter(REFUSALS)
    for line in response:
        if line.startswith(b"data: {"):
            ids += json.loads(line[6:])["choices"][0].get("token_ids", [])
            if (refusal := next(bad, None)) is not None and not isinstance(refusal[1], bytes):
                assert server.call("POST", *refusal[:2])[0] == refusal[2]
    assert ids == alone["choices"][0]["token_ids"]
    server.wait_until_idle()


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI):
    messages: Any = USER
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=messages)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="kvlite-small", messages=messages, temperature=-1)
    assert bad.value.param == "temperature"
    assert "between 0 and 100" in bad.value.message


def test_the_server_is_healthy_after_all_of_that(server: Server):
    assert server.call("GET", "/health") == (200, {"status": "ok"})
    assert server.call("GET", "/ready")[0] == 200
