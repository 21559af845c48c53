"""The walk of a request through the routes, with an engine that is told what to say."""

import asyncio
import json
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvlite.config import EngineConfig, Policy
from kvlite.errors import CapacityError, EngineClosedError, EngineError
from kvlite.types import FinishReason, Logprob, TokenLogprobs, Usage

from .fakes import CHAT, MODEL, FakeEngine, WatchedTokenizer, answer, delta, run

CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"


def one(engine: FakeEngine, path: str, body: object, **headers: str):
    """One request, one reply."""
    return run(engine, lambda client: client.post(path, body, headers))


def logprob(token: int, text: str, value: float) -> TokenLogprobs:
    chosen = Logprob(token, text, value, 1)
    return TokenLogprobs(chosen, (chosen, Logprob(9, "other", float("-inf"), 2)))


def test_a_chat_answer_has_the_message_the_usage_and_where_its_prompt_came_from():
    engine = FakeEngine([answer("Oslo", prompt=40, cached=32)], config=EngineConfig(policy=Policy.PRIORITY))
    reply = one(engine, CHAT_PATH, CHAT | {"temperature": 0.5, "priority": 3})
    assert reply.status == 200
    body = reply.json
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == MODEL
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Oslo", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert body["usage"] == {
        "prompt_tokens": 40, "completion_tokens": 2, "total_tokens": 42, "prompt_tokens_details": {"cached_tokens": 32},
    }  # fmt: skip
    assert body["kvlite"] == {
        "reuse": "prefix", "exact": True, "prefix_tokens": 32, "blended_tokens": 0, "recomputed_tokens": 0,
        "computed_tokens": 8,
    }  # fmt: skip
    assert "warnings" not in body
    assert engine.params[0].temperature == 0.5
    assert engine.asked[0].priority == 3
    assert engine.prompts == [tuple(engine.tokenizer.apply_chat_template(CHAT["messages"]))]


def test_a_stream_gives_the_role_first_and_one_end_per_choice_and_the_usage_last():
    ends = [
        delta("A", 300, index=1),
        delta("B", 301, index=0),
        delta("", index=0),
        delta("", 6, index=1, end=FinishReason.STOP),
        delta("C", 302, index=0, end=FinishReason.LENGTH, usage=Usage(5, 4, 0)),
    ]
    body = CHAT | {"stream": True, "n": 2, "stream_options": {"include_usage": True}, "colour": 1}
    reply = one(FakeEngine([ends]), CHAT_PATH, body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last = reply.events
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 9
    assert last["kvlite"]["computed_tokens"] == 5
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0]["warnings"] == ['unknown field "colour" was ignored']
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, text, end in ((0, "BC", "length"), (1, "A", "stop")):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == [end]
        assert own[-1]["finish_reason"] == end
    assert len(choices) == 2 + 4, "a delta that says nothing is not sent"


def test_chat_logprobs_carry_bytes_and_a_floor_instead_of_minus_infinity():
    script = [delta("Oslo", 300, logprobs=(logprob(300, "Oslo", -0.5),), end=FinishReason.STOP, usage=Usage(1, 1, 0))]
    body = one(FakeEngine([script]), CHAT_PATH, CHAT | {"logprobs": True, "top_logprobs": 2}).json
    entry = body["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["logprob"]) == ("Oslo", -0.5)
    assert bytes(entry["bytes"]) == FakeEngine().tokenizer.token_bytes(300)
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -9999.0]


def test_a_batch_of_prompts_keeps_its_order_whoever_ends_first():
    class FirstWaits(FakeEngine):
        """Its first stream starts when another has ended."""

        async def stream_validated(self, request):
            async for item in super().stream_validated(request):
                yield item
            self.another_ended.set()

        def __init__(self):
            self.another_ended = asyncio.Event()
            super().__init__([[self.another_ended, *script("a")], script("b"), script("c")])

    def script(name: str):
        return [
            delta(f"{name}1", 300, index=1, end=FinishReason.STOP),
            delta(f"{name}0", 301, index=0, end=FinishReason.STOP, usage=Usage(1, 2, 1)),
        ]

    expected = ["a0", "a1", "b0", "b1", "c0", "c1"]
    body = {"prompt": ["a", "b", "c"], "n": 2}
    whole = one(FirstWaits(), TEXT_PATH, body).json
    assert [choice["text"] for choice in whole["choices"]] == expected
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    assert whole["usage"]["completion_tokens"] == 6
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 3

    events = one(FirstWaits(), TEXT_PATH, body | {"stream": True}).events
    texts = {choice["index"]: choice["text"] for event in events for choice in event["choices"]}
    assert [texts[index] for index in range(6)] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_starts_with_the_prompt_and_a_null(stream: bool):
    tokens = [300, 301]
    tokenizer = FakeEngine().tokenizer
    texts = [tokenizer.token_text(token) for token in tokens]
    first = delta("x", 302, logprobs=(logprob(302, "x", -1.0),), prompt_logprobs=(None, logprob(301, texts[1], -2.0)))
    last = delta("yz", 303, logprobs=(logprob(303, "yz", -3.0),), end=FinishReason.LENGTH, usage=Usage(2, 2, 0))
    engine = FakeEngine([[first, last]])
    reply = one(engine, TEXT_PATH, {"prompt": tokens, "echo": True, "logprobs": 2, "max_tokens": 2, "stream": stream})
    choices = [event["choices"][0] for event in reply.events] if stream else reply.json["choices"]
    assert "".join(choice["text"] for choice in choices) == "".join(texts) + "xyz"
    merged = {key: [item for choice in choices for item in choice["logprobs"][key]] for key in choices[0]["logprobs"]}
    assert merged["tokens"] == [*texts, "x", "yz"]
    assert merged["token_logprobs"] == [None, -2.0, -1.0, -3.0]
    assert merged["top_logprobs"][0] is None
    assert merged["top_logprobs"][2] == {"x": -1.0, "other": -9999.0}
    assert merged["text_offset"] == [0, len(texts[0]), len("".join(texts)), len("".join(texts)) + 1]
    assert "prompt_logprobs" not in choices[0]
    assert engine.params[0].prompt_logprobs == 2


