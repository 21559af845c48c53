"""Ratios, the gate between engines, and what becomes of one that is missing, ends early, hangs or says other tokens."""

from __future__ import annotations

import asyncio
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvlite.bench import compare, targets
from kvlite.bench.client import Address
from kvlite.bench.compare import GATE_TOKENS, Comparison, Plan, agreement, figure_of, longest_request, one_round
from kvlite.bench.errors import BenchError, TargetError
from kvlite.bench.install_peers import requirements
from kvlite.bench.metrics import Record
from kvlite.bench.targets import Launch, Started, Target, free_port, running
from tests.bench.test_serve import FakeOpenAI, listening

PLAN = Plan(["b1", "ttft_512"], vocab=100, seed=0, num_requests=4)
LAUNCH = Launch(Path("model"), 1, 1, "float32", 64, 8, 1 << 20)
IDS = [(1, 2, 3, 4)] * 8


def target(name: str) -> Target:
    return Target(name, lambda launch: [])


def scripted(*code: str, start_s: float = 60.0, needs: Path | None = None) -> Target:
    """An engine that is a few lines of Python."""
    return Target("scripted", lambda launch: [sys.executable, "-c", "\n".join(code)], start_s, needs=needs)


def launch() -> Launch:
    return replace(LAUNCH, port=free_port())


def test_ratios_above_one_say_that_the_first_engine_is_faster_whatever_the_unit() -> None:
    comparison = Comparison([target("ours"), target("peer")], "auto")
    comparison.ids = {"ours": IDS, "peer": IDS}
    comparison.rounds = {
        "ours": [{"b1": 20.0, "ttft_512": 50.0}, {"b1": 40.0, "ttft_512": 50.0}, {"b1": 30.0, "ttft_512": 50.0}],
        "peer": [{"b1": 10.0, "ttft_512": 200.0}] * 3,
    }
    found = comparison.figures(PLAN.figures)
    assert (found["ours_b1"], found["ours_b1_spread"]) == (30.0, 20.0)
    assert (found["x_peer_b1"], found["x_peer_ttft_512"]) == (3.0, 4.0)
    assert found["agreement_peer"] == 1.0


def turns(monkeypatch: pytest.MonkeyPatch, script: dict[str, Any]) -> tuple[Comparison, list[str]]:
    """Two rounds of `ours` and `peer`, whose round gives `script[name]` or raises it; and who was started."""
    started: list[str] = []

    @contextmanager
    def fake_running(target: Target, launch: Launch) -> Any:
        started.append(target.name)
        yield target.name

    async def fake_round(target: Target, name: Any, plan: Plan) -> Any:
        if isinstance(script[name], Exception):
            raise script[name]
        return script[name]

    monkeypatch.setattr(compare, "running", fake_running)
    monkeypatch.setattr(compare, "one_round", fake_round)
    comparison = Comparison([target("ours"), target("peer")], "auto")
    for _ in range(2):
        for one in comparison.targets:
            comparison.turn(one, LAUNCH, PLAN)
    return comparison, started


def test_engines_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"b1": 1.0, "ttft_512": 1.0}
    comparison, started = turns(monkeypatch, {"ours": (IDS, figures), "peer": (IDS, figures)})
    assert started == ["ours", "peer", "ours", "peer"]
    assert comparison.rounds == {"ours": [figures] * 2, "peer": [figures] * 2}


@pytest.mark.parametrize(
    ("peer", "line"),
    [
        (TargetError("died with status 9: out of memory"), "peer          failed: died with status 9: out of memory"),
        (([(9, 9, 9, 9)] * 8, {"b1": 99.0, "ttft_512": 1.0}), "peer          failed: other tokens: 0% of the first"),
    ],
)
def test_a_peer_that_fails_is_a_line_in_the_table_and_no_figure(
    peer: Any, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, started = turns(monkeypatch, {"ours": (IDS, {"b1": 1.0, "ttft_512": 1.0}), "peer": peer})
    assert started == ["ours", "peer", "ours"], "it is not tried again"
    found = comparison.figures(PLAN.figures)
    assert [name for name in found if "peer" in name] == []
    assert "peer" in found["failed"]
    assert line in comparison.table(PLAN.figures, found)


def test_without_kvlite_itself_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchError, match="ours: no memory"):
        turns(monkeypatch, {"ours": TargetError("no memory"), "peer": (IDS, {})})


