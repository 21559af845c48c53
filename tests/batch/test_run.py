"""A batch on a tiny engine: every line gets its answer or the server's error, whatever interrupts the run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvlite import Engine, EngineConfig, SamplingParams
from kvlite.batch import run as module
from kvlite.batch.run import Files, run_batch
from kvlite.batch.sink import OutputError, Sink
from kvlite.errors import ConfigError
from tests.batch.lines import line, read, write
from tests.engines import SMALL, VOCAB, engine, ids, tiny

NUM_LINES = 24
LINES = [
    line(f"r{n}", ids(10 + n % 7, n % 4) + ids(5, n), max_tokens=3 + n % 5, ignore_eos=True) for n in range(NUM_LINES)
]


def config(**more: Any) -> EngineConfig:
    return EngineConfig(model=str(tiny()), **(SMALL | {"deterministic": True, "served_model_name": "tiny"} | more))


class Said(list[str]):
    """What a run told the user."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(write(tmp_path / "in.jsonl", *LINES), tmp_path / "out.jsonl")


def essence(path: Path) -> dict[str, Any]:
    """What a run must reproduce: everything but times, and what happened to be in the cache."""
    found = read(path)
    for value in found.values():
        body = value["response"]["body"]
        for name in ("created", "kvlite"):
            body.pop(name, None)
        body.get("usage", {}).pop("prompt_tokens_details", None)
    return found


def test_greedy_answers_are_those_of_generate_whatever_the_queue_holds(files: Files) -> None:
    lines = [each | {"body": each["body"] | {"temperature": 0}} for each in LINES]
    write(files.requests, *lines)
    said = Said()
    assert run_batch(config(max_num_waiting=4), files, said)
    with engine(deterministic=True) as made:
        params = [SamplingParams(temperature=0, max_tokens=e["body"]["max_tokens"], ignore_eos=True) for e in lines]
        outputs = made.generate([each["body"]["prompt"] for each in lines], params)
    found = read(files.answers)
    assert len(found) == NUM_LINES
    for asked, output in zip(lines, outputs, strict=True):
        response = found[asked["custom_id"]]["response"]
        body = response["body"]
        assert (response["status_code"], body["model"], body["object"]) == (200, "tiny", "text_completion")
        assert body["choices"][0]["text"] == output.text and body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["prompt_tokens"] == len(output.prompt_token_ids)
        assert body["usage"]["completion_tokens"] == len(output.token_ids)
    assert f"{NUM_LINES} of {NUM_LINES} lines answered" in said[-1] and "prompts from the cache" in said[-1]