def test_prompt_logprobs_and_token_ids_are_given_when_asked():
    script = [
        delta("x", 302, prompt_logprobs=(None, logprob(301, "b", -2.0)), end=FinishReason.STOP, usage=Usage(2, 1, 0))
    ]
    body = {"prompt": [300, 301], "prompt_logprobs": 1, "return_token_ids": True}
    choice = one(FakeEngine([script]), TEXT_PATH, body).json["choices"][0]
    assert choice["token_ids"] == [302]
    assert choice["prompt_token_ids"] == [300, 301]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["301"] == {"logprob": -2.0, "rank": 1, "decoded_token": "b"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("step", "status", "code"),
    [
        (CapacityError("1024 requests wait already", 2.5), 429, "rate_limit_exceeded"),
        (EngineClosedError(), 503, "shutting_down"),
        (EngineError("a step failed"), 500, "engine_error"),
        (ZeroDivisionError("secret detail"), 500, "internal_error"),
        (delta(end=FinishReason.ERROR, error="row failed"), 500, "engine_error"),
        (delta(end=FinishReason.TIMEOUT), 504, "request_timeout"),
        (delta(end=FinishReason.CANCELLED), 503, "shutting_down"),
    ],
)
def test_a_failure_before_the_first_token_is_a_status_streamed_or_not(step, status, code, stream):
    async def talk(client):
        exchange = client.open("POST", CHAT_PATH, CHAT | {"stream": stream})
        await asyncio.wait([exchange.task])
        exchange.task.exception()  # the server's last resort answers and raises again, for the log
        return await asyncio.gather(exchange.sent.get(), exchange.sent.get())

    start, body = run(FakeEngine([[step]]), talk)
    error = json.loads(body["body"])["error"]
    assert (start["status"], error["code"]) == (status, code)
    assert "secret" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    headers = dict(start["headers"])
    if status == 429:
        assert headers[b"retry-after"] == b"3"
    assert b"x-request-id" in headers


@pytest.mark.parametrize(
    "step", [EngineError("a step failed"), delta(end=FinishReason.ERROR, error="row failed")], ids=["raise", "end"]
)
def test_a_failure_after_the_first_token_is_an_event_and_the_stream_still_ends(step):
    *chunks, last = one(FakeEngine([[delta("a", 300), step]]), CHAT_PATH, CHAT | {"stream": True}).events
    assert last["error"]["code"] == "engine_error"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "a"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_aborts_its_request(stream: bool):
    engine = FakeEngine([[asyncio.Event()]])

    async def talk(client):
        exchange = client.open("POST", CHAT_PATH, CHAT | {"stream": stream})
        await engine.started.wait()
        exchange.leave()
        await exchange.task
        return engine.aborted.is_set()

    assert run(engine, talk)


def test_a_client_that_leaves_in_the_middle_of_a_batch_aborts_every_prompt():
    hold = asyncio.Event()
    aborted: list[int] = []

    class Engine(FakeEngine):
        async def stream_validated(self, request):
            try:
                async for item in super().stream_validated(request):
                    yield item
            finally:
                aborted.append(1)

    engine = Engine([[delta("a", 300), hold], [hold], [delta("c", 300), hold]])

    async def talk(client):
        exchange = client.open("POST", TEXT_PATH, {"prompt": ["a", "b", "c"], "stream": True})
        assert (await exchange.sent.get())["status"] == 200
        await exchange.sent.get()
        exchange.leave()
        await exchange.task

    run(engine, talk)
    assert len(aborted) == 3


