"""`kvlite batch` on the shipped model as a process: killed in the middle, continued, and the same as never killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvlite.demo import read_script
from tests.batch.lines import read, write

from .conftest import DEADLINE_S, POLL_S

NUM_LINES = 48
NAMES = ("Edgar", "Nora", "Ben")


def questions() -> list[dict[str, object]]:
    """Several questions about each of a few documents, interleaved; long answers, so that a run can be caught."""
    script = read_script()
    asked = []
    for n in range(NUM_LINES):
        messages = [
            {"role": "system", "content": script.system},
            {"role": "document", "content": script.documents[n % 4]},
            {"role": "user", "content": f"Where does {NAMES[n % 3]} live?"},
        ]
        body = {"model": "kvlite-small", "messages": messages, "max_tokens": 24, "ignore_eos": True}
        asked.append({"custom_id": f"q{n}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    return asked


def command(requests: Path, answers: Path) -> list[str]:
    more = ["--deterministic", "--kv-cache-bytes", "32MiB", "--max-num-seqs", "4", "--max-num-waiting", "8"]
    return [sys.executable, "-m", "kvlite.cli", "batch", str(requests), str(answers), *more]


def run(requests: Path, answers: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(requests, answers), capture_output=True, text=True, timeout=DEADLINE_S)


def choices(path: Path) -> dict[str, object]:
    return {id: value["response"]["body"]["choices"] for id, value in read(path).items()}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_goes_on_and_ends_as_one_that_was_not(tmp_path: Path, how: signal.Signals) -> None:
    requests = write(tmp_path / "in.jsonl", *questions())
    whole = run(requests, tmp_path / "whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    assert f"{NUM_LINES} of {NUM_LINES} lines answered" in whole.stderr and whole.stdout == ""

    answers = tmp_path / "out.jsonl"
    process = subprocess.Popen(command(requests, answers), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (answers.exists() and answers.stat().st_size):
        time.sleep(POLL_S)
    process.send_signal(how)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == (-how if how is signal.SIGKILL else 130), said
    raw = answers.read_bytes()
    kept = raw[: raw.rindex(b"\n") + 1]
    num_kept = kept.count(b"\n")
    assert 0 < num_kept < NUM_LINES, "the run was caught in the middle"
    if how is signal.SIGINT:
        assert f"{num_kept} of {NUM_LINES} lines answered" in said and "the same command goes on from here" in said
        assert "Traceback" not in said

    again = run(requests, answers)
    assert again.returncode == 0, again.stderr
    assert f"{num_kept} answered before" in again.stderr
    assert answers.read_bytes().startswith(kept)
    assert choices(answers) == choices(tmp_path / "whole.jsonl")


def test_what_the_user_got_wrong_is_said_with_status_2(tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", questions()[0], "{", questions()[0])
    done = run(requests, tmp_path / "out.jsonl")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    first, *rest = done.stderr.splitlines()
    assert first == f"kvlite: {requests}: 2 lines are no request, so nothing was run"
    assert [row.strip().split(":")[0] for row in rest] == ["line 2", "line 3"]
    write(requests, questions()[0])
    (tmp_path / "out.jsonl").write_text(json.dumps({"notes": 1}) + "\n")
    done = run(requests, tmp_path / "out.jsonl")
    assert done.returncode == 2 and "was not written by kvlite batch" in done.stderr
