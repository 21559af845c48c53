"""Clients that vanish: their requests end, their blocks return, their neighbours notice nothing."""

import json

from .conftest import Server

TEXT = "/v1/completions"
CANCELLED = "request_success_total/cancelled"
LONG = {"prompt": " Rain fell on the", "max_tokens": 1900, "ignore_eos": True}


SAMPLED = {"prompt": " Nora lives in", "temperature": 1.5, "seed": 5, "ignore_eos": True, "return_token_ids": True}


def ids_of(line: bytes) -> list[int]:
    return json.loads(line[6:])["choices"][0].get("token_ids", []) if line.startswith(b"data: {") else []


def test_a_client_gone_in_mid_stream_frees_its_blocks_and_leaves_its_neighbour_alone(server: Server):
    neighbour = SAMPLED | {"max_tokens": 96}
    _, alone = server.call("POST", TEXT, neighbour)
    before = server.wait_until_idle()

    victims = [server.post_raw(TEXT, LONG | {"stream": True, "seed": n}) for n in range(4)]
    for victim in victims:
        assert victim.recv(15) == b"HTTP/1.1 200 OK"
    response = server.open("POST", TEXT, neighbour | {"stream": True})
    ids: list[int] = []
    for line in response:
        ids += ids_of(line)
        if len(ids) > 8 and victims:
            victims.pop().close()
    assert ids == alone["choices"][0]["token_ids"]
    assert len(set(ids)) > 10
    after = server.wait_until_idle()
    assert after[CANCELLED] == before[CANCELLED] + 4


def test_a_client_gone_during_prefill_ends_its_request(server: Server):
    before = server.wait_until_idle()
    for stream in (True, False):
        prompt = [300 + (n * n + stream) % 1000 for n in range(1000)]
        body = {"prompt": prompt, "max_tokens": 1000, "ignore_eos": True, "stream": stream}
        connection = server.post_raw(TEXT, body)
        server.wait_until(lambda metrics: metrics["num_requests_running"] > 0)
        connection.close()
    after = server.wait_until_idle()
    assert after[CANCELLED] == before[CANCELLED] + 2


def test_a_client_gone_while_it_waits_for_a_whole_answer_ends_its_request(server: Server):
    before = server.wait_until_idle()
    connection = server.post_raw(TEXT, LONG)
    server.wait_until(lambda m: m["generation_tokens_total"] > before["generation_tokens_total"])
    connection.close()
    after = server.wait_until_idle()
    assert after[CANCELLED] == before[CANCELLED] + 1
    assert after["generation_tokens_total"] < before["generation_tokens_total"] + LONG["max_tokens"]