@pytest.mark.parametrize("after", [0, 1, NUM_LINES // 2, NUM_LINES - 1])
def test_an_interrupted_run_goes_on_and_gives_what_an_undisturbed_one_gives(
    files: Files, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Files(files.requests, tmp_path / "whole.jsonl")
    assert run_batch(config(), whole, Said())
    append = Sink.append

    def interrupted(sink: Sink, *arguments: Any) -> None:
        if len(sink.answered) == after:
            raise KeyboardInterrupt
        append(sink, *arguments)

    said = Said()
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "append", interrupted)
        assert not run_batch(config(max_num_seqs=3, max_num_waiting=2), files, said)
    assert len(read(files.answers)) == after
    assert "interrupted" in said and f"{after} of {NUM_LINES} lines answered" in said[-1]
    assert "the same command goes on from here" in said[-1]
    kept = files.answers.read_bytes()
    assert run_batch(config(), files, said)
    assert files.answers.read_bytes().startswith(kept), "finished lines are neither lost nor written again"
    assert essence(files.answers) == essence(whole.answers)


def test_ctrl_c_in_a_step_ends_the_run_with_what_was_finished(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    advance = Engine._advance

    def pressed(made: Engine) -> None:
        advance(made)
        if made.stats().finished:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_advance", pressed)
        assert not run_batch(config(), files, Said())
    assert run_batch(config(), files, Said())
    assert len(read(files.answers)) == NUM_LINES


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        (line("x", "Nora", temperature=1000), 400, "temperature"),
        (line("x", "Nora", stream=True), 400, "stream"),
        (line("x", [VOCAB]), 400, "prompt[0]"),
        (line("x", [5] * 300), 400, "prompt"),
        (line("x", [5] * 250, max_tokens=200), 400, "max_tokens"),
        (line("x", "Nora", model="gpt"), 404, "model"),
        (line("x", None), 400, "prompt"),
        (line("x") | {"url": "/v1/chat/completions", "body": {"messages": "no"}}, 400, "messages"),
    ],
)
def test_a_bad_body_is_an_answer_with_the_servers_error_beside_good_ones(
    tmp_path: Path, asked: Any, status: int, param: str
) -> None:
    good = line("good", ids(5), max_tokens=2, ignore_eos=True)
    files = Files(write(tmp_path / "in.jsonl", good, asked), tmp_path / "out.jsonl")
    said = Said()
    assert run_batch(config(), files, said)
    found = read(files.answers)
    assert found["good"]["response"]["status_code"] == 200
    assert found["x"]["response"]["status_code"] == status and found["x"]["error"] is None
    assert found["x"]["response"]["body"]["error"]["param"] == param
    assert f"1 of them with an error (1 with status {status})" in said[-1]


def test_what_only_the_core_refuses_is_an_answer_with_400(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Engine.add_validated

    def refuse(made: Engine, request: Any) -> int:
        if len(request.prompt_ids) == 15:
            raise module.InvalidRequestError("max_tokens", "needs 9 blocks")
        return add(made, request)

    monkeypatch.setattr(Engine, "add_validated", refuse)
    assert run_batch(config(), files, Said())
    refused = {id for id, value in read(files.answers).items() if value["response"]["status_code"] == 400}
    assert refused == {each["custom_id"] for each in LINES if len(each["body"]["prompt"]) == 15} != set()


def test_a_failed_step_is_an_answer_with_500_and_the_batch_goes_on(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, num_calls = module.Engine.run_plan, 0

    def fail_once(made: Engine) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            with monkeypatch.context() as patch:
                patch.setattr(made._runner.decoder, "embed", lambda *_: 1 / 0)
                forward(made)
        else:
            forward(made)

    monkeypatch.setattr(Engine, "run_plan", fail_once)
    assert run_batch(config(), files, Said())
    statuses = {value["response"]["status_code"] for value in read(files.answers).values()}
    assert statuses == {200, 500} and len(read(files.answers)) == NUM_LINES


def test_several_prompts_and_choices_are_one_line_and_have_seeds_of_their_own(tmp_path: Path) -> None:
    asked = line("many", [ids(6), ids(6)], n=2, max_tokens=8, temperature=1, ignore_eos=True)
    files = Files(write(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl")
    assert run_batch(config(), files, Said())
    choices = read(files.answers)["many"]["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in choices}) == 4


def test_a_bad_file_loads_no_model(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Engine", None)
    write(files.requests, *LINES, "{")
    with pytest.raises(ConfigError, match=f"line {NUM_LINES + 1}: not JSON"):
        run_batch(config(), files, Said())
    assert not files.answers.exists()


def test_a_finished_batch_and_an_empty_one_load_no_model(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_batch(config(), files, Said())
    monkeypatch.setattr(module, "Engine", None)
    before = files.answers.read_bytes()
    assert run_batch(config(), files, Said())
    assert files.answers.read_bytes() == before
    write(files.requests)
    assert run_batch(config(), Files(files.requests, files.answers.with_name("empty")), Said())


def test_a_write_error_says_what_is_kept_and_the_next_run_goes_on(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Sink.append

    def full(sink: Sink, *arguments: Any) -> None:
        if len(sink.answered) == 5:
            sink._fail(OSError(28, "No space left on device"))
        append(sink, *arguments)

    said = Said()
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"No space left on device; 5 answers"):
        patch.setattr(Sink, "append", full)
        run_batch(config(), files, said)
    assert f"5 of {NUM_LINES} lines answered" in said[-1]
    assert run_batch(config(), files, said) and len(read(files.answers)) == NUM_LINES


def test_nothing_of_the_http_server_is_imported() -> None:
    names = ("fastapi", "starlette", "uvicorn", "prometheus_client", "msgspec")
    code = f"import sys, kvlite.batch.run; found = [n for n in {names!r} if n in sys.modules]; assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
