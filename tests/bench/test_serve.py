"""The serve scenario end to end against a scripted OpenAI server, and its ramp against a server of known capacity."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvlite.bench.__main__ import main
from kvlite.bench.client import Piece
from kvlite.bench.metrics import Objective
from kvlite.bench.serve import parse, result_name
from kvlite.bench.server import ramp
from kvlite.bench.workloads import Job
from tests.bench.virtual import run_virtual


class FakeOpenAI:
    """Answers /v1/models, and completions with as many tokens as are asked; `refuse` gives a 400 after so many.

    A chat over documents finds `blend_cached` of its 100 tokens in the cache when it is blended, else 20.
    """

    def __init__(self, refuse_after: int | None = None, blend_cached: int = 90) -> None:
        self.refuse_after = refuse_after
        self.blend_cached = blend_cached
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET /v1/models "):
            writer.write(self._reply(json.dumps({"data": [{"id": "fake", "max_model_len": 2000}]})))
        else:
            length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            fields = json.loads(await reader.readexactly(length))
            self.asked.append(fields)
            if self.refuse_after is not None and len(self.asked) > self.refuse_after:
                writer.write(self._reply(json.dumps({"error": {"message": "no room"}}), "400 Bad Request"))
            else:
                writer.write(self._reply(self._stream(fields)))
        await writer.drain()
        writer.close()

    def _stream(self, fields: dict[str, Any]) -> str:
        count = fields["max_tokens"]
        is_chat = "messages" in fields
        said: dict[str, Any] = {"delta": {"content": "x"}} if is_chat else {"text": "x"}
        chunks: list[dict[str, Any]] = [{"choices": [said | {"token_ids": [n]}]} for n in range(count)]
        cached = (self.blend_cached if fields["reuse"] == "blend" else 20) if is_chat else 16
        usage: dict[str, Any] = {"completion_tokens": count, "prompt_tokens_details": {"cached_tokens": cached}}
        usage |= {"prompt_tokens": 100} if is_chat else {}
        lines = [json.dumps(chunk) for chunk in [*chunks, {"choices": [], "usage": usage}]]
        return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])

    @staticmethod
    def _reply(body: str, status: str = "200 OK") -> bytes:
        return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@contextmanager
def listening(server: FakeOpenAI) -> Generator[str]:
    """The server on a thread of its own; gives its address."""
    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(server, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    finally:
        loop.call_soon_threadsafe(listener.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "serve", *arguments])
    return main()


def figures_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_closed_loop_ends_in_figures_that_add_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeOpenAI()
    with listening(server) as url:
        assert bench(monkeypatch, "--url", url, "--num-requests", "5", "--concurrency", "2") == 0
    figures = figures_of(capsys)
    assert (figures["bench"], figures["model"], figures["gate_tokens"]) == ("serve-fake-w1", "fake", 8)
    run = figures["w1"]
    assert (run["requests"], run["errors"], run["output_tokens"], run["cached_tokens"]) == (5, 0, 5 * 64, 5 * 16)
    assert {"ttft_ms_p99", "tokens_per_s", "goodput_rps", "e2e_ms_p50"} <= set(run)
    assert {"commit", "command", "machine"} <= set(figures)
    asked = server.asked[1]
    assert (len(asked["prompt"]), asked["max_tokens"], asked["ignore_eos"]) == (512, 64, True)


def test_w3_asks_the_same_chats_blended_and_by_prefix_in_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeOpenAI()
    with listening(server) as url:
        arguments = ("--url", url, "--workload", "w3", "--num-requests", "6", "--rate", "500", "--ramp")
        assert bench(monkeypatch, *arguments, "--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000") == 0
    figures = figures_of(capsys)
    assert (figures["w3_blend"]["cached_share"], figures["w3_prefix"]["cached_share"]) == (0.9, 0.2)
    assert (figures["w3_blend"]["requests"], figures["w3_blend"]["prompt_tokens_mean"]) == (6, 100.0)
    assert {"x_ttft_w3", "x_throughput_blend", "saturation_blend", "saturation_prefix"} <= set(figures)
    assert [asked["reuse"] for asked in server.asked[1:3]] == ["blend"] * 2, "the store is warm before"
    assert [asked["reuse"] for asked in server.asked[3:15]] == (["prefix"] * 2 + ["blend"] * 2) * 3
    blended = server.asked[5]
    assert (len(blended["documents"]), len(blended["messages"]), blended["max_tokens"]) == (6, 2, 16)
    assert blended["reuse_options"] == {"method": "query", "recompute_ratio": 0.15}
    questions = [asked["messages"][1]["content"] for asked in server.asked[3:]]
    assert len(set(questions[:12])) == 12


def test_w3_without_reuse_gives_no_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with listening(FakeOpenAI(blend_cached=20)) as url:
        assert bench(monkeypatch, "--url", url, "--workload", "w3", "--num-requests", "3") == 1
    assert "documents are not reused" in capsys.readouterr().err


def test_plain_sends_only_what_openai_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeOpenAI()
    with listening(server) as url:
        arguments = ("--url", url, "--plain", "--num-requests", "1", "--model", "named")
        assert bench(monkeypatch, *arguments) == 0
    known = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert {name for fields in server.asked for name in fields} == known
    assert {fields["model"] for fields in server.asked} == {"named"}


def test_a_trace_leaves_out_what_the_servers_limit_excludes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = [{"timestamp": 0, "input_length": size, "output_length": 2, "hash_ids": [1] * -(-size // 512)}
             for size in (600, 1999, 700)]  # fmt: skip
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with listening(FakeOpenAI()) as url:
        assert bench(monkeypatch, "--url", url, "--trace", str(trace)) == 0
    figures = figures_of(capsys)
    assert (figures["left_out"], figures["trace"]["requests"], figures["trace"]["prompt_tokens"]) == (1, 2, 1300)


@pytest.mark.parametrize(
    ("refuse_after", "complaint"),
    [(0, "the first request failed: HTTP 400: no room"), (1, "w1: all 3 requests failed: HTTP 400: no room")],
)
def test_a_server_that_refuses_everything_gives_one_line_and_no_figures(
    refuse_after: int, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(FakeOpenAI(refuse_after)) as url:
        assert bench(monkeypatch, "--url", url, "--num-requests", "3") == 1
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert '"bench"' not in printed.out


def test_some_failures_are_counted_beside_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(FakeOpenAI(refuse_after=3)) as url:
        assert bench(monkeypatch, "--url", url, "--num-requests", "5") == 0
    run = figures_of(capsys)["w1"]
    assert (run["requests"], run["errors"], run["output_tokens"]) == (5, 3, 2 * 64)
    assert run["error_kinds"] == {"HTTP 400: no room": 3}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--ramp", "--ramp needs --rate"),
        ("--workload w3 --plain", "--workload w3 has documents"),
        ("--rate 1 --trace x.jsonl", "exclude each other"),
        ("--num-requests 0", "--num-requests 0: must be above 0"),
        ("--vocab 16", "--vocab 16"),
        ("--trace absent.jsonl", "absent.jsonl"),
    ],
)
def test_options_that_do_not_go_together_are_one_clear_line(
    arguments: str, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(FakeOpenAI()) as url:
        assert bench(monkeypatch, "--url", url, *arguments.split()) == 1
    assert complaint in capsys.readouterr().err


def test_a_ramp_ends_between_the_rates_that_a_server_of_known_capacity_holds_and_misses() -> None:
    class TenPerSecond:
        def __init__(self) -> None:
            self.turn = asyncio.Lock()

        async def send(self, job: Job) -> AsyncGenerator[Piece]:
            async with self.turn:
                await asyncio.sleep(0.1)
            yield Piece(1)

    async def run() -> dict[str, Any]:
        options = parse(["--url", "http://unused", "--rate", "2", "--ramp"])
        return await ramp(TenPerSecond(), lambda _: [Job((20,), 1)] * 300, options, Objective(2000, 2000))  # type: ignore[arg-type]

    found = run_virtual(run())
    rates = [stage["rate"] for stage in found["stages"]]
    assert rates[:3] == [2.0, 3.0, 4.5]
    assert found["saturation_rps"] == rates[-2]
    assert 5.0 < found["saturation_rps"] < 12.0 < rates[-1] * 1.2
    assert found["stages"][-1]["slo_share"] < 0.9 <= found["stages"][-2]["slo_share"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("--workload w2", "serve-qwen-w2"),
        ("--workload w4 --rate 2 --ramp", "serve-qwen-w4-ramp"),
        ("--rate 2 --label vllm", "serve-vllm-w1-poisson"),
        ("--trace some/azure.csv --label a/b", "serve-a-b-trace-azure"),
    ],
)
def test_every_question_has_a_result_of_its_own(arguments: str, name: str) -> None:
    options = parse(["--url", "http://x", *arguments.split()])
    assert result_name(options, "models/qwen") == name