def test_rounding_may_part_one_engine_in_four_from_another_and_no_more() -> None:
    other = (7, 2, 3, 4)
    assert agreement(IDS, [other] * 2 + IDS[2:]) == 0.75
    with pytest.raises(TargetError, match="62% of the first ones"):
        agreement(IDS, [other] * 3 + IDS[3:])


def test_a_figure_is_made_of_what_the_client_saw() -> None:
    records = [Record(0.0, 0.0, [1.0, 1.1, 1.2], 3, end_s=1.2), Record(0.0, 0.0, [2.0, 2.1, 2.2], 3, end_s=2.4)]
    assert figure_of("b8", records) == pytest.approx(80.0)
    assert figure_of("w1", records) == pytest.approx(2.5)
    assert figure_of("ttft_512", records) == pytest.approx(1500.0)
    records[1].error = "HTTP 500: no"
    with pytest.raises(TargetError, match="w1: HTTP 500: no"):
        figure_of("w1", records)


def test_a_round_asks_every_figure_of_a_server_in_the_wire_format() -> None:
    server = FakeOpenAI()
    with listening(server) as url:
        ids, figures = asyncio.run(one_round(target("fake"), Started(Address.of(url), 1.5), PLAN))
    assert ids == [tuple(range(GATE_TOKENS))] * compare.GATE_PROMPTS
    assert list(figures) == ["ready_s", *PLAN.figures]
    assert all(value > 0 for value in figures.values())
    assert [(len(a["prompt"]), a["max_tokens"]) for a in server.asked[8:]] == [(64, 128)] * 2 + [(512, 1)] * 3


def test_an_engine_that_is_not_installed_is_not_started(tmp_path: Path) -> None:
    with (
        pytest.raises(TargetError, match="run `make peers`"),
        running(scripted("1/0", needs=tmp_path / "no"), launch()),
    ):
        pass


def test_an_engine_that_ends_before_it_answers_says_its_first_error() -> None:
    code = ("print('ValueError: too little memory')", "print('RuntimeError: engine failed, see above')", "exit(3)")
    with (
        pytest.raises(TargetError, match="ended with status 3 before it answered: ValueError: too little memory"),
        running(scripted(*code), launch()),
    ):
        pass


def test_an_engine_that_never_answers_is_ended() -> None:
    code = ("import threading", "print('still loading', flush=True)", "threading.Event().wait()")
    with (
        pytest.raises(TargetError, match="no answer within 0 s"),
        running(scripted(*code, start_s=0.0), launch()),
    ):
        pass


def test_an_engine_that_dies_in_mid_run_is_named_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_wait", lambda target, process, *rest: process.wait())
    with pytest.raises(TargetError, match="died with status 5"), running(scripted("exit(5)"), launch()):
        raise TargetError("the answer broke off")


def test_the_requirements_of_a_wheel_leave_out_extras_and_torch(tmp_path: Path) -> None:
    lines = ["regex", "torch==2.13.0+cpu; python_version > '3'", "torchvision", "x>=1; extra == 'gpu'", "torch-like<2"]
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a-1.dist-info/METADATA", "Name: a\n" + "".join(f"Requires-Dist: {x}\n" for x in lines))
    assert requirements(wheel) == ["regex", "torch-like<2"]


def test_a_prompts_rate_counts_its_tokens_and_a_start_is_better_when_it_is_short() -> None:
    assert figure_of("prefill", [Record(0.0, 0.0, [4.0], 1, end_s=4.0)]) == 512.0
    comparison = Comparison([target("ours"), target("peer")], "auto")
    comparison.ids = {"ours": IDS, "peer": IDS}
    comparison.rounds = {"ours": [{"ready_s": 2.0}], "peer": [{"ready_s": 6.0}]}
    found = comparison.figures(["ready_s"])
    assert (found["ours_ready_s"], found["x_peer_ready_s"]) == (2.0, 3.0)


@pytest.mark.parametrize("figures", ["b2", "ttft_", "ttft_0", ""])
def test_what_is_no_figure_is_named(figures: str) -> None:
    with pytest.raises(BenchError, match="--figures"):
        longest_request([figures])
    assert longest_request(["b1", "prefill", "ttft_100"]) == 2049


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [("--peers sglang", "'sglang' is none of"), ("--rounds 0", "--rounds 0"), ("--vocab 16", "--vocab 16")],
)
def test_a_bad_option_is_refused_by_name(arguments: str, complaint: str) -> None:
    with pytest.raises(BenchError, match=complaint):
        compare.parse(arguments.split())
