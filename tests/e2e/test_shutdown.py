"""Signals: the first one drains, the second one aborts, and the process always ends."""

import http.client
import json
import signal
import socket
from typing import Any

import pytest

from kvlite.demo import HOST, read_script

from .conftest import DEADLINE_S

LONG = {"prompt": " Rain fell on the", "max_tokens": 200, "ignore_eos": True, "stream": True}


def events(response: http.client.HTTPResponse) -> list[Any]:
    data = [line.strip().removeprefix(b"data: ") for line in response if line.startswith(b"data: ")]
    return ["DONE" if item == b"[DONE]" else json.loads(item) for item in data]


def test_sigterm_lets_a_running_stream_finish_and_takes_no_new_one(start):
    server = start("--dtype", "float32")
    response = server.open("POST", "/v1/completions", LONG)
    response.readline()
    server.process.send_signal(signal.SIGTERM)
    *chunks, done = events(response)
    assert done == "DONE"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(DEADLINE_S) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, server.port))
    table = server.process.stderr.read()
    for text in (
        "kvlite-small",
        "float32",
        "MiB",
        "tokens, ",
        "requests of 2048 tokens",
        f"http://{HOST}:{server.port}",
    ):
        assert text in table


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event(start):
    server = start("--drain-s", "0")
    response = server.open("POST", "/v1/completions", LONG | {"max_tokens": 2000})
    response.readline()
    server.process.send_signal(signal.SIGTERM)
    *_, error, done = events(response)
    assert done == "DONE"
    assert error["error"]["code"] == "shutting_down"
    assert server.process.wait(DEADLINE_S) == 0


def test_a_second_ctrl_c_aborts(start):
    server = start("--drain-s", "3600")
    response = server.open("POST", "/v1/completions", LONG | {"max_tokens": 2000})
    response.readline()
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(OSError):
        # The door is closed when the first signal has been seen; only then is the second one a second one.
        while True:
            socket.create_connection((HOST, server.port), timeout=DEADLINE_S).close()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(DEADLINE_S) == 1
    assert "Traceback" not in server.process.stderr.read()


def test_ctrl_c_waits_for_documents_that_are_being_made(start):
    server = start("--drain-s", "60")
    script = read_script()
    body = {"documents": [{"id": f"d{n}", "text": " ".join(script.documents[n::3])} for n in range(3)]}
    before = server.metrics()["num_steps_total"]
    connection = server.post_raw("/v1/documents", body)
    server.wait_until(lambda metrics: metrics["num_steps_total"] > before)
    server.process.send_signal(signal.SIGINT)
    response = http.client.HTTPResponse(connection)
    response.begin()
    assert response.status == 200
    assert [item["state"] for item in json.loads(response.read())["data"]] == ["ready"] * 3
    connection.close()
    assert server.process.wait(DEADLINE_S) == 0
    assert "Traceback" not in server.process.stderr.read()
