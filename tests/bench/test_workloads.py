"""Workloads repeat and share what they should; a bad line of a trace is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvlite.bench.errors import BenchError
from kvlite.bench.workloads import (
    FIRST_ID,
    Arrival,
    Scaling,
    independent,
    poisson,
    read_trace,
    shared_prefixes,
    streams,
    trace_jobs,
)

GOOD: dict[str, Any] = {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_workloads_have_the_lengths_of_their_names_and_repeat_with_their_seed() -> None:
    for make, prompt, out in ((independent, 512, 64), (shared_prefixes, 1088, 64)):
        workload = make(8, 200, seed=3)
        assert {(len(job.prompt), job.max_tokens) for job in workload.jobs} == {(prompt, out)}
        assert workload == make(8, 200, seed=3)
        assert workload != make(8, 200, seed=4)
        assert {token for job in workload.jobs for token in job.prompt} <= set(range(FIRST_ID, 200))
    assert [streams(2, 200, 0, clients).concurrency for clients in (1, 8)] == [1, 8]


def test_w1_shares_nothing_and_w2_shares_1024_tokens_by_fours() -> None:
    first, second = (job.prompt for job in independent(2, 1000, seed=0).jobs)
    assert shared(first, second) < 4
    prompts = [job.prompt for job in shared_prefixes(8, 1000, seed=0).jobs]
    mates = [sum(shared(a, b) >= 1024 for b in prompts) for a in prompts]
    assert mates == [4] * 8
    assert len(set(prompts)) == 8


def test_traces_of_both_kinds_become_arrivals_from_zero_in_order(tmp_path: Path) -> None:
    lines = [GOOD | {"timestamp": 5500}, GOOD]
    mooncake = tmp_path / "a.jsonl"
    mooncake.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_trace(mooncake) == [Arrival(0.0, 600, 5, (0, 7)), Arrival(2.5, 600, 5, (0, 7))]
    azure = tmp_path / "a.csv"
    azure.write_text(HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6805900,396,109\n")
    assert read_trace(azure) == [Arrival(0.0, 374, 44), Arrival(1.0, 396, 109)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "no JSON"),
        ("[1, 2]", "an object is wanted"),
        (GOOD | {"timestamp": -1}, "timestamp is -1"),
        (GOOD | {"timestamp": None}, "timestamp is None"),
        (GOOD | {"input_length": 0}, "input_length is 0"),
        (GOOD | {"input_length": 513.0}, "input_length is 513.0"),
        (GOOD | {"input_length": 10**12}, "input_length is 1000000000000"),
        (GOOD | {"output_length": "5"}, "output_length is '5'"),
        (GOOD | {"hash_ids": [1]}, "1 hash_ids for 600 tokens"),
        (GOOD | {"hash_ids": "01"}, "hash_ids is 01"),
        ({key: GOOD[key] for key in GOOD if key != "hash_ids"}, "hash_ids is None"),
    ],
)
def test_a_bad_mooncake_line_is_named_with_its_number(tmp_path: Path, line: Any, complaint: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(BenchError) as caught:
        read_trace(path)
    assert "trace.jsonl:2: " in str(caught.value)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("2023-11-16 18:15:46,374", "2 fields"),
        ("yesterday,374,44", "TIMESTAMP is 'yesterday'"),
        ("2023-11-16 18:15:46,-3,44", "ContextTokens is '-3'"),
        ("2023-11-16 18:15:46,374,0", "GeneratedTokens is 0"),
    ],
)
def test_a_bad_azure_line_is_named_with_its_number(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "2023-11-16 18:15:46.6805900,374,44\n" + line + "\n")
    with pytest.raises(BenchError) as caught:
        read_trace(path)
    assert "trace.csv:3: " in str(caught.value)
    assert complaint in str(caught.value)


def test_a_trace_that_is_missing_empty_of_another_kind_or_without_its_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "no_header.csv").write_text("2023-11-16 18:15:46,374,44\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\n")
    for name in ("absent.jsonl", "empty.jsonl", "binary.jsonl", "no_header.csv", "trace.txt"):
        with pytest.raises(BenchError, match=name.replace(".", r"\.")):
            read_trace(tmp_path / name)


def test_prompts_of_a_trace_share_what_their_blocks_say() -> None:
    arrivals = [Arrival(0.0, 1030, 9, (1, 2, 3)), Arrival(2.0, 1024, 9, (1, 2)), Arrival(4.0, 600, 9, (1, 4))]
    jobs, left_out = trace_jobs(arrivals, Scaling(speedup=2.0), vocab=1000, num_requests=3)
    assert left_out == 0
    assert [len(job.prompt) for job in jobs] == [1030, 1024, 600]
    assert [job.at_s for job in jobs] == [0.0, 1.0, 2.0]
    assert shared(jobs[0].prompt, jobs[1].prompt) == 1024
    assert 512 <= shared(jobs[0].prompt, jobs[2].prompt) < 516


def test_requests_that_do_not_fit_are_left_out_and_counted_and_scaling_makes_them_fit() -> None:
    arrivals = [Arrival(0.0, 4000, 100, tuple(range(8))), Arrival(1.0, 400, 10, (0,)), Arrival(2.0, 400, 10, (0,))]
    jobs, left_out = trace_jobs(arrivals, Scaling(max_len=1000), vocab=100, num_requests=1)
    assert (len(jobs), left_out, len(jobs[0].prompt)) == (1, 1, 400)
    jobs, left_out = trace_jobs(arrivals, Scaling(length=0.1, max_len=1000), vocab=100, num_requests=9)
    assert ([len(job.prompt) for job in jobs], left_out) == ([400, 40, 40], 0)
    assert [job.max_tokens for job in jobs] == [10, 1, 1]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(BenchError, match="--rate"):
        poisson(independent(2, 100, seed=0).jobs, rate, seed=0)
