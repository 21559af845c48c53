"""A full server says so at once, with a time to come back, and serves again when there is room."""

from collections.abc import Callable

from .conftest import Server

TEXT = "/v1/completions"
LONG = {"prompt": " Rain fell on the", "max_tokens": 2000, "ignore_eos": True, "stream": True}


def test_beyond_running_and_waiting_requests_there_is_a_429_until_there_is_room(start: Callable[..., Server]):
    server = start("--max-num-seqs", "1", "--max-num-waiting", "1")
    running = server.open("POST", TEXT, LONG)
    running.readline()
    waiting = server.post_raw(TEXT, LONG)
    server.wait_until(lambda metrics: metrics["num_requests_waiting"] == 1)

    refused = server.open("POST", TEXT, LONG)
    assert refused.status == 429
    assert int(refused.getheader("retry-after") or 0) >= 1
    assert server.call("POST", TEXT, LONG | {"stream": False})[1]["error"]["code"] == "rate_limit_exceeded"

    running.connection.close()  # type: ignore[attr-defined]
    running.close()
    waiting.close()
    server.wait_until_idle()
    status, reply = server.call("POST", TEXT, {"prompt": " Oslo", "max_tokens": 1})
    assert (status, reply["usage"]["completion_tokens"]) == (200, 1)
