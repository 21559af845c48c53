"""The offline scenario: its workloads, what counts as saved, and the whole of it once on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from kvlite.bench import make_model, offline
from kvlite.bench.__main__ import main
from kvlite.bench.batches import Count, Groups, nested
from kvlite.bench.errors import BenchError
from kvlite.bench.make_model import Shape
from kvlite.bench.offline import Run, agree, saving, ways
from kvlite.bench.workloads import Job

TINY = Shape("llama", 2, 64, 4, 2, 16, 96, 1394, 1024)


def test_requests_of_a_group_share_just_the_prefix_and_are_no_neighbours() -> None:
    groups = Groups(3, 4, shared=20, own=5, drawn=2)
    jobs = groups.jobs(100)
    assert len(jobs) == groups.num_jobs and {len(job.prompt) for job in jobs} == {25}
    assert len({job.prompt[:20] for job in jobs}) == 3 and len({job.prompt for job in jobs}) == 12
    assert all(one.prompt[:20] != other.prompt[:20] for one, other in pairwise(jobs))


def test_distinct_tokens_are_those_of_the_first_of_equal_beginnings() -> None:
    shared = tuple(range(32))
    jobs = [Job((*shared, 1, 2), 3), Job((*shared, 3), 4), Job(shared[:20], 1)]
    assert Count.of(jobs) == Count(prompt=34 + 33 + 20, distinct=34 + 1, drawn=8, longest=37)
    assert Count.of([jobs[2], jobs[2]]).distinct == 21, "the last token of a prompt is computed"
    run = Run(1.0, cached=26, tokens_per_step=1.0, preemptions=0, firsts=(1, 2, 3))
    assert saving(run, Count.of(jobs)) == 0.5


def test_nested_prompts_share_on_every_level_and_draw_unequally() -> None:
    jobs = nested(1, 0.1, 100)
    beginnings = [len({job.prompt[:end] for job in jobs}) for end in (64, 64 + 32, 64 + 32 + 16)]
    assert beginnings == [1 + 8, 4 + 8, 16 + 8] and len({job.max_tokens for job in jobs}) > 3


def test_other_first_tokens_stop_the_scenario() -> None:
    run = Run(1.0, 0, 1.0, 0, (1, 2, 3, 4))
    assert agree(run, replace(run, firsts=(1, 2, 3, 9))) == 0.75
    with pytest.raises(BenchError, match="50% of the first tokens agree"):
        agree(run, replace(run, firsts=(1, 2, 8, 9)))


def test_apart_has_the_limits_of_a_server_and_together_those_of_batch() -> None:
    grouped, ungrouped, walk = ways()
    assert grouped.settings == walk.settings and "max_num_seqs" not in ungrouped.settings
    assert not ungrouped.settings["prefix_grouping"] and [way.whole for way in ways()] == [True, False, False]


@pytest.mark.parametrize("wrong", [["--groups", "0"], ["--scale", "0"], ["--peers", "gpt"], ["--trees", "-1"]])
def test_options_out_of_range_are_refused(wrong: list[str]) -> None:
    with pytest.raises(BenchError, match=wrong[0]):
        offline.parse(wrong)


def test_the_whole_scenario_ends_in_one_json_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model.make(TINY, tmp_path / "tiny")
    options = ["--groups", "3", "--degree", "4", "--trees", "1", "--scale", "0.1", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(
        "sys.argv",
        [
            "bench",
            "offline",
            "--model",
            str(tmp_path / "tiny"),
            *options,
            "--budget-s",
            "0.001",
            "--peers",
            "transformers",
        ],
    )
    assert main() == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["bench"] == "offline-tiny" and figures["requests"] == 12
    assert figures["saving_share"] == 1.0, "every shared block was computed once"
    assert figures["nested_saving_share"] >= 0.95
    for name in ("x_ungrouped", "x_roofline", "x_transformers_offline", "nested_x_ratio_order", "tokens_per_step_fcfs"):
        assert figures[name] > 0
