"""Intervals against published values (Newcombe 1998) and chance; the gap recovered on answers made by hand."""

from __future__ import annotations

import random

import pytest

from kvlite.bench.quality.statistics import Share, gap_interval, gap_recovered, share


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (10, 10, 0.722467, 1.0), (81, 263, 0.255289, 0.366212)],
)
def test_intervals_are_wilsons(right: int, asked: int, low: float, high: float) -> None:
    assert Share(right, asked).interval == pytest.approx((low, high), abs=1e-4)


def test_intervals_hold_the_truth_in_about_95_of_100_draws() -> None:
    draw, held = random.Random(1), 0
    for _ in range(1000):
        low, high = share([draw.random() < 0.3 for _ in range(80)]).interval
        held += low <= 0.3 <= high
    assert 0.92 < held / 1000 < 0.98


def test_nothing_asked_is_nothing_known() -> None:
    assert share([]).value == 0.0
    assert share([]).interval == (0.0, 1.0)


def test_the_gap_is_a_share_of_what_reuse_costs() -> None:
    assert gap_recovered(0.2, 0.2, 1.0) == 0.0
    assert gap_recovered(1.0, 0.2, 1.0) == 1.0
    assert gap_recovered(0.6, 0.2, 1.0) == pytest.approx(0.5)
    assert gap_recovered(0.1, 0.2, 1.0) == pytest.approx(-0.125)
    assert gap_recovered(0.9, 0.9, 0.9) is None


def test_the_interval_of_a_gap_holds_its_value_and_is_wider_for_answers_in_clumps() -> None:
    draw = random.Random(3)
    method = [draw.random() < 0.6 for _ in range(200)]
    none, full = [False] * 200, [True] * 200
    alone = gap_interval(range(200), method, none, full)
    clumped = [at // 10 % 2 == 0 for at in range(200)]
    together = gap_interval([at // 10 for at in range(200)], clumped, none, full)
    apart = gap_interval(range(200), clumped, none, full)
    assert alone is not None and together is not None and apart is not None
    assert alone[0] < sum(method) / 200 < alone[1]
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_no_interval_where_there_may_be_no_gap() -> None:
    same = [True, False] * 10
    assert gap_interval(range(20), same, same, same) is None
    with pytest.raises(ValueError, match="no answers"):
        gap_interval([], [], [], [])
