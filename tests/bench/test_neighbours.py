"""Slow-downs out of times of tokens: which steps belong to a move, and what each of them is compared with."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from bench.neighbours import Slowed, Times, slow_down, slowed

AT = Times(since=0.0, ordered=4.0, left=8.0, landed=10.0, over=10.0, until=14.0)


def arrivals(*steps: float) -> list[float]:
    return list(accumulate(steps, initial=0.0))


def test_steps_at_the_source_are_compared_with_the_request_until_its_last_token_and_without_it_behind() -> None:
    times = arrivals(*[1.0] * 4, *[1.5] * 2, 1.0, *[0.5] * 4, 1.0, *[0.25] * 8)
    assert times[7] == AT.left and times[11] == AT.landed
    found = slowed(times, AT, stays_at_source=True)
    assert found == Slowed(took_s=6.0, expected_s=3 * 1.0 + 4 * (1.0 + 8 * 0.25) / 9)


def test_steps_at_the_destination_are_compared_without_the_request_until_its_first_token_there() -> None:
    times = arrivals(*[0.5] * 8, *[1.0] * 4, 2.0, *[1.0] * 4)
    assert times[8] == AT.ordered and times[13] == AT.landed
    assert slowed(times, AT, stays_at_source=False) == Slowed(took_s=6.0, expected_s=4 * 0.5 + 1.0)


def test_a_larger_batch_is_no_slow_down() -> None:
    at_source = slowed(arrivals(*[1.0] * 8, *[0.5] * 12), AT, stays_at_source=True)
    at_destination = slowed(arrivals(*[0.5] * 18, *[1.0] * 6), AT, stays_at_source=False)
    assert at_source == Slowed(6.0, 4 * 1.0 + 4 * 0.5)
    assert slow_down([[at_source, at_destination]], random.Random(1))[0] == 0.0


def test_a_slow_down_is_weighed_by_time_and_its_interval_holds_it() -> None:
    moves = [[Slowed(3.3, 3.0), Slowed(2.0, 2.0)], [Slowed(1.3, 1.0)]]
    slow, low, high = slow_down(moves, random.Random(1))
    assert slow == pytest.approx((3.3 + 2.0 + 1.3) / 6.0 - 1)
    assert low <= slow <= high
    same, low, high = slow_down([[Slowed(4.0, 4.0)]] * 5, random.Random(1))
    assert same == low == high == 0.0
