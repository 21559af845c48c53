"""A result says where it comes from, is the last line of the run, and is kept only when asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvlite.bench import report


def test_a_result_names_machine_commit_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "decode", "--model", "/models/qwen", "--steps", "4"])
    origin = report.origin()
    assert origin["command"] == "python -m bench decode --model qwen --steps 4"
    assert {"cpu", "threads", "load"} <= set(origin["machine"])
    assert origin["commit"]


@pytest.mark.parametrize("save", [False, True])
def test_the_last_line_is_the_result_and_a_file_holds_it_when_asked(
    save: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    sys.stdout.write("a table\n")
    report.finish("decode", {"share_b1": 0.9}, save)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"bench": "decode", "share_b1": 0.9}
    kept = tmp_path / "results" / "decode.json"
    assert kept.exists() == save
    assert not save or json.loads(kept.read_text()) == {"share_b1": 0.9}