def test_a_client_that_leaves_while_it_does_not_read_aborts_its_request():
    engine = FakeEngine([[delta("a", 300), delta("b", 301), delta("c", 302)]])

    async def talk(client):
        exchange = client.open("POST", CHAT_PATH, CHAT | {"stream": True})
        exchange.reads_at_most = 3
        for _ in range(3):
            await exchange.sent.get()
        exchange.leave()
        await exchange.task
        assert engine.aborted.is_set()

    run(engine, talk)


def test_one_bad_prompt_refuses_the_batch_before_any_starts():
    engine = FakeEngine([])
    reply = one(engine, TEXT_PATH, {"prompt": [[300], [301] * 2048], "stream": True})
    assert reply.status == 400
    assert engine.prompts == []


def test_a_call_that_asks_for_too_much_in_all_is_refused():
    engine = FakeEngine([], EngineConfig(max_request_tokens=100))
    reply = one(engine, TEXT_PATH, {"prompt": [[300]] * 20, "max_tokens": 9})
    assert reply.status == 400
    assert "200 tokens, at most 100" in reply.error["message"]


def test_tokenising_never_runs_on_the_event_loop():
    tokenizer = WatchedTokenizer()
    one(FakeEngine([answer()], tokenizer=tokenizer), TEXT_PATH, {"prompt": "Hello"})
    assert tokenizer.threads
    assert threading.get_ident() not in tokenizer.threads


def test_a_body_over_the_limit_is_refused_as_it_streams():
    engine = FakeEngine(config=EngineConfig(max_body_bytes=1024))

    async def talk(client):
        exchange = client.open("POST", CHAT_PATH, [b"x" * 600] * 50)
        return exchange, await exchange.reply()

    exchange, reply = run(engine, talk)
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")
    assert exchange.num_read == 2
    assert reply.headers["connection"] == "close"


def test_models_are_listed_and_an_unknown_one_is_a_404():
    async def talk(client):
        return [await client.get(path) for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/models/a/b")]

    listed, card, unknown = run(FakeEngine(), talk)
    assert listed.json["data"] == [card.json]
    assert (card.json["id"], card.json["max_model_len"]) == (MODEL, 2048)
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nowhere", 404, "not_found"), ("GET", CHAT_PATH, 405, "method_not_allowed")],
)
def test_wrong_paths_and_methods_are_refused_in_the_same_shape(method, path, status, code):
    reply = run(FakeEngine(), lambda client: client.open(method, path).reply())
    assert (reply.status, reply.error["code"]) == (status, code)


@pytest.mark.parametrize(
    ("healthy", "draining", "health", "ready"),
    [(True, False, 200, 200), (True, True, 200, 503), (False, False, 503, 503)],
)
def test_health_and_readiness_tell_the_truth(healthy, draining, health, ready):
    async def talk(client):
        return [(await client.get(path)).status for path in ("/health", "/ready")]

    assert run(FakeEngine(healthy=healthy, draining=draining), talk) == [health, ready]


def test_the_version_is_that_of_the_package():
    reply = run(FakeEngine(), lambda client: client.get("/version"))
    assert list(reply.json) == ["version"]


def test_metrics_have_the_engines_counters_and_the_streams_times():
    async def talk(client):
        await client.post(CHAT_PATH, CHAT)
        return await client.get("/metrics")

    reply = run(FakeEngine([[delta("a", 300), *answer()]]), talk)
    samples = {
        (sample.name, *sorted((k, v) for k, v in sample.labels.items() if k != "model_name")): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }
    expected = {
        ("kvlite:num_requests_running",): 2,
        ("kvlite:num_requests_waiting",): 3,
        ("kvlite:kv_cache_usage_perc",): 0.25,
        ("kvlite:prompt_tokens_total", ("source", "computed")): 19,
        ("kvlite:prompt_tokens_total", ("source", "prefix")): 20,
        ("kvlite:prompt_tokens_total", ("source", "blend")): 8,
        ("kvlite:prompt_tokens_total", ("source", "recomputed")): 3,
        ("kvlite:blend_recomputed_tokens_total",): 3,
        ("kvlite:segment_hits_tokens_total",): 9,
        ("kvlite:blend_agreement_ratio",): 0.9,
        ("kvlite:blend_kl_divergence",): 0.01,
        ("kvlite:blend_samples_total",): 10,
        ("kvlite:blend_fallbacks_total",): 1,
        ("kvlite:num_segments",): 2,
        ("kvlite:num_documents",): 5,
        ("kvlite:kv_blocks_segments",): 4,
        ("kvlite:kv_blocks_pinned",): 1,
        ("kvlite:generation_tokens_total",): 7,
        ("kvlite:num_preemptions_total",): 1,
        ("kvlite:request_success_total", ("finished_reason", "stop")): 4,
        ("kvlite:request_success_total", ("finished_reason", "timeout")): 0,
        ("kvlite:time_to_first_token_seconds_count",): 1,
        ("kvlite:inter_token_latency_seconds_count",): 2,
        ("kvlite:e2e_request_latency_seconds_count",): 1,
    }
    assert {key: samples[key] for key in expected} == expected
