"""The quality floor as a state machine: samples in, ratios out."""

from __future__ import annotations

import random

from kvlite.agreement import FLOORS_LIMIT, SAMPLES_MIN, WINDOW, AgreementMonitor

KEY = ("query", 0.15)


def feed(monitor: AgreementMonitor, equal: bool, count: int) -> None:
    for _ in range(count):
        monitor.record(*KEY, equal, 0.1)


def test_without_a_floor_nothing_is_sampled_and_everything_is_done_as_asked() -> None:
    monitor = AgreementMonitor(None, 1.0)
    decisions = [monitor.decide(*KEY) for _ in range(10)]
    assert {(one.ratio, one.sampled, one.fallback) for one in decisions} == {(0.15, False, None)}


def test_every_nth_request_is_sampled_and_the_first_is() -> None:
    monitor = AgreementMonitor(0.5, 0.25)
    assert [monitor.decide(*KEY).sampled for _ in range(9)] == [True, False, False, False] * 2 + [True]


def test_below_the_floor_the_ratio_doubles_twice_and_then_the_request_is_exact() -> None:
    monitor = AgreementMonitor(0.9, 1.0)
    seen = []
    for _ in range(4):
        seen.append(monitor.decide(*KEY).ratio)
        feed(monitor, False, SAMPLES_MIN)
    assert seen == [0.15, 0.3, 0.6, None]
    last = monitor.decide(*KEY)
    assert last.ratio is None and last.fallback is not None
    assert "agreement 0.00 is below min_agreement=0.9: computed exactly" in last.fallback


def test_fewer_samples_than_the_minimum_change_nothing() -> None:
    monitor = AgreementMonitor(0.9, 1.0)
    feed(monitor, False, SAMPLES_MIN - 1)
    assert monitor.decide(*KEY).ratio == 0.15


def test_good_windows_bring_it_back_and_each_relapse_takes_longer() -> None:
    monitor = AgreementMonitor(0.9, 1.0)
    waits: list[int] = []
    for _ in range(3):
        feed(monitor, False, SAMPLES_MIN)
        assert monitor.decide(*KEY).ratio == 0.3
        wait = 0
        while monitor.decide(*KEY).ratio != 0.15:
            feed(monitor, True, 1)
            wait += 1
        waits.append(wait)
    assert waits == [2 * WINDOW, 4 * WINDOW, 8 * WINDOW]


def test_a_floor_of_zero_measures_and_never_interferes() -> None:
    monitor = AgreementMonitor(0.0, 1.0)
    feed(monitor, False, 500)
    monitor.record(*KEY, True, 0.3)
    assert monitor.decide(*KEY).ratio == 0.15
    assert (monitor.num_samples, monitor.num_fallbacks) == (501, 0)
    assert monitor.agreement == 1 / 501 and monitor.kl_divergence is not None


def test_one_methods_failure_is_not_anothers() -> None:
    monitor = AgreementMonitor(0.9, 1.0)
    for _ in range(SAMPLES_MIN):
        monitor.record("none", 0.0, False, 2.0)
    assert monitor.decide("none", 0.0).ratio is None, "doubling nothing helps nobody"
    assert monitor.decide(*KEY).ratio == 0.15


def test_a_level_is_always_one_of_the_steps_and_memory_is_bounded() -> None:
    draw = random.Random(3)
    monitor = AgreementMonitor(0.8, 0.5)
    for n in range(3000):
        ratio = draw.choice([0.1, 0.4, 0.7, n / 3000])
        decision = monitor.decide("query", ratio)
        assert decision.ratio in (None, ratio, min(2 * ratio, 1.0), min(4 * ratio, 1.0))
        assert (decision.ratio == ratio) == (decision.fallback is None) or ratio in (0.0, 1.0)
        monitor.record("query", ratio, draw.random() < 0.5, 0.0)
    assert len(monitor._floors) <= FLOORS_LIMIT
