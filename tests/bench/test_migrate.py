"""Figures of moves: gaps and steps out of times, slow-downs with their intervals, options; no fleet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import migrate
from bench.errors import BenchError
from kvlite.fleet.moves import MoveHow, MoveReport

REPORT = MoveReport(
    request="r", id=1, source=0, to=1, how=MoveHow.COPY, result="moved", reason="", tokens=10, stages=2, blocks=3,
    bytes=300, seconds=3.0, gap_s=2.0,
)  # fmt: skip


def test_a_gap_is_the_longest_wait_at_the_hand_over_and_steps_are_those_without_a_move() -> None:
    times = [float(n) for n in range(12)]
    times += [times[-1] + 2.5, *(times[-1] + 2.5 + n for n in range(1, 12))]
    move = migrate._seen(times, ordered=9.5, num_tokens=10, report=replace(REPORT, seconds=3.5))
    assert (move.gap_s, move.step_s, move.none_s, move.steps) == (2.5, 1.0, 1.0, 2.5)


def test_what_happens_while_it_is_copied_is_no_gap_but_a_slow_down() -> None:
    copied = [10.0 + 1.5 * n for n in range(21)]  # 40.0 at the end, one of them late
    copied[5:] = [at + 4.0 for at in copied[5:]]
    times = [*map(float, range(10)), *copied, *(45.0 + n for n in range(12))]
    move = migrate._seen(times, ordered=9.5, num_tokens=10, report=replace(REPORT, seconds=35.0))
    assert (move.gap_s, move.step_s, move.copying_s, move.longest_s) == (1.5, 1.0, 1.5, 5.5)
    blocked = migrate._seen(
        [*map(float, range(10)), *(40.0 + n for n in range(12))], 9.5, 10, replace(REPORT, seconds=30)
    )
    assert (blocked.gap_s, blocked.copying_s, blocked.longest_s) == (31.0, None, 31.0)


def test_a_wait_before_the_order_is_no_gap_of_the_move() -> None:
    times = [0.0, 1.0, 9.0, *(9.0 + n for n in range(1, 22))]
    move = migrate._seen(times, ordered=18.5, num_tokens=12, report=replace(REPORT, tokens=12))
    assert move.gap_s == 1.0
    assert move.step_s == 1.0


def test_lengths_and_transports_are_checked() -> None:
    options = migrate.parse(["--lengths", "512,256,512", "--transports", "gbit,shm", "--replays", "0"])
    assert (options.lengths, options.transports, options.replays) == ([256, 512], ["gbit", "shm"], [])
    for wrong in (["--lengths", "0"], ["--transports", "pigeon"], ["--rounds", "0"], ["--threads", "7"]):
        with pytest.raises(BenchError):
            migrate.parse(wrong)


def test_the_flatness_of_gaps_is_the_longest_over_the_shortest() -> None:
    figures = {"gap_ms_256": 10.0, "gap_ms_8k": 14.0, "gap_ms_256_tcp": 10.0, "gap_ms_8k_tcp": 30.0}
    assert migrate.ratios([256, 1024, 8192], figures) == {"gap_8k_over_256": 1.4, "gap_8k_over_256_tcp": 3.0}
